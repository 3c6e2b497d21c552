"""hisa-jax: every command says what it takes; what a command lacks or refuses is an error of one line."""

import pytest

from hisa_jax.__main__ import COMMANDS, main


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help(command, capsys):
    with pytest.raises(SystemExit) as ended:
        main([command, "--help"])
    assert ended.value.code == 0 and f"hisa-jax {command}" in capsys.readouterr().out


def test_an_error_is_one_line(tmp_path, capsys):
    assert main(["generate", "--checkpoint", str(tmp_path), "--prompt", "a"]) == 2
    said = capsys.readouterr()
    assert said.out == "" and said.err.startswith("error: ") and said.err.count("\n") == 1
