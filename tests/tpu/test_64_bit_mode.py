"""With `jax_enable_x64` every kernel is the one that is compiled without it."""

import functools

import jax
import jax.numpy as jnp
import pytest

import hisa_jax as hj
from bench.tpu import aot
from hisa_jax.kernels_pallas import mosaic_tpu
from hisa_jax.kernels_pallas.mosaic_tpu.sparse_attention import sparse_attention
from hisa_jax.kernels_pallas.mosaic_tpu.sparse_mla import sparse_mla
from hisa_jax.layout import BlockLists, Call
from tests import kernel_calls

BF16, I32, F32 = jnp.bfloat16, jnp.int32, jnp.float32
H, D, S, N, SIZE, R, P = 64, 128, 32768, 3000, 128, 8, 64
BLOCKS = dict(block_size=128, block_topk=16)
HISA = dict(topk=500, **BLOCKS)


def shaped(*shape, dtype=I32):
    return jax.ShapeDtypeStruct(shape, dtype)


def batch(B, T):
    """q, k, k_scale, w, visible."""
    k = shaped(B, S, D, dtype=BF16)
    return shaped(B, T, H, D, dtype=BF16), k, None, shaped(B, T, H, dtype=F32), shaped(B, T)


def of_requests(*keys):
    """Queries of R requests over keys."""
    return shaped(70, H, D, dtype=BF16), shaped(*keys, D, dtype=BF16), None, shaped(70, H, dtype=F32), shaped(70)


MLA = shaped(1, 64, 128, 576, dtype=BF16), shaped(1, S, 576, dtype=BF16)
GROUPED = 2 * [shaped(1, S, 2, 128, dtype=BF16)]
PAGES = shaped(70, H, D, dtype=BF16), shaped(70, H, dtype=F32), shaped(70), shaped(R, P), shaped(R + 1)
PACKED = (*of_requests(S), shaped(R + 1), shaped(R + 1))


def paged(select, method):
    """A call over pages, of arrays alone."""

    def call(q, w, visible, table, offsets):
        cache = hj.init_cache(N, SIZE, D, BF16)
        return select(Call(q=q, w=w, visible=visible, query_offsets=offsets, table=table, cache=cache), method)

    return call


def packed(function, **options):
    return lambda *arrays: function(*arrays[:-2], cu_seqlens=arrays[-2:], **options)


CASES = {
    "hisa_prefill": (lambda *arrays: kernel_calls.select_hisa(mosaic_tpu, *arrays, **HISA), batch(1, 64)),
    "hisa_decode": (lambda *arrays: kernel_calls.select_hisa(mosaic_tpu, *arrays, **HISA), batch(4, 1)),
    "flat": (lambda *arrays: kernel_calls.select_flat(mosaic_tpu, *arrays, topk=500), batch(1, 64)),
    "blocks": (lambda *arrays: kernel_calls.select_blocks(mosaic_tpu, *arrays, **BLOCKS), batch(1, 64)),
    "hisa_packed": (packed(functools.partial(kernel_calls.select_hisa, mosaic_tpu), **HISA), PACKED),
    "flat_paged": (paged(mosaic_tpu.select_flat, 500), PAGES),
    "hisa_paged": (paged(mosaic_tpu.select_hisa, hj.Hisa(**HISA)), PAGES),
    "sparse_attention": (
        lambda q, k, v, *lists: sparse_attention(q, k, v, BlockLists(*lists), scale=0.1, block_size=128),
        (shaped(1, 64, 32, 128, dtype=BF16), *GROUPED, shaped(1, 64, 2, 16), shaped(1, 64, 2)),
    ),
    "sparse_mla": (lambda *arrays: sparse_mla(*arrays, value_dim=512, scale=0.1), (*MLA, shaped(1, 64, 2048))),
}


def kernels(f, arrays):
    """What is handed to the compiler of kernels, and the dtypes of the result."""
    with jax.sharding.use_abstract_mesh(aot.abstract_mesh("v5e")):
        traced = jax.jit(f).trace(*arrays)
        text = traced.lower(lowering_platforms=("tpu",)).as_text()
    found = [line.split("backend_config")[1] for line in text.splitlines() if "@tpu_custom_call" in line]
    return found, [x.dtype.name for x in jax.tree.leaves(traced.out_info)]


@pytest.mark.gate("hisa_decode", "sparse_mla")
@pytest.mark.oldest("hisa_decode", "sparse_mla")
@pytest.mark.parametrize("case", CASES)
def test_kernels_are_the_same(case):
    f, arrays = CASES[case]
    found = []
    for is_on in (False, True):  # from one line: kernels say in their bytes where they were called
        with jax.enable_x64(is_on):
            found.append(kernels(f, arrays))
    assert found[0][0] and found[0] == found[1]
