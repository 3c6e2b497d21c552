"""What is chosen of a row of sort keys, given their threshold: the PTX, run by a machine in NumPy. A second in all."""

import re

import numpy as np
import pytest

from hisa_jax.kernels_pallas.mosaic_gpu.ptx.select_row import own_positions
from hisa_jax.kernels_pallas.mosaic_gpu.ptx.select_row_text import COUNT_PTX, RANGE_PTX, SPLIT_PTX, emit_ptx
from hisa_jax.kernels_pallas.sort_key import FORCED, INVISIBLE
from tests.gpu.ptx_machine import Machine

W, K = 1024, 200
SCRATCH = 4 * W  # in shared memory, after the row


def run(text, row, scratch, memory, **operands):
    """Operands by their places in the text -> what the machine leaves in its scratch, and its registers."""
    text = re.sub(r"\$(\d+)", lambda number: f"o{number[1]}_", text.strip().removeprefix("{").removesuffix("}"))
    text = re.sub(r"(\w+)<(\d+)>", lambda name: ", ".join(f"{name[1]}{i}" for i in range(int(name[2]))), text)
    machine = Machine(text, 128, {f"o{i}_": value for i, value in operands.items()}, memory, SCRATCH + 64)
    machine.smem[:W], machine.smem[W:] = row.view(np.uint32), scratch
    machine.run()
    return machine.smem[W:].copy(), machine.warps[0].registers


def numbered(*values):
    return {str(i): value for i, value in enumerate(values)}


def chosen(row, threshold):
    """[K] columns and sort keys, their count, and `least`."""
    memory, scratch = np.full(2 * K + 2, 7, np.uint32), np.zeros(16, np.uint32)
    scratch, _ = run(SPLIT_PTX, row, scratch, memory, **numbered(0, W, threshold, SCRATCH))
    outputs = 0, 8 * K, 4 * K, 8 * K + 4  # positions, count, sort keys, least
    emit = emit_ptx(K, own_positions(None).ptx, ("SORT_KEYS", "LEAST"))
    run(emit, row, scratch, memory, **numbered(0, W, threshold, SCRATCH, SCRATCH, *outputs))
    columns, sort_keys = memory[: 2 * K].view(np.int32).reshape(2, K)
    return columns, sort_keys, int(memory[2 * K]), int(memory[2 * K + 1 :].view(np.int32)[0])


@pytest.mark.parametrize("n", [W, K + 1, K, 30, 0])
@pytest.mark.parametrize("values", [3, 10**6])
def test_the_best_in_order_and_what_the_least_of_them_is(n, values):
    """Of few values many tie with the k-th: the first of them are chosen."""
    rng = np.random.default_rng(n + values)
    row = np.full(W, INVISIBLE, np.int32)
    row[np.sort(rng.choice(W, n, replace=False))] = rng.integers(0, values, n)
    best = np.sort(np.argsort(-row.astype(np.int64), kind="stable")[: min(n, K)])
    threshold = int(row[best].min(initial=FORCED)) if n else INVISIBLE + 1
    columns, sort_keys, count, least = chosen(row, threshold)
    assert count == len(best)
    np.testing.assert_array_equal(columns, np.pad(best, (0, K - count), constant_values=-1))
    np.testing.assert_array_equal(sort_keys, np.pad(row[best], (0, K - count), constant_values=INVISIBLE))
    assert least == (threshold if count == K else INVISIBLE)


def test_the_range_and_the_counts_of_a_row():
    rng = np.random.default_rng(0)
    row = rng.integers(-50, 50, W).astype(np.int32)
    row[:40], row[40:43] = INVISIBLE, FORCED
    empty = np.zeros(16, np.uint32)
    _, registers = run(RANGE_PTX, row, empty, empty, **numbered(0, 0, 0, 0, W, 0, SCRATCH))
    low, high, seen = (int(registers[f"o{i}_"].astype(np.int64).astype(np.int32)[0]) for i in range(3))
    assert (low, high, seen) == (row[43:].min(), row[43:].max(), W - 40)
    _, registers = run(COUNT_PTX, row, empty, empty, **numbered(0, 0, W, 10, SCRATCH))
    assert int(registers["o0_"][0]) == (row >= 10).sum()
