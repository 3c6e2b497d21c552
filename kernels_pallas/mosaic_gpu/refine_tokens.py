"""Exact scores of the tokens listed for each query, and the exact top-k of them: `refine`, its keys gathered.
    I[t, s] = k_scale[s] * sum_h w[t, h] * relu(q[t, h] . k[s]), s in the list of t;   o[t] = the k best s, ascending

Floor, 4096 queries of dsv32 with 8192 tokens each on an H200: that of `refine`, 0.5 to 0.6 ms for 4.3 GB from L2. Rows
of 128 bytes are whole lines of L2, so scattered tokens cost what blocks do; but threads must copy them, since the copy
engine takes no list of rows: four warps that load, 8 copies of 16 bytes a row.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental.pallas import mosaic_gpu as plgpu

from hisa_jax.kernels_pallas.mosaic_gpu.ptx.gather_rows import BARRIER_WORDS, ROWS_PER_WARP
from hisa_jax.kernels_pallas.mosaic_gpu.refine import Config, smem_of
from hisa_jax.kernels_pallas.mosaic_gpu.refine_body import META, Inputs, Plan
from hisa_jax.kernels_pallas.mosaic_gpu.refine_tokens_body import AHEAD, refine_tokens_body
from hisa_jax.kernels_pallas.mosaic_gpu.topk_body import Outputs
from hisa_jax.kernels_pallas.mosaic_gpu.warpgroups import SMEM_BYTES
from hisa_jax.kernels_pallas.operands import Operands
from hisa_jax.kernels_pallas.types import Interpret

_TILE_S = 4 * ROWS_PER_WARP  # keys a tile: each warp of the loader brings 32
_META = 32  # words a query, of which the last `META` count: copies take multiples of 128 bytes


def heuristic(H: int, D: int, capacity: int, itemsize: int) -> Config | None:
    """As `refine.heuristic`; None: a list does not fit, too many heads for registers, or rows too short to gather."""
    for n_sort_keys in (2, 1):
        config = Config(tile_s=_TILE_S, n_score=4, ring=4, n_sort_keys=n_sort_keys)
        fits = config.smem_bytes(H, D, _META, 1, itemsize) + 4 * n_sort_keys * capacity <= SMEM_BYTES
        if fits and H <= 64 and D * itemsize % 128 == 0 and capacity % config.columns == 0:
            return config
    return None


def refine_tokens(
    operands: Operands, tokens: Array, count: Array, first_row: Array, *, k_top: int, config: Config, **launch: Any
) -> tuple[Array, Array]:
    """Keys [S, D] -> [T, k_top] int32 positions, ascending, then -1; [T] int32 count.

    Args:
        tokens: [T, n] int32, ascending, then -1; n is a multiple of `config.columns`.
        count: [T] int32, how many there are; of a query with fewer than k_top these are all that it sees.
        first_row: [T] int32, where the query's sequence begins among the rows of all.
        launch: n_ctas, interpret.
    """
    positions, n_chosen, _ = _launch(operands, tokens, count, first_row, False, k_top=k_top, config=config, **launch)
    return positions, n_chosen


def refine_tokens_with_sort_keys(
    operands: Operands, tokens: Array, count: Array, first_row: Array, *, k_top: int, config: Config, **launch: Any
) -> tuple[Array, Array, Array]:
    """`refine_tokens` and the [T, k_top] sort keys of what it chose, then `INVISIBLE`; of no listed token anything.

    A list of fewer than k_top is scored, too, and need not be all that its query sees.
    """
    return tuple(_launch(operands, tokens, count, first_row, True, k_top=k_top, config=config, **launch))


@functools.partial(jax.jit, static_argnames=("with_sort_keys", "k_top", "config", "n_ctas", "interpret"))
def _launch(
    operands: Operands,
    tokens: Array,
    count: Array,
    first_row: Array,
    with_sort_keys: bool,
    *,
    k_top: int,
    config: Config,
    n_ctas: int = 132,
    interpret: Interpret = False,
) -> Outputs:
    q, w, k, k_scale, pages = operands
    (T, H, D), width = q.shape, tokens.shape[1]
    if width % config.columns or config.columns % (AHEAD * config.tile_s):
        raise ValueError(
            f"refine_tokens: lists of {width} in steps of {config.columns}, wanted whole steps of {AHEAD} tiles"
        )
    plan = Plan(
        T=T,
        n_parts=1,
        H=H,
        D=D,
        m=_META - META,
        dtype=k.dtype,
        has_scale=k_scale is not None,
        k_top=k_top,
        keeps_all=k_top,
        block_size=config.tile_s,
        tile_s=config.tile_s,
        n_score=config.n_score,
        columns=config.columns,
        ring=config.ring,
        n_sort_keys=config.n_sort_keys,
        width=width,
        n_ctas=min(n_ctas, T),
        interpret=interpret,
        page_size=None,
        n_listed=0,
        gathers=True,
    )
    n_tiles = -(-count // config.columns) * (config.columns // config.tile_s)
    if not with_sort_keys:
        # A query that keeps all it sees needs no scores. Where as few are scored as are chosen, k_top may be any.
        n_tiles = jnp.where(count < k_top, 0, n_tiles)
    meta = jnp.stack([n_tiles, count, first_row, jnp.zeros_like(count)], axis=1)
    rows = None if pages is None else jnp.where(tokens >= 0, pages.rows(first_row[:, None] + tokens), -1)
    smem = smem_of(plan)
    if not interpret:
        smem = smem._replace(
            k_full=None, landed=plgpu.SMEM((plan.ring, BARRIER_WORDS), jnp.int32), ready=plgpu.Barrier(num_arrivals=1)
        )
    chosen = jax.ShapeDtypeStruct((T, k_top), jnp.int32)
    out = Outputs(chosen, jax.ShapeDtypeStruct((T,), jnp.int32), chosen if with_sort_keys else None)
    return plgpu.kernel(
        functools.partial(refine_tokens_body, plan),
        out_type=[out],
        grid=(plan.n_ctas,),
        grid_names=("cta",),
        num_threads=plan.n_score + 2,
        thread_name="warpgroup",
        scratch_types=[smem],
        kernel_name="hisa_refine_tokens",
        interpret=interpret,
    )(Inputs(jnp.pad(meta, ((0, 0), (_META - META, 0))), q, w, k, k_scale, tokens, rows))[0]
