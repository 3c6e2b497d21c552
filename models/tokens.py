"""Text to tokens and back: by the checkpoint's tokenizer if it has one, else bytes."""

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from models.json_object import short

# The largest published ones have 20 MB.
_LARGEST_FILE = 128 * 2**20


class Tokenizer(Protocol):
    """What generation needs of a tokenizer."""

    def encode(self, text: str) -> list[int]:
        """Text -> tokens."""

    def decode(self, tokens: Sequence[int]) -> str:
        """Tokens -> text."""


class Bytes:
    """Token i is byte i of UTF-8, for checkpoints without a tokenizer.

    Args:
        vocab_size: tokens the model knows.
    """

    def __init__(self, vocab_size: int):
        self.vocab_size = vocab_size

    def encode(self, text: str) -> list[int]:
        """Text -> bytes.

        Raises: ValueError: a byte beyond the vocabulary.
        """
        tokens = list(text.encode())
        for token in tokens:
            if token >= self.vocab_size:
                raise ValueError(f"prompt holds byte {token}, but the vocabulary has only {self.vocab_size} tokens")
        return tokens

    def decode(self, tokens: Sequence[int]) -> str:
        """Bytes -> text; tokens that are no byte are left out."""
        return bytes(token for token in tokens if token < 256).decode(errors="replace")


class FromFile:
    """The tokenizer of a tokenizer.json.

    Args:
        file: the tokenizer.json.

    Raises: ModuleNotFoundError: the package `tokenizers` is not installed. ValueError: not a file that it can read.
    """

    def __init__(self, file: Path):
        try:
            import tokenizers
        except ModuleNotFoundError as error:
            raise ModuleNotFoundError(f"{file} needs the package tokenizers: pip install tokenizers") from error
        if not file.is_file():
            raise ValueError(f"{file}: is no file")
        if file.stat().st_size > _LARGEST_FILE:
            raise ValueError(f"{file}: has more than {_LARGEST_FILE} bytes, too many for a tokenizer")
        try:
            self.tokenizer = tokenizers.Tokenizer.from_file(str(file))
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException as error:  # the package raises Exception, and its panics are not even that
            raise ValueError(f"{file}: not a tokenizer: {short(str(error))}") from error

    def encode(self, text: str) -> list[int]:
        """Text -> tokens, special ones as the file's own template adds them."""
        return self.tokenizer.encode(text).ids

    def decode(self, tokens: Sequence[int]) -> str:
        """Tokens -> text, without special ones."""
        return self.tokenizer.decode(list(tokens))


def load_tokenizer(folder: str | Path, vocab_size: int) -> Tokenizer:
    """The folder's tokenizer.json if there is one, else bytes.

    Args:
        folder: of the checkpoint.
        vocab_size: tokens the model knows.

    Returns: a tokenizer.
    Raises: as `FromFile`, if there is a tokenizer.json.
    """
    file = Path(folder) / "tokenizer.json"
    return FromFile(file) if file.exists() else Bytes(vocab_size)
