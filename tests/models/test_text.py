"""Text as it comes: whole characters, nothing of a stop text, whatever the borders of tokens are. No model."""

import functools

import hypothesis
import hypothesis.strategies as st
import pytest

from hisa_jax.models.text import Text
from hisa_jax.models.tokens import Bytes, FromFile

HARD = "a\u00e9\u20ac\U0001f600 \n.\ufffd"


@functools.cache
def tokenizer(kind):
    """Of one of the families of decoders; with tokens of single bytes, so that characters come in parts."""
    if kind == "bytes":
        return Bytes(300)
    tokenizers = pytest.importorskip("tokenizers")
    import tempfile
    from pathlib import Path

    if kind == "byte-level":
        letters = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
        made = tokenizers.Tokenizer(tokenizers.models.BPE({letter: i for i, letter in enumerate(letters)}, []))
        made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
        made.decoder = tokenizers.decoders.ByteLevel()
    else:  # as SentencePiece: a space before the first word, which the decoder takes away
        vocabulary = {"<unk>": 0, "\u2581": 1, "a": 2, "\u2581a": 3, ".": 4}
        vocabulary |= {f"<0x{byte:02X}>": 5 + byte for byte in range(256)}
        made = tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary, [], unk_token="<unk>", byte_fallback=True))
        decoders = tokenizers.decoders
        made.decoder = decoders.Sequence(
            [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
        )
    made.add_special_tokens(["<end>"])
    with tempfile.TemporaryDirectory() as folder:
        made.save(str(Path(folder) / "tokenizer.json"))
        return FromFile(Path(folder) / "tokenizer.json")


def pieces(tokens, kind, stop=()):
    """The text that each token settled, then the rest."""
    text, parts = Text(tokenizer=tokenizer(kind), stop=stop), []
    for token in tokens:
        text = text.read(token)
        parts.append(text.new)
        if text.is_stopped:
            break
    return [*parts, text.end()]


KINDS = ["bytes", "byte-level", "fallback"]


@pytest.mark.parametrize("kind", KINDS)
@hypothesis.given(text=st.text(st.sampled_from(HARD), max_size=12))
def test_pieces_are_whole_characters_and_joined_the_text(kind, text):
    tokens = tokenizer(kind).encode(text)
    parts = pieces(tokens, kind)
    whole = tokenizer(kind).decode(tokens)
    assert "".join(parts) == whole
    if kind != "fallback":
        assert whole == text and "".join(parts).count("\ufffd") == text.count("\ufffd")


# A fallback to bytes decodes a run of them as a whole: an invalid one changes the text of those before it.
@pytest.mark.parametrize("kind", KINDS[:2])
@hypothesis.given(tokens=st.lists(st.integers(0, 255), max_size=20))
def test_pieces_of_any_tokens_joined_are_what_they_decode_to(kind, tokens):
    assert "".join(pieces(tokens, kind)) == tokenizer(kind).decode(tokens)


@pytest.mark.parametrize("n", [0, 1, 2, 3])
def test_text_that_is_none_comes_in_pieces_without_half_a_character(n):
    """Else each token would cost as much as all before it."""
    tokens = [0xFF] * 200 + [*"\U0001f600".encode()][:n] + [0xFF] * 70 + [*"\U0001f600 ".encode()]
    parts = pieces(tokens, "bytes")
    assert "".join(parts) == bytes(tokens).decode(errors="replace") and sum(map(bool, parts)) > 3


@pytest.mark.parametrize("kind", KINDS)
@hypothesis.given(
    text=st.text(st.sampled_from("ab\u00e9"), max_size=14),
    stop=st.lists(st.text(st.sampled_from("ab\u00e9"), min_size=1, max_size=4), min_size=1, max_size=3),
)
def test_a_stop_text_ends_it_where_it_is_complete_whatever_the_tokens_are(kind, text, stop):
    tokens = tokenizer(kind).encode(text)
    text = tokenizer(kind).decode(tokens)
    ends = [(end, end - len(one)) for one in stop for end in range(len(text) + 1) if text[:end].endswith(one)]
    want = text[: min(ends)[1]] if ends else text
    parts = pieces(tokens, kind, tuple(stop))
    assert "".join(parts) == want
    sent = ""
    for part in parts[:-1]:  # nothing was sent that a stop text might take back
        sent += part
        assert want.startswith(sent)


def test_of_two_stop_texts_in_one_token_the_one_that_is_complete_first_counts():
    class Words:
        def decode(self, tokens):
            return "".join("xabcd" for _ in tokens)

    for stop, want in ((("abcd", "bc"), "xa"), (("bc", "abcd"), "xa"), (("abc", "bc"), "x")):
        text = Text(tokenizer=Words(), stop=stop).read(0)
        assert text.is_stopped and text.new == want and text.end() == ""


def test_special_tokens_have_no_text_and_stop_nothing():
    end = tokenizer("byte-level").tokenizer.token_to_id("<end>")
    tokens = tokenizer("byte-level").encode("ab")
    assert "".join(pieces([tokens[0], *[end] * 200, tokens[1]], "byte-level", ("ab",))) == ""
    assert "".join(pieces([tokens[0], *[end] * 200], "byte-level", ("ab",))) == "a"
