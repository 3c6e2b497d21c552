"""Runs a model over a text with its flat indexer and keeps what some of its queries chose by and attended with."""

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array

import hisa_jax as hj
from hisa_jax.models.cache import Cache, contiguous, plain_latents
from hisa_jax.models.dsa import absorb
from hisa_jax.models.layers import rms_norm
from hisa_jax.models.modeling import Model
from hisa_jax.models.rope import rope_table


class Seen(NamedTuple):
    """One layer as n of its queries see it.

    Attributes:
        layer: its number.
        positions: [n] int32, of the queries, ascending.
        q, w: [1, n, H, D] and [1, n, H], index queries and head weights.
        k: [1, S, D] index keys of all tokens, as the cache holds them.
        heads: [n, N, C], the attention's queries for latents.
        latents: [S, C], of all tokens, with their rope keys.
    """

    layer: int
    positions: np.ndarray
    q: Array
    w: Array
    k: Array | hj.QuantizedKeys
    heads: Array
    latents: Array


def sampled_positions(n_tokens: int, n: int) -> np.ndarray:
    """Up to `n` evenly spaced positions of the last half of a text, its last one among them; int32, ascending."""
    return np.unique(np.linspace(n_tokens - 1, n_tokens // 2, n).round().astype(np.int32))


def read(
    model: Model, tokens: Sequence[int], positions: np.ndarray, chunk: int, progress: Callable[[int], None]
) -> Iterator[Seen]:
    """Each layer that selects, after the model has read the whole text.

    What is kept is the cache, and the queries at `positions`; nothing has the size of queries times tokens.

    Args:
        model: that selects by its flat indexer.
        tokens: ids of the text.
        positions: [n] int32, of the queries.
        chunk: tokens a forward pass.
        progress: is told how many tokens were read.
    """
    S = len(tokens)
    chunk = min(chunk, S)
    padded = np.zeros(-(-S // chunk) * chunk, np.int32)
    padded[:S] = tokens
    graph, state = nnx.split(model)
    cache = model.empty_cache(1, S)
    per_chunk = np.split(positions, np.searchsorted(positions, range(chunk, len(padded), chunk)))
    most = max(map(len, per_chunk))
    parts: list[list[tuple[Array, ...]]] = []
    for i, of_chunk in enumerate(per_chunk):
        first = i * chunk
        columns = np.zeros(most, np.int32)
        columns[: len(of_chunk)] = of_chunk - first
        ids, mask = padded[None, first : first + chunk], np.arange(first, first + chunk)[None] < S
        cache, queries = _read_chunk(state, cache, ids, mask, columns, graph=graph)
        parts.append([tuple(x[:, : len(of_chunk)] for x in of_layer) for of_layer in queries])
        progress(min(first + chunk, S))
    full = [i for i, kind in enumerate(model.config.indexer_kinds) if kind == "full"]
    for i, of_layer in zip(full, zip(*parts, strict=True), strict=True):
        q, w, heads = (jnp.concatenate(pieces, axis=1) for pieces in zip(*of_layer, strict=True))
        k, latents = _cached(cache, i, S)
        yield Seen(i, positions, q, w, k, heads[0], latents[0])


@functools.partial(jax.jit, static_argnames="graph", donate_argnames="cache")
def _read_chunk(
    state: nnx.State, cache: Cache, ids: Array, mask: Array, columns: Array, *, graph: nnx.GraphDef
) -> tuple[Cache, list[tuple[Array, Array, Array]]]:
    """The cache with these tokens; of each layer that selects q, w and the attention's queries at `columns`."""
    model = nnx.merge(graph, state)
    out = model.run(ids, cache=cache, mask=mask, last_only=True, trace=True)
    table = rope_table(model.config, out.slots[:, columns])
    queries = []
    x = model.embed[...][ids]
    for layer, trace in zip(model.layers, out.layers, strict=True):
        if trace.index_inputs is not None:
            q, _, w = trace.index_inputs
            normed = rms_norm(x[:, columns], layer.attention_norm[...], model.config.rms_norm_eps)
            made = layer.attention.project(normed, table)
            heads = absorb(made.q_nope, made.q_rope, layer.attention.k_b[...])
            queries.append((q[:, columns], w[:, columns], heads))
        x = trace.hidden
    return out.cache, queries


def _cached(cache: Cache, layer: int, S: int) -> tuple[Array | hj.QuantizedKeys, Array]:
    """[1, S, D] index keys and [1, S, C] latents of a layer."""
    pages = cache.layers[layer]

    def of(leaf: Array) -> Array:
        return contiguous(leaf, cache.block_tables, cache.lengths)[:, :S]

    keys = of(pages.keys)
    latents = plain_latents(pages, cache.block_tables, cache.lengths, jnp.float32)[:, :S]
    return keys if pages.scales is None else hj.QuantizedKeys(keys, of(pages.scales)), latents
