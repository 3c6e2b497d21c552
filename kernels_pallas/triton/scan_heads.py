"""What each query scans with: the exact heads, and the others in one virtual head.
    v[t] = sum_{h not exact} w[t, h] * a[t, h] * q[t, h],  a: at how many of the 32 best of 256 samples a head is open

Floor, 4096 queries of 64 heads of 128 in e4m3 on an H200: 17 GFLOP / 1979 TFLOP/s = 9 us, and 134 MB of sampled keys
from L2.
"""

import functools

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt

from hisa_jax.kernels_pallas.operands import Operands, ScanHeads
from hisa_jax.kernels_pallas.triton.launch import whole
from hisa_jax.kernels_pallas.triton.pool import check_addressable, parts_of
from hisa_jax.kernels_pallas.triton.scan_heads_body import (
    HeadInputs,
    Layout,
    Plan,
    SlopeInputs,
    scan_heads_body,
    slopes_body,
)
from hisa_jax.methods import Scan

# 4096 queries of 64K with 64 heads, in one kernel, ms: 0.235 with 4 warps; 0.31 with 8, spilled registers and 2.9 with
# 2. Products of 128 heads with 4 would spill as those of 64 with 2.
_HEADS_A_WARP = 16
_WARPS_IN_ONE = 8  # of slopes and heads in one: with 4 registers are spilled


@functools.partial(jax.jit, static_argnames=("method", "in_one", "is_sample", "interpret"))
def scan_heads(
    operands: Operands,
    visible: Array,
    first: Array,
    method: Scan,
    slopes: Array | None = None,
    *,
    in_one: bool = False,
    is_sample: bool = False,
    interpret: bool = False,
) -> ScanHeads:
    """The heads of `Scan`, at most 16 rows: v in bfloat16, of e4m3 keys in two numbers and a scale.

    Args:
        visible: [T] int32, tokens of its sequence that a query sees; `first`: [T] int32, the row of the first of them.
        slopes: [T, H] float32, where they are there already: then no key is read. None: they are taken here.
        is_sample: the keys are what is sampled, nothing between them.
    """
    q, w, k, *_ = operands
    T, H, D = q.shape
    n_linear = parts_of(k.dtype)
    n = n_linear + method.exact_heads
    R = max(pl.next_power_of_2(n), 2)
    samples, sample_specs, num_warps = None, None, _warps(H)
    layout = Layout(None if operands.pages is None else operands.pages.size, is_sample)
    if method.slopes == "sampled" and slopes is None:
        check_addressable(k)
        if in_one:
            samples, sample_specs = _samples(operands, visible, first)
            num_warps = max(_warps(H), _WARPS_IN_ONE)
        else:
            slopes = _slopes(operands, visible, first, layout, interpret)
    rows, weights = pl.pallas_call(
        functools.partial(scan_heads_body, plan=Plan(n_exact=method.exact_heads, n_linear=n_linear, layout=layout)),
        grid=(T,),
        in_specs=[HeadInputs(_row(H, D), _row(H), None if slopes is None else _row(H), sample_specs)],
        out_specs=[_row(R, D), _row(R)],
        out_shape=[jax.ShapeDtypeStruct((T, R, D), k.dtype), jax.ShapeDtypeStruct((T, R), jnp.float32)],
        compiler_params=plt.CompilerParams(num_warps=num_warps, num_stages=1),
        name="hisa_scan_heads",
        interpret=interpret,
    )(HeadInputs(q, w, slopes, samples))
    return ScanHeads(q=rows, w=weights, n_linear=n_linear, n=n)


def _slopes(operands: Operands, visible: Array, first: Array, layout: Layout, interpret: bool) -> Array:
    """[T, H] float32: at which share of a query's best samples each head is open.

    A kernel of its own: in one with the heads fewer programs fit, which took 0.22 ms where these two take 0.17. Of few
    queries all programs fit, and one launch is less than two.
    """
    (T, H, _), (samples, specs) = operands.q.shape, _samples(operands, visible, first)
    return pl.pallas_call(
        functools.partial(slopes_body, layout=layout),
        grid=(T,),
        in_specs=[specs],
        out_specs=_row(H),
        out_shape=jax.ShapeDtypeStruct((T, H), jnp.float32),
        compiler_params=plt.CompilerParams(num_warps=_warps(H), num_stages=1),
        name="hisa_scan_slopes",
        interpret=interpret,
    )(samples)


def _samples(operands: Operands, visible: Array, first: Array) -> tuple[SlopeInputs, SlopeInputs]:
    """What slopes are sampled from, and how a program of one query sees it."""
    q, w, k, k_scale, pages = operands
    _, H, D = q.shape
    table = None if pages is None else pages.table
    one = pl.BlockSpec((1,), lambda t: (t,))
    specs = SlopeInputs(_row(H, D), _row(H), one, one, whole(k), whole(table), whole(k_scale))
    return SlopeInputs(q, w, visible, first, k, table, k_scale), specs


def _row(*shape: int) -> pl.BlockSpec:
    """A query's part of [T, *shape]."""
    return pl.BlockSpec((None, *shape), lambda t: (t,) + (0,) * len(shape))


def _warps(H: int) -> int:
    return max(H // _HEADS_A_WARP, 4)
