"""The quality report's work in cells, each kept in a file of its own: a long run cut short goes on where it ended."""

import dataclasses
import functools
import hashlib
import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from bench import UserError
from bench.quality.agreement import agreement_rows
from bench.quality.answers import bits_rows, most_keys, multikey_rows, multikey_samples, needle_rows, task_rows
from bench.quality.size import Size
from bench.quality.variants import HISA_AWARE, Variant
from bench.records import whole_file
from hisa_jax.models.training.text import Corpus
from hisa_jax.models.training.weights import Stacked

Row = dict[str, Any]
PARTS = ("bits", "needle", "multikey", "tasks", "layers", "scans", "ablations")


@dataclasses.dataclass(frozen=True)
class Cell:
    """One part of the report for one method, or for all, at one context."""

    part: str
    context: int
    method: str
    make: Callable[[], list[Row]]

    @property
    def name(self) -> str:
        """Of its file."""
        method = "".join(character if character.isalnum() else "_" for character in self.method)
        return f"{self.part}-{self.context}-{method}.json"


@dataclasses.dataclass(frozen=True)
class Plan:
    """What is to be measured.

    Attributes:
        main: flat, HISA, scan and block-sparse, the flat one first.
        ablations: variants of HISA; `scans`: of the scan.
        aware: the model with indexers trained under HISA, None if there is none.
    """

    stacked: Stacked
    aware: Stacked | None
    corpus: Corpus
    size: Size
    main: Sequence[Variant]
    ablations: Sequence[Variant]
    scans: Sequence[Variant]

    def cells(self, parts: Sequence[str], contexts: Sequence[int]) -> list[Cell]:
        """Short contexts first, so that what is cut short is the long ones."""
        made = []
        for context in sorted(contexts):
            for part in PARTS:
                if part in parts:
                    made += getattr(self, f"_{part}")(context)
        return made

    def _bits(self, context: int) -> list[Cell]:
        n = self.size.windows.get(context, 0)
        return self._each("bits", context, n, lambda v: bits_rows(self.stacked, self.corpus, v, context, n))

    def _needle(self, context: int) -> list[Cell]:
        n, depths = self.size.needles.get(context, 0), self.size.depths
        return self._each("needle", context, n, lambda v: needle_rows(self.stacked, self.corpus, v, context, depths, n))

    def _multikey(self, context: int) -> list[Cell]:
        n = self.size.multikey.get(context, 0)
        keys = self.size.keys
        return self._each(
            "multikey", context, n, lambda v: multikey_rows(self.stacked, self.corpus, v, context, n, keys)
        )

    def _tasks(self, context: int) -> list[Cell]:
        n = self.size.tasks.get(context, 0)
        return self._each("tasks", context, n, lambda v: task_rows(self.stacked, self.corpus, v, context, n))

    def _layers(self, context: int) -> list[Cell]:
        n = self.size.layers.get(context, 0)
        return [Cell("layers", context, "all", lambda: self._agreement(context, n, self.main))] if n else []

    def _scans(self, context: int) -> list[Cell]:
        return self._changed("scans", context, self.size.scans.get(context, 0), self.scans)

    def _ablations(self, context: int) -> list[Cell]:
        n = self.size.ablations.get(context, 0)
        cells = self._changed("ablations", context, n, self.ablations)
        if n and self.aware is not None:
            hisa = dataclasses.replace(self.ablations[0], name=HISA_AWARE)
            make = functools.partial(self._answers, self.aware, hisa, context, n)
            cells.append(Cell("ablations", context, HISA_AWARE, make))
        return cells

    def _changed(self, part: str, context: int, n: int, variants: Sequence[Variant]) -> list[Cell]:
        """Selections, answers and bits of variants of a method, and the flat indexer's answers and bits."""
        if not n:
            return []
        cells = [Cell(part, context, "all", lambda: self._agreement(context, n, variants))]
        for variant in (self.main[0], *variants):
            make = functools.partial(self._answers, self.stacked, variant, context, n)
            cells.append(Cell(part, context, variant.name, make))
        return cells

    def _answers(self, stacked: Stacked, variant: Variant, context: int, n: int) -> list[Row]:
        keys = multikey_rows(stacked, self.corpus, variant, context, n, [most_keys(context, self.size.keys)])
        return [*keys, *bits_rows(stacked, self.corpus, variant, context, n)[-1:]]

    def _agreement(self, context: int, n: int, variants: Sequence[Variant]) -> list[Row]:
        samples = multikey_samples(self.corpus, context, n, most_keys(context, self.size.keys))
        return agreement_rows(
            self.stacked, samples, self.main[0], variants, self.size.queries, self.main[0].method.topk
        )

    def _each(self, part: str, context: int, n: int, make: Callable[[Variant], list[Row]]) -> list[Cell]:
        if not n:
            return []
        return [Cell(part, context, variant.name, functools.partial(make, variant)) for variant in self.main]


class Folder:
    """Where rows of finished cells are kept, those of one run alone.

    Raises: UserError: it cannot be written to, or holds cells of another model, text or size.
    """

    def __init__(self, folder: Path, settings: dict[str, Any]):
        self.folder = folder / "parts"
        known = self.folder / "settings.json"
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            # Rows of two models or sizes must not be mixed in one report.
            if known.is_file() and json.loads(known.read_text()) != settings:
                raise UserError(f"--out {folder}: holds parts of a run with other settings, wanted another folder")
            known.write_text(json.dumps(settings, indent=1) + "\n")
        except (OSError, ValueError) as error:
            raise UserError(f"--out {folder}: cannot be written to: {error}") from error

    def known(self, cell: Cell) -> list[Row] | None:
        """A finished cell's rows."""
        file = self.folder / cell.name
        return json.loads(file.read_text())["rows"] if file.is_file() else None

    def seconds(self, cells: Sequence[Cell]) -> float:
        """What the finished ones among some cells took."""
        files = [self.folder / cell.name for cell in cells]
        return round(sum(json.loads(file.read_text())["seconds"] for file in files if file.is_file()), 1)

    def measure(self, cell: Cell) -> list[Row]:
        """Runs a cell and keeps its rows."""
        start = time.perf_counter()
        # A row that names its method itself comes of a cell for all of them.
        rows = [{"part": cell.part, "context": cell.context, "method": cell.method, **row} for row in cell.make()]
        done = {"seconds": round(time.perf_counter() - start, 1), "rows": rows}
        with whole_file(self.folder / cell.name) as file:
            file.write_text(json.dumps(done))
        return rows


def fingerprint(stacked: Stacked) -> str:
    """Of the weights, 16 hex digits."""
    digest = hashlib.sha256()
    for leaf in jax.tree.leaves(stacked):
        digest.update(np.ascontiguousarray(leaf).view(np.uint8))
    return digest.hexdigest()[:16]
