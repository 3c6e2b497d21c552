"""Rows of the GPU bench, as far as a machine without one can tell; the scan's are interpreted. 8 s in the gate."""

import dataclasses
import functools
import types

import jax
import numpy as np
import pytest

import hisa_jax as hj
from bench import shapes
from bench.gpu import attention_rows, entry_rows, limit_rows, scan_checks, scan_rows
from bench.gpu.command import check_again
from bench.gpu.rows import rows
from hisa_jax.kernels_pallas.triton import stages

TINY = dataclasses.replace(shapes.DSV32, H=16, D=64, topk=16, block_size=8, block_topk=4)


def test_every_row_has_a_name_of_its_own_and_a_floor():
    every = list(rows())
    names = [(x.row, x.implementation, x.shape, x.context, x.dtype) for x in every]
    assert len(set(names)) == len(names)
    assert all(row.floor_ms > 0 for row in every)


@pytest.fixture
def interpreted(monkeypatch):
    """The scan's rows on Triton's stages, interpreted; they are all called with positions alone."""
    parts = {name: getattr(stages, name) for name in ("scan_heads", "scan_sort_keys", "kth", "scan_masks")}
    parts = {name: functools.partial(_interpreted, part) for name, part in parts.items()}
    parts["list_tokens"] = lambda *x: stages.list_tokens(*x, interpret=True)
    parts["refine_tokens"] = functools.partial(_interpreted, stages.refine_tokens)
    for module in (scan_rows, scan_checks):
        monkeypatch.setattr(module, "stages", types.SimpleNamespace(**parts))


def _interpreted(part, *arguments):
    return part(*arguments, True)


def damaged(leaf):
    """Other numbers, in other places."""
    leaf = np.array(leaf)
    return np.roll(leaf, 1, axis=-1) if leaf.ndim > 1 else leaf + np.asarray(1, leaf.dtype) * 10**7


@pytest.mark.unoptimised
@pytest.mark.parametrize("name", ["scan_heads", "scan_samples", "scan_masks", "list_tokens", "refine_tokens"])
@pytest.mark.gate("scan_masks")
def test_stages_of_the_scan_pass_their_checks_and_damaged_ones_do_not(interpreted, name):
    row = next(row for row in scan_rows.of_stages(TINY, 1024, T=7) if row.row == name)
    f, operands, check = row.make()
    out = jax.tree.map(np.asarray, jax.jit(f)(*operands))
    check(out)
    with pytest.raises(AssertionError):
        check(jax.tree.map(damaged, out))
    if name == "scan_masks":  # of a query that sees 33 tokens two words have a meaning
        *others, visible = operands
        found = np.asarray(row.defined(np.ones_like(out), (*others, np.full_like(visible, 33))))
        assert (found[:, :2] == 1).all() and (found[:, 2:] == 0).all() and found.shape[1] > 2


@pytest.mark.unoptimised
def test_a_whole_scan_passes_its_check_and_a_damaged_one_does_not(interpreted):
    f, operands, check = scan_rows.whole(TINY, 1024, implementation="xla", T=7).make()
    out = jax.tree.map(np.asarray, jax.jit(f)(*operands))
    check(out)
    indices = out[0].copy()
    indices[..., 3] = indices[..., 2] + 1  # of no merit
    with pytest.raises(AssertionError):
        check((np.sort(indices, axis=-1), out[1]))


@pytest.mark.unoptimised
@pytest.mark.exhaustive
@pytest.mark.parametrize("what", ["each_head", "source", "listed"])
def test_rows_of_other_indexers_pass_their_checks_and_damaged_ones_do_not(what):
    small = dict(topk=64, block_size=16, keep_first=0, scored_by="max")
    methods = {"each_head": hj.BlockSparse(activation=None, per_head=True, **small)}
    method, options = methods.get(what, hj.BlockSparse(**small)), dict(T=5, implementation="xla")
    if what == "listed":
        row = limit_rows.listed(TINY, method, 1, context=256, **options)
    else:
        row = limit_rows.units(TINY, method, 256, **options)
    f, operands, check = row.make()
    out = jax.tree.map(np.asarray, jax.jit(f)(*operands))
    check(out)
    with pytest.raises(AssertionError):
        check(jax.tree.map(lambda x: np.sort(np.where(x == x.max(), x.min(), x), axis=-1), out))


@pytest.mark.unoptimised
@pytest.mark.parametrize("what", ["tokens", "blocks", "dense"])
@pytest.mark.gate("blocks")
def test_attention_passes_its_check_and_a_damaged_one_does_not(what):
    shape = attention_rows.Shape(Hq=4, G=2, D=16, topk=32, block_size=8)
    if what == "dense":
        row = attention_rows.dense(shape, 2, 3, 131, implementation="xla")
    else:
        size = shape.block_size if what == "blocks" else 1
        row = attention_rows.sparse(shape, 2, 3, 131, block_size=size, implementation="xla")
    f, operands, check = row.make()
    out = np.asarray(jax.jit(f)(*operands))
    check(out)
    with pytest.raises(AssertionError):
        check(damaged(out))


@pytest.mark.unoptimised
@pytest.mark.parametrize("name", ["dsa", "hisa", "scan"])
@pytest.mark.parametrize("is_decoding", [False, True])
@pytest.mark.exhaustive
def test_pools_pass_their_checks_and_damaged_ones_do_not(interpreted, name, is_decoding):
    model = dataclasses.replace(TINY, H=4, topk=32, block_size=16, entry_size=4)
    method, options = model.methods()[name], dict(implementation="xla")
    if name == "scan":  # of 4 heads with 4 exact ones would be flat
        method = dataclasses.replace(method, exact_heads=1)
    row = (
        entry_rows.decode(model, method, 2, 1024, **options)
        if is_decoding
        else entry_rows.prefill(model, method, 1027, T=7, **options)
    )
    f, operands, check = row.make()
    out = jax.tree.map(np.asarray, jax.jit(f)(*operands))
    check(out)
    with pytest.raises(AssertionError):
        check((damaged(out[0]), *out[1:]))


def test_calls_in_a_row_must_have_the_bits_of_the_one_that_was_checked():
    first = {"indices": np.arange(4), "scores": np.asarray([np.nan, 0.5])}
    check_again(first, lambda: {name: x.copy() for name, x in first.items()})
    calls = iter([first, first, first | {"scores": np.asarray([np.nan, -0.5])}, first, first])
    with pytest.raises(AssertionError, match="calls in a row have other bits"):
        check_again(first, lambda: next(calls))
