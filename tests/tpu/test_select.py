"""`select` on TPU kernels keeps the contract, and says what they do not take."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import hisa_jax as hj
from hisa_jax import dispatch, dispatch_stage
from tests import draw, oracle

METHODS = {
    "dsa": hj.Dsa(topk=40),
    "hisa": hj.Hisa(topk=40, block_size=64, block_topk=3),
    "block_sparse": hj.BlockSparse(topk=192, block_size=64),
}
V5E = dispatch.Device(platform="tpu", kind="TPU v5 lite")


@pytest.mark.exhaustive  # test_ragged.py has calls by the public functions in the gate
@pytest.mark.parametrize("method", METHODS)
def test_selects_what_the_oracle_selects(implementation, method):
    q, k, w = draw.few_scores(2, 5, 330, 16, 64)
    q, k = (draw.cast(x, "bfloat16") for x in (q, k))
    options = dict(query_positions=np.array([[-1, 0, 64, 100, 329], [3, 190, 191, 192, 260]], np.int32))
    options["lengths"] = np.array([330, 201], np.int32)
    reference = oracle.select(q, k, w, METHODS[method], **options)
    got = hj.select(
        *map(jnp.asarray, (q, k, w)), METHODS[method], implementation=implementation, return_scores=True,
        return_blocks=method != "dsa", **jax.tree.map(jnp.asarray, options),
    )  # fmt: skip
    # The mean of a partly filled block is not exact.
    oracle.assert_same_selection(
        got.indices, got.count, reference, 0.0 if method == "dsa" else 1e-2, scores=got.scores, blocks=got.blocks
    )


@pytest.mark.exhaustive
def test_with_all_blocks_kept_hisa_is_the_flat_indexer(implementation):
    q, k, w = map(jnp.asarray, draw.inputs(1, 3, 150, 16, 64, dtype="bfloat16"))
    positions = jnp.array([[10, 100, 149]])
    hisa, dsa = (
        hj.select(q, k, w, METHODS[name], query_positions=positions, implementation=implementation,
                  return_blocks=name == "hisa")
        for name in ("hisa", "dsa")
    )  # fmt: skip
    np.testing.assert_array_equal(hisa.indices, dsa.indices)
    np.testing.assert_array_equal(hisa.blocks[0], [[0, -1, -1], [0, 1, -1], [0, 1, 2]])


def problem(**changes):
    options = dict(H=64, D=128, S=65536, q_dtype="bfloat16", k_dtype="bfloat16", method=hj.Hisa())
    return dispatch.Problem(**options | changes)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        (dict(S=1 << 21, method=hj.Dsa()), "the flat indexer needs at most 1179648 keys"),
        (dict(S=1 << 22, page_size=32), "needs at most 65536 pages a request"),
        (dict(page_size=256), "needs blocks of whole pages"),
        (dict(method=hj.BlockSparse(topk=2048, block_size=32)), "blocks of 64, 128 or 256"),
        (dict(S=1 << 23, method=hj.BlockSparse(topk=2048, block_size=8, scored_by="max")), "at most 589824 blocks"),
        (dict(q_dtype="float32", k_dtype="float32"), "float32"),
    ],
)
def test_what_it_does_not_take_is_declined_with_the_reason(changes, reason):
    assert dispatch.reasons(V5E, problem())["mosaic_tpu"] is None
    assert reason in dispatch.reasons(V5E, problem(**changes))["mosaic_tpu"]


@pytest.mark.parametrize(
    "method",
    [hj.Hisa(), hj.Dsa(), hj.BlockSparse(), hj.BlockSparse(topk=64, block_size=8, scored_by="max")],
    ids=("hisa", "dsa", "block_sparse", "best_token"),
)
@pytest.mark.parametrize("changes", [{}, dict(is_packed=True), dict(is_packed=True, page_size=16)])
def test_takes_every_method_in_every_form(method, changes):
    assert dispatch.reasons(V5E, problem(method=method, **changes))["mosaic_tpu"] is None


def test_a_tpu_is_asked_for():
    cpu = dispatch.Device(platform="cpu", kind="cpu")
    assert dispatch.reasons(cpu, problem())["mosaic_tpu"] == "needs a TPU, this device is 'cpu'"
    attention = dispatch_stage.AttentionProblem(N=128, key_dim=576, value_dim=512, dtype="bfloat16")
    assert dispatch_stage.attention_reasons(cpu, attention)["mosaic_tpu"] == "needs a TPU, this device is 'cpu'"
    assert dispatch_stage.attention_reasons(V5E, attention)["mosaic_tpu"] is None
    hopper = dispatch.Device(platform="gpu", kind="NVIDIA H200", compute_capability="9.0")
    assert next(iter(dispatch_stage.attention_reasons(hopper, attention))) == "mosaic_gpu"
    assert dispatch.reasons(hopper, problem())["mosaic_gpu"] is None
