"""`select_groups`: its PTX, one CTA a row and several, run by a machine in NumPy that sees races; the kernel on a GPU.

In the gate it costs 5 seconds.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hisa_jax.kernels_pallas.mosaic_gpu import topk_few
from hisa_jax.kernels_pallas.mosaic_gpu.ptx import select_few
from hisa_jax.kernels_pallas.mosaic_gpu.ptx.groups_shape import Groups
from hisa_jax.kernels_pallas.mosaic_gpu.ptx.select_groups_text import OPERANDS, groups_ptx
from hisa_jax.kernels_pallas.sort_key import FORCED, INVISIBLE
from tests.gpu.ptx_machine import Cluster
from tests.gpu.ptx_shared_memory import Race
from tests.gpu.test_topk_few import chosen, rows

THREADS = {1: 256, 8: 128}
NAMES = [name for name in rows(2048, 64) if "forced" not in name]


def with_maxima(x, limit, size, seed=2):
    """What is beyond the limit holds anything, and so does the greatest of what is all beyond it."""
    beyond = np.arange(len(x)) >= limit
    anything = np.random.default_rng(seed).integers(INVISIBLE, FORCED, len(x)).astype(np.int32)
    maxima = np.where(beyond, INVISIBLE, x).reshape(-1, size).max(axis=1)
    maxima = np.where(beyond[::size], anything[::size], maxima).astype(np.int32)
    return np.where(beyond, anything, x).astype(np.int32), maxima


def machine(x, maxima, limit, k, size, n_ctas, n_threads):
    """CTAs that share a row, the memory they write to, and where in it the result is."""
    shape = select_few.shape_of(len(maxima), k).of_threads(n_threads)
    shape = dataclasses.replace(shape, has_forced=False, each=4 if n_ctas > 1 else shape.each)
    groups = Groups(maxima=shape, size=size, n_ctas=n_ctas, has_sort_keys=True)
    text = groups_ptx(groups)
    for i in reversed(range(len(OPERANDS))):
        text = text.replace(f"${i}", f"o_{OPERANDS[i]}")
    start = len(x) + len(maxima)
    memory = np.concatenate([x, maxima, np.full(2 * k + 1, 77)]).astype(np.int32).view(np.uint32)
    at = dict(DONE=5, X=0, MAXIMA=4 * len(x), LIMIT=limit, O=4 * start, COUNT=4 * (start + k), SMEM=0)
    operands = {f"o_{name}": value for name, value in (at | dict(SORT_KEYS=4 * (start + k + 1))).items()}
    return Cluster(n_ctas, text, n_threads, operands, memory, groups.smem_bytes), memory, start


def assert_chooses(x, limit, k, size, n_ctas, n_threads):
    """Whether it did: it chooses the k best, or leaves all as it was."""
    x, maxima = with_maxima(x, limit, size)
    run, memory, start = machine(x, maxima, limit, k, size, n_ctas, n_threads)
    run.run()
    done = [{int(warp.registers["o_DONE"][0]) for warp in cta.warps} for cta in run.ctas]
    assert done[0] in ({0}, {1}) and done[1:] == [{1}] * (n_ctas - 1)
    result = memory[start:].view(np.int32)
    if done[0] == {0}:
        assert (result == 77).all()
        return False
    positions, count = chosen(x, limit, k, None)
    np.testing.assert_array_equal(result[:k], positions)
    np.testing.assert_array_equal(result[k + 1 :], x[positions])
    assert result[k] == count == k
    return True


# Rows that are left to two selections: scores in bins say nothing of them.
LEFT = {"all equal", "zeros of both signs", "infinite", "minus infinite", "one far away", "close to zero", "wide"}
LEFT |= {"of many magnitudes", "1.0 invisible", "any bits", "limit none", "limit few", "limit k", "limit k and one"}


@pytest.mark.gate("8-4-100-limit half", "8-2-30-normal", "1-8-64-few values", "1-2-30-0.9 invisible")
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(("size", "k"), [(8, 64), (4, 100), (2, 30), (8, 250)])
@pytest.mark.parametrize("n_ctas", [1, 8])
def test_the_best_of_a_row_of_groups(n_ctas, size, k, name):
    # Of several CTAs the last has fewer groups than the 512 of the others, or the last three have none.
    W = 2048 if n_ctas == 1 else size * (3996 if size > 2 else 2148)
    x, limit = rows(W, k)[name]
    too_few = n_ctas == 1 and k == 250 and name in ("limit half", "0.9 invisible")  # of 256 groups
    done = assert_chooses(x, limit, k, size, n_ctas, THREADS[n_ctas])
    # Of few threads a bin of ties has more than can be ranked; NaN may be the least of the greatest.
    assert done == (name not in LEFT and not too_few) or name in ("nan", "few values")


@pytest.mark.parametrize("n_ctas", [1, pytest.param(8, marks=pytest.mark.exhaustive)])
def test_what_is_best_may_lie_side_by_side(n_ctas):
    """All of the best groups are those of one CTA, and all of their tokens reach the bound; many tie."""
    W = 2048 * n_ctas
    x, limit = rows(W, 64)["normal"]
    x = np.where(np.arange(W) // 256 == 3 * n_ctas, np.abs(x) + (5 << 23), x)
    assert assert_chooses(x, limit, 60, 4, n_ctas, THREADS[n_ctas])
    assert assert_chooses(x & ~0x3FFFFF, limit, 30, 4, n_ctas, THREADS[n_ctas])


@pytest.mark.exhaustive
@pytest.mark.parametrize(("n_ctas", "n_threads"), [(1, 1024), (8, 512)])
def test_rows_of_128k(n_ctas, n_threads):
    """As long as a request's: for normal scores the longest lists are far from full."""
    for name in ("normal", "nan", "limit half"):
        x, limit = rows(131072, 2048)[name]
        assert assert_chooses(x, limit, 2048, 8, n_ctas, n_threads)


@pytest.mark.parametrize(
    ("T", "n_groups", "n_ctas"), [(1, 16384, 8), (16, 16384, 8), (17, 16384, 1), (1, 8196, 8), (1, 8192, 1)]
)
def test_a_cluster_shares_a_long_row_if_all_clusters_run_at_once(T, n_groups, n_ctas):
    assert topk_few._ctas_a_row(T, n_groups) == n_ctas


@pytest.mark.gate("barrier.cluster.wait.acquire.aligned")
@pytest.mark.parametrize("op", ["bar.sync", "barrier.cluster.wait.acquire.aligned"])
def test_the_machine_sees_a_barrier_that_is_missing(op):
    x, maxima = with_maxima(*rows(8192, 64)["normal"], 4)
    for cta in (run := machine(x, maxima, len(x), 64, 4, 8, 128)[0]).ctas:
        at = [i for i, (_, name, _) in enumerate(cta.code) if name == op][1]
        cta.code[at] = None, "mov.b32", ["unused", "0"]
    with pytest.raises(Race):
        run.run()


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("T", "width", "k"),
    [(1, 131072, 2048), (16, 131072, 2048), (20, 131072, 2048), (3, 69632, 1000), (3, 40000, 1000), (70, 66560, 500)],
)
def test_on_the_device(T, width, k):
    if jax.default_backend() != "gpu":
        pytest.skip("needs an NVIDIA GPU")
    every = rows(width, k)
    names = [name for name in every if "forced" not in name]
    several = [every[names[t % len(names)]] for t in range(max(T, len(names)) // T * T)]
    for first in range(0, len(several), T):
        x, limits = (np.stack(column) for column in zip(*several[first : first + T], strict=True))
        both = [with_maxima(row, limit, 8) for row, limit in zip(x, limits, strict=True)]
        x, maxima = (jnp.asarray(np.stack(column)) for column in zip(*both, strict=True))
        options = dict(size=8, limit=jnp.asarray(limits, jnp.int32), width=width // 8, has_sort_keys=True)
        got = topk_few.topk_by_maxima(x, maxima, k, **options)
        for t in range(T):
            positions, count = chosen(np.asarray(x[t]), limits[t], k, None)
            np.testing.assert_array_equal(got[0][t], positions, err_msg=names[(first + t) % len(names)])
            assert got[1][t] == count
