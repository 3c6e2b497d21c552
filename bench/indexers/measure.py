"""Rows of a rule: what it keeps of the flat choice, answers and bits of the model that runs by it, its cost."""

import dataclasses
import functools
import itertools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

import hisa_jax as hj
from bench.indexers.model import Runner
from bench.indexers.rules import Asked, Published, Role, Rule, choose, cost
from bench.quality.answers import bits_of
from hisa_jax.models.evaluate import statistics
from hisa_jax.models.training.retrieval import answered
from hisa_jax.models.training.samples import Sample

Row = dict[str, Any]
_GROUP = 8  # neighbouring queries that are compared together: whole groups of every rule
# (context, heads, selected tokens) of the model whose cost is shown beside: DeepSeek-V3.2's.
_REAL = (131_072, 64, 2048)


def recalls(runner: Runner, samples: Sequence[Sample], rules: Sequence[Rule], n_queries: int) -> list[Row]:
    """The share of the first rule's choice that each other one has, at the hidden states of the model that runs by it.

    Of two kinds of queries: groups of neighbours, evenly over the last half of the text, and groups that predict bytes
    of answers. A row a rule: means over layers, and the least one.
    """
    reference, found = rules[0], dict[tuple[str, str], list[list[float]]]()
    for sample in samples:
        text, asking = _groups(sample, n_queries)
        rows = np.concatenate([text, asking])
        before: dict[str, Published] = {}
        for at, (_, seen) in enumerate(runner.layers(sample.tokens[None], reference)):
            assert seen is not None
            here = Asked(seen.q[:, rows], seen.w[:, rows], jnp.asarray(rows)[None])
            wanted = None
            for rule in rules:
                by_entries = dataclasses.replace(rule, method=_of_entries(rule.method))
                chosen = _choose(by_entries.unnamed(), rule.role(at), here, seen.k, before.get(rule.name))
                before[rule.name] = chosen
                wanted = chosen.indices if wanted is None else wanted
                recall = np.asarray(hj.compare(_selection(chosen.indices), _selection(wanted)).recall)[0]
                for kind, part in (("text", recall[: text.size]), ("asking", recall[text.size :])):
                    layers = found.setdefault((rule.name, kind), [])
                    layers += [[]] * (at + 1 - len(layers))
                    layers[at] = layers[at] + part.tolist()
    made = []
    for rule in rules:
        row: Row = {"method": rule.name}
        for kind in ("text", "asking"):
            by_layer = [float(np.mean(x)) for x in found[rule.name, kind]]
            row |= {f"recall_{kind}": float(np.mean(by_layer)), f"worst_{kind}": min(by_layer)}
            row[f"by_layer_{kind}"] = by_layer
        made.append(row)
    return made


def _groups(sample: Sample, n: int) -> tuple[np.ndarray, np.ndarray]:
    """Positions of text, and of groups that predict bytes of answers; whole groups, ascending, int32."""
    T = len(sample.tokens)
    start = min(question.start for question in sample.questions)
    text = np.unique(np.linspace(T // 2 // _GROUP, start // _GROUP - 1, max(n // _GROUP, 1)).astype(int))
    asked = itertools.chain.from_iterable(range(q.answer - 1, q.stop - 1) for q in sample.questions)
    asking = np.unique([position // _GROUP for position in asked])
    return _members(text), _members(asking[(asking + 1) * _GROUP <= T])


def _members(groups: np.ndarray) -> np.ndarray:
    return (groups[:, None] * _GROUP + np.arange(_GROUP)).ravel().astype(np.int32)


def _of_entries(method: hj.Method) -> hj.Method:
    """The same that hands out entries: their tokens and the tail would count, too."""
    return method if method.entry_size == 1 else dataclasses.replace(method, tail=None, returns="entries")


@functools.partial(jax.jit, static_argnums=(0, 1))
def _choose(rule: Rule, role: Role, asked: Asked, k: Array, before: Published | None) -> Published:
    return choose(rule, role, asked, k, before)


def _selection(indices: Array) -> hj.Selection:
    return hj.Selection(indices=indices, count=jnp.sum(indices >= 0, axis=-1, dtype=jnp.int32))


def answers(runner: Runner, samples: Sequence[Sample], rule: Rule) -> Row:
    """Which questions are answered right: every byte the likeliest one, those before it given."""
    right: list[bool] = []
    for sample in samples:
        likeliest = np.asarray(jnp.argmax(runner.logits(sample.tokens[None], rule), axis=-1))
        right += answered(likeliest[0], sample)
    return {"right": sum(right), "questions": len(right)}


def bits(runner: Runner, windows: np.ndarray, rule: Rule) -> np.ndarray:
    """uint8 [n, T] -> [n]: bits a byte of each window's second half, where choices differ most."""
    found = [
        np.asarray(bits_of(runner.logits(window[None], rule), jnp.asarray(window[None])), np.float64)
        for window in windows
    ]
    return np.concatenate(found)[:, windows.shape[1] // 2 :].mean(axis=1)


def over(ours: np.ndarray, flat: np.ndarray) -> Row:
    """Bits more than the flat rule's, paired by window, with a 95 % interval."""
    middle, low, _ = statistics.mean(ours - flat)
    return {"bits": float(ours.mean()), "bits_over": middle, "bits_interval": middle - low}


def costs(rule: Rule, context: int, H: int) -> Row:
    """In head products of the flat indexer: here, and of the same rule at DeepSeek-V3.2's sizes and 128K."""
    S, heads, topk = _REAL
    return {"cost": cost(rule, context, H), "cost_128K": cost(_at_real_size(rule, heads, topk), S, heads)}


def _at_real_size(rule: Rule, H: int, topk: int) -> Rule:
    """HISA's blocks and the scan's heads as published; of heads that are chosen the same share."""
    method: hj.Method = hj.Dsa(topk=topk)
    if isinstance(rule.method, hj.Hisa):
        method = hj.Hisa(topk=topk)
    elif isinstance(rule.method, hj.Scan):
        method = hj.Scan(topk=topk)
    heads = None if rule.heads is None else H // 4
    return dataclasses.replace(rule, method=method, heads=heads, router_block=1024)
