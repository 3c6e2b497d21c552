"""The bench of selections that several GPUs share, as far as it goes without any."""

import numpy as np
import pytest

from bench import sharded
from bench.__main__ import main


def test_rows_are_prefills_and_decoding_at_both_contexts():
    names = [row.row for row in sharded.rows((2, 4))]
    assert names[:2] == ["dsa_prefill_128K", "dsa_prefill_1M"]
    assert {"hisa_decode128_128K", "hisa_decode1_1M", "scan_prefill_1M", "sparse_mla_decode32_8K"} <= set(names)
    assert len(set(names)) == len(names) == 22


def test_selections_agree_by_the_share_of_the_wanted_tokens():
    wanted = np.array([[[3, 5, 9, -1]]])
    assert sharded._share_of_tokens(np.array([[[9, 3, 5, -1]]]), wanted) == 1
    for got, share in (([5, 3, 2, 1], "0.6667"), ([-1, -1, -1, -1], "0.0000")):
        with pytest.raises(AssertionError, match=f"select {share} of the tokens"):
            sharded._share_of_tokens(np.array([[got]]), wanted)


@pytest.mark.parametrize("wrong", [3.0, np.nan])
def test_outputs_that_differ_or_are_nan_do_not_pass(wrong):
    wanted = np.ones((1, 1, 2, 4), np.float32)
    assert sharded._distance(wanted * 0.99, wanted) == pytest.approx(0.99)
    got = wanted.copy()
    got[0, 0, 1, 2] = wrong
    with pytest.raises(AssertionError, match="differ by"):
        sharded._distance(got, wanted)


def test_without_two_gpus_it_says_so(capsys):
    assert main(["sharded"]) == 2
    assert "needs 2 NVIDIA GPUs or more, this machine has" in capsys.readouterr().err
