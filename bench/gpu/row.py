"""What a row of `python -m bench gpu` is, and the rates of the device that give its floor."""

import dataclasses
from collections.abc import Callable
from typing import Any

from bench import shapes

K = 1024
TENSOR_FLOPS = {"e4m3": 1979e12, "bf16": 990e12}  # vendor's dense figures, H100 SXM and H200
MEMORY_BYTES = 4.3e12  # a second, measured by a copy on an H200


# The fields that a result has, too.
NAMED = ("row", "implementation", "shape", "context", "queries", "dtype")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Row:
    """One line of the table.

    Attributes:
        make: () -> (f, its operands, check of its result that raises; the last operand is int32 and may be delayed).
        carries: f returns its first operand anew, for the next repetition.
        defined: (result, operands) -> what of the result has a meaning; a kernel may leave the rest as memory was.
        flop: arithmetic of the visible work; `moved_bytes`: what must cross device memory.
    """

    row: str
    make: Callable[[], tuple[Callable, tuple, Callable[[Any], None]]]
    shape: str
    context: int
    queries: int
    dtype: str = "e4m3"
    implementation: str = "mosaic_gpu"
    carries: bool = False
    defined: Callable[[Any, tuple], Any] = lambda result, operands: result
    flop: float = 0.0
    moved_bytes: float = 0.0

    def __str__(self) -> str:
        context = shapes.label(self.context)
        return f"{self.row}:{self.implementation}:{self.shape}:{context}:{self.dtype}"

    @property
    def floor_ms(self) -> float:
        return 1e3 * max(self.flop / TENSOR_FLOPS[self.dtype], self.moved_bytes / MEMORY_BYTES)
