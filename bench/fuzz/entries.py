"""A judge of what setups do not have: entries of several tokens, heads that choose alone, lists and budgets.

It changes the method of a scene, draws what goes with that, and asks the oracle. The keys of the scene are entries.
"""

import dataclasses
from typing import Any

import numpy as np

import hisa_jax as hj
from bench.fuzz.judges import Judge, Verdict, Wrong, with_tolerances
from bench.fuzz.scene import PADDING, Array, Call, Keys, Scene, by_request, made, offsets, packed
from bench.fuzz.setups import Setup
from hisa_jax.testing.oracle.compare import judge
from tests import oracle

_SIZES = (1, 4, 8, 16, 128)
_WIDTH = 7  # of lists
_MOST_IN_PAGES = 8  # tokens of an entry


def changed(setup: Setup, rng: np.random.Generator) -> hj.Method:
    """The method over entries, for each head, without an activation, by the best token: whatever it takes of these."""
    method, r = setup.method, int(rng.choice(_SIZES))
    new: dict[str, Any] = dict(entry_size=r)
    if r > 1:
        new |= [dict(tail="open"), dict(returns="entries"), dict()][rng.integers(3)]
    if not isinstance(method, hj.Scan):
        new |= dict(per_head=bool(rng.integers(2)), activation=[None, "relu"][rng.integers(2)])
        if setup.q_dtype == "int8" and setup.implementation != "xla":
            new["activation"] = "relu"
    if isinstance(method, hj.BlockSparse) and rng.integers(2) and setup.implementation != "mosaic_tpu":
        new |= dict(scored_by="max", keep_last=int(rng.integers(method.keep_last + 1)))
    return dataclasses.replace(method, **new)


def family(scene: Scene, form: str) -> Verdict:
    """The oracle's choice by a method that was changed, with lists and budgets.

    In a batch at any positions of tokens; packed and in pages the queries are the last ones.
    """
    setup, (R, T) = scene.setup, (scene.setup.R, scene.setup.T)
    method, rng = _method(scene), np.random.default_rng(scene.seed)
    r, size = method.entry_size, setup.unit
    lengths = np.clip(scene.n_k, 0, setup.S).astype(np.int32) * r + int(rng.integers(r))
    positions = rng.integers(-1, setup.S * r + r, (R, T)).astype(np.int32)
    if form != "select":
        positions = lengths[:, None] - scene.n_q[:, None] + np.arange(T, dtype=np.int32)
        positions = np.where(scene.is_row, np.maximum(positions, -1), -1).astype(np.int32)
    budget = rng.integers(-1, method.topk + 2, (R, T)).astype(np.int32)
    w, ids = None if method.per_head else scene.w, None
    if isinstance(method, hj.Dsa) and scene.seed % 2 and setup.implementation != "mosaic_tpu":
        ids = rng.integers(-1, setup.S // size + 2, (R, T, _WIDTH)).astype(np.int32)
    keys: Any = scene.k if scene.scales is None else Keys(scene.k, scene.scales)
    limits: dict[str, Any] = dict(budget=budget, candidates=ids, candidate_size=size)
    reference = oracle.select(scene.q, keys, w, method, query_positions=positions, lengths=lengths, **limits)
    reference, tolerance = with_tolerances(scene, reference)
    options: dict[str, Any] = dict(method=method, implementation=setup.implementation, block_size=size)
    if form == "select":
        arguments = scene.q, scene.k, scene.scales, w, positions, lengths, budget, ids
        found = by_request(scene, form, made(Call("select_limited", arguments, options)))
    else:
        found = by_request(scene, form, made(_in_rows(scene, form, lengths, (w, budget, ids), options)))
    arrays: dict[str, Any] = dict(indices=found.indices, count=found.counts, scores=found.scores)
    arrays |= {} if found.blocks is None else dict(blocks=found.blocks)
    if form != "select":
        nothing = dict(indices=-1, count=0, scores=-np.inf, blocks=-1)
        for name, x in arrays.items():
            is_row = scene.is_row.reshape(R, T, *(1,) * (x.ndim - 2))
            arrays[name] = np.where(is_row, x, np.asarray(nothing[name], x.dtype))
    compared: Any = {name: np.asarray(x) for name, x in arrays.items()}
    whys = judge(reference, tolerance, **compared)
    rows = np.ndindex(reference.visible.shape)
    wrong = [Wrong(at[0], at[1], f"{method}: {why}") for at, why in zip(rows, whys, strict=True) if why]
    if found.leaked:
        wrong.append(Wrong(-1, -1, f"{found.leaked} rows of padding select something"))
    return Verdict(int(np.prod(reference.visible.shape)), wrong)


def _in_rows(scene: Scene, form: str, lengths: Array, limits: tuple[Any, ...], options: dict[str, Any]) -> Call:
    """A packed call, or one of pages, with weights, budgets and lists of [R, T, ..]."""
    setup, method = scene.setup, options["method"]
    n_entries, total = lengths // method.entry_size, setup.R * setup.T + PADDING
    q, w, budget, ids = (None if x is None else packed(x, scene.n_q, total) for x in (scene.q, *limits))
    k, scales = (None if x is None else packed(x, n_entries, setup.R * setup.S) for x in (scene.k, scene.scales))
    assert k is not None
    if form == "select_packed":
        arguments = q, k, scales, w, offsets(scene.n_q), offsets(n_entries), lengths, budget, ids
        return Call("select_limited_packed", arguments, options)
    rng, size = np.random.default_rng(scene.seed + 1), setup.page_size
    assert size
    P = -(-setup.S // size) + 1
    n_pages = setup.R * P + 2
    table = rng.permutation(n_pages)[: setup.R * P].reshape(setup.R, P).astype(np.int32)
    first = rng.integers(0, lengths + 1).astype(np.int32)
    if scales is None and k.dtype.itemsize == 1:
        scales = np.ones(len(k), np.float32)
    in_pages = q, w, table, offsets(scene.n_q), lengths, (k, scales), first, budget, ids
    return Call("select_limited_paged", in_pages, options | dict(n_pages=n_pages, page_size=size))


def _method(scene: Scene) -> hj.Method:
    """Of a setup two methods alone, each of which is compiled."""
    setup = scene.setup
    return changed(setup, np.random.default_rng([setup.H, setup.D, setup.method.topk, scene.seed % 2]))


def _applies(scene: Scene, form: str) -> bool:
    if form == "select_paged":  # tokens are written one by one
        return _method(scene).entry_size <= _MOST_IN_PAGES
    return form in ("select", "select_packed")


JUDGES = {"family": Judge(family, _applies, 0.2)}
