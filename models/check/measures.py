"""How near each method comes to the flat indexer in one layer, and how many candidates the scan needs there."""

import functools
import math
from collections.abc import Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

import hisa_jax as hj
from hisa_jax.layout import Contiguous, Keys
from hisa_jax.models.check.reading import Seen
from hisa_jax.xla import scan
from hisa_jax.xla.stages import Queries

FLAT = "flat"
_SCANS = (1.5, 2.0, 3.0, 4.0)  # candidates, in multiples of topk
_LARGEST_BLOCK = 128
_RANKED = 32  # queries whose tokens are put in order at a time


class Measured(NamedTuple):
    """Of one method in one layer, mean over queries: of the flat selection, and of the model's own attention."""

    recall: float
    iou: float
    mass: float


def methods_to_check(topk: int, block_size: int | None = None) -> dict[str, hj.Method]:
    """What is compared, by name, the flat indexer first.

    Args:
        topk: tokens selected by each.
        block_size: of HISA and block-sparse. Default: the largest power of two that divides `topk` and leaves 64 blocks
            of candidates, as the paper has it; HISA has 4 times topk of them, also as published.
    """
    size = block_size
    if size is None:
        size = math.gcd(topk, _LARGEST_BLOCK, 1 << (max(topk // 16, 2).bit_length() - 1))
    found: dict[str, hj.Method] = {
        FLAT: hj.Dsa(topk=topk),
        "HISA": hj.Hisa(topk=topk, block_size=size, block_topk=max(4 * topk // size, 2)),
    }
    for times in _SCANS:
        found[f"scan, {times:g} k"] = hj.Scan(topk=topk, candidates=math.ceil(times * topk))
    found["scan of 4 bits, 4 k"] = hj.Scan(topk=topk, sketch="int4")
    for times in (2, 4):
        found[f"one virtual head, {times} k"] = hj.Scan(topk=topk, candidates=times * topk, exact_heads=0)
    if topk % size == 0 and topk // size >= 2:  # the first and the last block are always kept
        found["block-sparse"] = hj.BlockSparse(topk=topk, block_size=size)
    return found


def measure(seen: Seen, methods: Mapping[str, hj.Method], scale: float) -> dict[str, Measured]:
    """Each method against the flat one, which comes first; `scale` is of the attention's logits."""
    positions = jnp.asarray(seen.positions)[None]
    selections = {name: _select(seen.q, seen.k, seen.w, positions, method) for name, method in methods.items()}
    indices = tuple(selection.indices[0] for selection in selections.values())
    masses = attention_mass(seen.heads, seen.latents, positions[0], indices, scale)
    found = {}
    for (name, selection), mass in zip(selections.items(), masses, strict=True):
        compared = hj.compare(selection, selections[FLAT])
        found[name] = Measured(*(float(np.mean(x)) for x in (compared.recall, compared.iou, mass)))
    return found


@functools.partial(jax.jit, static_argnames="method")
def _select(q: Array, k: Array | hj.QuantizedKeys, w: Array, positions: Array, method: hj.Method) -> hj.Selection:
    return hj.select(q, k, w, method, query_positions=positions)


@jax.jit
def attention_mass(
    heads: Array, latents: Array, positions: Array, indices: tuple[Array, ...], scale: float
) -> tuple[Array, ...]:
    """The share of the attention over all visible tokens that falls on the selected ones, mean over heads.

    Args:
        heads: [n, N, C] queries for latents.
        latents: [S, C].
        positions: [n] int32.
        indices: [n, K] int32 each, selected tokens, -1 where there is none.
        scale: of the logits.

    Returns: [n] float32 for each of `indices`.
    """

    def one(operands: tuple[Array, Array, tuple[Array, ...]]) -> tuple[Array, ...]:
        q, position, chosen = operands
        logits = jnp.einsum("nc,sc->ns", q, latents, preferred_element_type=jnp.float32) * scale
        is_visible = jnp.arange(latents.shape[0]) <= position
        p = jnp.mean(jax.nn.softmax(jnp.where(is_visible, logits, -jnp.inf), axis=-1), axis=0)
        return tuple(jnp.sum(jnp.where(at >= 0, p[at], 0)) for at in chosen)

    return lax.map(one, (heads, positions, indices))


def scan_ranks(seen: Seen, flat: hj.Dsa) -> np.ndarray:
    """[n * topk] int: how many tokens the scan puts before each token of the flat selections.

    A scan with c candidates, in units of one token, selects of these exactly those with a rank below c.
    """
    indices = _select(seen.q, seen.k, seen.w, jnp.asarray(seen.positions)[None], flat).indices[0]
    keys = Keys(seen.k.values[0], seen.k.scales[0]) if isinstance(seen.k, hj.QuantizedKeys) else Keys(seen.k[0], None)
    method, ranks = hj.Scan(topk=flat.topk), []
    for first in range(0, len(seen.positions), _RANKED):
        part = slice(first, first + _RANKED)
        queries = Queries(seen.q[0, part], seen.w[0, part], jnp.asarray(seen.positions[part]) + 1)
        ranks.append(np.asarray(_ranks(queries, keys, indices[part], method)))
    found = np.concatenate(ranks).ravel()
    return found[found >= 0]


@functools.partial(jax.jit, static_argnames="method")
def _ranks(queries: Queries, keys: Keys, indices: Array, method: hj.Scan) -> Array:
    """[t, K] int32, -1 where there is no token."""
    S = keys.values.shape[0]
    heads = scan.heads_of(queries, Contiguous(keys, jnp.int32(0), S), method)
    scores = scan.scores(heads, keys)
    positions, last = jnp.arange(S, dtype=jnp.int32), queries.visible[:, None] - 1
    is_forced = (positions < method.keep_first) | (positions > last - method.keep_last)
    # Ascending and stable: a tie goes to the lower position, and what is not visible comes last.
    cost = jnp.where(is_forced, -jnp.inf, jnp.where(jnp.isnan(scores), jnp.inf, -scores))
    order = jnp.argsort(jnp.where(positions > last, jnp.inf, cost), axis=1)
    rank = jnp.zeros(scores.shape, jnp.int32).at[jnp.arange(len(order))[:, None], order].set(positions)
    return jnp.where(indices < 0, -1, jnp.take_along_axis(rank, jnp.maximum(indices, 0), axis=1))


def fewest_candidates(ranks: np.ndarray, share: float, topk: int) -> int:
    """The fewest candidates of a scan that select a share of the tokens with these ranks [n]."""
    nth = math.ceil(share * len(ranks)) - 1
    return max(int(np.partition(ranks, nth)[nth]) + 1, topk)
