"""The best tokens of a few queries by sort keys that are all in memory, as lists: a CTA a query, nothing else.
    tokens[t] = at least `least` and at most `most` of those with the largest x[t, :limit[t]], ascending, then -1

Floor, one row of 128K on an H200: 0.5 MB to one multiprocessor at 64 bytes a cycle, 5 us; of 128 rows 67 MB, 16 us. The
threshold of the samples before it takes as long as `topk_few`, 4 us. docs/decoding.md has what was measured.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental.pallas import mosaic_gpu as plgpu

from hisa_jax.kernels_pallas.mosaic_gpu.ptx import inline
from hisa_jax.kernels_pallas.mosaic_gpu.ptx.list_best import list_best as list_row
from hisa_jax.kernels_pallas.mosaic_gpu.ptx.list_best import sample_of
from hisa_jax.kernels_pallas.mosaic_gpu.ptx.list_best_text import WORD, Row
from hisa_jax.kernels_pallas.mosaic_gpu.warpgroups import RESERVED_BYTES, SMEM_BYTES
from hisa_jax.kernels_pallas.scan import Ask
from hisa_jax.kernels_pallas.sort_key import FORCED, INVISIBLE
from hisa_jax.kernels_pallas.types import Interpret, Ref

MAX_WIDTH = 1 << 19  # two rows of bits in shared memory
_MAX_SAMPLES = 16384  # of the registers of 1024 threads


def why_not(width: int, ask: Ask) -> str | None:
    """None, or why rows of so many sort keys cannot be listed."""
    if width % WORD or width > MAX_WIDTH or -(-width // ask.step) > _MAX_SAMPLES:
        return f"needs rows of a multiple of {WORD} up to {MAX_WIDTH} sort keys and {_MAX_SAMPLES} samples, not {width}"
    if _row(width, ask).smem_bytes > SMEM_BYTES - RESERVED_BYTES:
        return f"has no room in shared memory for {ask.most} tokens beside the bits of {width}"
    return None


def _row(width: int, ask: Ask, *, are_apart: bool = True, keep_first: int = 0, keep_last: int = 0) -> Row:
    sample = sample_of(-(-width // ask.step), ask.rank)
    wanted: Any = dict(step=ask.step, least=ask.least, most=ask.most, keep_first=keep_first, keep_last=keep_last)
    return Row(width=width, apart=1 if are_apart else ask.step, **wanted, sample=sample)


@functools.partial(jax.jit, static_argnames=("ask", "keep_first", "keep_last", "interpret"))
def list_best(
    x: Array,
    limit: Array,
    ask: Ask,
    samples: Array | None = None,
    *,
    keep_first: int,
    keep_last: int,
    interpret: Interpret = False,
) -> tuple[Array, Array]:
    """[T, W] int32 sort keys, [T] int32 -> [T, ask.most] int32 tokens, ascending, then -1; [T] int32 count.

    A row has all that it sees, if they are at most `ask.most`. Otherwise it has at least `ask.least`, and whatever sort
    key it has it has all of, unless more tie than there is room for: of these it has the first ones.

    Args:
        limit: columns from here on are no candidates, whatever they hold.
        samples: [T, W / step], every `step`-th sort key; None: they are picked from x, a line of memory for each two.
        keep_first, keep_last: so many first and last candidates are listed whatever their sort keys.
    """
    T, W = x.shape
    if reason := why_not(W, ask):
        raise ValueError(f"list_best: x is [{T}, {W}]: {reason}")
    row = _row(W, ask, are_apart=samples is not None, keep_first=keep_first, keep_last=keep_last)
    tokens, count = plgpu.kernel(
        functools.partial(_body, row, interpret),
        out_type=[jax.ShapeDtypeStruct((T, ask.most), jnp.int32), jax.ShapeDtypeStruct((T,), jnp.int32)],
        grid=(T,),
        grid_names=("row",),
        num_threads=1 if interpret else row.sample.n_threads // 128,
        thread_name="warpgroup",
        scratch_types=[plgpu.SMEM((row.smem_bytes // 4,), jnp.int32)],
        kernel_name="hisa_list_best",
        interpret=interpret,
    )(jnp.minimum(limit, W), x, samples)
    return tokens, count


def _body(
    row: Row,
    interpret: Interpret,
    limit_gmem: Ref,
    x_gmem: Ref,
    samples_gmem: Ref | None,
    tokens_gmem: Ref,
    count_gmem: Ref,
    smem: Ref,
) -> None:
    # One CTA, one row:   every 16th sort key -> registers -> threshold -> all of them -> bits -> sums -> tokens, count
    #
    # Too few bits or too many: another threshold, and again.
    t = lax.axis_index("row")
    limit = limit_gmem[t]
    if not interpret:
        own = inline.Row(x_gmem, t, row.width)
        samples = own if samples_gmem is None else inline.Row(samples_gmem, t, samples_gmem.shape[1])
        list_row(row, own, samples, limit, tokens_gmem, count_gmem, smem)
        return
    # Exactly the best `least`, where the chip may list some more.
    column = jnp.arange(row.width, dtype=jnp.int32)
    is_kept = (column < row.keep_first) | (column >= limit - row.keep_last)
    x = jnp.where(column < limit, jnp.where(is_kept, FORCED, x_gmem[t]), INVISIBLE)
    count = jnp.where(limit <= row.most, limit, row.least)
    rank = jnp.zeros((row.width,), jnp.int32).at[jnp.argsort(~x, stable=True)].set(column)
    chosen = rank < count
    place = jnp.where(chosen, jnp.cumsum(chosen.astype(jnp.int32)) - 1, row.most)
    tokens_gmem[t] = jnp.full((row.most + 1,), -1, jnp.int32).at[place].set(column)[: row.most]
    count_gmem[t] = count
