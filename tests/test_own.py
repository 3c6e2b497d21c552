"""Functions of the caller's own in methods: they decide alone, in every form, and wrong ones are named. 8 s."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import hisa_jax as hj
from tests.own_scores import FUNCTIONS, bounds, distance, most

B, T, S, H, D = 2, 5, 200, 2, 8
PAGE, SIZE, M, K = 8, 16, 4, 12


QUEST = hj.Hisa(topk=K, block_size=SIZE, block_topk=M, keep_first=2, **FUNCTIONS)
METHODS = {
    "hisa": QUEST,
    "dsa": hj.Dsa(topk=K, token_score=distance),
    "block_sparse": hj.BlockSparse(topk=3 * SIZE, block_size=SIZE, pool=bounds, block_score=most),
}
each_method = pytest.mark.parametrize("name", METHODS)


@functools.cache
def inputs():
    """Whole numbers, so that every score is exact: ties are many."""
    rng = np.random.default_rng(0)
    return tuple(rng.integers(-3, 4, shape).astype(np.float32) for shape in ((B, T, H, D), (B, S, D), (B, T, H)))


@functools.cache
def in_one_piece(name):
    return hj.select(*inputs(), METHODS[name], return_blocks=name != "dsa")


def best(scores, n):
    """The n of highest score, ascending; a tie to the lower."""
    return np.sort(np.argsort(-scores, kind="stable")[:n])


def in_numpy(name, q, keys, w):
    """Tokens and blocks of one query [H, D] that sees all of these keys [s, D]."""
    tokens = np.arange(len(keys))
    blocks = None
    if name != "dsa":
        method, n = METHODS[name], -(-len(keys) // SIZE)
        cut = [keys[i * SIZE : (i + 1) * SIZE] for i in range(n)]
        least, greatest = (np.stack([f(block, axis=0) for block in cut]) for f in (np.min, np.max))
        scores = np.einsum("h,hnd->n", w, np.maximum(q[:, None] * least, q[:, None] * greatest))
        scores[[*range(method.keep_first), n - 1]] = np.inf
        blocks = best(scores, method.block_topk)
        tokens = tokens[np.isin(tokens // SIZE, blocks)]
    if name != "block_sparse":
        scores = -np.einsum("h,hsd->s", w**2, np.abs(q[:, None] - keys[tokens]))
        tokens = tokens[best(scores, K)]
    return tokens, blocks


@pytest.mark.gate("hisa", "dsa")
@each_method
def test_scores_of_ones_own_decide_which_blocks_and_tokens_are_chosen(name):
    got = in_one_piece(name)
    for b in range(B):
        for t in range(T):
            q, keys, w = (x[b] for x in inputs())
            tokens, blocks = in_numpy(name, q[t], keys[: S - T + t + 1], w[t])
            np.testing.assert_array_equal(got.indices[b, t, : got.count[b, t]], tokens)
            if blocks is not None:
                np.testing.assert_array_equal(got.blocks[b, t], blocks)


def same(selection, name):
    wanted = in_one_piece(name)
    for got, want in ((selection.indices, wanted.indices), (selection.count, wanted.count)):
        np.testing.assert_array_equal(np.reshape(got, want.shape), want)


def axes():
    return dict(mesh=jax.make_mesh((1,), ("context",)), context_axis="context")


def packed(name):
    (q, k, w), offsets = inputs(), np.arange(B + 1, dtype=np.int32)
    rows = (x.reshape(-1, *x.shape[2:]) for x in (q, k, w))
    return hj.select_packed(*rows, offsets * T, offsets * S, METHODS[name])


def paged(name, **over):
    q, k, w = (jnp.asarray(x.reshape(-1, *x.shape[2:])) for x in inputs())
    P, offsets = S // PAGE, np.arange(B + 1, dtype=np.int32)
    # Pages in some order, those of both requests mixed.
    table = np.random.default_rng(1).permutation(B * P).astype(np.int32).reshape(B, P)
    cache = hj.init_cache(B * P, PAGE, D, jnp.float32)
    cache = hj.append(cache, k, table, offsets * S, np.zeros(B, np.int32), **over)
    return hj.select_paged(q, w, cache, table, offsets * T, np.full(B, S, np.int32), METHODS[name], **over)


def on_a_mesh(name):
    """Of whole blocks: the last one is filled up with keys that no sequence has."""
    q, k, w = inputs()
    k = np.pad(k, ((0, 0), (0, -S % SIZE), (0, 0)), constant_values=np.nan)
    return hj.select(q, k, w, METHODS[name], lengths=np.full(B, S, np.int32), **axes())


FORMS = {"packed": packed, "paged": paged, "mesh": on_a_mesh, "paged on a mesh": lambda name: paged(name, **axes())}


@pytest.mark.gate(*(f"{form}-hisa" for form in ("packed", "paged", "mesh")))
@each_method
@pytest.mark.parametrize("form", FORMS)
def test_scores_of_ones_own_choose_alike_in_every_form(form, name):
    same(FORMS[form](name), name)


def test_queries_and_keys_of_8_bits_come_as_the_numbers_that_they_stand_for():
    q, k, w = inputs()
    scales = np.random.default_rng(2).choice([0.5, 1, 2], (B, S)).astype(np.float32)
    got = hj.select(q.astype(np.int8), hj.QuantizedKeys(k.astype(np.int8), scales), w, METHODS["dsa"])
    for b in range(B):
        tokens, _ = in_numpy("dsa", q[b, -1], k[b] * scales[b][:, None], w[b, -1])
        np.testing.assert_array_equal(got.indices[b, -1], tokens)


def test_a_score_may_close_over_what_jit_and_vmap_trace():
    """A score of parameters that are learnt."""
    q, k, w = inputs()

    def select(factor, q, k, w):
        method = hj.Dsa(topk=K, token_score=lambda *given: factor * distance(*given))
        return hj.select(q, k, w, method).indices

    both = jax.jit(jax.vmap(select, in_axes=(0, None, None, None)))
    nearest, farthest = both(jnp.float32([1, -1]), q, k, w)
    np.testing.assert_array_equal(nearest, in_one_piece("dsa").indices)
    assert (nearest != farthest).any()


def test_nan_of_ones_own_is_chosen_last_and_never_outside_of_what_is_visible():
    q, k, w = inputs()
    method = hj.Dsa(topk=K, token_score=lambda q, keys, w: jnp.where(keys[:, 0] > 0, jnp.nan, keys[:, 1]))
    got = hj.select(q, k, w, method)
    assert (got.count == K).all()
    assert (k[np.arange(B)[:, None, None], got.indices, 0] <= 0).all()


@pytest.mark.parametrize(
    ("method", "message"),
    [
        (
            hj.Dsa(topk=K, token_score=lambda q, keys, w: q @ keys.T),
            "Dsa(token_score=<lambda>): gave float32 [2, 256] for q [2, 8] and keys [256, 8], wanted [256] floats",
        ),
        (
            hj.Dsa(topk=K, token_score=lambda q, keys, w: None),
            "Dsa(token_score=<lambda>): gave NoneType for q [2, 8] and keys [256, 8], wanted [256] floats",
        ),
        (
            dataclasses.replace(QUEST, block_score=lambda q, blocks, w: blocks[:, 0] > 0),
            "Hisa(block_score=<lambda>): gave bool [128] for q [2, 8] and keys [128, 16], wanted [128] floats",
        ),
        (
            dataclasses.replace(QUEST, pool=lambda keys: keys),
            "Hisa(pool=<lambda>): gave float32 [16, 8] for keys [16, 8], wanted [E] floats",
        ),
        (
            dataclasses.replace(QUEST, block_score=None),
            "Hisa(pool=bounds): gave float32 [16] for keys [16, 8], wanted [8] floats",
        ),
    ],
)
def test_what_gives_no_score_a_key_is_named(method, message):
    with pytest.raises(ValueError, match=rf"^{re.escape(message)}(\n|$)"):  # JAX adds notes below
        hj.select(*inputs(), method)


def test_what_is_no_function_is_refused_and_methods_show_the_names_of_theirs():
    with pytest.raises(TypeError, match=re.escape("Hisa(pool='max'): must be a function or None, not str")):
        hj.Hisa(pool="max")

    class Unhashable(list):
        def __call__(self, *given):
            raise AssertionError("never called")

    with pytest.raises(TypeError, match=re.escape("Dsa(token_score=Unhashable): must be hashable, since methods are")):
        hj.Dsa(token_score=Unhashable())
    assert repr(hj.Dsa(topk=4)) == "Dsa(topk=4)" and repr(METHODS["dsa"]) == "Dsa(topk=12, token_score=distance)"
    assert METHODS["dsa"] == hj.Dsa(topk=K, token_score=distance) != hj.Dsa(topk=K)
