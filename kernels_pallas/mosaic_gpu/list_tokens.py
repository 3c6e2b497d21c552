"""The tokens whose bits a scan has set, as a list for each query.
    tokens[t] = the numbers of the set bits of masks[t], ascending, then -1

Floor, 4096 queries of 64K with some 10,000 of 12,288 slots taken on an H200: 34 MB of bits in, 200 MB out / 4.3 TB/s =
0.05 ms. A warp-group has a query and a list in shared memory, which the copy engine writes out; the other warp-groups
of the CTA work meanwhile. Measured: 80 us.
"""

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from hisa_jax.kernels_pallas.mosaic_gpu.ptx.inline import Row
from hisa_jax.kernels_pallas.mosaic_gpu.ptx.list_bits import WORDS, Words, list_bits
from hisa_jax.kernels_pallas.mosaic_gpu.warpgroups import RESERVED_BYTES, SMEM_BYTES
from hisa_jax.kernels_pallas.types import Interpret, Ref

LINE = 128  # a copy takes at most 256 elements an axis, so lists are folded
_MOST = 8  # warp-groups a CTA
_SCRATCH_WORDS = 4
# Of a list that is alone in shared memory, but for its scratch.
MAX_CAPACITY = (SMEM_BYTES - RESERVED_BYTES) // 4 // LINE * LINE - LINE


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """The static numbers of a launch."""

    T: int
    capacity: int
    n_groups: int
    n_ctas: int
    interpret: object


class Smem(NamedTuple):
    """Shared memory of a CTA: a list and a scratch for each warp-group."""

    lists: Ref  # [n_groups, capacity / LINE, LINE]
    scratch: Ref  # [n_groups, _SCRATCH_WORDS]


@functools.partial(jax.jit, static_argnames=("capacity", "n_ctas", "interpret"))
def list_tokens(
    masks: Array, visible: Array, capacity: int, *, n_ctas: int, interpret: Interpret = False
) -> tuple[Array, Array]:
    """[T, words] int32 -> [T, capacity] int32, [T] int32 count; a list that is longer is counted, but no list.

    Args:
        masks: words is a multiple of 4; those that hold no token before `visible` [T] may be anything.
        capacity: a multiple of 128.
    """
    T, words = masks.shape
    if words % WORDS or capacity % LINE:
        raise ValueError(f"list_tokens: {words} words to {capacity} tokens, wanted multiples of {WORDS} and {LINE}")
    each = 4 * (capacity + _SCRATCH_WORDS)
    n_groups = max(min((SMEM_BYTES - RESERVED_BYTES) // each, _MOST), 1)
    plan = Plan(T=T, capacity=capacity, n_groups=n_groups, n_ctas=min(n_ctas, T), interpret=interpret)
    lists = jax.ShapeDtypeStruct((T, capacity // LINE, LINE), jnp.int32)
    smem = Smem(
        lists=plgpu.SMEM((n_groups, capacity // LINE, LINE), jnp.int32),
        scratch=plgpu.SMEM((n_groups, _SCRATCH_WORDS), jnp.int32),
    )
    tokens, count = plgpu.kernel(
        functools.partial(_body, plan),
        out_type=[lists, jax.ShapeDtypeStruct((T,), jnp.int32)],
        grid=(plan.n_ctas,),
        grid_names=("cta",),
        num_threads=n_groups,
        thread_name="warpgroup",
        scratch_types=[smem],
        kernel_name="hisa_list",
        interpret=interpret,
    )(masks, visible)
    return tokens.reshape(T, capacity), count


def _body(plan: Plan, masks_gmem: Ref, visible_gmem: Ref, o_gmem: Ref, count_gmem: Ref, smem: Smem) -> None:
    # A warp-group by itself:   words in device memory  ->  its list in shared memory  ->  copy engine  ->  o
    #
    # The list is used again when the copy has read it. Nothing is shared: what hides a warp-group's waits is the
    # others.
    cta, group = lax.axis_index("cta"), lax.axis_index("warpgroup")
    rank, n_all = cta * plan.n_groups + group, plan.n_ctas * plan.n_groups

    def one_query(i, _):
        t = rank + i * n_all
        n_words = jnp.minimum((visible_gmem[t] + 31) // 32, masks_gmem.shape[1])
        if plan.interpret:
            count = _list_reference(plan, masks_gmem[t], n_words, smem.lists, group)
        else:
            into, scratch = Row(smem.lists, group, plan.capacity), Row(smem.scratch, group, _SCRATCH_WORDS)
            count = list_bits(Words(masks_gmem, t, n_words), into, scratch)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(smem.lists.at[group], o_gmem.at[t])
        count_gmem[t] = count
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        return _

    lax.fori_loop(0, (plan.T - rank + n_all - 1) // n_all, one_query, None)
    # What has been read may still be on its way to device memory.
    pl.when(rank < plan.T)(lambda: plgpu.wait_smem_to_gmem(0))


def _list_reference(plan: Plan, words: Array, n_words: Array, lists: Ref, group: Array) -> Array:
    """`list_bits` in jnp, for interpret mode, which cannot run PTX."""
    word = jnp.arange(words.shape[0], dtype=jnp.int32)
    bits = (jnp.where(word < n_words, words, 0)[:, None] >> jnp.arange(32, dtype=jnp.int32)) & 1
    count = jnp.sum(bits)
    tokens = jnp.nonzero(bits.reshape(-1), size=plan.capacity, fill_value=-1)[0].astype(jnp.int32)
    lists[group] = tokens.reshape(-1, LINE)
    return count
