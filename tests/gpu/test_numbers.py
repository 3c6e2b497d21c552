"""What kernels make of numbers, as functions of arrays: the bits that formats say, and the search for a threshold."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

import hisa_jax as hj
from hisa_jax.kernels_pallas import sort_key
from hisa_jax.xla.means import mean_parts, split


def test_a_mean_in_two_parts_of_e4m3_is_rounded_twice_to_nearest_even():
    """Ties among them: whole numbers up to 448 of which e4m3 holds some."""
    rng = np.random.default_rng(1)
    rows = [np.arange(-448, 449, 7), np.arange(17, 146), rng.normal(size=129), 1e-20 * rng.normal(size=129)]
    means = np.zeros((len(rows), 129), np.float32)
    for mean, row in zip(means, rows, strict=True):
        mean[: len(row)] = row
    parts, scale = mean_parts(jnp.asarray(means), jnp.float8_e4m3fn)
    power = np.asarray(scale)[:, None]
    assert (np.log2(power) % 1 == 0).all()
    assert (np.abs(means / power).max(1) <= 448).all() and (np.abs(means / power).max(1) > 224).all()
    first = (means / power).astype(ml_dtypes.float8_e4m3fn)
    second = (means / power - first.astype(np.float32)).astype(ml_dtypes.float8_e4m3fn)
    got = np.asarray(parts.astype(jnp.float32))
    np.testing.assert_array_equal(got[:, 0], first.astype(np.float32))
    np.testing.assert_array_equal(got[:, 1], second.astype(np.float32))
    compiled, compiled_scale = jax.jit(lambda x: split(x, 2, jnp.float8_e4m3fn))(jnp.asarray(means))
    np.testing.assert_array_equal(compiled_scale, scale)
    for part in range(2):
        np.testing.assert_array_equal(
            np.asarray(compiled[part]).view(np.uint8), np.asarray(parts[:, part]).view(np.uint8)
        )


@pytest.mark.parametrize("slack", [0, 5])
def test_a_threshold_is_reached_by_as_many_as_are_wanted_but_for_ties(slack):
    """Every number of 60 different sort keys, and of sort keys with ties, forced ones among them."""
    rng = np.random.default_rng(2)
    different = rng.permutation(np.unique(rng.integers(-(2**31) + 1, 2**31 - 1, 60)))
    ties = np.concatenate([rng.integers(-4, 4, 55), [sort_key.FORCED] * 5])
    for sort_keys in (different, ties):
        x = jnp.asarray(sort_keys, jnp.int32)
        count = lambda threshold, x=x: jnp.sum(x >= threshold, dtype=jnp.int32)  # noqa: E731
        bounds = jnp.min(x), jnp.max(x), jnp.int32(x.size)
        find = lambda k, count=count, bounds=bounds: sort_key.find_threshold(count, *bounds, k, slack=slack)  # noqa: E731
        thresholds = np.asarray(jax.jit(jax.vmap(find))(jnp.arange(1, 61)))
        for k, threshold in enumerate(thresholds, 1):
            above, reach = (sort_keys > threshold).sum(), (sort_keys >= threshold).sum()
            assert reach >= k and (reach <= k + slack or (above < k and threshold in sort_keys))


@pytest.mark.gpu
@pytest.mark.parametrize("is_appended", [False, True])
@pytest.mark.parametrize("dtype", ["bfloat16", "float8_e4m3fn", "int8"])
def test_what_pages_say_is_of_the_keys_that_they_hold_on_the_device(dtype, is_appended):
    """Keys are made, written and summed up in one program, where XLA may read them as they were before rounding."""
    n_pages, size, D = 64, 64, 128
    table, lengths = jnp.arange(n_pages, dtype=jnp.int32)[None, ::-1], jnp.asarray([n_pages * size - 5], jnp.int32)

    @jax.jit
    def made(x):
        k = x.astype(jnp.bfloat16) if dtype == "bfloat16" else hj.quantize_keys(x, dtype)
        if not is_appended:
            return described(jax.tree.map(lambda y: y.reshape(n_pages, size, *y.shape[1:]), k))
        cache = hj.init_cache(n_pages, size, D, dtype, block_size=None if dtype == "int8" else 128)
        none = jnp.zeros((1,), jnp.int32)
        return hj.append(cache, k, table, jnp.append(none, lengths), none, implementation="xla")

    def described(k):
        return hj.IndexCache.from_pages(k, table, lengths, block_size=None if dtype == "int8" else 128)

    got = made(jax.random.normal(jax.random.key(0), (n_pages * size, D)))
    k = got.keys if got.scales is None else hj.QuantizedKeys(got.keys, got.scales)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(jax.jit(described)(k)), strict=True):
        np.testing.assert_array_equal(np.asarray(a).view(np.uint8), np.asarray(b).view(np.uint8))
