"""The table of jobs: the commands that the GPU figures of README.md and docs/*.md come from, what is due first on top.

Seconds are guesses until a row has been measured once: a row says how long it took (`took_s`).
"""

import fnmatch
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from bench import shapes, sharded
from bench.gpu.row import NAMED, K, Row
from bench.gpu.rows import rows as gpu_rows
from bench.peers.compare import kind_of
from bench.renew.job import Figure, Job

# Files of kernels that rows of one kind alone run. A figure is older than the code if a file differs that its row may
# run; the rest of the library counts for all.
OF_ATTENTION = ("sparse_*",)
OF_SCAN = ("scan*", "sketch*", "slopes*", "list_best*", "list_tokens*", "list_bits*")
OF_SELECTION = (
    *OF_SCAN, "refine*", "merge*", "flat*", "scores*", "score_*", "topk*", "units*", "select_*", "listed_*",
    "pool_scores*", "kept_means*", "page_means*",
)  # fmt: skip
LIBRARY = (
    "kernels_pallas", "hisa_jax", ":!kernels_pallas/mosaic_tpu", ":!kernels_pallas/README.md",
    ":!hisa_jax/integrations", ":!hisa_jax/testing",
)  # fmt: skip
_SERVED = ("models", ":!models/README.md", ":!models/bytes", ":!models/training", ":!models/serve", ":!models/replay")


def _without(*names: str) -> tuple[str, ...]:
    """The library without kernels whose files have these names."""
    return (*LIBRARY, *(f":!kernels_pallas/{where}{name}" for name in names for where in ("", "*/")))


ATTENTION = _without(*OF_SELECTION)
FLAT_AND_HISA = _without(*OF_ATTENTION, *OF_SCAN)
SELECTION = _without(*OF_ATTENTION)


class Family(NamedTuple):
    """Rows of `python -m bench gpu` that one process measures: those whose text matches."""

    name: str
    patterns: tuple[str, ...]
    code: tuple[str, ...]
    file: str = "h200.json"


FIRST = (
    Family("flat", ("flat:*",), FLAT_AND_HISA),
    Family(
        "hisa", ("hisa:mosaic_gpu:*", "hisa_clustered:*", "refine_scores:*", "topk:*", "pool_and_block_filter:*"),
        FLAT_AND_HISA,
    ),
    Family("decode", ("decode*", "pool_and_block_filter_decode*", "append*"), FLAT_AND_HISA),
    Family("flat_decode", ("flat_decode*",), FLAT_AND_HISA),
    Family("scan", ("scan:mosaic_gpu:*", "scan_2_heads:*", "scan_4k:*"), SELECTION),
    Family("scan_decode", ("scan_decode*",), SELECTION),
    Family("sparse_mla", ("sparse_mla*:mosaic_gpu:*",), ATTENTION),
)  # fmt: skip
THEN = (
    Family("units", ("units*", "listed*", "hisa_budget:*", "hisa_ratio8:*"), SELECTION, "h200_limits.json"),
    Family("entries_qsa", ("entries*:qsa:*",), SELECTION, "entries.json"),
    Family("entries", ("entries*:glm53-flash:*",), SELECTION, "entries.json"),
    Family("scan_stages", ("scan_heads:*", "scan_samples:*", "scan_masks:*", "list_tokens:*", "refine_tokens:*"),
           SELECTION),
    Family("attention", ("attention*",), ATTENTION, "attention.json"),
    Family("triton", ("hisa:triton:*", "scan:triton:*", "sparse_mla*:triton:*"), LIBRARY),
)  # fmt: skip


def jobs(topk_library: Path | None = None) -> list[Job]:
    """All of them.

    Args:
        topk_library: sglang's top-k, which `python -m bench peers` measures beside ours (docs/peers.md).
    """
    rows = list(gpu_rows())
    first, then = ([_family(family, rows) for family in families] for families in (FIRST, THEN))
    return [*first, _sharded(), *_layer(), *_serve(), *then, _peers(topk_library, rows), _lighthouse()]


def _family(family: Family, rows: Iterable[Row]) -> Job:
    figures = [
        Figure(
            name=str(row), fields={name: getattr(row, name) for name in NAMED}, seconds=_seconds(row.context)
        )
        for row in rows
        if any(fnmatch.fnmatch(str(row), pattern) for pattern in family.patterns)
    ]  # fmt: skip
    return _job(f"gpu:{family.name}", ["gpu"], figures, family.file, family.code)


def _sharded() -> Job:
    figures = [
        Figure(
            name=row.row, fields={"row": row.row, "devices": list(row.devices)}, seconds=15 + 2 * _seconds(row.context)
        )
        for row in sharded.rows((2,))
    ]
    return _job("sharded:2", ["sharded", "--devices", "2"], figures, "sharded.json", LIBRARY, gpus=2)


def _layer() -> list[Job]:
    """A decoding step and a chunk of a prefill, by HISA and the flat indexer (docs/layers.md)."""
    sizes = {"decode32": ["--contexts", "--batches", "32"], "prefill": ["--contexts", str(128 * K), "--batches"]}
    found = []
    for phase, options in sizes.items():
        names = [f"dsv32 {phase} 128K {method}" for method in ("hisa", "dsa")]
        arguments = ["layer", "--models", "dsv32", *options, "--methods", "hisa", "dsa"]
        figures = [Figure(name=name, fields={"row": name}, seconds=60) for name in names]
        code = (*LIBRARY, *_SERVED)
        found.append(_job(f"layer:{phase}", arguments, figures, "layer.json", code, takes_rows=False))
    return found


def _serve() -> list[Job]:
    """The first token of long prompts on one GPU and on two; a method has a process (docs/long-contexts.md)."""
    contexts = [n * K for n in (32, 64, 128, 256, 512)]
    what = {"config": "deepseek-v3.2", "layers": 2, "attention_only": True, "chunk": 16 * K, "requests": 4}
    common = [
        "serve", "--config", "deepseek-v3.2", "--layers", "2", "--attention-only", "--chunk", str(16 * K), "--rows",
        "4", "--contexts", *map(str, contexts),
    ]  # fmt: skip
    found = []
    for axis in (None, "model", "context"):
        mesh = None if axis is None else {"data": 1, "model": 1, "context": 1} | {axis: 2}
        for method in ("hisa", "dsa", "scan"):
            where = "" if axis is None else f":{axis}=2"
            arguments = [*common, "--methods", method, *([] if axis is None else ["--mesh", f"{axis}=2"])]
            figures = [
                Figure(
                    name=f"{method} {shapes.label(context)}",
                    fields=what | {"row": "serve_contexts", "indexer": method, "mesh": mesh, "context": context},
                    seconds=10 + 5 * context / (32 * K),
                )
                for context in contexts
            ]
            options: dict[str, Any] = dict(gpus=1 if axis is None else 2, takes_rows=False, file_option="--out")
            file, code = "serve_contexts.json", (*LIBRARY, *_SERVED)
            found.append(_job(f"serve:{method}{where}", arguments, figures, file, code, **options))
    return found


def _peers(topk_library: Path | None, rows: Iterable[Row]) -> Job:
    """Those that a peer has; which peers are there, the process finds."""
    figures = [
        Figure(
            name=str(row), fields={name: getattr(row, name) for name in ("row", "shape", "context")},
            seconds=10 + _seconds(row.context),
        )
        for row in rows
        if kind_of(row)
    ]  # fmt: skip
    library = [] if topk_library is None else ["--topk-library", str(topk_library.resolve())]
    return _job("peers", ["peers", *library], figures, "peers.json", LIBRARY, start_s=60.0)


def _lighthouse() -> Job:
    contexts = [n * K for n in (64, 128, 256, 512)]
    figures = [
        Figure(name=f"lighthouse-{context}", fields={"row": f"lighthouse-{context}"}, seconds=15 + context / (16 * K))
        for context in contexts
    ]
    arguments = ["lighthouse", "--contexts", *map(str, contexts)]
    return _job("lighthouse", arguments, figures, "lighthouse.json", ("hisa_jax/lighthouse",), takes_rows=False)


def tests(n_gpus: int, n_cores: int) -> Job:
    """The tests that need a GPU, 16 processes a GPU if there are as many cores."""
    workers = max(1, min(16 * n_gpus, n_cores))
    # Where pytest-benchmark is installed it warns that it is off beside xdist, and our settings make that an error.
    plugins = ["-p", "no:cacheprovider", "-p", "no:benchmark"]
    pytest = ["-m", "pytest", "-m", "gpu", "tests/gpu", "-vv", *plugins]
    return Job(
        name="tests", arguments=(*pytest, "-n", str(workers), "--dist", "worksteal"), figures=(), file="", code=(),
        gpus=n_gpus, start_s=60 + 4600 / workers, takes_rows=False, file_option=None,
        environment={"XLA_PYTHON_CLIENT_PREALLOCATE": "false"},  # processes share a GPU's memory
    )  # fmt: skip


def _job(
    name: str, arguments: Sequence[str], figures: Sequence[Figure], file: str, code: tuple[str, ...], **options: Any
) -> Job:
    arguments = ("-m", "bench", *arguments)
    return Job(name=name, arguments=arguments, figures=tuple(figures), file=file, code=code, **options)


def _seconds(context: int) -> float:
    return 15.0 if context < 1024 * K else 30.0
