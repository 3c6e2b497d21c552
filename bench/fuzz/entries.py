"""A judge of what setups do not have: entries of several tokens, heads that choose alone, lists and budgets.

It changes the method of a scene, draws what goes with that, and asks the oracle. The keys of the scene are entries.
"""

import dataclasses
from typing import Any

import numpy as np

import hisa_jax as hj
from bench.fuzz.judges import Judge, Verdict, Wrong, with_tolerances
from bench.fuzz.scene import Call, Keys, Scene, made
from hisa_jax.testing.oracle.compare import judge
from tests import oracle

_SIZES = (1, 4, 8, 16, 128)
_WIDTH = 7  # of lists


def changed(method: hj.Method, rng: np.random.Generator) -> hj.Method:
    """The method over entries, for each head, without an activation, by the best token: whatever it takes of these."""
    r = int(rng.choice(_SIZES))
    new: dict[str, Any] = dict(entry_size=r)
    if r > 1:
        new |= [dict(tail="open"), dict(returns="entries"), dict()][rng.integers(3)]
    if not isinstance(method, hj.Scan):
        new |= dict(per_head=bool(rng.integers(2)), activation=[None, "relu"][rng.integers(2)])
    if isinstance(method, hj.BlockSparse) and rng.integers(2):
        new |= dict(scored_by="max", keep_last=int(rng.integers(method.keep_last + 1)))
    return dataclasses.replace(method, **new)


def family(scene: Scene, form: str) -> Verdict:
    """The oracle's choice by a method that was changed, at positions and lengths of tokens, with lists and budgets."""
    setup = scene.setup
    # Of a setup two methods alone, each of which is compiled.
    method = changed(setup.method, np.random.default_rng([setup.H, setup.D, setup.method.topk, scene.seed % 2]))
    rng, r, shape = np.random.default_rng(scene.seed), method.entry_size, (setup.R, setup.T)
    arguments: dict[str, Any] = dict(
        query_positions=rng.integers(-1, setup.S * r + r, shape).astype(np.int32),
        lengths=np.clip(scene.n_k, 0, setup.S).astype(np.int32) * r + int(rng.integers(r)),
        budget=rng.integers(-1, method.topk + 2, shape).astype(np.int32),
    )
    w, ids, size = None if method.per_head else scene.w, None, setup.unit
    if isinstance(method, hj.Dsa) and scene.seed % 2:
        ids = rng.integers(-1, setup.S // size + 2, (*shape, _WIDTH)).astype(np.int32)
    keys: Any = scene.k if scene.scales is None else Keys(scene.k, scene.scales)
    reference = oracle.select(scene.q, keys, w, method, **arguments, candidates=ids, candidate_size=size)
    reference, tolerance = with_tolerances(scene, reference)
    options: dict[str, Any] = dict(method=method, implementation=setup.implementation, block_size=size)
    got = made(Call("select_limited", (scene.q, scene.k, scene.scales, w, *arguments.values(), ids), options))
    found: dict[str, Any] = dict(indices=got.indices, count=got.count, scores=got.scores)
    found |= {} if got.blocks is None else dict(blocks=got.blocks)
    arrays: dict[str, Any] = {name: np.asarray(x) for name, x in found.items()}
    whys = judge(reference, tolerance, **arrays)
    rows = np.ndindex(reference.visible.shape)
    wrong = [Wrong(at[0], at[1], f"{method}: {why}") for at, why in zip(rows, whys, strict=True) if why]
    return Verdict(int(np.prod(reference.visible.shape)), wrong)


def _applies(scene: Scene, form: str) -> bool:
    return form == "select" and scene.setup.implementation == "xla"


JUDGES = {"family": Judge(family, _applies, 0.2)}
