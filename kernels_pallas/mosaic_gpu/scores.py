"""Images of the scores of a run of keys for every query: the flat indexer's scores and, over block means, the filter's.
    x[t, c] = image(k_scale[c] * sum_h w[t, h] * relu(q[t, h] . sum_p k[p, c]))       float32 sums

Floor, 4096 queries of dsv32 on an H200: block means of 64K (n = 512, two e4m3 parts each) 69 GFLOP / 1979 TFLOP/s =
0.035 ms; tokens of 64K 4.4 TFLOP = 2.2 ms. A CTA keeps `n_score` tiles of keys in shared memory, one a warp-group, and
streams the queries of a tile past them, so keys are read once a query tile and queries once a span of keys.

Block means come in parts whose sum is the mean (see `pool`): the tensor core adds the parts up in its accumulator,
which buys 8 bits of mean for e4m3 queries without converting them.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental.pallas import mosaic_gpu as plgpu

from kernels_pallas.mosaic_gpu.scores_body import Plan, scores_body
from kernels_pallas.types import Interpret, Ref


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """Tile sizes and warp-groups: they change the speed, never the result."""

    rows: int = 128  # keys a warp-group
    n_score: int = 4  # warp-groups that score
    n_keys: int = 1  # spans of keys in shared memory at a time
    ring: int = 4  # queries in flight
    tile_t: int = 32  # queries a work item

    @property
    def span(self) -> int:
        """Keys a work item."""
        return self.rows * self.n_score

    def smem_bytes(self, H: int, D: int, n_parts: int, itemsize: int) -> int:
        """Shared memory of a CTA, barriers and alignment included."""
        keys = self.n_keys * self.span * (n_parts * D * itemsize + 4)
        return keys + self.ring * H * (D * itemsize + 4) + 4096


def heuristic(T: int, H: int, D: int, n_columns: int, n_parts: int, itemsize: int, n_ctas: int = 132) -> Config:
    """Enough work items for every CTA, and as many queries an item as that allows."""
    rows = 128 if H <= 64 else 64
    fits = [
        config
        for n_score, n_keys in ((4, 2), (4, 1), (2, 2), (2, 1))
        for ring in (8, 4, 2)
        if (config := Config(rows=rows, n_score=n_score, n_keys=n_keys, ring=ring)).smem_bytes(H, D, n_parts, itemsize)
        <= 227 * 1024
    ]
    config = fits[0]
    n_spans = -(-n_columns // config.span)
    tile_t = next((t for t in (128, 64, 32, 16, 8, 4, 2) if -(-T // t) * n_spans >= n_ctas * 3 // 4), 1)
    return dataclasses.replace(config, tile_t=tile_t)


@functools.partial(jax.jit, static_argnames=("n_columns", "keep_first", "keep_last", "config", "n_ctas", "interpret"))
def scores(
    q: Array,
    w: Array,
    k: Array,
    k_scale: Array | None,
    limit: Array,
    tiles: Array,
    first_column: Array,
    *,
    n_columns: int,
    config: Config,
    keep_first: int = 0,
    keep_last: int = 0,
    n_ctas: int = 132,
    interpret: Interpret = False,
) -> Array:
    """[T, H, D], [T, H], [parts, S, D], [S], [T] -> [T, n_columns padded to whole spans] int32 images.

    Args:
        limit: candidates of each query. Columns at or beyond are `INVISIBLE` or, beyond its whole tile, not written.
        tiles: which queries and keys go together, see `Sequences.query_tiles`.
        first_column: [1] int32, a multiple of the span: column c of the result is candidate first_column + c.
        keep_first, keep_last: that many first and last candidates of each query are `FORCED`.
    """
    T, H, D = q.shape
    n_spans = -(-n_columns // config.span)
    n_items = tiles.shape[0] * n_spans
    plan = Plan(
        T=T,
        H=H,
        D=D,
        dtype=k.dtype,
        has_scale=k_scale is not None,
        n_parts=k.shape[0],
        n_spans=n_spans,
        n_items=n_items,
        keep_first=keep_first,
        keep_last=keep_last,
        n_ctas=min(n_ctas, n_items),
        interpret=interpret,
        rows=config.rows,
        n_score=config.n_score,
        n_keys=config.n_keys,
        ring=config.ring,
    )
    tile = plan.tile_transforms
    scratch: dict[str, Ref] = {
        "q_smem": plgpu.SMEM((plan.ring, H, D), plan.dtype, transforms=tile),
        "w_smem": plgpu.SMEM((plan.ring, max(H, 32)), jnp.float32),  # copies go to multiples of 128 bytes
        "k_smem": plgpu.SMEM((plan.n_keys, plan.n_score, plan.n_parts, plan.rows, D), plan.dtype, transforms=tile),
        "q_full": plgpu.Barrier(num_arrivals=2, num_barriers=plan.ring),
        "q_free": plgpu.Barrier(num_arrivals=plan.n_score, num_barriers=plan.ring),
        "k_full": plgpu.Barrier(num_arrivals=plan.n_score * (plan.n_parts + plan.has_scale), num_barriers=plan.n_keys),
        "k_free": plgpu.Barrier(num_arrivals=plan.n_score, num_barriers=plan.n_keys),
    }
    if plan.has_scale:
        scratch["scale_smem"] = plgpu.SMEM((plan.n_keys * plan.n_score, plan.rows), jnp.float32)
    keys = [k] + ([] if k_scale is None else [k_scale])
    return plgpu.kernel(
        functools.partial(scores_body, plan),
        out_type=[jax.ShapeDtypeStruct((T, n_spans * config.span), jnp.int32)],
        grid=(plan.n_ctas,),
        grid_names=("cta",),
        num_threads=plan.n_score + 1,
        thread_name="warpgroup",
        scratch_types=scratch,
        kernel_name="hisa_scores",
        interpret=interpret,
    )(tiles, limit, first_column, q, w, *keys)[0]
