"""The tables of the quality report, made of its rows alone: for its page, notes/quality_bytes.md and the screen."""

import dataclasses
from collections.abc import Iterable, Sequence
from typing import Any

from bench import shapes
from bench.quality.variants import BLOCK_SPARSE, FLAT, HISA, HISA_AWARE, SCAN
from hisa_jax.models.evaluate import statistics

Row = dict[str, Any]
METHODS = (FLAT, HISA, SCAN, BLOCK_SPARSE)
OTHERS = METHODS[1:]
NONE = "-"
NEEDLE_WANTED, MULTIKEY_WANTED = 0.95, 0.85


@dataclasses.dataclass(frozen=True)
class Table:
    """A title, columns and rows of text; the title ends without a full stop."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]

    def markdown(self) -> str:
        lines = [self.columns, ("---",) + ("--:",) * (len(self.columns) - 1), *self.rows]
        return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def find(rows: Iterable[Row], **wanted: Any) -> list[Row]:
    """Rows whose fields have these values."""
    return [row for row in rows if all(row.get(name) == value for name, value in wanted.items())]


def contexts(rows: Iterable[Row], *parts: str) -> list[int]:
    return sorted({row["context"] for row in rows if row["part"] in parts})


def pooled(rows: Sequence[Row]) -> Row | None:
    """Accuracy over several rows, None where there are none."""
    n = sum(row["n"] for row in rows)
    return statistics.share(sum(row["right"] for row in rows), n) if n else None


def excess(rows: Sequence[Row], method: str, **wanted: Any) -> tuple[float, float, float] | None:
    """Bits a byte more than the flat indexer's, window by window: mean and 95 % interval."""
    own, flat = find(rows, method=method, **wanted), find(rows, method=FLAT, **wanted)
    # Paired by window: the spread between texts is larger than what methods differ by.
    own, flat = ([row for row in some if "by_window" in row] for some in (own, flat))
    if not own or not flat:
        return None
    return statistics.mean([a - b for a, b in zip(own[0]["by_window"], flat[0]["by_window"], strict=True)])


def averaged(rows: Sequence[Row], **wanted: Any) -> float | None:
    """The mean over layers of a measure."""
    found = find(rows, **wanted)
    return sum(row["mean"] for row in found) / len(found) if found else None


def worst(rows: Sequence[Row], part: str) -> tuple[int, Row] | None:
    """The flat model's context with the lowest accuracy."""
    found = [(context, pooled(find(rows, part=part, method=FLAT, context=context))) for context in contexts(rows, part)]
    # Contexts at which this part was not measured say nothing.
    measured = [(context, share) for context, share in found if share is not None]
    return min(measured, key=lambda pair: pair[1]["accuracy"]) if measured else None


def all_tables(data: dict[str, Any]) -> list[Table]:
    """All of them, the verdict first; those that have no rows are left out."""
    rows, candidates = data["rows"], data["candidates"]
    made = [
        thresholds(rows), verdict(rows, candidates), needles(rows), multikey(rows), tasks(rows), bits(rows),
        *(layers(rows, queries) for queries in ("text", "retrieval")), overlaps(rows),
        variants(rows, "scans", "Variants of the scan: 4 k candidates and 4 exact heads unless said"),
        ablations(rows, data["hisa_aware"]),
    ]  # fmt: skip
    return [table for table in made if table.rows]


def thresholds(rows: Sequence[Row]) -> Table:
    found = []
    for part, name, wanted in (
        ("needle", "single needle", NEEDLE_WANTED), ("multikey", "multi-key", MULTIKEY_WANTED),
    ):  # fmt: skip
        lowest = worst(rows, part)
        if lowest is None:
            continue
        context, share = lowest
        measured = f"{shapes.label(contexts(rows, part)[0])} to {shapes.label(contexts(rows, part)[-1])}"
        passed = "pass" if share["accuracy"] >= wanted else "FAIL"
        found.append((name, percent(wanted), measured, _share(share), shapes.label(context), passed))
    return Table(
        "Is the flat model good enough to compare with",
        ("task", "wanted", "contexts", "accuracy at its worst", "which is at", "verdict"),
        tuple(found),
    )


def verdict(rows: Sequence[Row], candidates: int) -> Table:
    """One line a context: what is kept, what is lost."""
    found = []
    for context in contexts(rows, "needle", "multikey", "tasks", "bits", "layers"):
        here = find(rows, context=context)
        cells = [f"{shapes.label(context)}, {context / candidates:g}"]
        for part in ("needle", "multikey", "tasks"):
            shares = [pooled(find(here, part=part, method=method)) for method in METHODS]
            cells.append(" / ".join(NONE if share is None else percent(share["accuracy"]) for share in shares))
        whole = dict(part="bits", first=0, end=context)
        cells.append(" / ".join(_signed(excess(here, method, **whole)) for method in OTHERS))
        for queries, measure in (("text", "recall"), ("retrieval", "recall"), ("retrieval", "mass")):
            of = [averaged(here, part="layers", method=m, queries=queries, measure=measure) for m in OTHERS]
            cells.append(" / ".join(NONE if x is None else percent(x) for x in of))
        found.append(tuple(cells))
    columns = (
        "context, context/(m B)", "needle F / H / S / B", "multi-key F / H / S / B", "other tasks F / H / S / B",
        "bits a byte more than flat H / S / B", "recall, text H / S / B", "recall, retrieval H / S / B",
        "mass, retrieval H / S / B",
    )  # fmt: skip
    return Table("What is kept, what is lost: flat (F), HISA (H), scan (S), block-sparse (B)", columns, tuple(found))


def needles(rows: Sequence[Row]) -> Table:
    found = []
    for context in contexts(rows, "needle"):
        for method in METHODS:
            share = pooled(find(rows, part="needle", context=context, method=method))
            if share is not None:
                found.append((shapes.label(context), method, _share(share)))
    return Table("Single needle, all depths", ("context", "method", "exact answers"), tuple(found))


def multikey(rows: Sequence[Row]) -> Table:
    keys = sorted({row["n_keys"] for row in rows if row["part"] == "multikey"})
    return _by_task("Multi-key needles", "multikey", "n_keys", keys, [f"{n} keys" for n in keys], rows)


def tasks(rows: Sequence[Row]) -> Table:
    names = sorted({row["task"] for row in rows if row["part"] == "tasks"})
    return _by_task("Other tasks", "tasks", "task", names, names, rows)


def _by_task(
    title: str, part: str, field: str, values: Sequence[Any], names: Sequence[str], rows: Sequence[Row]
) -> Table:
    found = []
    for context in contexts(rows, part):
        for method in METHODS:
            own = find(rows, part=part, context=context, method=method)
            if own:
                shares = (pooled(find(own, **{field: value})) for value in values)
                found.append((shapes.label(context), method, *(NONE if s is None else _share(s) for s in shares)))
    return Table(title, ("context", "method", *names), tuple(found))


def bits(rows: Sequence[Row]) -> Table:
    found = []
    for context in contexts(rows, "bits"):
        for flat in find(rows, part="bits", context=context, method=FLAT):
            # A context has a row for all of its positions and one for each part of them.
            if (flat["first"], flat["end"]) == (0, context):
                name = "all"
            else:
                name = f"{shapes.label(flat['first']) if flat['first'] else 0} to {shapes.label(flat['end'])}"
            where = dict(part="bits", context=context, first=flat["first"], end=flat["end"])
            others = (_interval(excess(rows, method, **where), "+.4f") for method in OTHERS)
            found.append((shapes.label(context), name, f"{flat['bits']:.4f}", *others, str(flat["n"])))
    columns = ("context", "positions", "flat, bits a byte", *(f"{method} more" for method in OTHERS), "windows")
    return Table("Held-out text", columns, tuple(found))


def layers(rows: Sequence[Row], queries: str) -> Table:
    found = []
    for context in contexts(rows, "layers"):
        own = find(rows, part="layers", context=context, queries=queries)
        for method in OTHERS:
            of_method = find(own, method=method)
            for layer in sorted({row["layer"] for row in of_method}):
                cells = []
                for measure in ("recall", "iou", "mass", "needle_bytes"):
                    for row in find(of_method, layer=layer, measure=measure):
                        cells.append(_interval((row["mean"], row["low"], row["high"]), ".3f"))
                        if measure == "needle_bytes":
                            (flat,) = find(own, method=FLAT, layer=layer, measure=measure)
                            cells[-1] += f" of {flat['mean']:.3f}"
                found.append((shapes.label(context), method, str(layer), *cells, str(_n_queries(of_method, layer))))
    columns = ["context", "method", "layer", "recall", "IoU", "score mass", "queries"]
    if queries == "retrieval":
        columns.insert(6, "needle's bytes kept, of flat's")
    return Table(f"Selections of {queries} queries against the flat ones", tuple(columns), tuple(found))


def _n_queries(rows: Sequence[Row], layer: int) -> int:
    """Queries that a layer's recall is the mean of."""
    return find(rows, layer=layer, measure="recall")[0]["n"]


def overlaps(rows: Sequence[Row]) -> Table:
    found = []
    for context in contexts(rows, "layers"):
        for method in METHODS:
            means = [
                averaged(rows, part="layers", context=context, method=method, measure=measure)
                for measure in ("next_query_iou", "last_layer_iou")
            ]
            if means[0] is not None:
                cells = (NONE if mean is None else f"{mean:.3f}" for mean in means)
                found.append((shapes.label(context), method, *cells))
    columns = ("context", "method", "of adjacent queries", "of adjacent layers")
    return Table("Overlap (IoU) of selections, mean over layers, queries of text", columns, tuple(found))


def ablations(rows: Sequence[Row], hisa_aware: str) -> Table:
    """A line a variant; `hisa_aware` says why the indexer trained under HISA has none, if it has none."""
    made = variants(rows, "ablations", "Ablations of HISA")
    missing = tuple(
        (shapes.label(context), HISA_AWARE, hisa_aware, *[NONE] * 4)
        for context in contexts(rows, "ablations")
        if not find(rows, part="ablations", context=context, method=HISA_AWARE)
    )
    return dataclasses.replace(made, rows=made.rows + missing)


def variants(rows: Sequence[Row], part: str, title: str) -> Table:
    """A line a variant of a method."""
    found = []
    for context in contexts(rows, part):
        own = find(rows, part=part, context=context)
        for method in variants_in(own):
            share = pooled(find(own, method=method, task="multikey"))
            means = [
                averaged(own, method=method, queries=queries, measure=measure)
                for queries, measure in (("text", "recall"), ("retrieval", "recall"), ("retrieval", "mass"))
            ]
            found.append((
                shapes.label(context), method, NONE if share is None else _share(share),
                NONE if method == FLAT else _interval(excess(own, method), "+.4f"),
                *(NONE if mean is None else f"{mean:.3f}" for mean in means),
            ))  # fmt: skip
    columns = (
        "context", "variant", "multi-key", "bits a byte more than flat", "recall, text", "recall, retrieval",
        "score mass, retrieval",
    )  # fmt: skip
    return Table(title, columns, tuple(found))


def variants_in(rows: Sequence[Row]) -> list[str]:
    """Their names in order, the flat one first."""
    return sorted(dict.fromkeys(row["method"] for row in rows), key=lambda name: name != FLAT)


def percent(share: float) -> str:
    return f"{100 * share:.1f} %"


def _share(row: Row) -> str:
    return f"{percent(row['accuracy'])} ({100 * row['low']:.0f}-{100 * row['high']:.0f}, n = {row['n']})"


def _signed(interval: tuple[float, float, float] | None) -> str:
    return NONE if interval is None else f"{interval[0]:+.4f}"


def _interval(interval: tuple[float, float, float] | None, form: str) -> str:
    if interval is None:
        return NONE
    middle, _, high = interval
    # One window or query has no interval: the JSON holds null.
    bounds = "" if high is None or high != high else f" ± {high - middle:.4f}"
    return f"{middle:{form}}{bounds}"
