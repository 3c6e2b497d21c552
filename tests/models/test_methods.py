"""Swapping the indexer: every layer selects as its method says, and nothing else changes."""

import dataclasses

import jax
import numpy as np
import pytest
from flax import nnx

import hisa_jax as hj
from hisa_jax import models
from hisa_jax.models.plan import make_plan
from tests import oracle
from tests.own_scores import FUNCTIONS

from . import golden

HISA = hj.Hisa(topk=8, block_size=4, block_topk=3)
SCAN = hj.Scan(topk=8, candidates=12, exact_heads=1, unit=2)
cases = pytest.mark.parametrize("case", golden.CASES)


@pytest.mark.slow
@cases
@pytest.mark.gate("glm52")  # whose layers share selections
def test_hisa_that_keeps_all_blocks_gives_the_golden_logits(case):
    method = hj.Hisa(topk=8, block_size=4, block_topk=10)
    out = golden.model(case).with_method(method).run(golden.ids(case), trace=True)
    golden.assert_close(out.logits, golden.numbers(case)["logits"], golden.LOGITS)
    for i, layer in enumerate(out.layers):
        if golden.selects(case, i):
            want = golden.numbers(case)[f"L{i}.index_selected"]
            np.testing.assert_array_equal(golden.as_mask(layer.selection, want.shape[-1]), want)


@pytest.mark.slow
def test_a_scan_that_keeps_all_tokens_gives_the_golden_logits():
    method = hj.Scan(topk=8, candidates=40)
    logits = golden.model("dsv32").with_method(method)(golden.ids("dsv32"))
    golden.assert_close(logits, golden.numbers("dsv32")["logits"], golden.LOGITS)


@pytest.mark.slow
@cases
@pytest.mark.gate("3-dsv32")
@pytest.mark.parametrize("block_topk", [2, 3, 5])
def test_every_layer_selects_the_top_k_of_the_golden_scores_in_the_kept_blocks(case, block_topk):
    """Each layer by itself, after layers that are flat: then its inputs are the golden ones."""
    method = hj.Hisa(topk=8, block_size=4, block_topk=block_topk)
    inputs, numbers = golden.index_inputs(case), golden.numbers(case)
    for i in range(golden.model(case).config.num_hidden_layers):
        if not golden.selects(case, i):
            continue
        model = golden.model(case).with_method({i: method})
        selection = model.run(golden.ids(case), trace=True).layers[i].selection
        assert_top_k_in_kept_blocks(
            selection, [inputs[f"L{i}.{x}"] for x in "qkw"], numbers[f"L{i}.index_scores"], method
        )


def assert_top_k_in_kept_blocks(selection, inputs, scores, method):
    """Blocks are kept by the mean of their keys; the first and the query's own always."""
    blocks = oracle.select(*inputs, method).blocks
    B, T, S = scores.shape
    for b in range(B):
        for t in range(T):
            kept = blocks[b, t]
            assert kept[0] == 0 and kept[-1] == t // method.block_size
            in_kept = np.isin(np.arange(S) // method.block_size, kept) & (np.arange(S) <= t)
            best = np.argsort(-np.where(in_kept, scores[b, t], -np.inf), kind="stable")
            want = sorted(best[: min(method.topk, in_kept.sum())].tolist())
            got = np.asarray(selection.indices[b, t])
            assert got[got >= 0].tolist() == want, f"query {t} of row {b}: {got.tolist()}, wanted {want}"


@pytest.mark.gate("glm52", "glm52-scan")
@pytest.mark.parametrize(
    ("case", "method"), [*((case, HISA) for case in golden.CASES), ("glm52", SCAN)], ids=[*golden.CASES, "glm52-scan"]
)
def test_every_layer_selects_as_the_oracle_does(case, method):
    layers = golden.model(case).with_method(method).run(golden.ids(case), trace=True).layers
    for i, layer in enumerate(layers):
        if layer.index_inputs is None:
            assert layer.selection is layers[i - 1].selection
            continue
        inputs = [np.asarray(x) for x in layer.index_inputs]
        oracle.assert_same_selection(
            layer.selection.indices, layer.selection.count, oracle.select(*inputs, method), tolerance=1e-5
        )


def test_block_sparse_in_every_layer_selects_whole_blocks():
    method = hj.BlockSparse(topk=8, block_size=4)
    layer = golden.model("glm5").with_method(method).run(golden.ids("glm5"), trace=True).layers[2]
    inputs = [np.asarray(x) for x in layer.index_inputs]
    oracle.assert_same_selection(
        layer.selection.indices, layer.selection.count, oracle.select(*inputs, method), tolerance=1e-5
    )


def test_swapping_the_method_shares_every_weight():
    model = golden.model("glm52")
    other = model.with_method(HISA)
    same = jax.tree.map(lambda a, b: a is b, nnx.state(model), nnx.state(other))
    assert all(jax.tree.leaves(same)) and len(jax.tree.leaves(same)) > 50
    assert other.plan.layers[0] == HISA and model.plan.layers[0] == hj.Dsa(topk=8)


def test_no_method_is_the_flat_indexer_of_the_checkpoint():
    assert golden.model("dsv32").plan.layers == (hj.Dsa(topk=8),) * 3


def test_methods_by_layer():
    config = golden.model("dsv32").config
    flat = hj.Dsa(topk=8)
    assert make_plan(HISA, config).layers == (HISA,) * 3
    assert make_plan([flat, HISA, HISA], config).layers == (flat, HISA, HISA)
    assert make_plan({1: HISA}, config).layers == (flat, HISA, flat)
    loaded = models.from_pretrained(golden.FOLDER / "dsv32", {0: flat, 1: HISA, 2: HISA})
    assert loaded.plan.layers == (flat, HISA, HISA)


@pytest.mark.slow
def test_a_rule_is_asked_for_every_layer_and_phase():
    asked = set()

    def flat_at_the_end_of_the_prompt(layer, phase):
        asked.add((layer, phase))
        return hj.Dsa(topk=8) if phase == "last_prefill" else HISA

    model = golden.some_layers("glm5", (0, 2)).with_method(flat_at_the_end_of_the_prompt)
    tokens = golden.ids("glm5")[:1, :30]
    result = models.generate(model, tokens.tolist(), 4, chunk=10, report_recall=True)
    assert asked == {(i, phase) for i in range(2) for phase in ("prefill", "last_prefill", "decode")}
    # 12 and 20 prompt tokens are beyond topk in flat and in other chunks: only the former are recalled in full.
    assert 0 < result.recall["decode"][0] < 1
    assert 2 / 3 < result.recall["prefill"][0] < 1


@pytest.mark.parametrize(
    ("method", "error", "message"),
    [
        ("hisa", TypeError, "method is str, wanted hj.Hisa"),
        ([HISA], ValueError, "method is a sequence of 1, wanted one for each of 3 layers"),
        ([HISA, HISA, None], TypeError, r"method\[2\] is NoneType"),
        ({3: HISA}, ValueError, "method names layer 3, wanted an int from 0 to 2"),
        ({0: 8}, TypeError, r"method\[0\] is int"),
        (hj.Dsa(topk=8, entry_size=4), ValueError, r"method is Dsa\(topk=8, entry_size=4\), wanted one whose keys are"),
        ({1: hj.Dsa(topk=8, per_head=True)}, ValueError, r"method\[1\] is Dsa\(topk=8, per_head=True\), wanted one"),
    ],
)
def test_what_is_no_method_is_refused(method, error, message):
    with pytest.raises(error, match=message):
        golden.model("dsv32").with_method(method)


def test_a_rule_that_gives_no_method_is_refused():
    model = golden.model("dsv32").with_method(lambda layer, phase: None)
    with pytest.raises(TypeError, match=r"method\(0, 'prefill'\) is NoneType"):
        model(golden.ids("dsv32"))


def test_layers_choose_by_functions_of_ones_own():
    """Traced alone, 1 s: that tokens are those of each request alone, an exhaustive test of the engine has."""
    asked = set()

    def noted(name):
        def function(*given):
            asked.add(name)
            return FUNCTIONS[name](*given)

        return function

    method = dataclasses.replace(HISA, **{name: noted(name) for name in FUNCTIONS})
    model = golden.model("dsv32").with_method(method)
    jax.eval_shape(model, golden.ids("dsv32"))
    assert asked == {"pool", "block_score", "token_score"}
