"""How much the quality report measures."""

import dataclasses
from collections.abc import Mapping

CONTEXTS = (1024, 2048, 4096, 8192, 16384)
TASKS = ("multikey", "recall", "multivalue", "copy", "variables")


@dataclasses.dataclass(frozen=True)
class Size:
    """Samples at each context; a context that a mapping leaves out is not measured there.

    Attributes:
        depths: of needles.
        keys: numbers of keys of the multi-key task; at a context only those that leave half of the text.
        needles: needles a depth.
        multikey: samples for each number of keys.
        tasks: samples of each of the other tasks.
        windows: of text, for bits a byte.
        layers: samples whose selections are compared layer by layer.
        ablations, scans: samples with questions and as many windows of text, for each variant of HISA and of the scan.
        queries: of text, compared in a sample.
    """

    depths: tuple[float, ...]
    keys: tuple[int, ...]
    needles: Mapping[int, int]
    multikey: Mapping[int, int]
    tasks: Mapping[int, int]
    windows: Mapping[int, int]
    layers: Mapping[int, int]
    ablations: Mapping[int, int]
    scans: Mapping[int, int]
    queries: int = 256


def _at(*counts: int) -> dict[int, int]:
    return {context: n for context, n in zip(CONTEXTS, counts, strict=False) if n}


SIZES = {
    "small": Size(
        depths=(0.1, 0.5, 0.9), keys=(8, 32), needles=_at(1, 1, 1), multikey=_at(1, 2, 2, 1), tasks=_at(1, 1, 1),
        windows=_at(0, 0, 2), layers=_at(1, 1, 1, 1), ablations=_at(0, 0, 1), scans=_at(0, 0, 1),
        queries=128,
    ),
    "full": Size(
        depths=tuple(i / 10 for i in range(11)), keys=(8, 16, 32, 64), needles=_at(16, 16, 16, 16, 16),
        multikey=_at(16, 16, 16, 16, 16), tasks=_at(48, 48, 48, 48, 48), windows=_at(64, 64, 64, 48, 32),
        layers=_at(16, 16, 16, 8, 8), ablations=_at(0, 0, 0, 0, 16), scans=_at(0, 16, 16, 16, 16),
        queries=512,
    ),
}  # fmt: skip
