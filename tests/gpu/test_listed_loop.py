"""Scores of listed tokens for a few queries: the PTX run by a machine in NumPy, the kernel around it interpreted.

Whole numbers, of which no sum is rounded.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hisa_jax.kernels_pallas.mosaic_gpu import refine_tokens_few
from hisa_jax.kernels_pallas.mosaic_gpu.ptx.listed_loop_text import OPERANDS, STEP, Shape, loop_ptx
from hisa_jax.kernels_pallas.operands import Operands
from hisa_jax.kernels_pallas.pages import Pages
from hisa_jax.kernels_pallas.sort_key import sort_key_of
from tests.gpu.ptx_machine import Machine
from tests.gpu.test_lowering import E4M3, lower

CAPACITY, PAGE = 384, 32


class Lists:
    """Lists of two sequences, of some 600 keys each, in pages or not."""

    def __init__(self, H, in_pages, has_scale, count=(300, 0, 129, 64)):
        rng = np.random.default_rng(0)
        T, S = len(count), 2 * 640
        self.count = np.array(count, np.int32)
        self.first = np.array([0, 0, 640, 640][:T], np.int32)
        self.tokens = np.full((T, CAPACITY), -1, np.int32)
        for t, n in enumerate(count):
            self.tokens[t, :n] = np.sort(rng.choice(600, n, replace=False))
        q, k = rng.integers(-2, 3, (T, H, 128)), rng.integers(-3, 4, (S, 128))
        k[700] = 448  # one is NaN
        self.q, self.k = jnp.asarray(q, jnp.float32).astype(E4M3), jnp.asarray(k, jnp.float32).astype(E4M3)
        self.k = self.k.at[701, 3].set(jnp.nan)
        self.w = rng.integers(-2, 3, (T, H)).astype(np.float32)
        self.scale = 2.0 ** rng.integers(-1, 2, S).astype(np.float32) if has_scale else None
        table = rng.permutation(S // PAGE).astype(np.int32)
        self.pages = Pages(table=jnp.asarray(table), size=PAGE, n_pages=S // PAGE) if in_pages else None

    @property
    def operands(self):
        scale = None if self.scale is None else jnp.asarray(self.scale)
        return Operands(self.q, jnp.asarray(self.w), self.k, scale, self.pages)

    def check(self, got):
        q, k = np.asarray(self.q, np.float64), np.asarray(self.k, np.float64)
        for t, n in enumerate(self.count):
            rows = self.first[t] + self.tokens[t, :n]
            rows = rows if self.pages is None else np.asarray(self.pages.rows(jnp.asarray(rows)))
            x = q[t] @ k[rows].T
            x = self.w[t].astype(np.float64) @ np.where(x < 0, 0, x) * (1 if self.scale is None else self.scale[rows])
            np.testing.assert_array_equal(got[t, :n], sort_key_of(jnp.asarray(x, jnp.float32)), err_msg=f"query {t}")

    def launched(self, steps, interpret):
        lists = (jnp.asarray(x) for x in (self.tokens, self.count, self.first))
        return refine_tokens_few.refine_tokens_scores(self.operands, *lists, steps=steps, interpret=interpret)

    def by_machine(self, steps):
        T, H, _ = self.q.shape
        table = np.zeros(1, np.int32) if self.pages is None else self.pages.table
        scale = np.zeros(1, np.float32) if self.scale is None else self.scale
        shape = Shape(
            H=H, steps=steps, page_size=self.pages and PAGE, n_pages=len(table), table_size=len(table),
            n_rows=len(self.k), capacity=CAPACITY, has_scale=self.scale is not None,
        )  # fmt: skip
        words, at = [], []
        for array in (self.k, scale, table, self.tokens, self.q, self.w, np.zeros((T, CAPACITY), np.int32)):
            at.append(4 * sum(map(len, words)))
            array = np.frombuffer(np.asarray(array).tobytes(), np.uint32)
            words.append(np.pad(array, (0, -len(array) % 64)))
        memory, text = np.concatenate(words), loop_ptx(shape)
        for i in reversed(range(len(OPERANDS))):
            text = text.replace(f"${i}", OPERANDS[i].lower() + "_")
        for t, n in enumerate(self.count):
            for slot in range(0, CAPACITY, STEP * steps):
                own = dict(zip(OPERANDS, at, strict=False)) | dict(SMEM=0, ROW=int(self.first[t]), START=slot)
                own["STEPS"] = int(np.clip(-(-(n - slot) // STEP), 0, steps))
                for name, size in (("TOKENS", CAPACITY * 4), ("Q", H * 128), ("W", H * 4), ("O", CAPACITY * 4)):
                    own[name] += t * size
                operands = {name.lower() + "_": value for name, value in own.items()}
                Machine(text, 128, operands, memory, shape.smem_bytes).run()
        return memory[at[6] // 4 :][: T * CAPACITY].view(np.int32).reshape(T, CAPACITY)


@pytest.mark.parametrize(
    ("H", "in_pages", "has_scale", "steps"),
    [
        (16, True, True, 2),
        pytest.param(64, False, False, 6, marks=pytest.mark.exhaustive),
        pytest.param(32, True, False, 4, marks=pytest.mark.exhaustive),
    ],
)
def test_the_machine_has_the_scores_of_whole_numbers(H, in_pages, has_scale, steps):
    lists = Lists(H, in_pages, has_scale)
    lists.check(lists.by_machine(steps))


@pytest.mark.exhaustive
def test_the_kernel_around_it(interpret):
    lists = Lists(16, True, True)
    lists.check(lists.launched(4, interpret))


@pytest.mark.gpu
@pytest.mark.parametrize("steps", [2, 6])
@pytest.mark.parametrize(("in_pages", "has_scale"), [(False, True), (True, False), (True, True)])
@pytest.mark.parametrize("H", [16, 32, 64, 128])
def test_on_the_device(H, in_pages, has_scale, steps):
    if jax.default_backend() != "gpu":
        pytest.skip("needs an NVIDIA GPU")
    lists = Lists(H, in_pages, has_scale)
    lists.check(lists.launched(steps, False))


@pytest.mark.parametrize("T", [32, pytest.param(128, marks=pytest.mark.exhaustive)])
def test_it_lowers(T):
    """A query for each of T requests of 128K in pages of 64."""
    P, size = 2048, 64
    n, i32 = T * P, jnp.int32

    def scores(q, w, k, k_scale, table, tokens, count, first):
        operands = Operands(q, w, k, k_scale, Pages(table=table, size=size, n_pages=n))
        steps = refine_tokens_few.heuristic(T, 12288, 132)
        return refine_tokens_few.refine_tokens_scores(operands, tokens, count, first, steps=steps)

    queries = ((T, 64, 128), E4M3), ((T, 64), jnp.float32)
    keys = ((n * size, 128), E4M3), ((n * size,), jnp.float32), ((n,), i32)
    assert "mosaic_gpu" in lower(scores, *queries, *keys, ((T, 12288), i32), ((T,), i32), ((T,), i32))


def test_what_it_declines():
    assert refine_tokens_few.why_not(64, 128, 1) is None
    for H, D, itemsize in ((64, 64, 1), (64, 128, 2), (8, 128, 1), (256, 128, 1)):
        assert "needs" in refine_tokens_few.why_not(H, D, itemsize)
