"""What a job is: a process that measures rows and writes each into a result file as soon as it is measured."""

import dataclasses
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

_PATIENCE_S = 60.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Figure:
    """A row of a result file.

    Attributes:
        name: as the command's `--rows` takes it, if it has that option.
        fields: what the row in the file has and no other row.
        seconds: that measuring it takes, about.
    """

    name: str
    fields: Mapping[str, Any]
    seconds: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class Job:
    """One process, and all that is known of it before it runs.

    Attributes:
        name: kind:what.
        arguments: of Python, without those that name rows and file.
        figures: the rows that it measures, in this order.
        file: of the folder of results.
        code: what the figures are of, as git's pathspecs.
        gpus: how many it takes.
        start_s: seconds until it measures, about.
        takes_rows: the command has the option `--rows`, so that some of the figures can be measured alone.
        file_option: the option that names the file.
        environment: variables besides those that all jobs have.
        is_rest: rows that another process of it did not come to.
    """

    name: str
    arguments: tuple[str, ...]
    figures: tuple[Figure, ...]
    file: str
    code: tuple[str, ...]
    gpus: int = 1
    start_s: float = 25.0
    takes_rows: bool = True
    file_option: str | None = "--json"
    environment: Mapping[str, str] = dataclasses.field(default_factory=dict)
    is_rest: bool = False

    @property
    def kind(self) -> str:
        return self.name.split(":")[0]

    @property
    def seconds(self) -> float:
        """That it takes, about."""
        return self.start_s + sum(figure.seconds for figure in self.figures)

    @property
    def patience_s(self) -> float:
        """Seconds without a line of output after which it counts as hung: a line comes with each row."""
        return _PATIENCE_S + self.start_s + 3 * max((figure.seconds for figure in self.figures), default=0.0)

    def command(self, results: Path) -> list[str]:
        rows = ["--rows", *(figure.name for figure in self.figures)] if self.takes_rows else []
        file = [] if self.file_option is None else [self.file_option, str(results / self.file)]
        return [sys.executable, *self.arguments, *rows, *file]

    def of(self, figures: tuple[Figure, ...]) -> "Job":
        """The same with these figures alone."""
        return dataclasses.replace(self, figures=figures)

    def within(self, seconds: float) -> "Job | None":
        """What of it ends in this time: all, or the first rows if it takes rows; None: nothing does."""
        if self.seconds <= seconds:
            return self
        figures, needed = list[Figure](), self.start_s
        for figure in self.figures if self.takes_rows else ():
            needed += figure.seconds
            if needed > seconds:
                break
            figures.append(figure)
        return self.of(tuple(figures)) if figures else None
