"""`count_tiles`: its PTX run by a machine in NumPy, against the fusion that counts for many lists."""

import numpy as np
import pytest

from hisa_jax.kernels_pallas.mosaic_gpu.ptx.count_tiles import OPERANDS, tiles_text
from tests.gpu.ptx_machine import Machine

PAIR, KEYS = 128, 900


def lists(K, seed=0):
    """Full, empty, reaching to any column, with indices out of range after the last real one."""
    rng = np.random.default_rng(seed)
    for n in (K, 0, 1, *rng.integers(1, K, 6)):
        row = np.full(K, -1, np.int32)
        row[:n] = rng.integers(0, KEYS, n)
        if n < K:
            row[n : n + 20] = rng.choice(
                [-1, KEYS, np.iinfo(np.int32).min, np.iinfo(np.int32).max], len(row[n : n + 20])
            )
        yield row


def tiles(row, first, end):
    text, names = "{" + tiles_text(KEYS, PAIR) + "}", {name: name.lower() + "_operand" for name in OPERANDS}
    for name, register in names.items():
        text = text.replace(f"${name}", register)
    machine = Machine(text, 32, dict(zip(names.values(), (0, 0, first, end), strict=True)), row.view(np.uint32), 4)
    machine.run()
    counts = np.unique(machine.warps[0].registers["tiles_operand"])
    assert len(counts) == 1
    return counts[0]


@pytest.mark.parametrize("K", [33, 2048])
def test_up_to_the_last_token(K):
    for row in lists(K):
        used = np.flatnonzero((row >= 0) & (row < KEYS))
        for first in (0, 256):
            for end in {K, min(first + 384, K)}:
                within = used[used < end]
                n = within[-1] + 1 - first if len(within) else 0
                assert tiles(row, first, end) == 2 * max(-(-n // PAIR), 1), (first, end, n)
