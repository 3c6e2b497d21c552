"""Pieces of TPU kernels that are plain functions of arrays, by themselves: what takes interpreted kernels a minute."""

import jax
import jax.numpy as jnp
import numpy as np

from hisa_jax.kernels_pallas.mosaic_tpu import pool_body, score_body, topk_body


def test_a_mean_is_over_the_tokens_present_and_scaled_one_by_one():
    rng = np.random.default_rng(0)
    keys = rng.integers(-3, 4, (64, 128)).astype(np.float32)
    scale = 2.0 ** rng.integers(-2, 3, (1, 64)).astype(np.float32)
    mean = jax.jit(pool_body.mean_of_block)
    for n in (1, 2, 63, 64, 100):
        spoilt = np.where(np.arange(64)[:, None] < n, keys, np.nan).astype(np.float32)
        for factor in (None, scale):
            wanted = (keys * (1 if factor is None else factor.T))[:n].mean(0)
            np.testing.assert_allclose(mean(spoilt, factor, n)[0], wanted, rtol=1e-6)
    assert not np.any(mean(np.full((64, 128), np.nan, np.float32), None, 0))


def test_parts_of_a_mean_add_up_to_it():
    means = np.random.default_rng(1).normal(size=(16, 128)).astype(np.float32)
    one, two = (np.asarray(pool_body.parts_of(jnp.asarray(means), n), np.float32) for n in (1, 2))
    np.testing.assert_array_equal(one, means.astype(jnp.bfloat16).astype(np.float32))
    np.testing.assert_allclose(two.reshape(16, 2, 128).sum(1), means, rtol=2**-15)


def test_products_are_of_closed_or_open_relus_and_heads_are_weighted():
    rng = np.random.default_rng(2)
    q, keys, w = rng.integers(-2, 3, (16, 64)), rng.integers(-2, 3, (128, 64)), rng.integers(-3, 4, (16, 1))
    for dtype in (jnp.bfloat16, jnp.int8):
        x = score_body.products(jnp.asarray(q, dtype), jnp.asarray(keys, dtype))
        np.testing.assert_array_equal(x, np.maximum(q @ keys.T, 0))
        turned = score_body.products(jnp.asarray(q, dtype), jnp.asarray(keys.T, dtype), is_transposed=True)
        np.testing.assert_array_equal(turned, x)
    sums = score_body.sum_to_sublanes(x, jnp.asarray(np.broadcast_to(w, (16, 128)), jnp.float32))
    np.testing.assert_array_equal(np.asarray(sums).sum(0), (np.maximum(q @ keys.T, 0) * w).sum(0))


def test_the_place_of_a_bit_is_found_by_how_many_are_below_it():
    words = np.random.default_rng(3).integers(-(2**31), 2**31, 200).astype(np.int32)
    words[:3] = -1, 1, -(2**31)
    find = jax.jit(topk_body._bit_of_rank)
    for rank in range(32):
        for word, place in zip(words.tolist(), np.asarray(find(words, np.full(200, rank, np.int32))), strict=True):
            places = [bit for bit in range(32) if word >> bit & 1]
            assert rank >= len(places) or place == places[rank]


def test_a_product_packs_comparisons_to_words_counts_and_a_total():
    chosen = np.random.default_rng(4).random((40, 128)) < np.linspace(0, 1, 40)[:, None]
    both = np.asarray(topk_body._contract_lanes(topk_body._packing(), jnp.asarray(chosen, jnp.bfloat16)), np.int64)
    words = both[:8] | both[8:] << 16
    for group, row in enumerate(chosen):
        counts = row.reshape(4, 32).sum(1).cumsum()
        for i in range(4):
            assert words[i, group] == sum(int(bit) << place for place, bit in enumerate(row[32 * i : 32 * i + 32]))
        packed = words[4, group]
        assert (packed & 63, packed >> 6 & 127, packed >> 16) == tuple(counts[:3])
        assert words[5, group] == counts[3]


def test_groups_before_are_those_of_the_same_row():
    before = np.asarray(topk_body._before(16), np.float32)
    i, j = np.indices((128, 128))
    np.testing.assert_array_equal(before, (i < j) & (i // 16 == j // 16))
