"""How near a selection comes to the flat indexer's at the flat model's hidden states: rows of the quality report."""

import collections
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

import hisa_jax as hj
from bench.quality.model import layers_of
from bench.quality.variants import Variant
from hisa_jax.models.evaluate import statistics
from hisa_jax.models.training.samples import Sample
from hisa_jax.models.training.weights import Stacked

Row = dict[str, Any]
MEASURES = ("recall", "iou", "mass")


def agreement_rows(
    stacked: Stacked, samples: Sequence[Sample], flat: Variant, variants: Sequence[Variant], n_queries: int, topk: int
) -> list[Row]:
    """Recall, IoU and captured score mass by layer, of queries of text and of retrieval; overlaps of selections.

    Queries of text are pairs of neighbours, evenly spaced over those that see more than `topk` tokens and ask nothing.
    Queries of retrieval are those that predict a byte of an answer.

    Args:
        samples: of one length, each with questions.
        flat: the model runs with, and is the reference.
        variants: to compare; those with `flat_last` are left out, since they select by position.
        n_queries: of text, in a sample.
    """
    values: dict[tuple, list[float]] = collections.defaultdict(list)
    variants = [variant for variant in variants if not variant.flat_last]
    for sample in samples:
        text, asking, needs = _queries(sample, n_queries, topk)
        positions = np.concatenate([text, text + 1, asking])
        before: dict[str, hj.Selection] = {}
        for layer, seen in enumerate(layers_of(stacked, sample.tokens[None], flat)):
            at = jnp.asarray(positions, jnp.int32)[None]
            q, w = seen.q[:, positions], seen.w[:, positions]
            reference = _select(flat, q, seen.k, w, at)
            for variant in variants:
                # The reference is flat on the keys as they are, whatever the variant makes of them.
                selection = _select(variant.at(layer), q, seen.k, w, at)
                if variant != flat:
                    _compare(values, variant.name, layer, selection, reference, text.size)
                kept = _kept(np.asarray(selection.indices)[0, 2 * text.size :], needs)
                values[variant.name, layer, "retrieval", "needle_bytes"] += kept
                values[variant.name, layer, "text", "next_query_iou"] += _iou(
                    _of(selection, slice(text.size, 2 * text.size)), _of(selection, slice(text.size))
                )
                if layer:
                    values[variant.name, layer, "text", "last_layer_iou"] += _iou(
                        _of(selection, slice(2 * text.size)), _of(before[variant.name], slice(2 * text.size))
                    )
                before[variant.name] = selection
    return _rows(values)


def _queries(sample: Sample, n: int, topk: int) -> tuple[np.ndarray, np.ndarray, list[tuple[int, int]]]:
    """Positions of text (each with a neighbour), those that predict answers, and the bytes that each of these needs."""
    start = min(q.start for q in sample.questions)
    first = topk if start > 2 * topk else 0
    text = np.unique(np.linspace(first, max(first, start - 2), max(1, n // 2)).astype(int))
    asking, needs = [], []
    for question in sample.questions:
        for position in range(question.answer - 1, question.stop - 1):
            asking.append(position)
            needs.append(question.needs[0])
    return text, np.array(asking), needs


@functools.partial(jax.jit, static_argnums=0)
def _select(variant: Variant, q: Array, k: Array, w: Array, positions: Array) -> hj.Selection:
    return variant.select(q, k, w, query_positions=positions, return_scores=True)


def _of(selection: hj.Selection, which: slice) -> hj.Selection:
    scores = None if selection.scores is None else selection.scores[:, which]
    return hj.Selection(indices=selection.indices[:, which], count=selection.count[:, which], scores=scores)


def _compare(
    values: dict, name: str, layer: int, selection: hj.Selection, reference: hj.Selection, n_text: int
) -> None:
    found = hj.compare(selection, reference)
    for measure in MEASURES:
        of_queries = np.asarray(getattr(found, measure))[0].tolist()
        values[name, layer, "text", measure] += of_queries[: 2 * n_text]
        values[name, layer, "retrieval", measure] += of_queries[2 * n_text :]


def _iou(one: hj.Selection, other: hj.Selection) -> list[float]:
    return np.asarray(hj.compare(one, other).iou)[0].tolist()


def _kept(indices: np.ndarray, needs: Sequence[tuple[int, int]]) -> list[float]:
    """The share of the bytes needed, [start, stop), among the selected ones, for each query."""
    return [
        float(((row >= start) & (row < stop)).sum()) / (stop - start)
        for row, (start, stop) in zip(indices, needs, strict=True)
    ]


def _rows(values: dict[tuple, list[float]]) -> list[Row]:
    rows = []
    for (name, layer, queries, measure), found in values.items():
        middle, low, high = statistics.mean(found)
        rows.append({
            "method": name, "layer": layer, "queries": queries, "measure": measure, "mean": middle, "low": low,
            "high": high, "p5": float(np.percentile(found, 5)), "n": len(found),
        })  # fmt: skip
    return rows
