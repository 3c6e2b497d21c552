"""What each query of a batch scans with: the slopes, the virtual head and the exact heads.
    v[t] = sum over heads h that are not exact of w[t, h] * slope[t, h] * q[t, h]

where slope[t, h] is the share of t's best samples at which q[t, h] . k > 0, and the exact heads are those of greatest
|w| * |q| (`xla/scan.py`).

Floor, 4096 queries of dsv32: products of 64 heads with 256 samples and of a query's pairs of heads with one another
take the MXU 48 cycles a query on v5e, 24 on v6e; HBM 16 KiB of queries, 30 and 18 cycles. On v6e as much by the VPU:
six operations for each of the 16 registers of products, 24 cycles.

A step between samples is a power of two, so that there are few: XLA brings the 256 keys of each. All queries of a tile
score those of one step, and again those of another where they do not all have the same.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from hisa_jax.kernels_pallas.mosaic_tpu import launch
from hisa_jax.kernels_pallas.mosaic_tpu.config import LANES, SUBLANES
from hisa_jax.kernels_pallas.mosaic_tpu.launch import Launch
from hisa_jax.kernels_pallas.mosaic_tpu.scan_heads_body import GAP, Plan, Refs, scan_heads_body
from hisa_jax.kernels_pallas.types import Interpret, Ref
from hisa_jax.layout import Call, Keys, Queries
from hisa_jax.methods import Scan
from hisa_jax.xla import scan
from hisa_jax.xla.scan import N_SAMPLES, ScanHeads

_HALF = LANES // 2  # queries that the lanes of a register hold with two heads each


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """Tile sizes: they change the speed, never the result.

    Attributes:
        tile_t: queries a grid step. Of two halves of 64 the lanes of a register hold one after the other.
    """

    tile_t: int = 2 * _HALF

    def __post_init__(self) -> None:
        if self.tile_t % SUBLANES or (self.tile_t > _HALF and self.tile_t != 2 * _HALF):
            raise ValueError(f"Config(tile_t={self.tile_t}): must be 128, or a multiple of {SUBLANES} up to 64")

    @property
    def n_halves(self) -> int:
        return -(-self.tile_t // _HALF)

    def vmem_bytes(self, H: int, D: int, n_exact: int, n_steps: int) -> int:
        row = 4 * LANES
        windows = self.tile_t * (H * D * 2 + (n_exact + 1) * D * 4) + n_steps * N_SAMPLES * (D * 2 + row)
        scratch = self.n_halves * (H // 2 + 2) * N_SAMPLES * row + N_SAMPLES * row
        scratch += self.tile_t * (H + 2 * GAP) * D * 2
        return 2 * windows + scratch + (4 << 20)


def heuristic(T: int) -> Config:
    """For T queries of a sequence."""
    return Config(tile_t=2 * _HALF if T > _HALF else -(-T // SUBLANES) * SUBLANES)


def scan_heads(call: Call, method: Scan, interpret: Interpret = False) -> ScanHeads:
    """Of a batch: [B, T, ...] each, as `xla.scan.heads_of` gives them."""
    queries = Queries(call.q, call.w, jnp.clip(call.visible, 0, call.max_keys))
    every = jnp.arange(call.n_sequences, dtype=jnp.int32)
    return heads_of_rows(queries, every, call, call.max_keys, method, interpret)


def heads_of_rows(
    queries: Queries, sequences: Array, call: Call, S: int, method: Scan, interpret: Interpret = False
) -> ScanHeads:
    """Of rows of queries [B, T, ...], each of the sequence of `call` that `sequences` [B] int32 says.

    Args:
        queries: they see at most S tokens; those of a sequence below 0 none.
    """
    B, T, H, D = queries.q.shape
    config, n_exact, pairs = heuristic(T), min(method.exact_heads, H), H // 2
    tile_t, n_halves = config.tile_t, config.n_halves
    # Operands of 8 bits are exact in bfloat16.
    q, w, visible = (launch.pad_axis(x, 1, tile_t) for x in queries._replace(q=queries.q.astype(jnp.bfloat16)))
    tiles, half = q.shape[1] // tile_t, tile_t // n_halves
    steps = scan.sample_steps(visible)
    n_samples = (visible + (1 << steps) - 1) >> steps
    n_steps = ((S - 1) // N_SAMPLES).bit_length() + 1
    of_tile = (B * tiles, tile_t)
    sees = (visible > 0).reshape(of_tile)
    first = jnp.min(jnp.where(sees, steps.reshape(of_tile), n_steps), axis=1)
    last = jnp.max(jnp.where(sees, steps.reshape(of_tile), -1), axis=1)
    sequences, every = jnp.maximum(sequences, 0), jnp.arange(call.n_sequences, dtype=jnp.int32)
    # Once a sequence, or once a row if those are fewer.
    of_rows, sampled = (jnp.arange(B, dtype=jnp.int32), sequences) if len(every) > B else (sequences, every)
    samples = _samples(call, sampled, n_steps)

    def in_lanes(x: Array) -> Array:
        """[B, T, n, 2] -> [B, halves, n, 128]: query by query two values."""
        x = x.reshape(B, tiles * n_halves, half, -1, 2).swapaxes(2, 3)
        return launch.pad_axis(x.reshape(B, tiles * n_halves, -1, 2 * half), 3, LANES)

    def of_queries(*shape: int) -> pl.BlockSpec:
        return pl.BlockSpec((None, *shape), lambda b, t, *_: (b, t, *(0 for _ in shape[1:])))

    def of_sequence(*shape: int) -> pl.BlockSpec:
        return pl.BlockSpec((None, *shape), lambda b, t, of_rows, *_: (of_rows[b], *(0 for _ in shape)))

    twice = lambda x: in_lanes(jnp.stack([x, x], axis=-1)[:, :, None])  # noqa: E731
    plan = Plan(
        tiles=tiles,
        n_halves=n_halves,
        half=half,
        n_pairs=pairs,
        n_exact=n_exact,
        is_sampled=method.slopes == "sampled",
        interpret=interpret,
    )
    outs = {"virtual": (jax.ShapeDtypeStruct((B, tiles * tile_t, D), jnp.float32), of_queries(tile_t, D))}
    if n_exact:
        rows = pl.BlockSpec((None, n_exact, tile_t, D), lambda b, t, *_: (b, 0, t, 0))
        outs["exact"] = jax.ShapeDtypeStruct((B, n_exact, tiles * tile_t, D), jnp.float32), rows
        shape = jax.ShapeDtypeStruct((B, tiles * n_halves, n_exact, LANES), jnp.float32)
        outs["w_exact"] = shape, of_queries(n_halves, n_exact, LANES)
    of_samples = functools.partial(pltpu.VMEM, dtype=jnp.float32)
    table_lanes = -(-(pairs + n_exact) // LANES) * LANES
    scratch: dict[str, Ref] = {
        "heads_vmem": pltpu.VMEM((1, tile_t * (H + 2 * GAP), D), q.dtype),
        "products_vmem": of_samples((n_halves, pairs * N_SAMPLES, LANES)),
        "scores_vmem": of_samples((n_halves, N_SAMPLES, LANES)),
        "least_vmem": of_samples((n_halves, N_SAMPLES, LANES)),
        "sort_keys_vmem": pltpu.VMEM((N_SAMPLES, LANES), jnp.int32),
        "squares_vmem": of_samples((n_halves, pairs, LANES)),
        "n_open_vmem": of_samples((n_halves, pairs, LANES)),
        "table_vmem": of_samples((n_halves * LANES, table_lanes)),
    }
    virtual, *exact = Launch(
        body=functools.partial(scan_heads_body, plan),
        refs=Refs,
        name="hisa_scan_heads",
        grid=(B, tiles),
        scalars={"of_rows_smem": of_rows, "first_smem": first, "last_smem": last},
        operands={
            "q": (q.reshape(B, -1, D), pl.BlockSpec((1, tile_t * H, D), lambda b, t, *_: (b, t, 0))),
            "w": (in_lanes(w.reshape(B, -1, pairs, 2)), of_queries(n_halves, pairs, LANES)),
            "steps": (twice(steps), of_queries(n_halves, 1, LANES)),
            "n_samples": (twice(n_samples), of_queries(n_halves, 1, LANES)),
            "keys": (samples.values, of_sequence(n_steps, N_SAMPLES, D)),
            "scales": (samples.scales, of_sequence(n_steps, N_SAMPLES, 1)),
        },
        outs=outs,
        scratch=scratch,
        vmem_bytes=config.vmem_bytes(H, D, n_exact, n_steps),
        interpret=interpret,
        dimension_semantics=("parallel", "parallel"),
        pinned=("q",),
    )()
    virtual = virtual[:, :T]
    if not n_exact:
        return ScanHeads(virtual, jnp.zeros((B, T, 0, D), queries.q.dtype), jnp.zeros((B, T, 0)))
    found, w_exact = exact
    w_exact = w_exact[..., : 2 * half : 2].swapaxes(2, 3).reshape(B, tiles * tile_t, n_exact)
    return ScanHeads(virtual, found.swapaxes(1, 2)[:, :T].astype(queries.q.dtype), w_exact[:, :T])


def _samples(call: Call, sequences: Array, n_steps: int) -> Keys:
    """[n, n_steps, 256, D] bfloat16 keys at every 1, 2, 4, ...-th position, [n, n_steps, 256, 1] float32 scales."""
    positions = jnp.arange(N_SAMPLES, dtype=jnp.int32) << jnp.arange(n_steps, dtype=jnp.int32)[:, None]
    keys = jax.vmap(lambda r: call.sequence(r).rows(positions))(sequences)
    return Keys(keys.values.astype(jnp.bfloat16), None if keys.scales is None else keys.scales[..., None])
