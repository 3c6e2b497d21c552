"""`refine_few`: scores and top-k of few queries in one kernel, against `refine`, interpreted and on a GPU.

In the gate it costs 20 seconds.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hisa_jax.kernels_pallas.mosaic_gpu import refine, refine_few
from hisa_jax.kernels_pallas.mosaic_gpu.ptx import select_few
from hisa_jax.kernels_pallas.mosaic_gpu.ptx.cluster_text import CLUSTER_SYNC
from hisa_jax.kernels_pallas.mosaic_gpu.ptx.select_few_text import OPERANDS, row_ptx, select_ptx
from hisa_jax.kernels_pallas.operands import KeptBlocks, Operands
from hisa_jax.kernels_pallas.pages import Pages
from hisa_jax.kernels_pallas.sort_key import INVISIBLE
from tests.gpu import draw
from tests.gpu.ptx_machine import Cluster
from tests.gpu.test_lowering import BF16, E4M3
from tests.gpu.test_topk_few import chosen, rows


def inputs(T, S, m, H, D, block_size, dtype, page_size=None, draw_arrays=draw.integers):
    """Queries of one sequence that keep all blocks, few of them or none, and see all tokens or some."""
    rng = np.random.default_rng(T)
    q, k, scale, w = draw_arrays(3, 1, T, S, H, D, dtype, dtype == E4M3)
    n_blocks = S // block_size
    ids = np.full((T, m), -1, np.int32)
    visible = np.full(T, S - 7, np.int32)
    for t in range(T):
        n = (min(m, n_blocks), 3, 1, 0)[t % 4]
        ids[t, :n] = np.sort(rng.permutation(n_blocks)[:n])
        if n < 2:
            ids[t, :n] = 0
            visible[t] = 5 * n  # `refine` looks at no score of a query that keeps all it sees
    kept = KeptBlocks(
        ids=jnp.asarray(ids), visible=jnp.asarray(visible), first=jnp.zeros(T, jnp.int32), size=block_size
    )
    k, scale = k[0], None if scale is None else scale[0]
    pages = None
    if page_size is not None:
        table = rng.permutation(S // page_size).astype(np.int32)
        order = np.argsort(table)
        k = k.reshape(-1, page_size, D)[order].reshape(S, D)
        scale = None if scale is None else scale.reshape(-1, page_size)[order].reshape(S)
        pages = Pages(table=jnp.asarray(table), size=page_size, n_pages=len(table))
    return Operands(q[0], w[0], k, scale, pages), kept


def check(operands, kept, k_top, config, interpret=False):
    got = refine_few.refine_few(operands, kept, k_top=k_top, config=config, interpret=interpret)
    (_, H, D), itemsize, m = operands.q.shape, operands.k.dtype.itemsize, kept.ids.shape[1]
    of_many = refine.heuristic(H, D, m, kept.size, itemsize, None if operands.pages is None else operands.pages.size)
    wanted = refine.refine(operands, kept, k_top=k_top, config=of_many, n_ctas=3, interpret=interpret)
    for x, y in zip(got, wanted, strict=True):
        np.testing.assert_array_equal(x, y)


@pytest.mark.gate("64-e4m3-page")
@pytest.mark.parametrize(
    ("block_size", "dtype", "page_size"),
    [(64, E4M3, 32), (32, BF16, None), (256, E4M3, None), (128, E4M3, 64)],
    ids=["64-e4m3-page", "32-bf16", "256-e4m3", "128-e4m3-page"],
)
def test_it_chooses_what_refine_chooses(interpret, block_size, dtype, page_size):
    # Two laps of the ring, of which a query of three blocks has one.
    operands, kept = inputs(4, 1024, 768 // block_size, 16, 64, block_size, dtype, page_size)
    config = refine_few.Config(ring=4)
    check(operands, kept, 60, config, interpret)


@pytest.mark.parametrize("name", ["normal", "few values", "0.9 invisible", "limit none", "limit k", "limit k and one"])
@pytest.mark.parametrize("n_ctas", [1, 2])
def test_sort_keys_of_all_ctas_meet_in_the_first(n_ctas, name):
    """In PTX: each CTA stores its part of a row, then the first one selects from it. The row leaves threads without.

    Where as many columns are seen as are chosen, their sort keys may be anything.
    """
    width, k = 3072, 500
    x, limit = rows(width, k)[name]
    row = refine_few.Config().row(width, k, is_full="limit" in name)
    if limit > k:
        x = np.where(np.arange(width) < limit, x, INVISIBLE).astype(np.int32)
    n, own = row.n_threads, width // n_ctas
    assert row.is_there and n * row.each > width and own % n == 0
    ids = np.random.default_rng(1).permutation(1000)[: width // 128].astype(np.int32)

    def with_registers(text, names):
        text = text.strip().removeprefix("{").removesuffix("}")  # no scopes: registers of one name are of all
        for i in reversed(range(len(names))):
            text = text.replace(f"${i}", names[i])
        return text

    stores = "".join(
        f"""add.u32 own, first, {n * i}; mul.wide.u32 word, own, 4; add.s64 word, word, o_X;
ld.global.b32 key, [word];
{with_registers(row_ptx(row, n_ctas), ["own", "o_SMEM", "key"])}
"""
        for i in range(own // n)
    )
    select = select_ptx(row, lambda: select_few.block_position(128, len(ids)))
    text = f"""mov.u32 tid, %tid.x; {"mov.u32 cta, %cluster_ctarank;" if n_ctas > 1 else "mov.b32 cta, 0;"}
mad.lo.u32 first, cta, {own}, tid;
{stores}
{CLUSTER_SYNC if n_ctas > 1 else f"bar.sync 8, {n};"}
setp.ne.s32 p, cta, 0; @p bra end;
{with_registers(select, [f"o_{name}" for name in OPERANDS])}
end:
"""
    start = width + len(ids)
    memory = np.concatenate([x, ids, np.full(k + 1, 77)]).astype(np.int32).view(np.uint32)
    at = dict(X=0, IDS=4 * width, O=4 * start, COUNT=4 * (start + k), SMEM=0, LIMIT=limit)
    Cluster(n_ctas, text, n, {f"o_{name}": value for name, value in at.items()}, memory, row.smem_bytes).run()
    result = memory[start:].view(np.int32)
    positions, count = chosen(x, limit, k, ids)
    np.testing.assert_array_equal(result[:k], positions)
    assert result[k] == count


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("T", "H", "D", "block_size", "m", "dtype", "page_size"),
    [
        (34, 64, 128, 128, 64, E4M3, 64),
        (67, 64, 128, 128, 64, BF16, None),
        (40, 32, 128, 128, 50, E4M3, None),
        (64, 64, 128, 64, 128, E4M3, 64),
        (40, 16, 64, 32, 200, BF16, 32),
        (100, 128, 128, 128, 64, E4M3, None),
        (132, 64, 128, 128, 64, E4M3, 64),
    ],
)
def test_on_the_device(T, H, D, block_size, m, dtype, page_size):
    """Again and again: what CTAs have stored is there when the first one selects."""
    if jax.default_backend() != "gpu":
        pytest.skip("needs an NVIDIA GPU")
    k_top = 2048 if m * block_size > 6000 else 500
    shape = dict(H=H, D=D, block_size=block_size)
    itemsize = jnp.dtype(dtype).itemsize
    config = refine_few.heuristic(T=T, m=m, itemsize=itemsize, topk=k_top, n_sms=132, page_size=page_size, **shape)
    assert config is not None
    for draw_arrays in (draw.integers, draw.normal):
        operands, kept = inputs(T, 16384, m, dtype=dtype, page_size=page_size, draw_arrays=draw_arrays, **shape)
        if page_size is not None:  # all queries are of the first of two sequences, as a number and as its first block
            sequence, n_blocks = jnp.zeros(T, jnp.int32), 8192 // block_size
            kept = dataclasses.replace(kept, sequence=sequence, n_sequences=2, apart=n_blocks)
        for _ in range(3):
            check(operands, kept, k_top, config)


def test_queries_that_leave_half_of_the_ctas_have_two_each():
    of = lambda T, **other: refine_few.heuristic(  # noqa: E731
        **(dict(T=T, H=64, D=128, m=64, block_size=128, itemsize=1, topk=2048, n_sms=132) | other)
    )
    assert [of(T).n_ctas for T in (34, 66, 67, 132)] == [2, 2, 1, 1]
    assert of(33) is of(133) is of(40, m=48) is None  # of more parts, or of several queries a CTA
    assert of(40, m=4).n_ctas == 1 and of(40, m=5).n_ctas == 2  # no CTA without blocks
    assert of(40, m=65) is None  # no row of registers
    assert of(40, H=128, block_size=32, m=256).row(8192, 2048).each == 32
    for H, itemsize in ((64, 1), (64, 2), (128, 1), (128, 2)):
        config = of(40, H=H, itemsize=itemsize, page_size=64)
        n_bytes = config.smem_bytes(H, 128, 64 // config.n_ctas, 128, itemsize, 64)
        assert n_bytes + config.row(8192, 2048).smem_bytes <= refine.SMEM_BYTES
