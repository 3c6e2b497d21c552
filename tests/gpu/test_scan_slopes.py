"""Slopes by Mosaic: the PTX run by a machine in NumPy, the kernel around it interpreted, both against Triton's.

Whole numbers, of which no sum is rounded. In the gate 3 s.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hisa_jax.kernels_pallas.mosaic_gpu import scan_slopes
from hisa_jax.kernels_pallas.mosaic_gpu.ptx.listed_loop_text import Shape as Listed
from hisa_jax.kernels_pallas.mosaic_gpu.ptx.slopes_text import OPERANDS, Shape, slopes_ptx
from hisa_jax.kernels_pallas.operands import Operands
from hisa_jax.kernels_pallas.pages import Pages
from hisa_jax.kernels_pallas.triton import scan_heads
from hisa_jax.kernels_pallas.triton.scan_heads_body import Layout
from tests.gpu.ptx_machine import Machine
from tests.gpu.test_lowering import E4M3, lower

pytestmark = pytest.mark.filterwarnings("ignore:The Pallas Triton backend is deprecated:DeprecationWarning")
PAGE, S = 32, 1280


class Queries:
    """Of two sequences of 640 keys: they see many tokens, few, hardly more than are sampled, as many, none."""

    def __init__(self, H, in_pages, has_scale, is_sample, most, T):
        rng = np.random.default_rng(0)
        self.visible = np.array([640, 40, 257, 256, 32, 5, 0], np.int32)[:T]
        first = [0, 256, 512, 768, 0, 1024, 0] if is_sample else [640, 0, 640, 640, 0, 640, 0]
        self.first = np.array(first, np.int32)[:T]
        q, k = rng.integers(-2, 3, (T, H, 128)), rng.integers(-most, most + 1, (S, 128))
        self.q, self.k = jnp.asarray(q, jnp.float32).astype(E4M3), jnp.asarray(k, jnp.float32).astype(E4M3)
        self.k = self.k.at[16, 3].set(jnp.nan).at[640 + 36, 5].set(jnp.nan)
        self.w = rng.integers(-2, 3, (T, H)).astype(np.float32)
        self.scale = 2.0 ** rng.integers(-1, 2, S).astype(np.float32) if has_scale else None
        table = rng.permutation(S // PAGE).astype(np.int32)
        self.pages = Pages(table=jnp.asarray(table), size=PAGE, n_pages=S // PAGE) if in_pages else None
        self.is_sample = is_sample

    @property
    def operands(self):
        scale = None if self.scale is None else jnp.asarray(self.scale)
        return Operands(self.q, jnp.asarray(self.w), self.k, scale, self.pages)

    @property
    def seen(self):
        return jnp.asarray(self.visible), jnp.asarray(self.first)

    def wanted(self):
        """By Triton's kernel."""
        layout = Layout(None if self.pages is None else PAGE, self.is_sample)
        return np.asarray(jax.jit(lambda: scan_heads._slopes(self.operands, *self.seen, layout, True))())

    def by_machine(self):
        T, H, _ = self.q.shape
        table = np.zeros(1, np.int32) if self.pages is None else self.pages.table
        scale = np.zeros(1, np.float32) if self.scale is None else self.scale
        listed = Listed(
            H=H, steps=4, page_size=self.pages and PAGE, n_pages=len(table), table_size=len(table), n_rows=S,
            capacity=256, has_scale=self.scale is not None,
        )  # fmt: skip
        shape = Shape(listed=listed, is_sample=self.is_sample)
        words, at = [], []
        for array in (self.k, scale, table, self.q, self.w, np.zeros((T, H), np.float32)):
            at.append(4 * sum(map(len, words)))
            array = np.frombuffer(np.asarray(array).tobytes(), np.uint32)
            words.append(np.pad(array, (0, -len(array) % 64)))
        memory, text = np.concatenate(words), slopes_ptx(shape)
        for i in reversed(range(len(OPERANDS))):
            text = text.replace(f"${i}", OPERANDS[i].lower() + "_")
        for t in range(T):
            own = dict(zip(OPERANDS, at, strict=False)) | dict(SMEM=0)
            own |= dict(ROW=int(self.first[t]), VISIBLE=int(self.visible[t]))
            for name, size in (("Q", H * 128), ("W", H * 4), ("O", H * 4)):
                own[name] += t * size
            operands = {name.lower() + "_": value for name, value in own.items()}
            Machine(text, 128, operands, memory, shape.smem_bytes, seed=t).run()
        return memory[at[5] // 4 :][: T * H].view(np.float32).reshape(T, H)


CASES = [
    pytest.param(16, True, True, False, 3, 2, id="pages"),
    pytest.param(64, True, False, False, 3, 7, marks=pytest.mark.exhaustive, id="64_heads"),
    pytest.param(128, False, True, False, 3, 7, marks=pytest.mark.exhaustive, id="128_heads"),
    pytest.param(32, False, True, True, 3, 7, marks=pytest.mark.exhaustive, id="samples_alone"),
    pytest.param(32, False, False, False, 0, 7, marks=pytest.mark.exhaustive, id="all_tie"),
]


@pytest.mark.parametrize(("H", "in_pages", "has_scale", "is_sample", "most", "T"), CASES)
def test_the_machine_has_tritons_slopes(H, in_pages, has_scale, is_sample, most, T):
    queries = Queries(H, in_pages, has_scale, is_sample, most, T)
    np.testing.assert_array_equal(queries.by_machine(), queries.wanted())


@pytest.mark.exhaustive
@pytest.mark.parametrize(("H", "in_pages", "has_scale", "is_sample", "most", "T"), CASES)
def test_the_kernel_around_it(interpret, H, in_pages, has_scale, is_sample, most, T):
    queries = Queries(H, in_pages, has_scale, is_sample, most, T)
    got = scan_slopes.scan_slopes(queries.operands, *queries.seen, is_sample=is_sample, interpret=interpret)
    np.testing.assert_array_equal(got, queries.wanted())


@pytest.mark.gpu
@pytest.mark.parametrize(("H", "in_pages", "has_scale", "is_sample", "most", "T"), CASES)
def test_on_the_device(H, in_pages, has_scale, is_sample, most, T):
    if jax.default_backend() != "gpu":
        pytest.skip("needs an NVIDIA GPU")
    queries = Queries(H, in_pages, has_scale, is_sample, most, T)
    got = scan_slopes.scan_slopes(queries.operands, *queries.seen, is_sample=is_sample)
    np.testing.assert_array_equal(got, queries.wanted())


def test_it_lowers():
    T, n, i32 = 4096, 65536, jnp.int32
    slopes = functools.partial(lambda *x: scan_slopes.scan_slopes(Operands(*x[:4]), *x[4:]))
    arrays = ((T, 64, 128), E4M3), ((T, 64), jnp.float32), ((n, 128), E4M3), ((n,), jnp.float32), ((T,), i32)
    assert "mosaic_gpu" in lower(slopes, *arrays, ((T,), i32))


def test_what_it_declines():
    assert scan_slopes.why_not(64, 128, 1) is None
    for H, D, itemsize in ((64, 64, 1), (64, 128, 2), (8, 128, 1), (256, 128, 1)):
        assert "needs" in scan_slopes.why_not(H, D, itemsize)
