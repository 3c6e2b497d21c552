"""Lighthouse attention against its literal form: what is selected, in which order, what comes out, and gradients."""

import dataclasses
import functools

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies
from jax.experimental import checkify

import hisa_jax as hj
from hisa_jax.dispatch import Device
from hisa_jax.lighthouse import dense
from hisa_jax.lighthouse.forward import Options, attend
from hisa_jax.lighthouse.rope import Rotation
from hisa_jax.testing.oracle import lighthouse as oracle

METHOD = hj.Lighthouse(levels=3, pool=2, topk=16, tile=4)
T, H, G, D, V = 128, 4, 2, 8, 6
CALL = jax.jit(hj.lighthouse_attention, static_argnames=("method", "rope_theta"))


def change(**settings):
    return dataclasses.replace(METHOD, **settings)


def whole_numbers(seed, T, H, G, D=4):
    """Queries and keys whose norms are exact, and often equal."""
    rng = np.random.default_rng(seed)
    return (rng.integers(-2, 3, (1, T, heads, D)).astype(np.float32) for heads in (H, G))


def inputs(seed=0, dtype=np.float32, T=T, H=H, G=G, D=D, V=V):
    rng = np.random.default_rng(seed)
    return [rng.normal(size=(1, T, heads, size)).astype(dtype) for heads, size in ((H, D), (G, D), (G, V))]


def grouped(q, G):
    return q.reshape(*q.shape[:-2], G, -1, q.shape[-1])


def pairs(selection, method, T, g=0):
    """The entries of a sequence's key head, in order, as pairs (level, number)."""
    starts = np.array(method.pyramid(T).starts)
    entries = np.asarray(selection.entries)[0, :, g]
    numbers = entries[entries >= 0]
    levels = np.searchsorted(starts, numbers, side="right") - 1
    return list(zip(levels.tolist(), (numbers - starts[levels]).tolist(), strict=True))


def check_selection(method, T, seed):
    """All that is promised of a selection; the oracle picks by streaming, with ties."""
    q, k = whole_numbers(seed, T, H, G)
    got = hj.lighthouse_select(q, k, method)
    S = T // method.widest + (method.levels - 1) * method.pool * method.topk
    S += method.widest - 1 if method.prefix == "keep" else 0
    assert method.n_entries(T) == S and got.entries.shape == (1, S, G)
    entries, slots = np.asarray(got.entries), np.asarray(got.slots)
    for g in range(G):
        row, places = entries[0, :, g], slots[0, :, g]
        n = np.sum(row >= 0)
        assert (row[:n] >= 0).all() and (row[n:] == -1).all() and S - n <= method.n_kept
        np.testing.assert_array_equal(places[row[:n]], np.arange(n))
        assert np.sum(places >= 0) == n
        a, b = oracle.scores(grouped(q, G)[0, :, g].astype(np.float64), k[0, :, g].astype(np.float64))
        wanted = oracle.present(a, b, method)
        assert pairs(got, method, T, g) == wanted
        if method.prefix == "release":
            assert wanted == oracle.released_order(wanted, method)


@strategies.composite
def legal(draw):
    levels, pool, tile = (draw(strategies.sampled_from(x)) for x in ((1, 2, 3, 4), (2, 4, 8), (2, 4, 6)))
    least = -(-2 * pool // tile)
    n_tiles = draw(strategies.integers(least, least + 2))
    n = tile + tile // 2 * draw(strategies.integers(0, 3))
    hypothesis.assume(n * n_tiles * pool ** (levels - 1) <= 2048)
    prefix = draw(strategies.sampled_from(("keep", "release")))
    method = hj.Lighthouse(levels=levels, pool=pool, topk=n_tiles * tile, tile=tile, prefix=prefix)
    return method, n * n_tiles * method.widest


def test_a_selection_is_what_streaming_picks_in_order():
    """Three levels with ties, then two; the next test has any: it takes a second a shape."""
    check_selection(METHOD, T, 0)
    check_selection(change(levels=2, pool=4, prefix="release"), T, 1)


@pytest.mark.exhaustive
@hypothesis.given(legal(), strategies.integers(0, 9))
@hypothesis.settings(max_examples=60)
def test_a_selection_is_what_streaming_picks_for_any_method(case, seed):
    check_selection(*case, seed)


def test_one_case_by_hand():
    """Eight windows of two tokens: by queries' norms 1 and 4 are picked, then by keys' 3 and 6, as 4 is picked."""
    method = hj.Lighthouse(levels=2, pool=2, topk=4, tile=4, prefix="release")
    q, k = np.ones((1, 16, 1, 1), np.float32), np.ones((1, 16, 1, 1), np.float32)
    q[0, [3, 8]], k[0, [6, 9, 12]] = 5, 7
    entries = np.asarray(hj.lighthouse_select(q, k, method).entries)[0, :, 0]
    top = [16 + number for number in range(8)]
    wanted = [top[0], 2, 3, top[1], top[2], 6, 7, top[3], 8, 9, top[4], top[5], 12, 13, top[6], top[7]]
    assert entries.tolist() == wanted


def test_tiles_are_selected_apart_from_each_other():
    q, k = whole_numbers(3, T, H, G)
    whole = pairs(hj.lighthouse_select(q, k, METHOD), METHOD, T)
    half = change(topk=8)
    first = pairs(hj.lighthouse_select(q[:, : T // 2], k[:, : T // 2], half), half, T // 2)
    assert whole[: len(first)] == first


def test_nan_scores_below_all_and_nothing_is_picked_twice():
    q, k = whole_numbers(0, T, H, G)
    k[:, : T // 2], q[:, T // 4 :] = np.nan, np.nan
    got = hj.lighthouse_select(q, k, METHOD)
    a, b = oracle.scores(grouped(q, G)[0, :, 0].astype(np.float64), k[0, :, 0].astype(np.float64))
    assert pairs(got, METHOD, T) == oracle.present(a, b, METHOD)


def wide(method, theta, q, k, v, **options):
    """(output, pull-back) in float64: the attention between the checks, which want float32."""
    selection = options.pop("selection", None)
    if selection is None:
        selection = hj.lighthouse_select(*(x.astype(np.float32) for x in (q, k)), method)
    positions = jnp.arange(q.shape[1], dtype=jnp.int32)[None]
    given = Options(name="xla", scale=q.shape[-1] ** -0.5, rotate=theta and Rotation(theta))
    return jax.vjp(jax.jit(lambda q, k, v: attend(q, k, v, selection, positions, method, given)), q, k, v), selection


def masked(q, k, v, entries, method, theta):
    """The dense form in JAX, for its gradient: one sequence and key head, q [T, R, D]."""
    T, L, pool = len(k), method.levels, method.pool
    means = [[x.reshape(-1, pool**level, *x.shape[1:]).mean(axis=1) for level in range(L)] for x in (q, k, v)]
    q, k, v = map(jnp.concatenate, means)
    every = [(level, number) for level in range(L) for number in range(T // pool**level)]
    ends = np.array([oracle.last_position(entry, pool) for entry in every], np.int32)
    if theta:
        q, k = (Rotation(theta)(x[None, :, None], jnp.asarray(ends)[None, :, None])[0, :, 0] for x in (q, k[:, None]))
        k = k[:, 0]
    there = np.array([entry in set(entries) for entry in every])
    order = ends * L + np.array([level for level, _ in every])
    sees = there[None] & (order[None] <= order[:, None])
    logits = jnp.einsum("trd,sd->rts", q, k) * q.shape[-1] ** -0.5
    out = jnp.einsum("rts,sv->trv", jax.nn.softmax(jnp.where(sees[None], logits, -1e30), axis=-1), v)
    lands = np.zeros((T, len(every)))
    for at, (level, _) in enumerate(every):
        lands[ends[at] : ends[at] + pool**level, at] = there[at]
    return jnp.einsum("ts,srv->trv", lands, out)


@pytest.mark.gate("release")
@pytest.mark.parametrize("prefix", ["keep", "release"])
def test_output_and_gradients_are_those_of_the_dense_form(prefix):
    """In float64; of both key heads, two queries each. 3 seconds a case."""
    method, theta = change(prefix=prefix), 50.0
    with jax.enable_x64(True):
        q, k, v = inputs(dtype=np.float64)
        (got, pull), selection = wide(method, theta, q, k, v)
        d = np.random.default_rng(1).normal(size=got.shape)
        gradients = [np.asarray(x) for x in pull(d)]
        for g in range(G):
            entries = pairs(selection, method, T, g)
            one = grouped(q, G)[0, :, g], k[0, :, g], v[0, :, g]
            wanted = oracle.attention(*one, entries, method, theta)
            np.testing.assert_allclose(grouped(got, G)[0, :, g], wanted, rtol=0, atol=1e-12)
            form, pull = jax.vjp(functools.partial(masked, entries=entries, method=method, theta=theta), *one)
            np.testing.assert_allclose(form, wanted, rtol=0, atol=1e-12)
            wanted = pull(grouped(d, G)[0, :, g])
            own = grouped(gradients[0], G)[0, :, g], gradients[1][0, :, g], gradients[2][0, :, g]
            for x, y in zip(own, wanted, strict=True):
                np.testing.assert_allclose(x, y, rtol=0, atol=1e-12)


def test_one_level_is_dense_attention():
    q, k, v = inputs(T=64)
    wanted = jax.nn.dot_product_attention(q[..., :6], k[..., :6], v, is_causal=True, scale=D**-0.5)
    q, k = np.pad(q[..., :6], ((0, 0),) * 3 + ((0, 2),)), np.pad(k[..., :6], ((0, 0),) * 3 + ((0, 2),))
    got = CALL(q, k, v, method=hj.Lighthouse(levels=1, pool=2, topk=8, tile=4))
    np.testing.assert_allclose(got, wanted, atol=1e-5)


def test_given_the_selection_no_output_sees_a_later_token():
    q, k, v = inputs()
    selection = hj.lighthouse_select(q, k, METHOD)
    before = CALL(q, k, v, method=METHOD, selection=selection, rope_theta=1e4)
    other = inputs(seed=9)
    for t in (1, 2, 3, 31, 32, 70, 127):
        mixed = [np.concatenate([x[:, :t], y[:, t:]], axis=1) for x, y in zip((q, k, v), other, strict=True)]
        after = CALL(*mixed, method=METHOD, selection=selection, rope_theta=1e4)
        np.testing.assert_array_equal(before[:, :t], after[:, :t])
        assert not np.array_equal(before[:, t:], after[:, t:])


def test_a_selection_out_of_range_raises_if_checked_and_reads_nothing_else():
    q, k, v = inputs()
    good = hj.lighthouse_select(q, k, METHOD)
    bad = dataclasses.replace(good, entries=good.entries.at[0, 5, 0].set(10**6))
    assert np.isfinite(CALL(q, k, v, method=METHOD, selection=bad)).all()
    with pytest.raises(checkify.JaxRuntimeError, match="selection.entries range from -1 to 1000000, wanted -1 to 223"):
        hj.checked(hj.lighthouse_attention)(q, k, v, METHOD, selection=bad)


def test_the_selection_looks_ahead_within_a_tile():
    """A loud token late in a tile changes which earlier entries are there: no loss through this is a likelihood."""
    q, k, v = inputs()
    louder, tile = q.copy(), slice(T // 4, T // 2)
    at = tile.stop - 2
    louder[:, at] *= 100
    slots = [np.asarray(hj.lighthouse_select(x, k, METHOD).slots) >= 0 for x in (q, louder)]
    changed = np.flatnonzero((slots[0] != slots[1])[0, :T].any(axis=-1))
    assert len(changed) and changed.min() < at - 2 and tile.start <= changed.min() and changed.max() < tile.stop
    out = [np.asarray(CALL(x, k, v, method=METHOD)) for x in (q, louder)]
    differs = np.flatnonzero((out[0] != out[1])[0].any(axis=(1, 2)))
    assert tile.start <= differs.min() < at


@pytest.mark.parametrize("prefix", ["keep", "release"])
def test_each_position_gets_one_output_of_a_level_or_none(prefix):
    q, k, v = inputs()
    counts = np.asarray(CALL(q, k, np.ones_like(v), method=change(prefix=prefix)))
    np.testing.assert_allclose(counts, np.round(counts), atol=1e-5)
    counts, start = np.round(counts), METHOD.widest - 1
    assert counts.max() <= METHOD.levels and counts[:, start:].min() >= 1
    if prefix == "keep":
        assert counts.min() >= 1
    else:
        slots = np.asarray(hj.lighthouse_select(q, k, change(prefix=prefix)).slots)[0]
        covered = slots[:start] >= 0  # or else by nothing: their windows of other levels end later or are not picked
        np.testing.assert_array_equal(counts[0, :start].reshape(start, G, -1)[..., 0] > 0, covered)


def test_the_same_bits_twice_and_no_sum_in_any_order():
    q, k, v = map(jnp.asarray, inputs())
    gradient = jax.grad(lambda *x: jnp.sum(CALL(*x, method=METHOD, rope_theta=1e4) ** 2), argnums=(0, 1, 2))
    assert "scatter-add" not in str(jax.make_jaxpr(gradient)(q, k, v))
    compiled = jax.jit(gradient)
    jax.tree.map(np.testing.assert_array_equal, compiled(q, k, v), compiled(q, k, v))


def test_rotation_is_of_the_last_position_or_before_pooling():
    q, k, v = inputs()
    plain = CALL(q, k, v, method=METHOD)
    same = CALL(q, k, v, method=METHOD, rope_theta=50.0, positions=np.full((1, T), 7, np.int32))
    np.testing.assert_allclose(same, plain, atol=1e-5)
    method = change(rope="before")
    got = CALL(q, k, v, method=method, rope_theta=50.0)
    entries = pairs(hj.lighthouse_select(q, k, method), method, T, 1)
    wanted = oracle.attention(
        *(x.astype(np.float64) for x in (grouped(q, G)[0, :, 1], k[0, :, 1], v[0, :, 1])), entries, method, 50.0
    )
    np.testing.assert_allclose(grouped(got, G)[0, :, 1], wanted, atol=1e-5)


def test_bfloat16_is_near_float32():
    rounded = [jnp.asarray(x, jnp.bfloat16) for x in inputs()]
    got = CALL(*rounded, method=METHOD, rope_theta=1e4)
    wanted = CALL(*(x.astype(jnp.float32) for x in rounded), method=METHOD, rope_theta=1e4)
    assert got.dtype == jnp.bfloat16
    error = np.abs(np.asarray(got, np.float32) - np.asarray(wanted))
    assert np.mean(error) < 0.01 and np.max(error) < 0.06


def test_the_dilated_scorer_is_the_norm_of_attention_to_every_fourth_token():
    q, k, v = inputs()
    norms = []
    for classes in range(4):
        own = slice(classes, None, 4)
        visible = np.tril(np.ones((T // 4, T // 4), bool))
        for r in range(H // G):
            rows = q[0, own, r].astype(np.float64), k[0, own, 0].astype(np.float64)
            for x, y in (rows, rows[::-1]):
                logits = np.where(visible, x @ y.T * D**-0.5, -np.inf)
                p = np.exp(logits - logits.max(axis=1, keepdims=True))
                norms.append((p / p.sum(axis=1, keepdims=True) @ v[0, own, 0]).astype(np.float64))
    strength = np.sum(np.array(norms).reshape(4, H // G, 2, T // 4, V) ** 2, axis=-1).max(axis=1)
    a, b = strength.transpose(1, 2, 0).reshape(2, T)
    method = change(scorer="dilated")
    assert pairs(hj.lighthouse_select(q, k, method, v=v), method, T) == oracle.present(a, b, method)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (dict(levels=0), "levels=0.: must be at least 1"),
        (dict(pool=3), "pool=3.: must be a power of two"),
        (dict(tile=3, topk=18), "tile=3.: must be even"),
        (dict(topk=18), "topk=18.: must be a multiple of tile = 4"),
        (dict(topk=4, pool=4), "topk=4.: must be at least 2 . pool = 8"),
        (dict(scorer="gla"), "scorer='gla'.: must be one of norm, dilated"),
        (dict(rope="first"), "rope='first'.: must be one of last, before"),
        (dict(prefix=None), "prefix=None.: must be one of keep, release"),
    ],
)
def test_a_method_out_of_range_is_refused(settings, message):
    with pytest.raises(ValueError, match=rf"Lighthouse\({message}"):
        change(**settings)


@pytest.mark.parametrize(
    ("T", "message"),
    [
        (130, r"multiple of pool \*\* \(levels - 1\) = 4"),
        (4 * 4 * 2, "2 entries of the top level in a tile, wanted at least tile = 4"),
        (4 * 4 * 5, "5 entries of the top level in a tile, wanted at least tile = 4 and a multiple of half"),
        (4 * 6, "wanted a multiple of 16: its 6 entries of the top level must make topk / tile = 4 tiles"),
    ],
)
def test_a_length_that_the_method_does_not_divide_is_refused(T, message):
    q, k, v = inputs(T=T)
    for call, run in (("lighthouse_select", lambda: hj.lighthouse_select(q, k, METHOD)),
                      ("lighthouse_attention", lambda: hj.lighthouse_attention(q, k, v, METHOD))):  # fmt: skip
        with pytest.raises(ValueError, match=f"{call}: q's T = {T}, .*({message})"):
            run()


def test_implementations_say_which_attention_runs_and_why_not():
    described = [jax.ShapeDtypeStruct((1, T, heads, 128), jnp.bfloat16) for heads in (H, G)]
    assert list(hj.implementations(*described, METHOD)) == ["cudnn", "splash", "xla"]
    gpu = Device(platform="gpu", kind="NVIDIA H200", compute_capability="9.0")
    old = Device(platform="gpu", kind="NVIDIA V100", compute_capability="7.0")
    tpu, cpu = Device(platform="tpu", kind="TPU v6e"), Device(platform="cpu", kind="cpu")
    good = dense.Problem(key_dim=128, value_dim=128, dtype="bfloat16")
    for device, name in ((gpu, "cudnn"), (tpu, "splash"), (cpu, "xla"), (old, "xla")):
        assert next(key for key, reason in dense.reasons(device, good).items() if reason is None) == name
    for changes in (dict(dtype="float32"), dict(value_dim=64), dict(key_dim=12, value_dim=12)):
        problem = dataclasses.replace(good, **changes)
        assert dense.reasons(gpu, problem)["cudnn"].startswith("needs ")
    assert dense.reasons(tpu, dense.Problem(key_dim=64, value_dim=64, dtype="bfloat16"))["splash"].startswith("needs ")
    q, k, v = inputs()
    with pytest.raises(ValueError, match='implementation="cudnn" cannot run here: needs an NVIDIA GPU'):
        hj.lighthouse_attention(q, k, v, METHOD, implementation="cudnn")


@pytest.mark.exhaustive  # interpreted, 10 seconds
def test_splash_attention_is_that_of_xla():
    q, k, v = (jnp.asarray(x) for x in inputs(T=256, D=128, V=128))
    got = dense.splash(q, k, v, 0.1, interpret=True)
    np.testing.assert_allclose(got, dense.attention("xla", 0.1)(q, k, v), atol=2e-3)
