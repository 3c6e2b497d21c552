"""What kernels make of numbers, as functions of arrays: the same bits as XLA's, and those that the formats say."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

from hisa_jax.kernels_pallas import sort_key
from hisa_jax.xla import topk
from hisa_jax.xla.means import mean_parts, split

SPECIAL = [np.nan, -np.nan, np.inf, -np.inf, 0.0, -0.0, 1e-37, -1e-37, 3e38, -3e38, 1.0, -1.0]


def test_sort_keys_are_those_of_xla_and_can_be_inverted():
    scores = np.concatenate([SPECIAL, np.random.default_rng(0).normal(size=500)]).astype(np.float32)[None]
    got = sort_key.sort_key_of(jnp.asarray(scores))
    np.testing.assert_array_equal(got, topk.sort_key_of(jnp.asarray(scores)))
    wanted = np.where(np.isnan(scores), -np.inf, scores)
    np.testing.assert_array_equal(sort_key.score_of(got), wanted)
    assert (np.diff(np.asarray(got)[0][np.argsort(wanted[0], kind="stable")].astype(np.int64)) >= 0).all()


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
    big = np.abs(means / power) > 2**-5  # smaller ones are subnormal in a part, where the second one holds the rest
    got = np.asarray(parts.astype(jnp.float32))
    np.testing.assert_array_equal(got[:, 0][big], first.astype(np.float32)[big])
    normal = big & (np.abs(second.astype(np.float32)) > 2**-5)
    np.testing.assert_array_equal(got[:, 1][normal], second.astype(np.float32)[normal])
    compiled, compiled_scale = jax.jit(lambda x: split(x, 2, jnp.float8_e4m3fn))(jnp.asarray(means))
    np.testing.assert_array_equal(compiled_scale, scale)
    for part in range(2):
        np.testing.assert_array_equal(
            np.asarray(compiled[part]).view(np.uint8), np.asarray(parts[:, part]).view(np.uint8)
        )


def test_a_threshold_is_reached_by_as_many_as_are_wanted_but_for_ties():
    """Every number of 60 different sort keys, and of sort keys with ties, forced ones among them."""
    rng = np.random.default_rng(2)
    different = rng.permutation(np.unique(rng.integers(-(2**31) + 1, 2**31 - 1, 60)))
    ties = np.concatenate([rng.integers(-4, 4, 55), [sort_key.FORCED] * 5])
    for sort_keys in (different, ties):
        x = jnp.asarray(sort_keys, jnp.int32)
        count = lambda threshold, x=x: jnp.sum(x >= threshold, dtype=jnp.int32)  # noqa: E731
        find = lambda k, count=count, x=x: sort_key.find_threshold(count, jnp.min(x), jnp.max(x), jnp.int32(x.size), k)  # noqa: E731
        thresholds = np.asarray(jax.jit(jax.vmap(find))(jnp.arange(1, 61)))
        for k, threshold in enumerate(thresholds, 1):
            assert (sort_keys > threshold).sum() <= k <= (sort_keys >= threshold).sum()
            assert (sort_keys >= threshold).sum() == k or threshold in sort_keys
