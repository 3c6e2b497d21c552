"""Lists of chosen tokens on TPU, interpreted: any order, holes, repeats; what nobody chose leaves no trace.

The interpreter that finds races takes seconds a call, so it has few of the cases. All cost 14 s.
"""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

from hisa_jax.kernels_pallas.mosaic_tpu.sparse_mla import Config, runs_of
from tests import contract_lists
from tests.contract_lists import Case

CASE = Case(K=150, N=16, Dk=160, value_dim=128)  # more entries than a block has tokens
PIECE, *PAGES, MESH = contract_lists.forms(page_sizes=(1, 64))
SOME_BLOCKS = Config(tile_s=256)


@pytest.fixture
def kernel(monkeypatch):
    contract_lists.interpreted(monkeypatch, "mosaic_tpu", config=SOME_BLOCKS, interpret=True)


@pytest.mark.gate("one_piece", "pages_of_64")
@pytest.mark.parametrize("form", [PIECE, *PAGES], ids=str)
def test_a_list_may_have_any_order_holes_and_repeats(kernel, form):
    contract_lists.check_any_order(CASE, form)
    contract_lists.check_counts(CASE, form)


# Over a mesh the kernel is compiled once more, and is the same.
@pytest.mark.gate("one_piece", "pages_of_64")
@pytest.mark.parametrize("form", [PIECE, *PAGES, MESH], ids=str)
def test_rows_that_are_not_selected_leave_no_trace(kernel, form):
    contract_lists.check_no_trace(CASE, form)


def test_nothing_is_read_out_of_bounds_and_nothing_races(interpret, monkeypatch):
    case = dataclasses.replace(CASE, K=100, only=(0, 6, 7))
    contract_lists.interpreted(monkeypatch, "mosaic_tpu", config=SOME_BLOCKS, interpret=interpret)
    contract_lists.check_no_trace(case, PIECE)


def test_runs_hold_every_entry_once_and_no_more_than_a_window():
    lists = CASE.lists(320)
    is_start, codes = map(np.asarray, runs_of(jnp.asarray(lists), 320))
    for row, starts, code in zip(lists, is_start, codes, strict=True):
        is_token = (row >= 0) & (row < 320)
        np.testing.assert_array_equal(code[~is_token], -1)
        run, token = code[is_token] // 128, row[is_token]
        np.testing.assert_array_equal(code[is_token] % 128, token % 128)
        assert set(run) == set(np.flatnonzero(starts))
        assert (row[run] // 128 == token // 128).all() and (np.flatnonzero(is_token) - run < 128).all()
    ascending = np.unique(lists[5][lists[5] >= 0])[None]  # one run a block, as many as there must be
    assert np.asarray(runs_of(jnp.asarray(ascending), 320)[0]).sum() == len(np.unique(ascending // 128))
