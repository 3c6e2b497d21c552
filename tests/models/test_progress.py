"""Signs of life, and the options of the command that say how tokens are taken."""

import io

import pytest

from hisa_jax import models
from hisa_jax.__main__ import main
from hisa_jax.models import progress as module
from hisa_jax.models.progress import Progress

from . import golden


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_a_line_now_and_then_and_on_a_terminal_one_that_changes(monkeypatch):
    clock = iter(range(0, 100, 2))
    monkeypatch.setattr(module.time, "perf_counter", lambda: next(clock))
    for stream, want in (
        (io.StringIO(), "reading: 0 of 6\nreading: 3 of 6\nreading, 12.0 s\n"),
        (Terminal(), "".join(f"\r\x1b[Kreading: {i} of 6" for i in range(6)) + "\r\x1b[Kreading, 12.0 s\n"),
    ):
        told = Progress(stream)
        for done in range(7):
            told("reading", done, 6)
        assert stream.getvalue() == want


@pytest.mark.exhaustive
def test_the_command_takes_tokens_as_its_options_say_and_shows_signs_of_life(capsys):
    how = models.Sampling(max_tokens=6, temperature=0.9, top_p=0.9, top_k=40, min_p=0.01, seed=4, logprobs=1)
    folder = golden.FOLDER / "glm5"
    made = models.generate(models.from_pretrained(folder), ["HISA"], sampling=how, chunk=16)
    given = dict(max_tokens=6, temperature=0.9, top_p=0.9, top_k=40, min_p=0.01, seed=4, logprobs=1, dtype="float32")
    options = [part for name, value in given.items() for part in (f"--{name.replace('_', '-')}", str(value))]
    assert main(["generate", "--checkpoint", str(folder), "--prompt", "HISA", "--chunk", "16", *options]) == 0
    out, err = capsys.readouterr()
    assert out == made.texts[0] + "\n"
    assert "reading parameters: 0 of " in err and "reading prompts" in err and "making tokens" in err
    shown = [line.split() for line in err.splitlines()]
    for one in made.logprobs[0]:
        assert [str(one.token), f"{one.logprob:.3f}"] in [line[:2] for line in shown]
    stop = made.texts[0][2:4]
    arguments = ["generate", "--checkpoint", str(folder), "--prompt", "HISA", "--chunk", "16", "--stop", stop, *options]
    assert main(arguments) == 0
    assert capsys.readouterr().out == made.texts[0][: made.texts[0].index(stop)] + "\n"
