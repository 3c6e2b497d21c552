"""Candidates of a tile that passed, gathered into lists: the PTX, run by a machine in NumPy. A second in all."""

import re

import numpy as np
import pytest

from hisa_jax.kernels_pallas.mosaic_gpu.ptx.gather_survivors import gather_ptx
from hisa_jax.kernels_pallas.sort_key import INVISIBLE
from tests.gpu import reference
from tests.gpu.ptx_machine import Machine

NAMES = ("LISTED", "NEXT", "SORT_KEYS", "POSITIONS", "SCRATCH", "MASKS", "X", "WORD", "WORDS", "COUNT", "START")
K, CAPACITY, START = 512, 512 + 2048 + 512, 100_000
POSITIONS, SCRATCH = 4 * CAPACITY, 8 * CAPACITY  # in shared memory, after the sort keys


def gather(passed, x, word):
    """A list that begins with K old ones -> how long it is, the next word, sort keys and positions of the new ones."""
    n_words = len(passed) // 32
    tile = reference.side_by_side(x, passed, 12345).astype(np.int32)
    memory = np.concatenate([np.packbits(passed, bitorder="little").view(np.uint32), tile.view(np.uint32)])
    text = gather_ptx(CAPACITY).strip().removeprefix("{").removesuffix("}")
    text = re.sub(r"\$(\d+)", lambda number: f"o{number[1]}_", text)
    values = dict(
        SORT_KEYS=0, POSITIONS=POSITIONS, SCRATCH=SCRATCH, MASKS=0, X=4 * n_words, WORD=word, WORDS=n_words, COUNT=K,
        START=START,
    )  # fmt: skip
    operands = {f"o{NAMES.index(name)}_": value for name, value in values.items()}
    machine = Machine(text, 128, operands, memory, SCRATCH + 64)
    machine.run()
    listed, following = (int(machine.warps[0].registers[f"o{i}_"][0]) for i in range(2))
    smem = machine.smem.view(np.int32)
    assert (smem[listed : -(-listed // 512) * 512] == INVISIBLE).all(), "the rest of a step is not empty"
    return listed, following, smem[K:listed], smem[POSITIONS // 4 + K : POSITIONS // 4 + listed]


@pytest.mark.parametrize("share", [0.0, 0.15, 0.6, 1.0])
def test_lists_hold_what_passed_in_order_and_go_on_where_one_was_full(share):
    """Of a share of 0.6 a round nearly fills a list; where all pass a list takes half of one."""
    rng = np.random.default_rng(0)
    passed = rng.random(9 * 1024 + 32) < share
    x = rng.integers(-1000, 1000, len(passed)).astype(np.int32)
    word, columns, n_lists = 0, [], 0
    while word < len(passed) // 32:
        listed, following, sort_keys, positions = gather(passed, x, word)
        assert following > word and listed - K == passed[32 * word : 32 * following].sum()
        np.testing.assert_array_equal(sort_keys, x[positions - START])
        columns, word, n_lists = np.concatenate([columns, positions - START]), following, n_lists + 1
    np.testing.assert_array_equal(columns, np.flatnonzero(passed))
    assert n_lists == {0.0: 1, 0.15: 1, 0.6: 3, 1.0: 5}[share]
