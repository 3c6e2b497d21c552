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
from hisa_jax.kernels_pallas.triton.pool import check_addressable, parts_of
from hisa_jax.kernels_pallas.triton.scan_heads_body import Inputs, Plan, scan_heads_body
from hisa_jax.methods import Scan

# 4096 queries of 64K with 64 heads, ms: 0.235 with 4 warps; 0.31 with 8, spilled registers and 2.9 with 2. Products of
# 128 heads with 4 would spill as those of 64 with 2.
_HEADS_A_WARP = 16


@functools.partial(jax.jit, static_argnames=("method", "interpret"))
def scan_heads(operands: Operands, visible: Array, first: Array, method: Scan, *, interpret: bool = False) -> ScanHeads:
    """The heads of `Scan`, at most 16 rows: v in bfloat16, of e4m3 keys in two numbers and a scale.

    Args:
        visible: [T] int32, tokens of its sequence that a query sees; `first`: [T] int32, the row of the first of them.
    """
    q, w, k, k_scale, pages = operands
    T, H, D = q.shape
    check_addressable(k)
    n_linear = parts_of(k.dtype)
    n = n_linear + method.exact_heads
    R = max(pl.next_power_of_2(n), 2)
    inputs = Inputs(
        q=q,
        w=w,
        visible=visible,
        first=first,
        k=k,
        table=None if pages is None else pages.table,
        k_scale=k_scale,
    )
    row = lambda *shape: pl.BlockSpec((None, *shape), lambda t: (t,) + (0,) * len(shape))  # noqa: E731
    one = pl.BlockSpec((1,), lambda t: (t,))
    whole = lambda x: None if x is None else pl.BlockSpec(x.shape, lambda t: (0,) * x.ndim)  # noqa: E731
    in_specs = Inputs(row(H, D), row(H), one, one, whole(inputs.k), whole(inputs.table), whole(inputs.k_scale))
    plan = Plan(
        n_exact=method.exact_heads,
        n_linear=n_linear,
        is_sampled=method.slopes == "sampled",
        page_size=None if pages is None else pages.size,
    )
    rows, weights = pl.pallas_call(
        functools.partial(scan_heads_body, plan=plan),
        grid=(T,),
        in_specs=[in_specs],
        out_specs=[row(R, D), row(R)],
        out_shape=[jax.ShapeDtypeStruct((T, R, D), k.dtype), jax.ShapeDtypeStruct((T, R), jnp.float32)],
        compiler_params=plt.CompilerParams(num_warps=max(H // _HEADS_A_WARP, 4), num_stages=1),
        name="hisa_scan_heads",
        interpret=interpret,
    )(inputs)
    return ScanHeads(q=rows, w=weights, n_linear=n_linear, n=n)
