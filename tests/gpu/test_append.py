"""`append` as one kernel: the pages that XLA writes, bit for bit."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import hisa_jax as hj
from hisa_jax import dispatch, dispatch_stage
from hisa_jax.kernels_pallas.triton import append as append_stage
from hisa_jax.kernels_pallas.triton.pool import pool
from tests.gpu.test_lowering import BF16, E4M3, lower

pytestmark = pytest.mark.filterwarnings("ignore:The Pallas Triton backend is deprecated:DeprecationWarning")
DTYPES = ["float8_e4m3fn", "bfloat16", "int8", "float32"]


@dataclasses.dataclass(frozen=True)
class Step:
    """Requests in pages of random order, and new tokens for them, of which the last rows are padding."""

    cache: hj.IndexCache
    k: jax.Array | hj.QuantizedKeys
    latents: jax.Array | None
    tables: jax.Array
    cu_seqlens: jax.Array
    lengths: jax.Array

    def append(self, implementation):
        arrays = self.cache, self.k, self.tables, self.cu_seqlens, self.lengths
        return hj.append(*arrays, latents=self.latents, implementation=implementation)

    def append_interpreted(self):
        k, scales = (self.k.values, self.k.scales) if isinstance(self.k, hj.QuantizedKeys) else (self.k, None)
        arrays = self.tables, self.cu_seqlens, self.lengths
        return append_stage.append(self.cache, (k, scales, self.latents), *arrays, interpret=True)


def draw(dtype, lengths, sizes, page_size, *, D=64, scale="ue8m0", seed=0, latent_dim=None, **options):
    """Normal keys. With scales of powers of two no product is rounded, so that no compiler can fuse it with a sum."""
    rng = np.random.default_rng(seed)
    R, lengths = len(lengths), np.asarray(lengths, np.int32)
    P = int(max(-(-(lengths + np.asarray(sizes)) // page_size))) + 1
    n_pages = R * P + 2
    tables = rng.permutation(n_pages)[: R * P].reshape(R, P).astype(np.int32)

    def keys(n):
        k = jnp.asarray(rng.normal(size=(n, D)), jnp.float32)
        return hj.quantize_keys(k, dtype, scale=scale) if dtype in ("float8_e4m3fn", "int8") else k.astype(dtype)

    def latents(n):
        return None if latent_dim is None else jnp.asarray(rng.normal(size=(n, latent_dim)), BF16)

    cache = hj.append(
        hj.init_cache(n_pages, page_size, D, dtype, latent_dim=latent_dim, **options),
        keys(lengths.sum()),
        jnp.asarray(tables),
        jnp.asarray(np.cumsum([0, *lengths]), jnp.int32),
        jnp.zeros(R, jnp.int32),
        latents=latents(lengths.sum()),
        implementation="xla",
    )
    T = sum(sizes) + 3
    cu_seqlens = jnp.asarray(np.cumsum([0, *sizes]), jnp.int32)
    return Step(cache, keys(T), latents(T), jnp.asarray(tables), cu_seqlens, jnp.asarray(lengths))


def assert_same(got, wanted):
    assert jax.tree.structure(got) == jax.tree.structure(wanted)
    for (path, x), y in zip(jax.tree.leaves_with_path(got), jax.tree.leaves(wanted), strict=True):
        bits = f"uint{8 * x.dtype.itemsize}"
        np.testing.assert_array_equal(np.asarray(x).view(bits), np.asarray(y).view(bits), err_msg=str(path))


# Within a page; to its end; over several; nothing; into an empty request; one that begins a page.
LENGTHS, SIZES = [40, 31, 5, 64, 0, 32], [3, 1, 70, 0, 33, 1]
# Ends of blocks of two and four pages: with one new token, with pages written before it in the same call, not yet.
ENDS_OF_BLOCKS = [63, 40, 127, 90, 0], [1, 90, 1, 37, 64]


# One program of a dtype serves the tests below.
ALL_PARTS = {
    dtype: dict(page_size=16 if dtype == "float8_e4m3fn" else 32, latent_dim=40, sketch="int4") for dtype in DTYPES
}


@pytest.mark.gate("bfloat16")  # the next test writes float8_e4m3fn
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_kernel_writes_what_xla_writes(dtype):
    step = draw(dtype, LENGTHS, SIZES, **ALL_PARTS[dtype])
    assert_same(step.append_interpreted(), step.append("xla"))


@pytest.mark.gate("float8_e4m3fn-64")
@pytest.mark.parametrize("block_size", [64, 128])
@pytest.mark.parametrize("dtype", DTYPES[:2])
def test_the_kernel_keeps_the_means_of_blocks_that_xla_keeps(dtype, block_size):
    step = draw(dtype, *ENDS_OF_BLOCKS, 32, block_size=block_size)
    got, wanted = step.append_interpreted(), step.append("xla")
    assert_same(got, wanted)
    # Whatever is no page is in no block.
    step = dataclasses.replace(step, tables=step.tables.at[1, 2].set(-1).at[4, 0].set(10**6))
    assert_same(step.append_interpreted(), step.append("xla"))


@pytest.mark.parametrize("bad", [-1, 10**6])
def test_tokens_without_a_page_are_dropped_and_the_others_written(bad):
    step = draw("float8_e4m3fn", LENGTHS, SIZES, **ALL_PARTS["float8_e4m3fn"])
    step = dataclasses.replace(step, tables=step.tables.at[0, 2].set(bad).at[2, 1].set(bad))
    got = step.append_interpreted()
    assert_same(got, step.append("xla"))
    assert not (np.asarray(got.counts) == np.asarray(step.cache.counts)).all()
    beyond = dataclasses.replace(step, lengths=step.lengths.at[1].set(step.tables.shape[1] * 16))
    assert_same(beyond.append_interpreted(), beyond.append("xla"))


def test_offsets_beyond_the_new_tokens_write_no_more_than_there_are():
    step = draw("bfloat16", LENGTHS, SIZES, **ALL_PARTS["bfloat16"])
    step = dataclasses.replace(step, cu_seqlens=step.cu_seqlens.at[-1].add(10**6))
    assert_same(step.append_interpreted(), step.append("xla"))


@pytest.mark.slow
@pytest.mark.gate("32-float8_e4m3fn", "128-bfloat16")
@pytest.mark.parametrize("dtype", DTYPES[:2])
@pytest.mark.parametrize("page_size", [32, 128])
def test_a_page_keeps_the_mean_that_pool_makes_of_it(dtype, page_size):
    cache = draw(dtype, [3 * page_size + 5, page_size], [1, 7], page_size).append("xla")
    scales = None if cache.scales is None else cache.scales.reshape(-1)
    means, mean_scales = pool(
        cache.keys.reshape(-1, cache.keys.shape[2]), scales, cache.counts, block_size=page_size, interpret=True
    )
    np.testing.assert_array_equal(np.asarray(cache.means).view("uint8"), np.asarray(means).view("uint8"))
    assert (cache.mean_scales is None) == (mean_scales is None)
    wanted = np.asarray(cache.sums) / np.maximum(cache.counts, 1)[:, None]
    got = np.asarray(cache.means, np.float32).sum(1)
    if mean_scales is not None:
        np.testing.assert_array_equal(cache.mean_scales, mean_scales)
        got *= np.asarray(mean_scales)[:, None]
    largest = np.abs(wanted).max(1, keepdims=True)
    assert (np.abs(got - wanted) <= 2**-8 * largest).all()


def test_auto_takes_the_kernel_where_it_can_run(monkeypatch):
    step = draw("bfloat16", LENGTHS, SIZES, 32)
    calls = []

    def spy(cache, *arrays):
        calls.append(arrays)
        return cache

    monkeypatch.setattr(dispatch_stage, "appender", lambda name: spy if name == "triton" else None)
    step.append("auto")
    assert not calls
    with pytest.raises(ValueError, match='append: implementation="triton" cannot run here: needs an NVIDIA GPU'):
        step.append("triton")
    ampere = dispatch.Device(platform="gpu", kind="NVIDIA A100", compute_capability="8.0")
    monkeypatch.setattr(dispatch.Device, "default", lambda: ampere)
    step.append("auto")
    assert len(calls) == 1


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({}, None),
        ({"dtype": "float8_e4m3fn"}, "float8_e4m3fn needs compute capability 8.9, this device has 8.0"),
        ({"D": 0}, "needs keys of 16 to 512 features, a power of two, not 0"),
        ({"D": 48}, "needs keys of 16 to 512 features, a power of two, not 48"),
        ({"page_size": 8}, "needs pages of 16 tokens or more, not 8"),
        ({"n_requests": 5000}, "needs at most 4096 requests, not 5000"),
        ({"dtype": "int8", "n_pages": 1 << 18}, "needs at most 2147483648 bytes of 8-bit keys, not 4294967296"),
    ],
)
def test_refusals_say_why(change, reason):
    shape = dict(n_requests=128, n_pages=1 << 17, page_size=128, D=128, dtype="bfloat16") | change
    assert append_stage.why_not("8.0", **shape) == reason


@pytest.mark.oldest("page_is_a_block_with_sketch")
@pytest.mark.parametrize(
    ("dtype", "T", "R", "P", "page_size", "latent_dim", "sketch", "block_size"),
    [
        (E4M3, 128, 128, 1024, 64, None, None, None),
        (E4M3, 32, 32, 1024, 128, None, "int4", None),
        (BF16, 4096, 8, 512, 64, 576, None, 128),
    ],
    ids=["decode", "page_is_a_block_with_sketch", "prefill_with_latents_and_blocks"],
)
def test_it_lowers(dtype, T, R, P, page_size, latent_dim, sketch, block_size):
    options = dict(sketch=sketch, latent_dim=latent_dim, block_size=block_size)
    cache = jax.eval_shape(lambda: hj.init_cache(R * P, page_size, 128, dtype, **options))
    leaves, structure = jax.tree.flatten(cache)

    def append(*arrays):
        cache = jax.tree.unflatten(structure, arrays[: len(leaves)])
        k, scales, latents, *rest = arrays[len(leaves) :]
        return append_stage.append(
            cache, (k, scales if dtype == E4M3 else None, latents if latent_dim else None), *rest
        )

    new = ((T, 128), dtype), ((T,), jnp.float32), ((T, latent_dim or 1), BF16)
    requests = ((R, P), jnp.int32), ((R + 1,), jnp.int32), ((R,), jnp.int32)
    assert "hisa_append" in lower(append, *((x.shape, x.dtype) for x in leaves), *new, *requests)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("page_size", "block_size"), [(16, 128), (64, 128), (64, None), (128, None)])
@pytest.mark.parametrize("scale", ["float32", "ue8m0"])
def test_on_the_device(dtype, page_size, block_size, scale):
    if jax.default_backend() != "gpu":
        pytest.skip("needs an NVIDIA GPU")
    rng = np.random.default_rng(page_size)
    for lengths, sizes in (
        (rng.integers(0, 3000, 100), np.ones(100, int)),  # decode
        ([777], [1]),
        (rng.integers(0, 3000, 9), [700, 1, 0, 300, 128, 1, 1, 5, 64]),  # prefill chunks among it
    ):
        options = dict(latent_dim=576, sketch="int4", block_size=block_size, scale=scale)
        step = draw(dtype, lengths, sizes, page_size, D=128, **options)
        got, wanted = step.append("triton"), step.append("xla")
        assert_same(got, step.append("triton"))
        if wanted.means is not None:
            # Triton divides by other counts than powers of two with an error of its own.
            exact = np.isin(np.asarray(wanted.counts), 2 ** np.arange(9))
            for name in ("means", "mean_scales"):
                x, y = getattr(got, name), getattr(wanted, name)
                if x is not None:
                    np.testing.assert_array_equal(np.asarray(x)[exact], np.asarray(y)[exact], err_msg=name)
        assert_same(*(dataclasses.replace(cache, means=None, mean_scales=None) for cache in (got, wanted)))
