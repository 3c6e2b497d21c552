"""The loop of `scores` for single queries, and for two that share a product: its PTX, run by a machine in NumPy.

Whole numbers, of which no sum is rounded. It costs a second a case.
"""

import jax.numpy as jnp
import numpy as np
import pytest

from hisa_jax.kernels_pallas.mosaic_gpu.ptx.inline import numbered
from hisa_jax.kernels_pallas.mosaic_gpu.ptx.score_loop_text import OPERANDS, loop_ptx
from hisa_jax.kernels_pallas.mosaic_gpu.ptx.score_shape import Shape
from hisa_jax.kernels_pallas.sort_key import FORCED, INVISIBLE, sort_key_of
from tests.gpu import draw, reference
from tests.gpu.ptx_machine import Machine

RING, WIDTH, CANDIDATE = 4, 512, 256
Q, KEYS, W, PIN, SCALES, BARRIERS = (1024 * i for i in (0, 64, 96, 98, 102, 103))  # in shared memory


@pytest.mark.parametrize(
    ("H", "together", "n_parts", "filters", "keep"),
    [
        (32, 2, 1, True, 0),
        pytest.param(32, 2, 2, False, 1, marks=pytest.mark.exhaustive),
        pytest.param(64, 1, 1, True, 1, marks=pytest.mark.exhaustive),
        pytest.param(64, 1, 1, False, 0, marks=pytest.mark.exhaustive),
        pytest.param(64, 2, 1, True, 1, marks=pytest.mark.exhaustive),
    ],
)
def test_the_machine_has_the_scores_of_whole_numbers(H, together, n_parts, filters, keep):
    """Three queries, of which the last has a slot by itself, from the ring's last slot on."""
    T, columns = 3, H * together
    q, k, scale, w = draw.integers(H, 1, 4, 128 * n_parts, H, 128, jnp.float8_e4m3fn, True)
    k, scale = k[0].reshape(n_parts, 128, 128), np.asarray(scale[0, :128])
    shape = Shape(
        H=H, together=together, row_bytes=128, n_parts=n_parts, is_e4m3=True, ring=RING, has_scale=True,
        keep_first=keep, keep_last=keep, out_columns=WIDTH, filters=filters,
    )  # fmt: skip
    limit, threshold = np.array([1000, 300, 257], np.int32), np.asarray(sort_key_of(jnp.float32([-3, 4, 0])))
    # In device memory, each with a row more, that nobody reads or writes.
    memory = np.full(2 * 64 + 4 * (WIDTH + WIDTH // 32), 7, np.uint32)
    memory[:T], memory[64 : 64 + T] = limit.view(np.uint32), threshold.view(np.uint32)
    at = dict(LIMITS=0, THRESHOLDS=4 * 64, O=4 * 128, MASKS=4 * (128 + 4 * WIDTH))
    text = numbered(loop_ptx(shape), OPERANDS)
    for i in reversed(range(len(OPERANDS))):
        text = text.replace(f"${i}", OPERANDS[i].lower() + "_")
    before = RING - 1
    at |= dict(KEYS=KEYS, K_FREE=BARRIERS, SCALES=SCALES, Q=Q, W=W, FULL=BARRIERS + 64, FREE=BARRIERS + 128, PIN=PIN)
    at |= dict(COUNT=T, BEFORE=before, CANDIDATE=CANDIDATE)
    machine = Machine(text, 128, {name.lower() + "_": value for name, value in at.items()}, memory, 1024 * 104)
    put(machine, KEYS, swizzled(k.reshape(-1, 128)))
    put(machine, SCALES, scale)
    for first in range(0, T, together):
        slot, own = (before + first // together) % RING, slice(first, first + together)
        put(machine, Q + slot * columns * 128, swizzled(q[0, own].reshape(-1, 128)))
        put(machine, W + slot * columns * 4, np.asarray(w[0, own]))
    machine.run()
    assert machine.arrivals[BARRIERS] == 128 and sum(machine.arrivals.values()) == 128 * (1 + -(-T // together))
    check(memory, shape, reference.token_scores(q[0], k.astype(jnp.float32).sum(0), scale, w[0]), limit, threshold)


def check(memory, shape, scores, limit, threshold):
    got = memory[128 : 128 + 4 * WIDTH].view(np.int32).reshape(4, WIDTH)
    masks = memory[128 + 4 * WIDTH :].view(np.uint32).reshape(4, WIDTH // 32)
    candidate = CANDIDATE + np.arange(128)
    for t, n in enumerate(limit):
        wanted = np.array(sort_key_of(jnp.asarray(scores[t], jnp.float32)))
        wanted[(candidate < shape.keep_first) | (candidate >= n - shape.keep_last)] = FORCED
        wanted[candidate >= n] = INVISIBLE
        passes = wanted > threshold[t] if shape.filters else np.ones(128, bool)
        wanted = reference.side_by_side(wanted, passes, 7) if shape.filters else wanted
        np.testing.assert_array_equal(got[t, :128], wanted, err_msg=f"query {t}")
        bits = masks[t, :4, None] >> np.arange(32, dtype=np.uint32) & 1
        assert not shape.filters or (bits.reshape(-1) == passes).all()
    assert (got[len(limit)] == 7).all() and (masks[len(limit)] == 7).all() and (got[:, 128:] == 7).all()


def put(machine, address, array):
    words = np.frombuffer(np.ascontiguousarray(array).tobytes(), np.uint32)
    machine.smem[address // 4 : address // 4 + len(words)] = words


def swizzled(rows):
    """Rows of 128 bytes: the chunks of 16 in each change places with the row's number."""
    rows = np.asarray(rows).view(np.uint8).reshape(-1, 8, 16)
    return np.stack([row[np.arange(8) ^ i % 8] for i, row in enumerate(rows)])
