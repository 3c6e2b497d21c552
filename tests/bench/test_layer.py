"""The bench of whole layers, on a tiny layer. 12 s in the gate."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

from bench.__main__ import main
from bench.layer import command
from bench.layer.checks import check
from bench.layer.choice import NEAR, WrongError, check_best, check_best_of_blocks
from bench.layer.command import PARTS, Bench, Row
from bench.layer.parts import Layer
from bench.layer.setting import served
from hisa_jax.models import published
from hisa_jax.models.methods import make_method

TINY = dataclasses.replace(
    served(published.dsv32()), hidden_size=32, num_attention_heads=2, q_lora_rank=16, kv_lora_rank=16,
    qk_nope_head_dim=8, qk_rope_head_dim=8, v_head_dim=8, index_n_heads=4, index_head_dim=16, index_topk=32,
    hisa_k_block_size=64, hisa_block_topk=3,
)  # fmt: skip
PREFILL = command.setting("tiny", TINY, 1, 8, 512)


@pytest.fixture(scope="module")
def bench():
    return Bench(command.timer())


@pytest.mark.exhaustive  # 10 seconds
def test_a_layer_is_checked_and_timed_whole_and_by_part(bench):
    row = bench.measure(Row(PREFILL, "hisa"))
    assert row["checked"] and row["timer"] == "wall clock" and row["ms_p10"] <= row["ms"] <= row["ms_p90"]
    assert set(row["parts_ms"]) == {*PARTS, "sparse_mla"} and all(ms > 0 for ms in row["parts_ms"].values())
    assert row["row"] in command.line(row)
    lines = command.table([row, row | {"method": "dsa", "ms": 2 * row["ms"]}]).splitlines()
    assert len(lines) == 4 and "| 2.00x |" in lines[2] and "x |" not in lines[3]


@pytest.mark.exhaustive  # 20 seconds each
@pytest.mark.parametrize("method", ["scan", "dsa"])
def test_decoding_is_checked_and_timed(bench, method):
    assert bench.measure(Row(command.setting("tiny", TINY, 3, 1, 256), method))["row"] == f"tiny decode3 256 {method}"


@pytest.mark.exhaustive  # 20 seconds
def test_latents_in_8_bits_are_checked_and_timed(bench):
    config = dataclasses.replace(TINY, latent_dtype="float8_e4m3fn")
    row = bench.measure(Row(command.setting("tiny", config, 1, 8, 512), "hisa"))
    assert row["row"] == "tiny prefill 512 8bit hisa" and row["latents"] == "float8_e4m3fn"


@pytest.mark.exhaustive  # 15 seconds
def test_what_is_wrong_is_noticed():
    layer, method = Layer(PREFILL), make_method("dsa", TINY)
    f, operands = layer.whole(method)
    right = f(*operands)
    check(layer, right, method)
    pages, selection = right.pages, right.selection
    shifted = jnp.maximum(selection.indices - 1, jnp.arange(TINY.index_topk, dtype=jnp.int32)[None, None])
    attended = f(pages, operands[1])  # the output and the selection do not belong together
    wrong = {
        "the output": right._replace(out=right.out * 1.1),
        "off NumPy's": right._replace(pages=dataclasses.replace(pages, latents=jnp.roll(pages.latents, 1, axis=1))),
        "list that is none": right._replace(selection=dataclasses.replace(selection, count=selection.count - 1)),
        "the output is": attended._replace(selection=dataclasses.replace(selection, indices=shifted)),
    }
    for what, result in wrong.items():
        with pytest.raises(WrongError, match=what):
            check(layer, result, method)


def test_a_choice_may_differ_near_the_cut_alone():
    scores = np.random.default_rng(0).normal(size=400)
    order, near = np.argsort(-scores), NEAR * scores.std()
    check_best(order[:50], scores, 0)
    scores[order[50]] = scores[order[49]] - near / 2
    check_best(np.delete(order[:51], 49), scores, 0)
    with pytest.raises(WrongError, match="left out"):
        check_best(order[1:51], scores, 0)
    with pytest.raises(WrongError, match="left out"):
        check_best(np.append(order[:49], order[80]), scores, 0)


def test_blocks_may_differ_near_the_cut_alone():
    size, m, n = 16, 8, 40
    rng = np.random.default_rng(0)
    scores, block_scores = rng.normal(size=n * size - 3), rng.normal(size=n)
    inner = 1 + np.argsort(-block_scores[1:-1])
    block_scores[inner[6]] = block_scores[inner[5]] - NEAR / 10  # the first that is left out is near the last kept

    def best(blocks: np.ndarray, count: int = 40) -> np.ndarray:
        tokens = np.flatnonzero(np.isin(np.arange(len(scores)) // size, blocks))
        return np.sort(tokens[np.argsort(-scores[tokens])[:count]])

    sizes = block_scores, size, m, 0
    kept = np.array([0, n - 1, *inner[:6]])
    check_best_of_blocks(best(kept), scores, *sizes)
    check_best_of_blocks(best(np.array([*kept[:-1], inner[6]])), scores, *sizes)
    check_best_of_blocks(best(kept, 3), scores, *sizes)  # most of the kept blocks have none of the chosen tokens
    for wrong in (
        best(kept[1:]),
        best(kept[:-1]),
        best(np.array([*kept, inner[6]])),
        best(np.array([*kept, inner[9]])),
    ):
        with pytest.raises(WrongError):
            check_best_of_blocks(wrong, scores, *sizes)


def test_sizes_that_do_not_fit_are_a_clear_error(capsys):
    assert main(["layer", "--contexts", "4100"]) == 2
    assert "a context of 4100, wanted a multiple of 64" in capsys.readouterr().err
