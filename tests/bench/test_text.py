"""Real text in."""

import hypothesis
import hypothesis.strategies as st
import pytest

from bench import UserError, text


@hypothesis.given(st.text())
@hypothesis.example("  a_1 = x**2 # ²\n\n\tb\r\n")
def test_tokens_joined_are_the_text(content):
    assert "".join(text.tokenize(content)) == content


def test_a_token_is_a_word_a_number_a_mark_or_white_space():
    assert text.tokenize("def f_1(x): return 42\n") == ["def", " f_1", "(", "x", ")", ":", " return", " 42", "\n"]


def test_the_standard_library_gives_as_many_tokens_as_are_needed_and_always_the_same():
    tokens = text.standard_library_tokens(3000)
    assert len(tokens) >= 3000
    assert tokens[:1000] == text.standard_library_tokens(1000)[:1000]


def test_bytes_that_are_no_utf8_do_not_stop_it(tmp_path):
    path = tmp_path / "latin"
    path.write_bytes("naïve words".encode("latin-1"))
    assert "".join(text.file_tokens(path, 1)) == "na\N{REPLACEMENT CHARACTER}ve words"


def test_the_standard_library_without_sources_says_so(tmp_path, monkeypatch):
    monkeypatch.setattr(text.sysconfig, "get_path", lambda name: str(tmp_path))
    (tmp_path / "bad.py").write_bytes(b"\xff")
    (tmp_path / "test").mkdir()
    (tmp_path / "test" / "skipped.py").write_text("not this")
    (tmp_path / "some.py").write_text("a b c")
    with pytest.raises(UserError, match=r"sources in .*: 3 tokens, wanted 4: give"):
        text.standard_library_tokens(4)
