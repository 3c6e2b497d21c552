"""The bench of selections that several GPUs share, as far as it goes without any."""

import numpy as np
import pytest

from bench import sharded
from bench.__main__ import main


def test_rows_are_prefills_and_decoding_at_both_contexts():
    names = [row.row for row in sharded.rows((2, 4))]
    assert names[:3] == ["dsa_prefill_128K", "hisa_prefill_128K", "scan_prefill_128K"]
    assert {"dsa_prefill_1M", "hisa_decode1_128K", "hisa_decode128_128K", "scan_decode1_1M"} <= set(names)
    assert len(set(names)) == len(names) == 18


@pytest.mark.parametrize(("got", "share"), [([3, 5, 9, -1], 1.0), ([5, 3, 2, 1], 2 / 3), ([-1, -1, -1, -1], 0.0)])
def test_the_share_that_is_the_same_is_of_the_tokens_wanted(got, share):
    wanted = np.array([[[3, 5, 9, -1]]])
    assert sharded._same(np.array([[got]]), wanted) == pytest.approx(share)


def test_without_two_gpus_it_says_so(capsys):
    assert main(["sharded"]) == 2
    assert "needs 2 NVIDIA GPUs or more, this machine has" in capsys.readouterr().err
