"""What is compiled: a model at its published sizes, its weights, a chip, a phase, and how the pod is shared out.

Decoding shares the cache of a request among 16 devices (`context`): 128K tokens of all layers take 11 GB, and a copy on
each device would leave no room. A chunk of a prompt exchanges a sum of values for each head and query over `context`,
so its heads are split over `model` as far as the attention's kernel takes them (16 heads), and pages as far as needed.
"""

import dataclasses
import math
from collections.abc import Iterator
from typing import Any, Literal

import hisa_jax as hj
from bench.tpu.chips import CHIPS, Chip

CONTEXT = 131_072
METHOD = hj.Hisa(topk=2048, block_size=128, block_topk=64)
Phase = Literal["decode", "prefill"]
Weights = Literal["bf16", "e4m3"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Row:
    """One program: `batch` requests of `context` tokens, each with `queries` new ones among them.

    Attributes:
        model: a name in `hisa_jax.models`.
        layers: the first of them and the one after the last, None: all; `experts`: of a layer, None: all.
        data, model_axis, context_axis: devices of each axis of the mesh.
    """

    model: str
    weights: Weights
    chip: str
    phase: Phase
    data: int
    model_axis: int = 1
    context_axis: int = 1
    batch: int
    queries: int = 1
    context: int = CONTEXT
    method: hj.Hisa = METHOD
    layers: tuple[int, int] | None = None
    experts: int | None = None

    @property
    def row(self) -> str:
        return f"{self.model}-{self.weights}-{self.phase}-{self.chip}"

    @property
    def axes(self) -> dict[str, int]:
        return {"data": self.data, "model": self.model_axis, "context": self.context_axis}

    @property
    def n_devices(self) -> int:
        return math.prod(self.axes.values())

    @property
    def tokens(self) -> int:
        """New ones in a step."""
        return self.batch * self.queries


# Requests a group of devices decodes: what the memory that weights leave holds, with a tenth to spare.
_REQUESTS: dict[tuple[str, Weights], dict[str, int]] = {
    ("dsv32", "bf16"): {"v5e": 8, "v5p": 80, "v6e": 24, "v7x": 96},
    ("dsv32", "e4m3"): {"v5e": 12, "v5p": 88, "v6e": 32, "v7x": 96},
    ("glm5", "bf16"): {"v5e": 5, "v5p": 64, "v6e": 16, "v7x": 72},
}
# Devices over which a prompt's heads and pages are split. GLM-5 has 64 heads, V3.2 has 128.
_PREFILL = {"v5e": (4, 4), "v5p": (4, 2), "v6e": (4, 4), "v7x": (4, 4)}
_CHUNK = 512


def rows() -> Iterator[Row]:
    for (model, weights), requests in _REQUESTS.items():
        for name, chip in CHIPS.items():
            n = devices(chip)
            own: Any = dict(model=model, weights=weights, chip=name)
            yield Row(**own, phase="decode", data=n // 16, context_axis=16, batch=n // 16 * requests[name])
            heads, pages = _PREFILL[name]
            data = n // (heads * pages)
            yield Row(
                **own, phase="prefill", data=data, model_axis=heads, context_axis=pages, batch=data, queries=_CHUNK
            )


def devices(chip: Chip) -> int:
    """What JAX calls devices, of the chip's pod slice."""
    return chip.pod_chips * chip.devices_per_chip
