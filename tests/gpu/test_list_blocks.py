"""`list_blocks`: its PTX, run by a machine in NumPy, against what XLA lists."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

from hisa_jax.kernels_pallas.mosaic_gpu import refine, refine_few
from hisa_jax.kernels_pallas.mosaic_gpu.ptx.list_blocks import OPERANDS, list_ptx
from hisa_jax.kernels_pallas.mosaic_gpu.refine_body import META
from hisa_jax.kernels_pallas.operands import KeptBlocks, Operands
from hisa_jax.kernels_pallas.pages import Pages
from tests.gpu.ptx_machine import Machine


@pytest.mark.parametrize("has_all_tiles", [False, True], ids=["own_tiles", "all_tiles"])
@pytest.mark.parametrize(
    ("m", "block_size", "page_size", "n_parts"),
    [(64, 128, 64, 1), (64, 128, 128, 8), (50, 128, None, 4), (200, 32, 32, 2), (20, 256, 32, 2)],
)
def test_a_part_lists_what_xla_lists(m, block_size, page_size, n_parts, has_all_tiles):
    rng, T, n_blocks = np.random.default_rng(0), 5, 300
    ids = np.full((T, m), -1, np.int32)
    for t, n in enumerate((m, m - 1, m // 3, 1, 0)):
        ids[t, :n] = np.sort(rng.permutation(n_blocks)[:n])
    visible, first = np.asarray([9000, 8000, 7000, 3, 0], np.int32), 7 * np.arange(T, dtype=np.int32)
    kept = KeptBlocks(ids=jnp.asarray(ids), visible=jnp.asarray(visible), first=jnp.asarray(first), size=block_size)
    pages, table = None, np.zeros(1, np.int32)
    if page_size is not None:
        # Shorter than what is asked for, and of pages that there are not.
        table = rng.integers(-3, 900, 310 * block_size // page_size).astype(np.int32)
        pages = Pages(table=jnp.asarray(table), size=page_size, n_pages=850)
    if n_parts > 2:  # a query of each of five sequences, the last one padding
        sequence = jnp.asarray([0, 1, 2, 3, 7])
        first = np.asarray([0, 1, 2, 3, 3], np.int32) * 11
        kept = dataclasses.replace(kept, first=jnp.asarray(first), sequence=sequence, n_sequences=4, apart=11)
    config = refine_few.Config(ring=4, n_ctas=n_parts)
    parts = refine.parts_of(kept, n_parts, config)
    if has_all_tiles:
        parts = dataclasses.replace(parts, count=None)
    operands = Operands(jnp.zeros((T, 64, 128)), jnp.zeros((T, 64)), jnp.zeros((1, 128)), None, pages)
    arrays = refine.plan_of(operands, parts, None, config, 132, interpret=False)
    arrays = dataclasses.replace(arrays, keeps_all=7000 if n_parts == 1 else 0)
    plan = refine.with_lists(arrays, kept, parts, pages, has_all_tiles=has_all_tiles)
    # Of one part alone there is no all_tiles: it has those of its blocks.
    wanted = np.asarray(refine.inputs_of(operands, parts, arrays).meta)
    lists = plan.lists if n_parts > 1 else dataclasses.replace(plan.lists, n_tiles=None)

    text = list_ptx(lists)
    for i in reversed(range(len(OPERANDS))):
        text = text.replace(f"${i}", f"o_{OPERANDS[i]}")
    # What the kernel would be given.
    _, seen, begins, _ = (np.asarray(x) for x in refine.inputs_of(operands, kept, plan).meta)
    memory = np.concatenate([ids.reshape(-1), seen, begins, table]).astype(np.int32).view(np.uint32)
    n_words = plan.m + META
    for t in range(T * n_parts):
        query, part = divmod(t, n_parts)
        at = dict(IDS=query * m, VISIBLE=T * m + query, FIRST=T * m + T + query, TABLE=T * m + 2 * T)
        at |= dict(META=0, PAGES=n_words)
        operands_of = {f"o_{name}": 4 * word for name, word in at.items()} | {"o_COLUMN": part * lists.n_own}
        run = Machine(text, 32, operands_of, memory, 4 * (n_words + max(plan.n_listed, 1)), seed=t)
        run.run()
        got = run.smem.view(np.int32)[: n_words + plan.n_listed]
        n_listed = n_words + lists.n_own * lists.per_block if pages else n_words
        np.testing.assert_array_equal(got[:n_listed], wanted[t, :n_listed], err_msg=f"part {t}")
        # What a last tile may ask for beyond is a page that there is.
        assert ((got[n_listed:] >= 0) & (got[n_listed:] < 850)).all()
