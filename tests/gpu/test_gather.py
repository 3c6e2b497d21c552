"""`gather_rows` and `gather_latents`: their PTX run by a machine in NumPy that sees races."""

import re

import ml_dtypes
import numpy as np
import pytest

from hisa_jax.kernels_pallas.mosaic_gpu.ptx import gather_latents, gather_rows, sparse_mla
from hisa_jax.kernels_pallas.mosaic_gpu.sparse_mla_plan import PARTS
from hisa_jax.kernels_pallas.mosaic_gpu.sparse_mla_plan import ROPE as LAST
from tests.gpu.ptx_machine import Machine
from tests.gpu.ptx_shared_memory import Race

V, ROPE, E, ROWS, TILES = 512, 64, 576, 32, 1024


def latents(n, spread, seed):
    """Every number of 8 bits, NaN too, scales of 2^-spread to 2^spread and beyond, and rope parts."""
    rng = np.random.default_rng(seed)
    values = rng.integers(0, 256, (n, V), np.uint8)
    values = np.where((values & 127 == 127) & (rng.random((n, V)) < 0.9), 0, values).astype(np.uint8)
    scales = np.exp2(rng.normal(0, spread, (n, 4))).astype(np.float32)
    return values, scales, rng.normal(size=(n, ROPE)).astype(ml_dtypes.bfloat16)


def in_rows(smem, width=E, n=ROWS):
    """[n, width] bfloat16 as the tensor core finds them, by the swizzle of 128 bytes."""
    # Tiles of 8 rows of 8 chunks of 8 values.
    blocks = smem.view(ml_dtypes.bfloat16).reshape(n // 8, width // 64, 8, 8, 8)
    rows = np.arange(8)[:, None]
    chunks = blocks[:, :, rows, np.arange(8)[None, :] ^ rows]
    return chunks.transpose(0, 2, 1, 3, 4).reshape(n, width)


def machine_of(text, names, operands, memory, width, seed=0):
    """After a run of one warp; `operands`: what the text calls by these names."""
    for name in sorted(names, key=len, reverse=True):
        text = text.replace(f"${name}", f"{name.lower()}_operand")
    given = dict(zip((f"{name.lower()}_operand" for name in names), operands, strict=True))
    machine = Machine("{" + text + "}", 32, given, memory, TILES + ROWS * 2 * width, seed=seed)
    machine.run()
    return machine


def run(groups, has_rope, text=None, spread=8, seed=0):
    """Shared memory after the gather, by rows; what it should be, where the gather writes; the machine."""
    values, scales, rope = latents(50, spread, seed)
    rng = np.random.default_rng(seed + 1)
    row = np.where(rng.random(ROWS) < 0.2, -1, rng.integers(0, 50, ROWS))
    memory = np.concatenate([x.view(np.uint32).reshape(-1) for x in (values, scales, rope)])
    text = text or gather_latents.latents_text(2 * E, 4, groups, has_rope)
    operands = 0, values.nbytes, values.nbytes + scales.nbytes, TILES, row, 0
    machine = machine_of(text, gather_latents.OPERANDS, operands, memory, E, seed)
    plain = values.view(ml_dtypes.float8_e4m3fn).astype(np.float32).reshape(50, 4, 128)
    plain = plain * scales.astype(ml_dtypes.bfloat16).astype(np.float32)[:, :, None]
    wanted = np.concatenate([plain.reshape(50, V), rope.astype(np.float32)], 1)[row]
    wanted = np.where(row[:, None] < 0, 0, wanted).astype(ml_dtypes.bfloat16)
    columns = np.concatenate([np.arange(128 * group, 128 * group + 128) for group in groups])
    columns = np.append(columns, np.arange(V, E)) if has_rope else columns
    return in_rows(machine.smem[TILES // 4 :])[:, columns], wanted[:, columns], machine


@pytest.mark.parametrize("spread", [2, 8], ids=["scales_below_128", "any_scales"])
@pytest.mark.parametrize(("groups", "has_rope"), [((0, 2), False), ((1, 3), True)])
def test_values_are_those_of_the_latents(groups, has_rope, spread):
    got, wanted, machine = run(groups, has_rope, spread=spread)
    got, wanted = got.astype(np.float32), wanted.astype(np.float32)
    is_nan = np.isnan(wanted)
    assert 0 < is_nan.sum() < wanted.size / 20 and np.isnan(got[is_nan]).all()
    # One NaN of a latent is as good as all: a lane makes its 16 values NaN, 8 of each half of 128.
    pieces = is_nan[:, : 128 * len(groups)].reshape(ROWS, len(groups), 2, 8, 8)
    pieces = np.broadcast_to(pieces.any((2, 4), keepdims=True), pieces.shape).reshape(ROWS, -1)
    is_near = np.pad(pieces, ((0, 0), (0, got.shape[1] - pieces.shape[1])))
    np.testing.assert_array_equal(got[~is_near], wanted[~is_near])
    assert machine.arrivals == {0: 32 * (1 + has_rope)}


@pytest.mark.parametrize("missing", ["bar.warp.sync -1;", "cp.async.wait_group 3;", "cp.async.commit_group; cp"])
def test_the_machine_sees_what_is_missing(missing):
    text = gather_latents.latents_text(2 * E, 4, (0, 2), False)
    assert missing in text
    with pytest.raises((Race, AssertionError)):
        got, wanted, _ = run((0, 2), False, text.replace(missing, "cp" if missing.endswith("cp") else ""), spread=2)
        np.testing.assert_array_equal(got, wanted)


@pytest.mark.parametrize("keeps", [False, True])
@pytest.mark.parametrize("n", [16, 32])
@pytest.mark.parametrize(
    ("width", "pieces"),
    [
        *((E, part) for part in PARTS),
        (E, (LAST,)),
        (128, ((0, 128),)),
        (64, ((0, 64),)),
    ],
    ids="01234",
)
def test_rows_are_those_of_the_source(width, pieces, n, keeps):
    rng = np.random.default_rng(0)
    source = rng.normal(size=(50, width)).astype(ml_dtypes.bfloat16)
    row = np.where(rng.random(ROWS) < 0.2, -1, rng.integers(0, 50, ROWS))
    text = gather_rows.rows_text(2 * width, tuple((first // 8, n // 8) for first, n in pieces), n, keeps)
    memory = source.view(np.uint32).reshape(-1)
    machine = machine_of(text + "cp.async.wait_all;", gather_rows.OPERANDS, (0, TILES, row, 0), memory, width)
    columns = np.concatenate([np.arange(first, first + n) for first, n in pieces])
    wanted = np.where(row[:n, None] < 0, 0, source[row[:n]]).astype(source.dtype)
    got = in_rows(machine.smem[TILES // 4 :][: n * width // 2], width, n)
    np.testing.assert_array_equal(got[:, columns], wanted[:, columns])
    assert machine.arrivals == {0: 32}


def test_copies_may_land_with_those_that_come_next():
    text = gather_rows.rows_text(2 * E, ((0, 16),), 16, True, arrives=False)
    machine = machine_of(text + "cp.async.wait_all;", gather_rows.OPERANDS, (0, TILES, 0, 0), np.zeros(E, np.uint32), E)
    assert not machine.arrivals


def test_an_accumulator_is_written_in_whole_pieces_of_rows():
    """4 warps, 64 rows of 64 columns, between rows of other columns."""
    rows, columns, stride = 64, 64, 96
    values = np.arange(rows * columns, dtype=np.uint16).reshape(rows, columns)
    thread, words = np.arange(128), []
    for i in range(columns // 8):
        for half in range(2):
            row = thread // 32 * 16 + thread % 32 // 4 + 8 * half
            low, high = (values[row, 8 * i + 2 * (thread % 4) + j].astype(np.uint32) for j in range(2))
            words.append(low | high << 16)
    text = re.sub(r"\$(\d+)", r"o\1", sparse_mla.output_text(columns // 32, 2 * stride))
    memory = np.full(64 + rows * stride // 2, 0xFFFFFFFF, np.uint32)
    for first in range(0, 128, 32):
        operands = {f"o{i}": x[first : first + 32] for i, x in enumerate(words)} | {f"o{len(words)}": 64}
        text_of_warp = text.replace("%tid.x", "tid")
        machine = Machine(text_of_warp, 32, operands | {"tid": thread[first : first + 32]}, memory, 4)
        machine.run()
    written = memory[16:].view(np.uint16)[: rows * stride].reshape(rows, stride)
    np.testing.assert_array_equal(written[:, :columns], values)
    assert (written[:, columns:] == 0xFFFF).all() and (memory[:16] == 0xFFFFFFFF).all()
