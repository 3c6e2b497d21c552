"""Text to tokens and back: by the checkpoint's tokenizer if it has one, else bytes."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol, TypeVar

from hisa_jax.checks import optional_packages
from hisa_jax.models.json_object import short

# The largest published ones have 20 MB.
_LARGEST_FILE = 128 * 2**20

_MOST_BYTES = 512  # a larger vocabulary is not one of bytes

Result = TypeVar("Result")


class Tokenizer(Protocol):
    """What generation needs of a tokenizer."""

    def encode(self, text: str, *, add_special: bool = True) -> list[int]:
        """Text -> tokens, with those that begin or end every prompt unless told."""

    def decode(self, tokens: Sequence[int]) -> str:
        """Tokens -> text."""


class Bytes:
    """Token i is byte i of UTF-8, for checkpoints without a tokenizer.

    Args:
        vocab_size: tokens the model knows.
    """

    def __init__(self, vocab_size: int):
        self.vocab_size = vocab_size

    def encode(self, text: str, *, add_special: bool = True) -> list[int]:
        """Text -> bytes; there are no special ones.

        Raises: ValueError: a byte beyond the vocabulary.
        """
        tokens = list(text.encode())
        for token in tokens:
            if token >= self.vocab_size:
                raise ValueError(f"prompt holds byte {token}, but the vocabulary has only {self.vocab_size} tokens")
        return tokens

    def decode(self, tokens: Sequence[int]) -> str:
        """Bytes -> text; tokens from 256 on are left out."""
        return bytes(token for token in tokens if token < 256).decode(errors="replace")


class FromFile:
    """The tokenizer of a tokenizer.json.

    Args:
        file: the tokenizer.json.

    Raises: MissingExtra: the package `tokenizers` is missing. ValueError: not a file that it can read.
    """

    def __init__(self, file: Path):
        with optional_packages():
            import tokenizers
        if not file.is_file():
            raise ValueError(f"{file}: is no file")
        if file.stat().st_size > _LARGEST_FILE:
            raise ValueError(f"{file}: has more than {_LARGEST_FILE} bytes, too many for a tokenizer")
        self.file = file
        self.tokenizer = self._call("not a tokenizer", lambda: tokenizers.Tokenizer.from_file(str(file)))
        # A prompt is encoded whole and as it is, whatever batches the file's writer had.
        self.tokenizer.no_padding()
        self.tokenizer.no_truncation()

    def encode(self, text: str, *, add_special: bool = True) -> list[int]:
        """Text -> tokens, special ones as the file's own template adds them, unless told.

        Raises: ValueError: a text that the tokenizer cannot encode.
        """
        return self._call(
            "cannot encode the prompt", lambda: self.tokenizer.encode(text, add_special_tokens=add_special).ids
        )

    def decode(self, tokens: Sequence[int]) -> str:
        """Tokens -> text, without special ones.

        Raises: ValueError: tokens that the tokenizer cannot decode.
        """
        return self._call("cannot decode the tokens", lambda: self.tokenizer.decode(list(tokens)))

    def _call(self, what: str, call: Callable[[], Result]) -> Result:
        try:
            return call()
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException as error:  # the package raises Exception, and its panics are not even that
            raise ValueError(f"{self.file}: {what}: {short(str(error))}") from error


def load_tokenizer(folder: str | Path, vocab_size: int) -> Tokenizer:
    """The folder's tokenizer.json if there is one, else bytes.

    Args:
        folder: of the checkpoint.
        vocab_size: tokens the model knows.

    Returns: a tokenizer.
    Raises: as `FromFile`, if there is a tokenizer.json. ValueError: there is none, and tokens are not bytes.
    """
    file = Path(folder) / "tokenizer.json"
    if not has_tokenizer(folder, vocab_size):
        raise ValueError(
            f"{folder}: has no tokenizer.json, wanted one, since its vocabulary of {vocab_size:,} tokens is not one of "
            "bytes"
        )
    return FromFile(file) if file.exists() else Bytes(vocab_size)


def has_tokenizer(folder: str | Path, vocab_size: int) -> bool:
    """Whether a folder has a tokenizer.json, or so few tokens that they are bytes."""
    return (Path(folder) / "tokenizer.json").exists() or vocab_size <= _MOST_BYTES
