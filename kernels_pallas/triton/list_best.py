"""The best tokens of a few queries by sort keys that are all in memory, as lists: a program a query, nothing else.
    tokens[t] = at least `least` and at most `most` of those with the largest x[t, :limit[t]], ascending, then -1

A sample says which threshold lets some more pass than are wanted, so one pass over the row is nearly always enough. A
row whose sample misleads, or where many sort keys tie, is passed over again by its own program: no launch depends on
what another has found, so nothing waits for the host.

Floor, one row of 128K on an H200: 0.5 MB to one multiprocessor at 64 bytes a cycle, 5 us; of 128 rows 67 MB, 16 us.
"""

import functools

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt

from hisa_jax.kernels_pallas.scan import Ask
from hisa_jax.kernels_pallas.triton.list_best_body import WORD, Inputs, Plan, list_best_body

_WORDS = 512  # of 32 sort keys at a time
_NUM_WARPS = 32  # all that a program may have: a query has a multiprocessor to itself


@functools.partial(jax.jit, static_argnames=("ask", "keep_first", "keep_last", "interpret"))
def list_best(
    x: Array,
    limit: Array,
    ask: Ask,
    *,
    keep_first: int,
    keep_last: int,
    interpret: bool = False,
) -> tuple[Array, Array]:
    """[T, W] int32 sort keys, [T] int32 -> [T, ask.most] int32 tokens, ascending, then -1; [T] int32 count.

    Which tokens a row has, and the arguments, are those of mosaic_gpu/list_best.py.
    """
    T, W = x.shape
    n_samples = pl.next_power_of_2(-(-W // ask.step))
    words = min(_WORDS, pl.next_power_of_2(-(-W // WORD)))
    plan = Plan(
        **ask._asdict(),
        n_samples=n_samples,
        words=words,
        keep_first=keep_first,
        keep_last=keep_last,
    )
    row = lambda width: pl.BlockSpec((None, width), lambda t: (t, 0))  # noqa: E731
    one = pl.BlockSpec((1,), lambda t: (t,))
    return pl.pallas_call(
        functools.partial(list_best_body, plan=plan),
        grid=(T,),
        in_specs=[Inputs(row(W), one)],
        out_specs=[row(ask.most), one],
        out_shape=[jax.ShapeDtypeStruct((T, ask.most), jnp.int32), jax.ShapeDtypeStruct((T,), jnp.int32)],
        compiler_params=plt.CompilerParams(num_warps=_NUM_WARPS, num_stages=1),
        name="hisa_list_best",
        interpret=interpret,
    )(Inputs(x, limit))
