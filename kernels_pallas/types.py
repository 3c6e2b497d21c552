"""Names for what Pallas leaves untyped."""

from typing import Any

Ref = Any  # a reference to an array in some memory, or a barrier
Interpret = Any  # False, True (Triton) or plgpu.InterpretGPUParams (Mosaic GPU)
