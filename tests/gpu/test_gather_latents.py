"""`gather_latents`: its PTX run by a machine in NumPy that sees races."""

import ml_dtypes
import numpy as np
import pytest

from hisa_jax.kernels_pallas.mosaic_gpu.ptx.gather_latents import OPERANDS, latents_text
from tests.gpu.ptx_machine import Machine, Race

V, ROPE, E, ROWS, TILES = 512, 64, 576, 32, 1024


def latents(n, seed=0):
    """Every number of 8 bits, NaN too, scales of any size, and rope parts."""
    rng = np.random.default_rng(seed)
    values = rng.integers(0, 256, (n, V), np.uint8)
    values = np.where((values & 127 == 127) & (rng.random((n, V)) < 0.9), 0, values).astype(np.uint8)
    scales = np.exp2(rng.normal(0, 8, (n, 4))).astype(np.float32)
    return values, scales, rng.normal(size=(n, ROPE)).astype(ml_dtypes.bfloat16)


def in_rows(smem):
    """[32, 576] bfloat16 as the tensor core finds them, by the swizzle of 128 bytes."""
    blocks = smem.view(ml_dtypes.bfloat16).reshape(ROWS // 8, E // 64, 8, 8, 8)  # tiles of 8 rows, 8 chunks of 8 values
    rows = np.arange(8)[:, None]
    chunks = blocks[:, :, rows, np.arange(8)[None, :] ^ rows]
    return chunks.transpose(0, 2, 1, 3, 4).reshape(ROWS, E)


def run(groups, has_rope, text=None, seed=0):
    """Shared memory after the gather, by rows; what it should be, where the gather writes; the machine."""
    values, scales, rope = latents(50, seed)
    rng = np.random.default_rng(seed + 1)
    row = np.where(rng.random(ROWS) < 0.2, -1, rng.integers(0, 50, ROWS))
    memory = np.concatenate([x.view(np.uint32).reshape(-1) for x in (values, scales, rope)])
    text = text or latents_text(2 * E, 4, groups, has_rope)
    names = {name: name.lower() + "_operand" for name in OPERANDS}
    for name in sorted(OPERANDS, key=len, reverse=True):
        text = text.replace(f"${name}", names[name])
    at = values.nbytes, values.nbytes + scales.nbytes
    operands = dict(zip(names.values(), (0, *at, TILES, row, 0), strict=True))
    machine = Machine("{" + text + "}", 32, operands, memory, TILES + ROWS * 2 * E, seed=seed)
    machine.run()
    plain = values.view(ml_dtypes.float8_e4m3fn).astype(np.float32).reshape(50, 4, 128)
    plain = plain * scales.astype(ml_dtypes.bfloat16).astype(np.float32)[:, :, None]
    wanted = np.concatenate([plain.reshape(50, V), rope.astype(np.float32)], 1)[row]
    wanted = np.where(row[:, None] < 0, 0, wanted).astype(ml_dtypes.bfloat16)
    columns = np.concatenate([np.arange(128 * group, 128 * group + 128) for group in groups])
    columns = np.append(columns, np.arange(V, E)) if has_rope else columns
    return in_rows(machine.smem[TILES // 4 :])[:, columns], wanted[:, columns], machine


@pytest.mark.parametrize(("groups", "has_rope"), [((0, 2), False), ((1, 3), True)])
def test_values_are_those_of_the_latents(groups, has_rope):
    got, wanted, machine = run(groups, has_rope)
    got, wanted = got.astype(np.float32), wanted.astype(np.float32)
    is_nan = np.isnan(wanted)
    assert 0 < is_nan.sum() < wanted.size / 20 and np.isnan(got[is_nan]).all()
    # One NaN of a latent is as good as all: a lane makes its 16 values NaN, 8 of each half of 128.
    pieces = is_nan[:, : 128 * len(groups)].reshape(ROWS, len(groups), 2, 8, 8)
    pieces = np.broadcast_to(pieces.any((2, 4), keepdims=True), pieces.shape).reshape(ROWS, -1)
    is_near = np.pad(pieces, ((0, 0), (0, got.shape[1] - pieces.shape[1])))
    np.testing.assert_array_equal(got[~is_near], wanted[~is_near])
    assert machine.arrivals == {0: 32 * (1 + has_rope)}


@pytest.mark.parametrize("missing", ["bar.warp.sync -1;", "cp.async.wait_group 1;", "cp.async.wait_group 0;"])
def test_the_machine_sees_what_is_missing(missing):
    text = latents_text(2 * E, 4, (0, 2), False)
    assert missing in text
    with pytest.raises((Race, AssertionError)):
        got, wanted, _ = run((0, 2), False, text.replace(missing, ""))
        np.testing.assert_array_equal(got, wanted)
