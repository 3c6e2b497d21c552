"""The experiment on Lighthouse: its arms, and what measures them."""

import pytest

from bench import pretraining
from bench.__main__ import main
from hisa_jax.models.training.arms import ARMS, arm


def test_all_arms_read_as_many_bytes():
    read = {
        name: sum(stage.rows * stage.context * stage.steps for stage in recipe().stages)
        for name, recipe in ARMS.items()
        if name != "arms"
    }
    assert len(read) == 3 and len(set(read.values())) == 1, read


def test_an_arm_that_is_none_is_named():
    with pytest.raises(ValueError, match="name is 'sparse', wanted one of dense, lighthouse, lighthouse-only"):
        arm("sparse")


def test_a_ratio_is_the_context_over_the_tokens_in_kept_blocks():
    flat, *hisa, dense = pretraining.variants(256, 16384)
    kept = {variant.name: variant.method.block_size * variant.method.block_topk for variant in hisa}
    assert kept == {f"HISA 1 in {ratio}": 16384 // ratio for ratio in (16, 8, 4, 2)}
    assert flat.method.topk == 256 and dense.method.topk == 16384
    # One that leaves fewer than topk tokens is left out.
    assert [variant.name for variant in pretraining.variants(256, 1024)[1:-1]] == ["HISA 1 in 4", "HISA 1 in 2"]


def test_a_checkpoint_that_is_none_is_a_clear_error(capsys):
    assert main(["pretraining", "--checkpoint", "nowhere"]) == 2
    assert "--checkpoint nowhere: no such folder" in capsys.readouterr().err
