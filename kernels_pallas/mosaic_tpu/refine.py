"""Token scores in the kept blocks of each query: the second stage without its top-k.
    o[t, j * B + i] = image of k_scale[s] * sum_h w[t, h] * relu(q[t, h] . k[s]), s = block_ids[t, j] * B + i

Floor, 4096 queries of dsv32, m = 64: v5e, MXU 550 GFLOP / 197 TFLOP/s = 2.8 ms, 16 cycles a query and block; v6e and
v7x take 8 if 256 keys stand in the matrix unit. HBM: keys once, 34 MB, queries 67 MB and images 134 MB, 0.29 ms on v5e,
under the products. Bound by the MXU on v5e, and elsewhere by loading keys into it: no two queries share a block.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental.pallas import tpu as pltpu

from kernels_pallas.mosaic_tpu import launch, refine_body
from kernels_pallas.mosaic_tpu.config import LANES, ROWS, Chip
from kernels_pallas.mosaic_tpu.refine_body import Plan
from kernels_pallas.types import Interpret, Ref

_RESIDENT_BYTES = 34 << 20  # 131,072 bfloat16 keys, 262,144 of 8 bits with scales: fits beside the rest on every chip


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """Tile sizes: they change the speed, never the result.

    Attributes:
        columns: candidates of a query a step; 1024 are 64 products of 128 keys, which take 900 to 1200 cycles.
        n_cores: cores that share the queries of a sequence.
    """

    columns: int = 1024
    n_cores: int = 1

    def __post_init__(self):
        if self.columns % 256:
            raise ValueError(f"Config(columns={self.columns}): must be a multiple of 256, the candidates of a product")

    def vmem_bytes(self, H: int, D: int, m: int, block_size: int, itemsize: int) -> int:
        """Everything in VMEM but the keys."""
        queries = ROWS * H * (2 * max(D, LANES) * itemsize + 2 * 4 + 4 * LANES)
        return queries + 4 * ROWS * (2 * m * block_size + ROWS * self.columns)


def resident_bytes(n: int, block_size: int, D: int, itemsize: int) -> int:
    """Of the keys of a sequence in VMEM, with their scales."""
    return n * (block_size * max(D, LANES) * itemsize + 4 * max(block_size, LANES) * (itemsize == 1))


def is_resident(n: int, block_size: int, D: int, itemsize: int) -> bool:
    """Whether they fit."""
    return resident_bytes(n, block_size, D, itemsize) <= _RESIDENT_BYTES


def heuristic(chip: Chip, T: int, H: int) -> Config:
    """Fewer candidates a step where a product has more rows, for the sake of the code's size."""
    return Config(columns=1024 if H <= 64 else 512, n_cores=chip.n_cores if T > ROWS else 1)


@functools.partial(jax.jit, static_argnames=("config", "interpret"))
def refine_resident(
    q: Array,
    w: Array,
    k: Array,
    k_scale: Array | None,
    block_ids: Array,
    n_steps: Array,
    n_tokens: Array,
    *,
    config: Config,
    interpret: Interpret = False,
) -> Array:
    """[B, T, H, D], [B, T, H], [B, n, block_size, D], [B, n, block_size], [B, T, m] -> [B, T, m * block_size] int32.

    Args:
        q: T a multiple of 8 * n_cores.
        block_ids: blocks of its sequence that each query keeps, then any block that is present; m * block_size a
            multiple of config.columns.
        n_steps: [B * T / 8] int32, steps of config.columns candidates that each tile of 8 queries needs; columns
            beyond are not written.
        n_tokens: [B] int32, tokens present.
    """
    (B, T, H, D), (n, block_size), m = q.shape, k.shape[1:3], block_ids.shape[2]
    tiles = T // ROWS // config.n_cores
    plan = Plan(block_size=block_size, columns=config.columns)
    operands = [k] if k_scale is None else [k, k_scale]
    scratch: dict[str, Ref] = {
        "w_vmem": pltpu.VMEM((ROWS, H, LANES), jnp.float32),
        "partial_vmem": pltpu.VMEM((config.columns // LANES * ROWS * ROWS, LANES), jnp.float32),
        "keys_vmem": pltpu.VMEM((n, block_size, D), k.dtype),
        "sems": pltpu.SemaphoreType.DMA((2,)),
    }
    if k_scale is not None:
        scratch["scale_vmem"] = pltpu.VMEM((n, block_size), jnp.float32)

    rows = functools.partial(launch.rows, ROWS, tiles)
    return launch.call(
        functools.partial(refine_body.resident_body, plan),
        name="hisa_refine",
        grid=(config.n_cores, B, tiles),
        prefetch=[n_steps, n_tokens],
        operands=[block_ids, q, w, *operands],
        in_specs=[rows(m, memory_space=pltpu.SMEM), rows(H, D), rows(H), *launch.in_hbm(operands)],
        out_specs=rows(m * block_size),
        out_shape=jax.ShapeDtypeStruct((B, T, m * block_size), jnp.int32),
        scratch=scratch,
        dimension_semantics=("parallel", "arbitrary", "arbitrary"),
        vmem_bytes=config.vmem_bytes(H, D, m, block_size, q.dtype.itemsize)
        + resident_bytes(n, block_size, D, k.dtype.itemsize),
        interpret=interpret,
    )
