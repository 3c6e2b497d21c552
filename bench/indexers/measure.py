"""Rows of a rule: what it keeps of the flat choice, answers and bits of the model that runs by it, its cost."""

import collections
import dataclasses
import functools
import itertools
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

import hisa_jax as hj
from bench import shapes
from bench.gpu.inputs import draw
from bench.indexers.model import Runner
from bench.indexers.rules import READS, Asked, Published, Role, Rule, choose, cost
from bench.quality.answers import bits_of
from hisa_jax.models.evaluate import statistics
from hisa_jax.models.training.retrieval import answered
from hisa_jax.models.training.samples import Sample

Row = dict[str, Any]
_ROWS = 256  # queries come in multiples of it, so that samples share programs
_GROUP = 8  # neighbouring queries that are compared together: whole groups of every rule
# (context, heads, selected tokens) of the model whose cost is shown beside: DeepSeek-V3.2's.
_REAL = (131_072, 64, 2048)


class Reference(NamedTuple):
    """What some queries of a sample ask a layer for: its keys [1, S, D], and what the reference rule chose.

    Attributes:
        n_text, n_asking: so many queries are of the text, then so many predict bytes of answers; the others fill up.
    """

    here: Asked
    k: Array
    chosen: hj.Selection
    n_text: int
    n_asking: int


def references(runner: Runner, samples: Sequence[Sample], rule: Rule, n_queries: int) -> list[list[Reference]]:
    """Of each sample and layer of the model that runs by the rule.

    Of two kinds of queries: groups of neighbours, evenly over the last half of the text, and groups that predict bytes
    of answers.
    """
    found = []
    for sample in samples:
        text, asking = _groups(sample, n_queries)
        rows = np.concatenate([text, asking])
        rows = np.pad(rows, (0, -rows.size % _ROWS), mode="wrap")
        layers = list[Reference]()
        for _, seen in runner.layers(sample.tokens[None], rule):
            assert seen is not None
            here = Asked(seen.q[:, rows], seen.w[:, rows], jnp.asarray(rows)[None])
            (program,) = prepare(runner, rule, here, seen.k).values()
            chosen = selection_of(program.result()(here, seen.k, None).indices)
            layers.append(Reference(here, seen.k, chosen, text.size, asking.size))
        found.append(layers)
    return found


def prepare(runner: Runner, rule: Rule, here: Asked, k: Array) -> dict[Role, Any]:
    """What the rule needs to choose for such queries, being compiled: of each role of a layer that chooses."""
    by_entries = dataclasses.replace(rule, method=_of_entries(rule.method)).unnamed()
    roles = {role: None for at in range(runner.stacked.config.num_hidden_layers) if (role := rule.role(at))}
    started: dict[Role, Any] = {}
    before = None
    for role in roles:
        if role != "take over":
            args, choose_by = (here, k, before if role in READS else None), chooser(by_entries, role)
            started[role] = runner.programs.start(("recall", by_entries, role), choose_by, *args)
            before = jax.eval_shape(choose_by, *args)
    return started


def prepare_like(runner: Runner, rule: Rule, T: int, sample: Sample, n_queries: int) -> None:
    """`prepare` for what `references` will have of a sample of T tokens."""
    seen, n = runner.sees(T, rule), sum(x.size for x in _groups(sample, n_queries))
    n += -n % _ROWS
    assert seen.w is not None
    rows: list[Any] = [jax.ShapeDtypeStruct((1, n, *x.shape[2:]), x.dtype) for x in (seen.q, seen.w)]
    rows.append(jax.ShapeDtypeStruct((1, n), jnp.int32))
    prepare(runner, rule, Asked(*rows), seen.k)


def recall(runner: Runner, rule: Rule, samples: Sequence[Sequence[Reference]]) -> Row:
    """The share of the reference rule's choice that this one has: means over layers, and the least one."""
    found: dict[tuple[str, int], list[float]] = collections.defaultdict(list)
    for layers in samples:
        before: Published | None = None
        for at, (here, k, wanted, n_text, n_asking) in enumerate(layers):
            if (role := rule.role(at)) != "take over":
                program = prepare(runner, rule, here, k)[role].result()
                before = program(here, k, before if role in READS else None)
            assert before is not None
            shares = np.asarray(hj.compare(selection_of(before.indices), wanted).recall)[0].tolist()
            found["text", at] += shares[:n_text]
            found["asking", at] += shares[n_text : n_text + n_asking]
    row: Row = {}
    for kind in ("text", "asking"):
        by_layer = [float(np.mean(found[kind, at])) for at in range(len(samples[0]))]
        row |= {f"recall_{kind}": float(np.mean(by_layer)), f"worst_{kind}": min(by_layer)}
        row[f"by_layer_{kind}"] = by_layer
    return row


def random_recalls(model: shapes.Model, rules: Sequence[Rule], context: int, n: int) -> Iterator[Row]:
    """The share of the first rule's entries that each rule finds, of the last n queries of random normal data."""
    q, k, _, w, _ = draw(model, 1, n, context // model.entry_size, jnp.float32)
    here = Asked(q, w, jnp.arange(context - n, context, dtype=jnp.int32)[None])
    wanted = None
    for rule in rules:
        by_entries = dataclasses.replace(rule, method=_of_entries(rule.method)).unnamed()
        found = selection_of(chooser(by_entries, "choose")(here, k, None).indices)
        wanted = wanted or found
        recall = np.asarray(hj.compare(found, wanted).recall)
        yield {"method": rule.name, "recall": float(recall.mean()), "worst_query": float(recall.min()), "queries": n}


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


@functools.cache
def chooser(rule: Rule, role: Role) -> Any:
    """`choose`, compiled when it is called."""
    return jax.jit(functools.partial(choose, rule, role))


def selection_of(indices: Array) -> hj.Selection:
    return hj.Selection(indices=indices, count=jnp.sum(indices >= 0, axis=-1, dtype=jnp.int32))


class Read(NamedTuple):
    """What a model that runs by a rule makes of samples: bits a byte of the text [n], and which answers are right."""

    bits: np.ndarray
    right: list[bool]


def read(runner: Runner, samples: Sequence[Sample], rule: Rule) -> Read:
    """Bits of the second half of each sample up to its questions, statements and all, and its answers.

    An answer is right if every byte of it is the likeliest one, those before it given.
    """
    bits, right = [], list[bool]()
    for sample in samples:
        logits, start = runner.logits(sample.tokens[None], rule), min(q.start for q in sample.questions)
        of_bytes = np.asarray(bits_of(logits, jnp.asarray(sample.tokens[None])), np.float64)[0]
        bits.append(of_bytes[len(sample.tokens) // 2 : start - 1].mean())
        right += answered(np.asarray(jnp.argmax(logits, axis=-1))[0], sample)
    return Read(np.array(bits), right)


def beside(ours: Read, flat: Read) -> Row:
    """Bits more than the flat rule's, paired by sample, with a 95 % interval; right answers."""
    middle, low, _ = statistics.mean(ours.bits - flat.bits)
    return {
        "bits": float(ours.bits.mean()), "bits_over": middle, "bits_interval": middle - low,
        "right": sum(ours.right), "questions": len(ours.right),
    }  # fmt: skip


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
