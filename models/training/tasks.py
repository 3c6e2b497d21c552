"""Long-range tasks: lines that state something, put into a text, and at its end lines that ask for it.

Each kind is a function of a generator, the text around and its parameters. The text is `filler`, uint8 [length]; its
end gives way to the lines, so that the sample is as long. They measure; `dense_mix` is the form to train on.
"""

from collections.abc import Callable

import numpy as np

from hisa_jax.models.training.groups import (
    Names,
    chain_lines,
    key_lines,
    passage_lines,
    pick,
    spread,
    table_lines,
    value_lines,
)
from hisa_jax.models.training.mix import dense_mix
from hisa_jax.models.training.samples import Question, Sample, place

__all__ = [
    "KINDS",
    "Question",
    "Sample",
    "copy",
    "dense_mix",
    "multikey",
    "multivalue",
    "needle",
    "recall",
    "variables",
]


def needle(rng: np.random.Generator, filler: np.ndarray, *, depth: float | None = None) -> Sample:
    """One statement, one question.

    Args:
        depth: in [0, 1], where the statement stands: 0 at the start, 1 right before the question. Default: random.
    """
    depth = _depth("needle", rng, depth)
    (stated,), (asked,) = key_lines(Names(rng, keys=1, values=1), 1, [0], "needle")
    return place("needle", filler, [(depth, stated), (1.0, asked)])


def multikey(
    rng: np.random.Generator, filler: np.ndarray, *, n_keys: int | None = None, n_questions: int = 1
) -> Sample:
    """Statements with different keys all through the text, questions about some of them.

    Args:
        n_keys: how many statements. Default: 8 to 64 at 16,384 bytes, in proportion elsewhere.
    """
    if n_keys is None:
        n_keys = max(2, int(rng.integers(8, 65)) * filler.size // 16384)
    _at_least_one("multikey", n_keys=n_keys, n_questions=n_questions)
    picked = pick(rng, n_keys, n_questions)
    stated, asked = key_lines(Names(rng, keys=n_keys, values=n_keys), n_keys, picked, "multikey")
    return place("multikey", filler, [*spread(rng, stated), *((1.0, line) for line in asked)])


def multivalue(rng: np.random.Generator, filler: np.ndarray, *, n_values: int | None = None) -> Sample:
    """Statements that each add a value to one key, a question for all values in their order.

    Args:
        n_values: how many. Default: 1 to 8.
    """
    n_values = int(rng.integers(1, 9)) if n_values is None else n_values
    _at_least_one("multivalue", n_values=n_values)
    stated, asked = value_lines(Names(rng, keys=1, values=n_values), n_values)
    return place("multivalue", filler, [*spread(rng, stated), (1.0, asked)])


def recall(
    rng: np.random.Generator, filler: np.ndarray, *, n_keys: int | None = None, n_questions: int = 8, depth: float = 0.0
) -> Sample:
    """A dense table of keys and values, many questions about it.

    Args:
        n_keys: how many keys the table has. Default: 64 at 16,384 bytes, in proportion elsewhere.
        depth: in [0, 1], where the table stands.
    """
    n_keys = max(4, filler.size // 256) if n_keys is None else n_keys
    _at_least_one("recall", n_keys=n_keys, n_questions=n_questions)
    depth = _depth("recall", rng, depth)
    rows, asked = table_lines(Names(rng, keys=n_keys, values=n_keys), n_keys, pick(rng, n_keys, n_questions))
    return place("recall", filler, [*((depth, row) for row in rows), *((1.0, line) for line in asked)])


def copy(
    rng: np.random.Generator, filler: np.ndarray, *, n_words: int = 24, n_passages: int = 4, depth: float | None = None
) -> Sample:
    """Passages of random words, each with a name; one of them is to be repeated.

    Args:
        depth: in [0, 1], where the passage asked for stands. Default: random.
    """
    _at_least_one("copy", n_words=n_words, n_passages=n_passages)
    depth = _depth("copy", rng, depth)
    names = Names(rng, keys=n_passages)
    (stated, asked), *others = [passage_lines(rng, names, n_words) for _ in range(n_passages)]
    return place("copy", filler, [(depth, stated), *spread(rng, [other for other, _ in others]), (1.0, asked)])


def variables(rng: np.random.Generator, filler: np.ndarray, *, hops: int | None = None, n_chains: int = 4) -> Sample:
    """Chains of variables all through the text, each bound to the one before; asked for the value of one's last.

    Args:
        hops: statements from the variable asked for to its value. Default: 1 to 4.
    """
    hops = int(rng.integers(1, 5)) if hops is None else hops
    _at_least_one("variables", hops=hops, n_chains=n_chains)
    names = Names(rng, values=n_chains, variables=hops * n_chains)
    chains = [chain_lines(names, hops) for _ in range(n_chains)]
    placed = [pair for stated, _ in chains for pair in spread(rng, stated)]
    return place("variables", filler, [*placed, (1.0, chains[0][1][-1])])


KINDS: dict[str, Callable[..., Sample]] = {
    "needle": needle,
    "multikey": multikey,
    "multivalue": multivalue,
    "recall": recall,
    "copy": copy,
    "variables": variables,
    "dense_mix": dense_mix,
}


def _depth(task: str, rng: np.random.Generator, depth: float | None) -> float:
    depth = rng.random() if depth is None else depth
    if not 0 <= depth <= 1:
        raise ValueError(f"{task}: depth is {depth}, wanted 0 to 1")
    return depth


def _at_least_one(task: str, **counts: int) -> None:
    for name, count in counts.items():
        if count < 1:
            raise ValueError(f"{task}: {name} is {count}, wanted at least 1")
