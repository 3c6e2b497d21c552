"""`checked` turns values that only run time can know into errors; without it they are harmless."""

import contextvars
import threading

import jax
import jax.numpy as jnp
import pytest
from jax.experimental import checkify

import hisa_jax as hj

ARRAYS = jnp.ones((2, 3, 4, 16)), jnp.ones((2, 40, 16)), jnp.ones((2, 3, 4))
PACKED = jnp.ones((3, 4, 16)), jnp.ones((40, 16)), jnp.ones((3, 4))
MLA = jnp.ones((1, 2, 4, 24)), jnp.ones((1, 40, 24))
METHODS = [
    hj.Dsa(topk=4),
    hj.Hisa(topk=4, block_size=4, block_topk=2),
    hj.BlockSparse(topk=8, block_size=4),
    hj.Scan(topk=4),
]


@pytest.mark.gate("Hisa")  # what is checked, every method shares
@pytest.mark.parametrize("method", METHODS, ids=lambda method: type(method).__name__)
def test_good_values_pass_and_change_nothing(method):
    got = hj.checked(hj.select)(*ARRAYS, method, lengths=jnp.array([40, 7]))
    wanted = hj.select(*ARRAYS, method, lengths=jnp.array([40, 7]))
    assert (got.indices == wanted.indices).all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(lengths=jnp.array([40, 41])), r"select: lengths is \[40 41\], wanted 0 to 40, the keys there are"),
        (dict(lengths=jnp.array([-1, 4])), r"select: lengths is \[-1  4\], wanted 0 to 40"),
        (
            dict(query_positions=jnp.array([[1, 2, -2]] * 2)),
            r"select: query_positions holds -2, wanted -1 \(padding\) or more",
        ),
    ],
)
def test_bad_values_raise_and_are_named(options, message):
    with pytest.raises(checkify.JaxRuntimeError, match=message):
        hj.checked(hj.select)(*ARRAYS, METHODS[0], **options)
    with pytest.raises(checkify.JaxRuntimeError, match=message):
        hj.checked(jax.jit(lambda *arrays: hj.select(*arrays, METHODS[0], **options)))(*ARRAYS)
    hj.select(*ARRAYS, METHODS[0], **options)  # unchecked: no error


@pytest.mark.parametrize(
    ("cu_seqlens_q", "cu_seqlens_k", "message"),
    [
        ([0, 2, 1], [0, 1, 2], r"cu_seqlens_q is \[0 2 1\], wanted ascending offsets from 0 to at most 3"),
        ([1, 2, 3], [0, 1, 2], r"cu_seqlens_q is \[1 2 3\], wanted ascending offsets from 0 to at most 3"),
        ([0, 2, 3], [0, 1, 41], r"cu_seqlens_k is \[ 0  1 41\], wanted ascending offsets from 0 to at most 40"),
    ],
)
def test_bad_offsets_raise_and_are_named(cu_seqlens_q, cu_seqlens_k, message):
    with pytest.raises(checkify.JaxRuntimeError, match=message):
        hj.checked(hj.select_packed)(*PACKED, jnp.array(cu_seqlens_q), jnp.array(cu_seqlens_k), METHODS[0])


def test_bad_indices_raise_and_are_named():
    indices = jnp.array([[[0, 40], [3, -1]]])
    with pytest.raises(checkify.JaxRuntimeError, match="sparse_mla: indices range from -1 to 40, wanted -1 to 39"):
        hj.checked(hj.sparse_mla)(*MLA, indices, scale=0.1, value_dim=16)
    assert jnp.isfinite(hj.sparse_mla(*MLA, indices, scale=0.1, value_dim=16)).all()


@pytest.mark.parametrize(
    ("indices", "offsets", "message"),
    [
        (
            [[0, 32], [3, -1], [9, 9]],
            [0, 1, 2],
            r"rows \[ True False False\] of q select what has no page, wanted -1 or",
        ),
        ([[0, 31], [17, -1], [9, 9]], [0, 1, 2], r"rows \[False  True False\] of q select what has no page"),
        (
            [[0, 31], [3, -1], [9, 9]],
            [0, 2, 1],
            r"cu_seqlens_q is \[0 2 1\], wanted ascending offsets from 0 to at most 3",
        ),
    ],
)
def test_what_has_no_page_is_named(indices, offsets, message):
    """The last query is no request's: what its list holds is no mistake."""
    cache = hj.init_cache(4, 16, 0, latent_dim=24, latent_dtype=jnp.float32)
    arrays = jnp.ones((3, 4, 24)), cache, jnp.array(indices), jnp.array([[3, 0], [2, -1]]), jnp.array(offsets)
    options = dict(scale=0.1, value_dim=16)
    with pytest.raises(checkify.JaxRuntimeError, match=f"sparse_mla_paged: {message}"):
        hj.checked(hj.sparse_mla_paged)(*arrays, **options)
    assert jnp.isfinite(hj.sparse_mla_paged(*arrays, **options)).all()
    good = jnp.array([[0, 31], [15, -1], [999, -7]])
    hj.checked(hj.sparse_mla_paged)(*arrays[:2], good, arrays[3], jnp.array([0, 1, 2]), **options)


def test_other_threads_are_not_checked_even_if_they_inherit_the_context():
    """JAX would keep their programs, checks and all, as the unchecked ones, which could not be exported then."""
    run = jax.jit(lambda lengths: hj.select(*ARRAYS, METHODS[0], lengths=lengths).count)
    bad = jnp.array([40, 41])

    def elsewhere():
        thread = threading.Thread(target=contextvars.copy_context().run, args=(run, bad))
        thread.start()
        thread.join()
        return bad

    hj.checked(elsewhere)()
    jax.export.export(run)(bad).serialize()
    with pytest.raises(checkify.JaxRuntimeError, match="select: lengths"):
        hj.checked(run)(bad)


def test_attention_over_a_mesh_is_checked_and_has_a_gradient_as_on_one_device():
    over = dict(mesh=jax.make_mesh((1,), ("context",)), context_axis="context", scale=0.1, value_dim=16)
    indices, good = jnp.array([[[0, 40], [3, -1]]]), jnp.array([[[0, 39], [3, -1]]])
    with pytest.raises(checkify.JaxRuntimeError, match="sparse_mla: indices range from -1 to 40"):
        hj.checked(hj.sparse_mla)(*MLA, indices, **over)
    cache = hj.init_cache(4, 16, 0, latent_dim=24, latent_dtype=jnp.float32)
    arrays = cache, indices[0], jnp.array([[3, 0]]), jnp.array([0, 2])
    with pytest.raises(checkify.JaxRuntimeError, match=r"sparse_mla_paged: rows \[ True False\] of q"):
        hj.checked(hj.sparse_mla_paged)(MLA[0][0], *arrays, **over)
    q, kv = (jax.random.normal(jax.random.key(0), x.shape) for x in MLA)
    got = jax.grad(lambda q, kv: (hj.sparse_mla(q, kv, good, **over) ** 2).sum(), (0, 1))(q, kv)
    wanted = jax.grad(lambda q, kv: (hj.sparse_mla(q, kv, good, scale=0.1, value_dim=16) ** 2).sum(), (0, 1))(q, kv)
    for x, y in zip(got, wanted, strict=True):
        assert jnp.allclose(x, y, atol=1e-5) and jnp.abs(y).max() > 0.01
