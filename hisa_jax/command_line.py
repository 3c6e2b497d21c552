"""What the commands share: how one is named, errors in what was typed, the options of a method."""

import argparse
import dataclasses
from typing import Any, NamedTuple

from hisa_jax.methods import NAMES


class UsageError(ValueError):
    """What was typed cannot be meant so; the message names the option. The exit status is 2, of other errors 1."""


class Command(NamedTuple):
    """A command.

    Attributes:
        where: what it is made of, a module or module:function, imported when the command is called.
        description: for --help.
        example: that --help ends with.
    """

    where: str
    description: str
    example: str

    def add_to(self, commands: Any, name: str) -> argparse.ArgumentParser:
        """The parser of this command among others."""
        return commands.add_parser(
            name, help=self.description, description=self.description, epilog=f"example:\n  {self.example}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )  # fmt: skip


def demand_at_least(options: argparse.Namespace, **least: int) -> None:
    """Raises UsageError for an option that is given and smaller."""
    for name, wanted in least.items():
        value = getattr(options, name)
        if value is not None and value < wanted:
            raise UsageError(f"{_flag(name)} {value}: wanted at least {wanted}")


def given_fields(options: argparse.Namespace) -> dict[str, Any]:
    """The fields of methods that options give, an option a field of its name."""
    fields = sorted({field for name in NAMES for field in _fields(name)})
    return {field: value for field in fields if (value := getattr(options, field, None)) is not None}


def method_fields(options: argparse.Namespace, name: str, who: str) -> dict[str, Any]:
    """The fields of one method that options give.

    Args:
        options: parsed.
        name: of the method.
        who: what an error calls it.

    Raises: UsageError: an option for a field that the method does not have; it names the methods that do.
    """
    given = given_fields(options)
    for field, value in given.items():
        if field not in _fields(name):
            owners = " or ".join(owner for owner in NAMES if field in _fields(owner))
            raise UsageError(f"{_flag(field)} {value}: {who} has none, --indexer {owners} has")
    return given


def _fields(name: str) -> set[str]:
    return {field.name for field in dataclasses.fields(NAMES[name])}


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"
