"""Statements with the questions that they allow, one function for each kind of task."""

from collections.abc import Sequence

import numpy as np

from hisa_jax.models.training import lines
from hisa_jax.models.training.lines import Line

_ROW = 4  # pairs in a line of a table


class Names:
    """Keys, values and variables of one sample: none is given out twice."""

    def __init__(self, rng: np.random.Generator, *, keys: int = 0, values: int = 0, variables: int = 0):
        self._keys, self._values = lines.draw_keys(rng, keys), lines.draw_values(rng, values)
        self._variables = lines.draw_variables(rng, variables)

    def keys(self, n: int) -> list[str]:
        return _taken(self._keys, n)

    def values(self, n: int) -> list[str]:
        return _taken(self._values, n)

    def variables(self, n: int) -> list[str]:
        return _taken(self._variables, n)


def key_lines(names: Names, n_keys: int, picked: Sequence[int], kind: str) -> tuple[list[Line], list[Line]]:
    """A statement for each key, a question for each number of a key in `picked`."""
    keys, values = names.keys(n_keys), names.values(n_keys)
    stated = [lines.statement("key", key, value) for key, value in zip(keys, values, strict=True)]
    return stated, [lines.question("ask", keys[at], values[at], kind, [stated[at]]) for at in picked]


def value_lines(names: Names, n_values: int) -> tuple[list[Line], Line]:
    """Statements that add values to one key, the question for all."""
    (key,), values = names.keys(1), names.values(n_values)
    stated = [lines.statement("add", key, value) for value in values]
    return stated, lines.question("all", key, " ".join(values), "multivalue", stated)


def table_lines(names: Names, n_keys: int, picked: Sequence[int]) -> tuple[list[Line], list[Line]]:
    """A table in as many lines as it takes, a question for each number of a key in `picked`."""
    pairs = list(zip(names.keys(n_keys), names.values(n_keys), strict=True))
    rows = [lines.table_row(pairs[at : at + _ROW]) for at in range(0, n_keys, _ROW)]
    return rows, [lines.question("ask", *pairs[at], "recall", [rows[at // _ROW]]) for at in picked]


def passage_lines(rng: np.random.Generator, names: Names, n_words: int) -> tuple[Line, Line]:
    """A passage of random words with a name, the question to repeat it."""
    (name,), passage = names.keys(1), lines.draw_passage(rng, n_words)
    stated = lines.statement("copy", name, passage)
    return stated, lines.question("paste", name, passage, "copy", [stated])


def chain_lines(names: Names, hops: int) -> tuple[list[Line], list[Line]]:
    """Variables, the first bound to a value and each other to the one before; a question for each of them."""
    (value,), chain = names.values(1), names.variables(hops)
    stated = [lines.statement("let", *pair) for pair in zip(chain, [value, *chain[:-1]], strict=True)]
    return stated, [
        lines.question("value", name, value, "variables", stated[: hop + 1], hop + 1) for hop, name in enumerate(chain)
    ]


def pick(rng: np.random.Generator, n: int, n_picked: int) -> list[int]:
    """Numbers below n, each once before any comes twice."""
    rounds = [rng.permutation(n) for _ in range(-(-n_picked // n))]
    return np.concatenate(rounds)[:n_picked].tolist()


def spread(rng: np.random.Generator, stated: Sequence[Line]) -> list[tuple[float, Line]]:
    """Lines at random places, in their order."""
    return list(zip(np.sort(rng.random(len(stated))).tolist(), stated, strict=True))


def _taken(names: list[str], n: int) -> list[str]:
    """The last n, which leave the list."""
    assert n <= len(names), "a sample draws as many names as it may need"
    taken = names[len(names) - n :]
    del names[len(names) - n :]
    return taken
