"""`topk_few`: its PTX run by a machine in NumPy that sees races, the kernel around it interpreted, all on a GPU."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu

from hisa_jax.kernels_pallas.mosaic_gpu import topk_few
from hisa_jax.kernels_pallas.mosaic_gpu.ptx import select_few
from hisa_jax.kernels_pallas.mosaic_gpu.ptx.select_few_text import OPERANDS, select_ptx
from hisa_jax.kernels_pallas.operands import KeptBlocks
from hisa_jax.kernels_pallas.sort_key import FORCED, INVISIBLE, sort_key_of
from tests.gpu.ptx_machine import Machine
from tests.gpu.ptx_shared_memory import Race

BLOCK = 128


def rows(W, k, seed=0):
    """Name -> sort keys and limit: what a search by bins of equal width finds easy, hard and impossible."""
    rng = np.random.default_rng(seed)

    def normal():
        return rng.normal(size=W).astype(np.float32)

    def some(share, value, otherwise):
        return np.where(rng.random(W) < share, np.float32(value), otherwise)

    scores = {
        "normal": normal(),
        "few values": np.round(normal() * 2),
        "all equal": np.ones(W),
        "zeros of both signs": some(0.5, -0.0, np.float32(0)),
        "nan": some(0.2, np.nan, normal()),
        "infinite": some(0.2, np.inf, normal()),
        "minus infinite": some(0.9, -np.inf, normal()),
        "one far away": np.where(np.arange(W) == 5, 1e9, normal()),
        "close to zero": normal() * np.float32(1e-38),
        "wide": normal() * np.float32(5e37),
        "of many magnitudes": np.exp(np.minimum(20 * normal(), 85)),
    }
    keys = {name: np.array(sort_key_of(jnp.asarray(x, jnp.float32))) for name, x in scores.items()}
    out = {name: (x, W) for name, x in keys.items()}
    x = keys["normal"]
    limits = {"none": 0, "few": k - 3, "k": k, "k and one": k + 1, "half": W // 2 + 13, "beyond": W + 7}
    out |= {f"limit {name}": (x, limit) for name, limit in limits.items()}
    for share in (0.01, 0.9, 1.0):
        out[f"{share} forced"] = np.where(rng.random(W) < share, FORCED, x), W
        out[f"{share} invisible"] = np.where(rng.random(W) < share, INVISIBLE, x), W
    out["forced and infinite"] = np.where(rng.random(W) < 0.01, FORCED, keys["infinite"]), W
    out["any bits"] = rng.integers(INVISIBLE + 1, FORCED, W).astype(np.int32), W
    return out


def chosen(x, limit, k, ids):
    """[k] positions and how many, by sorting."""
    x = np.where(np.arange(len(x)) < limit, x, INVISIBLE).astype(np.int64)
    there = np.flatnonzero(x > INVISIBLE)
    columns = np.sort(there[np.lexsort((there, -x[there]))][:k])
    positions = columns
    if ids is not None:
        positions = ids[columns] if len(ids) == len(x) else ids[columns // BLOCK] * BLOCK + columns % BLOCK
    return np.append(positions, np.full(k - len(columns), -1)), len(columns)


def machine(x, limit, k, ids, n_threads=None, **options):
    """One that runs a row, and where in its memory the result is."""
    width = options.get("group", 0) * len(ids) if options.get("group") else len(x)
    shape = dataclasses.replace(select_few.shape_of(width, k), **options)
    if n_threads is not None:
        shape = shape.of_threads(n_threads)
    position = select_few.own_position
    if ids is not None:
        position = lambda: select_few.block_position(BLOCK, len(ids))  # noqa: E731
    text = select_ptx(shape, position)
    for i in reversed(range(len(OPERANDS))):
        text = text.replace(f"${i}", f"o_{OPERANDS[i]}")
    table = np.zeros(4, np.int32) if ids is None else ids
    start = len(x) + len(table)
    memory = np.concatenate([x, table, np.full(2 * k + 1, 77)]).astype(np.int32).view(np.uint32)
    addresses = dict(X=0, IDS=4 * len(x), O=4 * start, COUNT=4 * (start + k), SMEM=0, LIMIT=limit)
    addresses["SORT_KEYS"] = 4 * (start + k + 1)
    operands = {f"o_{name}": value for name, value in addresses.items()}
    return Machine(text, shape.n_threads, operands, memory, shape.smem_bytes), start


def assert_chooses(x, limit, k, ids=None, **options):
    run, start = machine(x, limit, k, ids, **options)
    run.run()
    result = run.memory[start:].view(np.int32)
    positions, count = chosen(x, limit, k, None if options.get("group") else ids)
    if options.get("has_sort_keys"):
        columns, _ = chosen(x, limit, k, None)
        np.testing.assert_array_equal(result[k + 1 :], np.where(columns < 0, INVISIBLE, x[columns]))
    np.testing.assert_array_equal(result[:k], positions)
    assert result[k] == count
    return run


@pytest.mark.parametrize("name", rows(1024, 64))
def test_blocks_are_chosen_from_any_scores(name):
    """Of 1024 means, the 64 best: a warp-group."""
    x, limit = rows(1024, 64)[name]
    assert_chooses(x, limit, 64, has_forced=True)


@pytest.mark.gate("normal", "few values")
@pytest.mark.parametrize("name", [name for name in rows(8192, 2048) if "forced" not in name])
def test_tokens_are_chosen_from_any_scores(name):
    """Of 64 kept blocks, 2048 tokens: four warp-groups."""
    x, limit = rows(8192, 2048)[name]
    ids = np.random.default_rng(1).permutation(1000)[:64].astype(np.int32)
    assert_chooses(x, limit, 2048, ids, has_forced=False)


@pytest.mark.parametrize("name", ["normal", "few values", "limit half", "limit few"])
def test_lists(name):
    x, limit = rows(1024, 64)[name]
    listed = np.random.default_rng(1).permutation(10**6)[:1024].astype(np.int32)
    for has_sort_keys in (False, True):
        assert_chooses(x, limit, 64, listed, is_listed=True, has_sort_keys=has_sort_keys, has_forced=False)


@pytest.mark.gate("8-64-few values", "4-100-limit half")
@pytest.mark.parametrize("name", [name for name in rows(1024, 64) if "forced" not in name])
@pytest.mark.parametrize(("size", "k"), [(8, 64), (4, 100), (2, 7), (8, 250)])
def test_the_best_groups_by_their_greatest_hold_the_best(size, k, name):
    """What is beyond the limit holds anything, and so does the greatest of what is all beyond it."""
    rng, W = np.random.default_rng(2), 2048
    x, limit = rows(W, k)[name]
    beyond = np.arange(W) >= limit
    maxima = np.where(beyond, INVISIBLE, x).reshape(-1, size).max(axis=1)
    anything = rng.integers(INVISIBLE, FORCED, W).astype(np.int32)
    maxima = np.where(beyond[::size], anything[::size], maxima)
    run, start = machine(maxima, -(-limit // size), k, None, 256, has_forced=False)
    run.run()
    groups = run.memory[start : start + k].view(np.int32)
    x = np.where(beyond, anything, x)
    for has_sort_keys in (False, True):
        options = dict(has_sort_keys=has_sort_keys, n_threads=256)
        assert_chooses(x, limit, k, groups, group=size, has_forced=False, **options)


@pytest.mark.exhaustive
@pytest.mark.parametrize("W", [16, 128, 1040, 2048, 4096, 6144, 12288, 16384])
def test_rows_of_every_width(W):
    for k in (1, min(W // 2, 2048), W - 1, W, W + 5):
        for name in ("normal", "few values", "limit half"):
            x, limit = rows(W, k)[name]
            assert_chooses(x, limit, k, has_forced=True)


@pytest.mark.parametrize("limit", [0, 1, 63, 64, 65])
def test_all_of_few_columns_are_chosen_whatever_they_hold(limit):
    x, _ = rows(1024, 64)["0.9 invisible"]
    if limit <= 64:
        run, start = machine(x, limit, 64, None, is_full=True)
        run.run()
        wanted = np.append(np.where(np.arange(64) < limit, np.arange(64), -1), limit)
        np.testing.assert_array_equal(run.memory[start : start + 65].view(np.int32), wanted)
    else:
        assert_chooses(rows(1024, 64)["normal"][0], limit, 64, is_full=True)


def test_normal_scores_take_few_passes():
    """Eight barriers: the bin that holds the threshold is short, and nothing is halved."""
    x, limit = rows(8192, 2048)["normal"]
    assert assert_chooses(x, limit, 2048, has_forced=False).n_barriers == 8


@pytest.mark.parametrize("at", [0, 1, 3])
def test_the_machine_sees_a_barrier_that_is_missing(at):
    x, limit = rows(1024, 64)["normal"]
    run, _ = machine(x, limit, 64, None, has_forced=True)
    barriers = [i for i, (_, op, _) in enumerate(run.code) if op == "bar.sync"]
    run.code[barriers[at]] = None, "mov.b32", ["unused", "0"]
    with pytest.raises(Race):
        run.run()


def kept_of(T, n_blocks):
    ids = np.stack([np.random.default_rng(t).permutation(2 * n_blocks)[:n_blocks] for t in range(T)]).astype(np.int32)
    none = jnp.zeros(T, jnp.int32)
    return ids, KeptBlocks(ids=jnp.asarray(ids), visible=none, first=none, size=BLOCK)


def assert_kernel_chooses(W, k, with_blocks, interpret):
    several = {name: row for name, row in rows(W, k).items() if not (with_blocks and "forced" in name)}
    if interpret:
        several = {name: several[name] for name in ("few values", "limit half")}
    x, limits = (np.stack(column) for column in zip(*several.values(), strict=True))
    ids, kept = kept_of(len(x), W // BLOCK)
    got = topk_few.topk(
        jnp.asarray(x), jnp.asarray(limits, jnp.int32), k, kept if with_blocks else None, has_forced=not with_blocks,
        interpret=interpret,
    )  # fmt: skip
    for t, name in enumerate(several):
        positions, count = chosen(x[t], limits[t], k, ids[t] if with_blocks else None)
        np.testing.assert_array_equal(got[0][t], positions, err_msg=name)
        assert got[1][t] == count, name


@pytest.mark.gate("True")
@pytest.mark.parametrize("with_blocks", [False, True])
def test_interpreted(with_blocks):
    assert_kernel_chooses(512, 64, with_blocks, plgpu.InterpretGPUParams(detect_races=True))


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("W", "k", "with_blocks"), [(1024, 64, False), (8192, 2048, True), (16384, 2048, True), (6144, 300, False)]
)
def test_on_the_device(W, k, with_blocks):
    if jax.default_backend() != "gpu":
        pytest.skip("needs an NVIDIA GPU")
    assert_kernel_chooses(W, k, with_blocks, False)


def test_a_row_that_is_too_wide_is_refused():
    with pytest.raises(ValueError, match="topk: x has rows of 16388 sort keys, wanted a multiple of 4 up to 16384"):
        topk_few.topk(jnp.zeros((1, 16388), jnp.int32), jnp.zeros(1, jnp.int32), 4)
