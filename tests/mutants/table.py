"""The mistakes that tests must notice: read from the tables, made in a tree."""

import dataclasses
import functools
import pathlib
import tomllib

TABLES = sorted(pathlib.Path(__file__).parent.glob("*.toml"))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Mutant:
    """A mistake in one line.

    Attributes:
        breaks: what goes wrong, in a phrase.
        file: from the root of the repository.
        before: a part of a line, which the file has once, or `nth` counts from 1; `after`: what becomes of it.
        test: node id of the test that must fail of it.
    """

    breaks: str
    file: str
    before: str
    after: str
    test: str
    nth: int | None = None

    def applied(self, text: str) -> str:
        """The file's text with the mistake. Raises LookupError: `before` is not there, or nobody knows which it is."""
        found = text.count(self.before)
        if found == 0 or (self.nth is None and found > 1) or (self.nth or 1) > found:
            wanted = "once" if self.nth is None else f"{self.nth} times"
            raise LookupError(f"{self.file} has {self.before!r} {found} times, wanted {wanted}: {self.breaks}")
        at = -1
        for _ in range(self.nth or 1):
            at = text.index(self.before, at + 1)
        return text[:at] + self.after + text[at + len(self.before) :]


@functools.cache
def read() -> list[Mutant]:
    """All of them, file by file."""
    return [Mutant(**row) for table in TABLES for row in tomllib.loads(table.read_text())["mutant"]]
