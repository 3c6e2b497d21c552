"""How all layers of a model choose: a method, and up to one way to do less of it, as values; and what a rule costs.

    heads       MISA: a query scores with some of its heads, those that a router over pooled keys finds
    group       PIVOT: neighbouring queries share the candidates that one proxy of them finds
    layers      IndexCache: of so many layers the first chooses, the others take over what it chose
    lists       of so many layers the first publishes candidates, among which the others choose by their own indexers

Everything here is put together from `hj.select` and its candidates.
"""

import dataclasses
from typing import Any, Literal, NamedTuple

import jax.numpy as jnp
from jax import Array

import hisa_jax as hj

Role = Literal["choose", "publish", "look up", "take over"]
READS = ("look up", "take over")  # those that depend on what a layer before hands on
_LISTED = 4  # times topk: candidates that are published, or that routed heads find for all heads
_SHARED = 2  # times topk: candidates of a proxy
_PUBLISHED_BLOCK = 8  # of the flat indexer's list, as DeepSeek-V4.1 publishes it


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rule:
    """How each layer chooses.

    Attributes:
        name: in tables.
        method: what finds tokens.
        heads: how many of a query's heads score, in every stage; None: all.
        rescores: those heads find four times topk candidates, by the flat method, and all heads choose among them.
        router_block: keys of a block by whose mean key heads are chosen.
        group: how many adjacent queries share candidates: from a multiple of it on. 1: none do.
        layers, lists: of how many layers the first one does the work, see above.
    """

    name: str
    method: hj.Method
    heads: int | None = None
    rescores: bool = False
    router_block: int = 128
    group: int = 1
    layers: int = 1
    lists: int = 1

    def role(self, layer: int) -> Role:
        """What a layer does."""
        if layer % self.layers:
            return "take over"
        if self.lists == 1:
            return "choose"
        return "look up" if layer % self.lists else "publish"

    def unnamed(self) -> "Rule":
        """The same for programs, of which rules share those that do not differ."""
        return dataclasses.replace(self, name="", layers=1, lists=1)


class Asked(NamedTuple):
    """What some queries of a sequence choose by: q [1, t, H, D], w [1, t, H] or None, positions [1, t] int32."""

    q: Array
    w: Array | None
    positions: Array


class Published(NamedTuple):
    """What a layer hands on: indices [1, t, K] int32 and, of a source, a list of candidate blocks [1, t, m]."""

    indices: Array
    blocks: Array | None = None


def choose(rule: Rule, role: Role, asked: Asked, k: Array, before: Published | None) -> Published:
    """What queries choose from k [1, S, D], or what a layer before has chosen or listed for them."""
    if role == "take over":
        assert before is not None
        return before
    scores = asked if rule.heads is None else routed(asked, k, rule.heads, rule.router_block)
    if role == "look up":
        assert before is not None
        assert before.blocks is not None
        return before._replace(indices=_among(rule, scores, k, before.blocks, _list_block(rule.method)))
    if rule.group > 1:
        return Published(_grouped(rule, scores, k))
    if rule.rescores:
        listed = hj.Dsa(topk=_LISTED * rule.method.topk)
        return Published(_among(rule, asked, k, _select(scores, k, listed).indices, 1))
    if role == "choose":
        return Published(_select(scores, k, rule.method).indices)
    if isinstance(rule.method, hj.Dsa):
        source: hj.Method = hj.BlockSparse(
            topk=_LISTED * rule.method.topk, block_size=_PUBLISHED_BLOCK, keep_first=0, scored_by="max"
        )
        blocks = _select(scores, k, source, return_blocks=True).blocks
        assert blocks is not None
        return Published(_among(rule, scores, k, blocks, _PUBLISHED_BLOCK), blocks)
    found = _select(scores, k, rule.method, return_blocks=True)
    return Published(found.indices, found.blocks)


def routed(asked: Asked, k: Array, heads: int, block: int) -> Asked:
    """The queries with `heads` of their heads: those of greatest mean |w relu(q . mean key)| over blocks before them.

    Blocks that a query does not see whole are left out; where it sees none, the first heads are taken, and it sees so
    few tokens that it chooses all of them. Source: MISA, arXiv 2605.07363.
    """
    q, w, positions = asked
    assert w is not None
    n, D = k.shape[1] // block, k.shape[2]
    means = jnp.mean(k[:, : n * block].astype(jnp.float32).reshape(1, n, block, D), axis=2)
    products = jnp.maximum(jnp.einsum("bthd,bnd->bthn", q.astype(jnp.float32), means), 0)
    ends = (jnp.arange(n, dtype=jnp.int32)[None, None, :] + 1) * block
    seen = ends <= positions[..., None] + 1
    worth = jnp.abs(w) * jnp.sum(jnp.where(seen[:, :, None, :], products, 0), axis=-1)
    best = jnp.sort(jnp.argsort(-worth, axis=-1, stable=True)[..., :heads], axis=-1)
    return Asked(jnp.take_along_axis(q, best[..., None], axis=2), jnp.take_along_axis(w, best, axis=2), positions)


def _grouped(rule: Rule, asked: Asked, k: Array) -> Array:
    """PIVOT as we define it, arXiv 2607.24593: a group's proxy is the mean of its queries and of their weights.

    It sees what stands before the group and finds twice topk tokens. These and the group's own are the candidates of
    each query of the group, which chooses by its own scores. Queries come in whole groups.
    """
    q, w, positions = asked
    assert w is not None
    (B, t, H, D), g = q.shape, rule.group
    proxies = Asked(
        jnp.mean(q.astype(jnp.float32).reshape(B, t // g, g, H, D), axis=2).astype(q.dtype),
        jnp.mean(w.reshape(B, t // g, g, H), axis=2),
        positions[:, ::g] - 1,
    )
    found = _select(proxies, k, dataclasses.replace(rule.method, topk=_SHARED * rule.method.topk)).indices
    own = positions[:, ::g, None] + jnp.arange(g, dtype=jnp.int32)[None, None, :]
    listed = jnp.repeat(jnp.concatenate([found, own], axis=-1), g, axis=1)
    return _among(rule, asked, k, listed, 1)


def _among(rule: Rule, asked: Asked, k: Array, blocks: Array, block_size: int) -> Array:
    """The exact best of listed blocks."""
    listed = hj.CandidateBlocks(blocks, block_size)
    return _select(asked, k, hj.Dsa(topk=rule.method.topk), candidates=listed).indices


def _select(asked: Asked, k: Array, method: hj.Method, **options: Any) -> hj.Selection:
    # By one implementation, so that rules differ in what they say alone.
    return hj.select(asked.q, k, asked.w, method, query_positions=asked.positions, implementation="xla", **options)


def _list_block(method: hj.Method) -> int:
    """Tokens of a published block."""
    return _PUBLISHED_BLOCK if isinstance(method, hj.Dsa) else method.block_size


def composed(topk: int, block_size: int, block_topk: int, H: int, router_block: int) -> tuple[Rule, ...]:
    """Flat, HISA and the scan, each alone and with each option; the flat one first."""
    methods: dict[str, hj.Method] = {
        "flat": hj.Dsa(topk=topk),
        "HISA": hj.Hisa(topk=topk, block_size=block_size, block_topk=block_topk),
        "scan": hj.Scan(topk=topk),
    }
    few = max(H // 4, 1)
    ways: dict[str, dict[str, Any]] = {
        "": {},
        ", shared by 4 queries": dict(group=4),
        ", a list for 4 layers": dict(lists=4),
        ", a quarter of the heads": dict(heads=few),
        ", shared by 2 layers": dict(layers=2),
    }
    found = [
        Rule(name=f"{name}{way}", method=method, router_block=router_block, **options)
        for way, options in ways.items()
        for name, method in methods.items()
    ]
    two_stages = Rule(
        name="flat, a quarter of the heads, then all", method=methods["flat"], heads=few, rescores=True,
        router_block=router_block,
    )  # fmt: skip
    return (*found[:3], two_stages, *found[3:])


def cost(rule: Rule, S: int, H: int) -> float:
    """Products of a head and a key, of a query that sees S tokens, mean over layers, in shares of the flat indexer's.

    Means of blocks count as keys; what chooses heads counts, too.
    """
    h, topk = rule.heads or H, rule.method.topk
    router = 0.0 if rule.heads is None else H * S / rule.router_block

    def of_method(method: hj.Method) -> float:
        if isinstance(method, hj.Hisa):
            return h * (S / method.block_size + min(method.block_topk * method.block_size, S))
        if isinstance(method, hj.Scan):
            return min((min(method.exact_heads, h) + 1) * S + h * method.block_topk, h * S)
        return h * S

    products = router + of_method(rule.method)
    if rule.group > 1:
        products = router + of_method(rule.method) / rule.group + h * (_SHARED * topk + rule.group)
    elif rule.rescores:
        products += H * _LISTED * topk
    elif rule.lists > 1:
        products = (products + (rule.lists - 1) * (router + h * min(_LISTED * topk, S))) / rule.lists
    return products / rule.layers / (H * S)
