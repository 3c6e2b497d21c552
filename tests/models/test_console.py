"""hisa-jax: every command says what it takes, with an example; what it lacks or refuses is an error of one line."""

import argparse
import io
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

import hisa_jax.__main__ as console
from bench import __main__ as bench
from hisa_jax import checkout, models
from hisa_jax.__main__ import COMMANDS, main
from hisa_jax.models.tokens import Bytes

from . import golden

ROOT = Path(__file__).parents[2]
PROGRAMS = {"hisa-jax": (main, COMMANDS), "python -m bench": (bench.main, bench.COMMANDS)}


@pytest.mark.parametrize(
    ("program", "command"), [(program, name) for program, (_, names) in PROGRAMS.items() for name in names]
)
def test_every_command_has_help_with_an_example_that_it_takes(program, command, capsys, monkeypatch):
    run, commands = PROGRAMS[program]
    with pytest.raises(SystemExit) as ended:
        run([command, "--help"])
    shown = capsys.readouterr().out
    assert ended.value.code == 0 and f"{program} {command}" in shown.splitlines()[0]
    example = re.search(rf"\nexample:\n  (?:echo .* \| )?({program} {command}.*)\n", shown)[1]
    parsed = []
    parse = argparse.ArgumentParser.parse_args

    def parse_only(parser, arguments):
        options = parse(parser, arguments)
        options.run = parsed.append
        return options

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse_only)
    assert commands[command].example.splitlines()[0].endswith(example)
    assert not run(shlex.split(example.removeprefix(program))) and len(parsed) == 1


def test_an_error_is_one_line(tmp_path, capsys):
    assert main(["generate", "--checkpoint", str(tmp_path), "--prompt", "a"]) == 1
    said = capsys.readouterr()
    assert said.out == "" and said.err.startswith("error: ") and said.err.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--block-size", "64"], "--block-size 64: the checkpoint's own indexer, dsa, has none, --indexer hisa or bl"),
        (
            ["--block-size", "64", "--indexer", "scan"],
            "--block-size 64: --indexer scan has none, --indexer hisa or block-",
        ),
        (
            ["--unit", "2", "--indexer", "hisa"],
            "--unit 2: --indexer hisa has none, --indexer scan has$",
        ),
        (["--topk", "8", "--indexer", "layers.json"], "--topk: --indexer layers.json is a file, which says all that "),
        (["--indexer", "flat"], "--indexer is flat, wanted one of dsa, hisa, scan, block-sparse or a file"),
        (["--candidates", "1", "--indexer", "scan"], r"--indexer: Scan\(candidates=1\)"),
        (["--temperature", "-1"], "Sampling: temperature=-1"),
        (["--chunk", "0"], "--chunk 0: wanted at least 1"),
    ],
)
@pytest.mark.parametrize("command", ["generate", "chat"])
def test_what_cannot_be_meant_as_it_was_typed_is_named_and_ends_with_2(command, arguments, message, capsys):
    prompt = ["--prompt", "a"] if command == "generate" else []
    assert main([command, "--checkpoint", str(ROOT / "models/bytes"), *prompt, *arguments]) == 2
    said = capsys.readouterr().err
    assert re.search(f"^error: {message}", said, re.MULTILINE) and said.count("\n") == 1


def test_the_modules_are_the_same_program(monkeypatch):
    import hisa_jax.models.__main__ as of_models

    assert of_models.main is main
    run = [sys.executable, "-m", "models", "check", "--checkpoint", "nowhere", "--text", "README.md"]
    done = subprocess.run([*run, "--queries", "0"], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (2, "error: --queries 0: wanted at least 1\n")
    assert main(run[3:]) == 1


def test_demo_and_bench_run_from_a_checkout_and_else_say_where_they_are(monkeypatch, capsys, tmp_path):
    calls = []
    monkeypatch.setattr(console.subprocess, "call", lambda command, env: calls.append((command, env)) or 3)
    assert main(["demo", "--help"]) == 3 and main(["bench", "memory", "--limit-gib", "1"]) == 3
    assert [command[-2:] for command, _ in calls] == [["demo", "--help"], ["--limit-gib", "1"]]
    assert all(env["PYTHONPATH"].split(":")[0] == str(ROOT) for _, env in calls)
    monkeypatch.setattr(checkout, "__file__", str(tmp_path / "site-packages/hisa_jax/checkout.py"))
    monkeypatch.chdir(tmp_path)
    assert main(["demo"]) == 1 and len(calls) == 2
    assert capsys.readouterr().err == (
        "error: demo and benches lie in the repository of hisa_jax, not in the wheel: clone it and run this in it\n"
    )
    monkeypatch.chdir(ROOT / "docs")
    assert main(["demo"]) == 3 and calls[-1][1]["PYTHONPATH"].split(":")[0] == str(ROOT)


def test_an_interrupt_is_no_traceback(monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(console.importlib, "import_module", interrupted)
    assert main(["generate"]) == 130


def test_chat_needs_a_template(tmp_path, capsys):
    folder = golden.FOLDER / "glm5"
    assert main(["chat", "--checkpoint", str(folder)]) == 1
    assert f"{folder}: has no chat template, as chat_template.jinja: generate continues" in capsys.readouterr().err


@pytest.mark.exhaustive
def test_chat_answers_each_line_with_all_that_was_said_and_leaves_out_what_has_no_room(tmp_path, capsys, monkeypatch):
    """It compiles an engine's programs: 10 s."""
    for file in (golden.FOLDER / "glm5").iterdir():
        (tmp_path / file.name).symlink_to(file)
    (tmp_path / "chat_template.jinja").write_text("{% for m in messages %}{{ m.content }}/{% endfor %}")
    monkeypatch.setattr("sys.stdin", io.StringIO("ABCDEF\n\n" + 99 * "X" + "\nGHI\n"))
    options = ["--max-new-tokens", "3", "--max-length", "64", "--chunk", "8", "--dtype", "float32", "--system", "S"]
    assert main(["chat", "--checkpoint", str(tmp_path), *options]) == 1
    said = capsys.readouterr()
    first, second = said.out.removesuffix("\n").split("\n", 1)
    model, prompts = golden.model("glm5"), ["S/ABCDEF/", f"S/ABCDEF/{first}/GHI/"]
    wanted = [models.generate(model, [list(prompt.encode())], 3).tokens[0] for prompt in prompts]
    assert [first, second] == [Bytes(101).decode(tokens) for tokens in wanted]
    assert "error: submit: " in said.err
