"""Lists of chosen tokens in plain JAX: any order, holes, repeats; what nobody chose leaves no trace, gradients too.

All cost 8 s, most of it compiling.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import hisa_jax as hj
from tests import contract_lists
from tests.contract_lists import Case

CASE = Case(K=150, N=2, Dk=24, value_dim=16, rows=512, dtype="float32", tolerance=2e-5)
FORMS = contract_lists.forms(page_sizes=(1, 2, 16, 64, 256))


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_a_list_may_have_any_order_holes_and_repeats(form):
    contract_lists.check_any_order(CASE, form, "xla")
    contract_lists.check_counts(CASE, form, "xla")


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_rows_that_are_not_selected_leave_no_trace(form):
    contract_lists.check_no_trace(CASE, form, "xla")


def gradients(q, kv, indices, sink, cotangents):
    def attend(q, kv, sink):
        return hj.sparse_mla(q, kv, indices, scale=0.2, value_dim=16, sink=sink, return_lse=True)

    return jax.jit(lambda *arrays: jax.vjp(attend, *arrays)[1](cotangents))(q, kv, sink)


@functools.cache
def drawn():
    """Arrays of `gradients`: lists in any order with holes, what is outside, and one of nothing."""
    lists = CASE.lists(300)[:, :60]
    rng = np.random.default_rng(1)
    draw = lambda *shape: rng.normal(size=shape).astype(np.float32)  # noqa: E731
    return draw(1, 8, 2, 24), draw(1, 300, 24), lists[None], draw(2), (draw(1, 8, 2, 16), draw(1, 8, 2))


def test_rows_that_are_not_selected_have_no_gradient_and_leave_no_trace_in_others():
    q, kv, lists, sink, cotangents = drawn()
    others = contract_lists.unselected(lists, 300)
    kv[:, others] = 0
    wanted = gradients(q, kv, lists, sink, cotangents)
    assert not np.asarray(wanted[1])[0, others].any() and all(np.isfinite(x).all() for x in wanted)
    kv[:, others] = np.resize(contract_lists.POISON, len(others))[:, None]
    contract_lists.same_bits(map(np.asarray, gradients(q, kv, lists, sink, cotangents)), map(np.asarray, wanted))


def test_a_query_that_selects_nothing_passes_no_gradient_on():
    """Of its logsumexp, -inf, callers easily pass NaN back."""
    q, kv, lists, sink, (d_out, d_lse) = drawn()
    of_nothing = (lists < 0).all(axis=-1) | (lists >= 300).all(axis=-1)
    wanted = gradients(q, kv, lists, sink, (d_out, d_lse))
    got = gradients(q, kv, lists, sink, (d_out, np.where(of_nothing[..., None], np.float32(np.nan), d_lse)))
    assert of_nothing.any() and not np.asarray(got[0])[of_nothing].any()
    contract_lists.same_bits(map(np.asarray, got), map(np.asarray, wanted))


def test_a_token_listed_twice_has_the_gradient_of_two_that_are_alike():
    q, kv, _, sink, cotangents = drawn()
    kv = np.nan_to_num(kv)
    alike = np.concatenate([kv, kv[:, 5:6]], axis=1)
    lists = np.zeros((1, 8, 4), np.int32) + np.array([5, 290, 5, 7], np.int32)
    twice = gradients(q, kv, lists, sink, cotangents)
    wanted = gradients(q, alike, np.where(np.arange(4) == 2, 300, lists), sink, cotangents)
    np.testing.assert_allclose(twice[0], wanted[0], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(twice[1][:, 5], wanted[1][:, 5] + wanted[1][:, 300], rtol=1e-5, atol=1e-5)


def test_a_sink_of_minus_infinity_takes_nothing_even_from_nothing():
    q, kv, lists, _, _ = drawn()
    kv = np.nan_to_num(kv)
    options = dict(scale=0.2, value_dim=16, return_lse=True)
    wanted = hj.sparse_mla(*map(jnp.asarray, (q, kv, lists)), **options)
    got = hj.sparse_mla(*map(jnp.asarray, (q, kv, lists)), sink=jnp.full(2, -jnp.inf), **options)
    jax.tree.map(np.testing.assert_array_equal, got, wanted)


@pytest.mark.parametrize("offsets", [[0, 3, 8], [2, 4, 6], [-5, 3, 3], [0, 6, 2], [0, 900, 7], [8, 8, 8]])
def test_odd_offsets_give_each_row_one_request_or_none(offsets):
    """Rows before the first request and after the last select nothing; offsets that do not ascend read no others'."""
    rng = np.random.default_rng(0)
    cache = hj.init_cache(6, 16, 0, "float32", latent_dim=24, latent_dtype="float32")
    latents = jnp.asarray(rng.normal(size=(6, 16, 24)), jnp.float32)
    cache, tables = hj.IndexCache(**{**vars(cache), "latents": latents}), jnp.array([[4, 2], [1, 0]], jnp.int32)
    q, lists = (
        jnp.asarray(rng.normal(size=(8, 2, 24)), jnp.float32),
        jnp.asarray(rng.integers(0, 32, (8, 5)), jnp.int32),
    )
    options = dict(scale=0.2, value_dim=16, return_lse=True)
    out, lse = hj.sparse_mla_paged(q, cache, lists, tables, jnp.array(offsets, jnp.int32), **options)
    ends = np.maximum.accumulate(np.clip(offsets, 0, 8))
    for t in range(8):
        r = np.searchsorted(ends, t, side="right") - 1
        own = latents[tables[r]].reshape(1, 32, 24) if 0 <= r < 2 else jnp.zeros((1, 0, 24))
        wanted = hj.sparse_mla(q[None, t : t + 1], own, lists[None, t : t + 1], **options)
        np.testing.assert_allclose(out[t], wanted[0][0, 0], rtol=1e-6, atol=1e-6)
        np.testing.assert_allclose(lse[t], wanted[1][0, 0], rtol=1e-6)


@pytest.mark.parametrize(
    ("T", "R", "P", "K", "N"), [(0, 1, 2, 3, 2), (3, 0, 2, 3, 2), (3, 1, 0, 3, 2), (3, 1, 2, 0, 2), (3, 1, 2, 3, 0)]
)
def test_of_no_queries_requests_pages_entries_or_heads_there_is_nothing(T, R, P, K, N):
    cache = hj.init_cache(4, 16, 0, "float32", latent_dim=24, latent_dtype="float32")
    zeros = lambda *shape: jnp.zeros(shape, jnp.int32)  # noqa: E731
    arrays = jnp.ones((T, N, 24)), cache, zeros(T, K), zeros(R, P), jnp.full(R + 1, T)
    mesh = dict(mesh=jax.make_mesh((1,), ("context",)), context_axis="context")
    options = dict(scale=0.1, value_dim=16, return_lse=True)
    q, lists, kv = arrays[0][None], jnp.full((1, T, K), -1), jnp.ones((1, 16 * P * R, 24))
    for out, lse in (
        hj.sparse_mla_paged(*arrays, **options),
        hj.sparse_mla_paged(*arrays, **options, **mesh),
        (x[0] for x in hj.sparse_mla(q, kv, lists, **options, **mesh)),
    ):
        assert out.shape == (T, N, 16) and not out.any() and lse.shape == (T, N) and jnp.isneginf(lse).all()
