"""Lists of chosen tokens on NVIDIA GPUs: any order, holes, repeats; what nobody chose leaves no trace.

On a GPU at real sizes, interpreted at small ones: Mosaic's interpreter takes seconds a call, so it has a few.
All that is interpreted costs 8 s.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hisa_jax.kernels_pallas.triton import sparse_mla as triton
from tests import contract_lists
from tests.contract_lists import Case

pytestmark = pytest.mark.filterwarnings("ignore:The Pallas Triton backend is deprecated:DeprecationWarning")
SMALL = Case(K=150, N=24, Dk=80, value_dim=64)  # heads that are not whole tiles
SMALL_HOPPER = Case(K=128, N=16, Dk=576, value_dim=512, only=(0, 4, 6))
REAL = Case(K=2048, N=128, Dk=576, value_dim=512, rows=8192)
# Each form, and in turn a list in one piece and in parts.
IN_TURN = pytest.mark.gate("whole-one_piece", "splits-pages_of_1", "whole-pages_of_64", "splits-mesh")
TILES = triton.Config(tile_n=16, tile_s=16)
PIECE, *PAGES, MESH = contract_lists.forms(page_sizes=(1, 64))


@pytest.fixture(params=[TILES, dataclasses.replace(TILES, n_splits=3)], ids=["whole", "splits"])
def triton_interpreted(request, monkeypatch):
    contract_lists.interpreted(monkeypatch, "triton", config=request.param, interpret=True)


@IN_TURN
@pytest.mark.parametrize("form", [PIECE, *PAGES, MESH], ids=str)
def test_a_list_may_have_any_order_holes_and_repeats_in_triton(triton_interpreted, form):
    contract_lists.check_any_order(SMALL, form)
    contract_lists.check_counts(SMALL, form)


@IN_TURN
@pytest.mark.parametrize("form", [PIECE, *PAGES, MESH], ids=str)
def test_rows_that_are_not_selected_leave_no_trace_in_triton(triton_interpreted, form):
    contract_lists.check_no_trace(SMALL, form)


def test_lists_keep_their_promises_on_hopper_interpreted(interpret, monkeypatch):
    contract_lists.interpreted(monkeypatch, "mosaic_gpu", n_ctas=1, interpret=interpret)
    contract_lists.check_any_order(SMALL_HOPPER, PAGES[1])
    contract_lists.check_no_trace(SMALL_HOPPER, PAGES[1])


@pytest.fixture(params=["mosaic_gpu", "triton"])
def on_gpu(request):
    """A backend that this device can run, or a skip."""
    if jax.default_backend() != "gpu":
        pytest.skip("needs an NVIDIA GPU")
    if request.param == "mosaic_gpu" and jax.devices()[0].compute_capability != "9.0":
        pytest.skip("needs a Hopper GPU")
    return request.param


@pytest.mark.gpu
@pytest.mark.parametrize("form", [PIECE, *PAGES, MESH], ids=str)
def test_lists_may_have_any_order_on_device(on_gpu, form):
    contract_lists.check_any_order(REAL, form, on_gpu)
    contract_lists.check_counts(REAL, form, on_gpu)


@pytest.mark.gpu
@pytest.mark.parametrize("form", [PIECE, *PAGES, MESH], ids=str)
def test_rows_that_are_not_selected_leave_no_trace_on_device(on_gpu, form):
    contract_lists.check_no_trace(REAL, form, on_gpu)


@pytest.mark.gpu
@pytest.mark.parametrize("N", [16, 24, 40, 128])
def test_any_number_of_heads_on_device(on_gpu, N):
    """A last tile of heads that is not whole writes nobody else's."""
    if on_gpu == "mosaic_gpu" and N not in (16, 128):
        pytest.skip(f"{on_gpu} declines {N} heads")
    contract_lists.check_any_order(dataclasses.replace(REAL, N=N, K=300), PIECE, on_gpu)


@pytest.mark.gpu
def test_memory_is_read_within_bounds(on_gpu):
    """Small, for compute-sanitizer: pages in any order, lists of every kind, NaN in what is not selected."""
    case = dataclasses.replace(REAL, K=200, N=64, rows=640)
    for form in (PIECE, *PAGES):
        contract_lists.check_no_trace(case, form, on_gpu)


def test_heads_are_padded_to_whole_tiles():
    """What a program reads and writes of a tile that is not whole is up to jax: the kernel is given none."""
    shapes = ((1, 2, 24, 80), jnp.bfloat16), ((1, 70, 80), jnp.bfloat16), ((1, 2, 40), jnp.int32)
    attend = lambda *x: triton.sparse_mla(*x, value_dim=64, scale=0.1, config=TILES, interpret=True)  # noqa: E731
    jaxpr = jax.make_jaxpr(attend)(*(jax.ShapeDtypeStruct(*shape) for shape in shapes))
    (call,) = (eqn for eqn in jaxpr.jaxpr.eqns[0].params["jaxpr"].jaxpr.eqns if eqn.primitive.name == "pallas_call")
    for block in call.params["grid_mapping"].block_mappings:
        tiles = (getattr(tile, "block_size", 1) for tile in block.block_shape)  # 1 of an axis that it leaves out
        assert not np.any(np.remainder(block.array_aval.shape, tuple(tiles))), block
