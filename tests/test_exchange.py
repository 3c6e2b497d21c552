"""What devices exchange, on devices that `jax.vmap` stands in for: the arithmetic, without a mesh."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hisa_jax.sharded import attention, exchange
from hisa_jax.sharded.select_kernels import merge_of_any_order
from hisa_jax.xla import topk


@pytest.mark.parametrize("many_bytes", [0, 2**20], ids=["each_a_share", "few_queries"])
def test_attention_to_parts_merges_to_attention_to_all(many_bytes, monkeypatch):
    """By their logsumexps; a device without a token counts for nothing, a query that nobody has one for gives zeros."""
    monkeypatch.setattr(attention, "_MANY_BYTES", many_bytes)
    rng = np.random.default_rng(0)
    logits, values = rng.normal(scale=20, size=(4, 3, 5)), rng.normal(size=(4, 5, 7))  # devices, heads, tokens
    logits[1], logits[:, 2] = -np.inf, -np.inf
    with np.errstate(divide="ignore", invalid="ignore"):
        p, lse = np.exp(logits), np.log(np.exp(logits).sum(-1))
        out = np.nan_to_num(np.einsum("dns,dsv->dnv", p, values) / p.sum(-1)[..., None])
        wanted = np.nan_to_num(np.einsum("dns,dsv->nv", p, values) / p.sum((0, 2))[:, None])
        wanted_lse = np.log(p.sum((0, 2)))
    arrays = (jnp.asarray(x[:, None, None], jnp.float32) for x in (out, lse))
    got, got_lse = jax.vmap(lambda out, lse: attention.merge(out, lse, "devices"), axis_name="devices")(*arrays)
    for device in range(4):  # all have the same
        np.testing.assert_allclose(got[device, 0, 0], wanted, rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(got_lse[device, 0, 0], wanted_lse, rtol=1e-5)


def test_each_device_gets_what_all_have_found_for_its_queries_and_all_get_what_it_makes_of_it():
    n, T, j = 4, 10, 3  # ten queries do not divide by four
    found = jnp.arange(n * T * j, dtype=jnp.int32).reshape(n, T, j)
    own = jax.vmap(lambda x: exchange.to_owner(x, -1, "devices", n), axis_name="devices")(found)
    assert own.shape == (n, 3, n * j)
    for t in range(12):
        wanted = found[:, t].reshape(-1) if t < T else np.full(n * j, -1)
        np.testing.assert_array_equal(own[t // 3, t % 3], wanted)
    back = jax.vmap(lambda x: exchange.from_owners(x, "devices", T), axis_name="devices")(own)
    for device in range(n):
        np.testing.assert_array_equal(back[device], found.swapaxes(0, 1).reshape(T, -1))


@pytest.mark.parametrize("n_scores", [5, 10**6], ids=["tied", "all_different"])
def test_the_lowest_positions_win_ties_of_a_merge_whose_first_columns_do(n_scores):
    """Devices' lists ascend, one after the other they do not; rows with holes, with few candidates, and with none."""
    rng, n, j, k = np.random.default_rng(0), 3, 40, 30
    positions = np.sort(
        rng.permuted(np.tile(np.arange(n * j * 2), (6, 1)), axis=1)[:, : n * j].reshape(6, n, j), axis=2
    )
    sort_keys = rng.integers(-n_scores, n_scores, (6, n, j))
    sort_keys[3, :, 10:], sort_keys[4, :, 5:], sort_keys[5] = topk.INVISIBLE, topk.INVISIBLE, topk.INVISIBLE
    arrays = [jnp.asarray(x.reshape(6, -1), jnp.int32) for x in (sort_keys, positions)]
    arrays[1] = jnp.where(arrays[0] > topk.INVISIBLE, arrays[1], -1)

    def by_column(sort_keys, positions, k):
        best, columns = topk.topk_in_order(sort_keys, None, k)
        chosen = jnp.take_along_axis(positions, jnp.maximum(columns, 0), axis=1)
        return best, jnp.where(columns >= 0, chosen, -1)

    got, wanted = merge_of_any_order(by_column, *arrays, k), topk.topk_of_any_order(*arrays, k)
    jax.tree.map(np.testing.assert_array_equal, got, wanted)
