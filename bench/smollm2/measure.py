"""Compares methods at the hidden states of the model that runs with its flat indexer, all of them in one pass."""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from bench.smollm2 import sketches
from bench.smollm2.filters import INVISIBLE, Method, Varied, View, kept, open_heads, rank, takes_all
from bench.smollm2.indexers import Indexers, index_keys, index_queries
from bench.smollm2.model import Config, Weights, attention_mass, chunked, dense, masked, rope_table, run
from hisa_jax.xla.topk import score_of

_CHUNK = 128  # queries at a time where all methods' rankings are in memory


class Measures(NamedTuple):
    """Means over queries, [M] a layer: share of the flat selection, share of the attention, candidates, chosen."""

    recall: Array
    mass: Array
    candidates: Array
    chosen: Array


class Heads(NamedTuple):
    """How linear the indexers are, means over queries, a layer.

    `open_all`, `open_cut`: share of heads open at all visible tokens, at those ranked within k / 2 of the threshold; by
    weight: `open_cut_weighted`. `rank`: (tr M)^2 / tr M^2 of M = sum_h |w_h| q_h q_h^T. `negative`,
    `negative_weighted`: share of weights below 0. `kl`: from the attention.
    """

    open_all: Array
    open_cut: Array
    open_cut_weighted: Array
    rank: Array
    negative: Array
    negative_weighted: Array
    kl: Array


def view_of(
    one: Indexers,
    h: Array,
    rows: Array,
    config: Config,
    k: Array,
    sketched: Mapping[str, Array] | None = None,
    products: Any = jnp.float32,
) -> View:
    """What the queries at some rows [t] int32 of an input [T, E] choose by."""
    q, w = index_queries(one, h[rows], rope_table(config, rows))
    return View(q, w, k, rows + 1, sketched or {}, products)


def sketch_names(methods: Sequence[Method]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(method.sketch for method in methods if isinstance(method, Varied) and method.sketch))


@functools.cache
def make_measure(config: Config, methods: tuple[Method, ...], topk: int) -> Callable[..., tuple[Measures, Heads]]:
    """(weights, indexers, directions [L, D, D], tokens [T]) -> measures of the last quarter's queries, [L, M] and [L].

    The model runs with the flat indexer's best `topk` tokens in every layer.
    """
    topks = sorted({method.topk for method in methods})
    topk_of = jnp.array([topks.index(method.topk) for method in methods])
    whole = jnp.array([takes_all(method) for method in methods])
    names = sketch_names(methods)

    def compare(view: View, mass: Array) -> Measures:
        t, S = view.exact.shape
        flat = jnp.stack([kept(view.exact, jnp.full_like(view.visible, topk)) for topk in topks])
        rankings = [rank(method, view) for method in methods]
        # All methods at once: one method's rows are too few for a GPU.
        sort_keys, budgets = (jnp.concatenate([ranking[i] for ranking in rankings]) for i in (0, 1))
        candidates = kept(sort_keys, budgets).reshape(len(methods), t, S)
        exact = jnp.where(candidates, view.exact[None], INVISIBLE).reshape(-1, S)
        best = kept(exact, jnp.repeat(jnp.array(topks)[topk_of], t)).reshape(candidates.shape)
        got, wanted = jnp.where(whole[:, None, None], candidates, best), flat[topk_of]
        found = Measures(
            recall=jnp.sum(got & wanted, axis=2) / jnp.sum(wanted, axis=2),
            mass=jnp.sum(jnp.where(got, mass[None], 0), axis=2),
            candidates=jnp.sum(candidates, axis=2).astype(jnp.float32),
            chosen=jnp.sum(got, axis=2).astype(jnp.float32),
        )
        return jax.tree.map(lambda x: x.T, found)  # [t, M]

    @jax.jit
    def measure(weights: Weights, indexers: Indexers, directions: Array, tokens: Array) -> tuple[Measures, Heads]:
        T = tokens.shape[0]

        def attend(h: Array, q: Array, k: Array, v: Array, own: tuple[Indexers, Array]) -> tuple[Array, Any]:
            one, basis = own
            ik = index_keys(one, h, rope_table(config, jnp.arange(T)))
            sketched = sketches.make(names, ik, basis)

            def flat(rows: Array) -> Array:
                view = view_of(one, h, rows, config, ik)
                return masked(q[rows], k, v, kept(view.exact, jnp.full_like(rows, topk)))

            def compared(rows: Array) -> tuple[Measures, Heads]:
                view = view_of(one, h, rows, config, ik, sketched)
                mass = attention_mass(q[rows], k, rows + 1)
                return compare(view, mass), heads(view, mass, topk)

            found = chunked(compared, T, first=T - T // 4, chunk=_CHUNK)
            return chunked(flat, T), jax.tree.map(lambda x: jnp.mean(x, axis=0), found)

        return run(weights, config, tokens, attend, own=(indexers, directions))[1]

    return measure


def heads(view: View, mass: Array, topk: int) -> Heads:
    """Of each query, [t] each."""
    H, S = view.q.shape[1], view.k.shape[0]
    n = 2 * topk
    _, near = lax.top_k(view.exact, min(n - n // 4, S))
    at_cut = open_heads(view, near[:, n // 4 :])
    size = jnp.abs(view.w)
    share = size / jnp.sum(size, axis=1, keepdims=True)
    products = jnp.einsum("thd,sd->ths", view.q, view.k, preferred_element_type=jnp.float32)
    is_open = jnp.sum((products > 0) & view.seen[:, None, :], axis=(1, 2))
    q = view.q.astype(jnp.float32) * jnp.sqrt(size)[:, :, None]
    gram = jnp.einsum("thd,tgd->thg", q, q, precision=lax.Precision.HIGHEST)
    scores = jnp.where(view.seen, score_of(view.exact), -jnp.inf)
    logs = jnp.where(view.seen, jax.nn.log_softmax(scores, axis=-1), 0)
    below = view.w < 0
    return Heads(
        open_all=is_open / (H * view.visible),
        open_cut=jnp.mean(at_cut, axis=(1, 2)),
        open_cut_weighted=jnp.sum(share * jnp.mean(at_cut, axis=2), axis=1),
        rank=jnp.trace(gram, axis1=1, axis2=2) ** 2 / jnp.sum(gram**2, axis=(1, 2)),
        negative=jnp.mean(below, axis=1),
        negative_weighted=jnp.sum(jnp.where(below, share, 0), axis=1),
        kl=jnp.sum(jax.scipy.special.xlogy(mass, mass) - mass * logs, axis=1),
    )


def directions(weights: Weights, config: Config, indexers: Indexers, tokens: Array) -> Array:
    """[L, D, D] float32: principal directions of the index keys of a text, dense attention, the strongest first."""
    second = _second_moments(weights, config, indexers, tokens)
    return jnp.asarray(np.linalg.eigh(np.asarray(second, np.float64))[1][:, :, ::-1], jnp.float32)


@functools.partial(jax.jit, static_argnames="config")
def _second_moments(weights: Weights, config: Config, indexers: Indexers, tokens: Array) -> Array:
    def attend(h: Array, q: Array, k: Array, v: Array, one: Indexers) -> tuple[Array, Array]:
        ik = index_keys(one, h, rope_table(config, jnp.arange(tokens.shape[0]))).astype(jnp.float32)
        return dense(h, q, k, v, None)[0], jnp.einsum("sd,se->de", ik, ik, precision=lax.Precision.HIGHEST)

    return run(weights, config, tokens, attend, own=indexers)[1]
