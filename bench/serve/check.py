"""Every selection of a server against the oracle.

The recorder keeps each request's index keys in one piece, as the model made them, by its own bookkeeping: a fork begins
with its donor's, rejected tokens go. So a page that was mixed up, overwritten or pooled wrongly shows in a selection.
"""

from collections.abc import Container, Hashable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import hisa_jax as hj
from hisa_jax.models import Model
from hisa_jax.models.engine import Report, Step
from tests import oracle

_TOLERANCE = 1e-5  # of float32 sums, relative to a query's scores
_TIE = 1e-3  # of logits of a few units, which sums in another order may exchange


class Recorder:
    """What requests should hold, and what was compared.

    Attributes:
        n_checked: queries and layers.
        mismatches: what was wrong, a text each.
    """

    def __init__(self, method: hj.Method) -> None:
        self.method, self.n_checked = method, 0
        self.mismatches: list[str] = []
        self._keys: dict[tuple[int, int], hj.QuantizedKeys] = {}  # by request and layer: [S, D], [S]

    def check(self, report: Report, alive: Container[Hashable]) -> None:
        """Takes up a step's forks and keys and compares its selections; requests that are not `alive` are forgotten."""
        for new, donor, shared in report.forks:
            for (request, layer), keys in list(self._keys.items()):
                if request == donor:
                    self._keys[new, layer] = _first(keys, shared)
        for step in report.steps:
            self._check(step)
        self._keys = {at: keys for at, keys in self._keys.items() if at[0] in alive}

    def _check(self, step: Step) -> None:
        for traced in step.layers:
            selection, q, k, w = jax.device_get((traced.selection, traced.q, traced.k, traced.w))
            if not isinstance(k, hj.QuantizedKeys):
                ones: Any = np.ones(k.shape[:2], np.float32)
                k = hj.QuantizedKeys(k, ones)
            rows = zip(step.rows, step.requests, step.starts, step.n_new, step.n_kept, strict=True)
            for row, request, start, n_new, n_kept in rows:
                new = slice(q.shape[1] - n_new, None)
                own = hj.QuantizedKeys(k.values[row, new], k.scales[row, new])
                before = self._keys.get((request, traced.layer), _first(own, 0))
                keys = jax.tree.map(lambda *x: np.concatenate(x), before, own)
                assert len(before.scales) == start
                one = jax.tree.map(lambda x: x[None], keys)
                wanted = oracle.select(q[None, row, new], one, w[None, row, new], self.method)
                self.n_checked += n_new
                try:
                    oracle.assert_same_selection(
                        selection.indices[None, row, new], selection.count[None, row, new], wanted, _TOLERANCE
                    )
                except AssertionError as error:
                    self.mismatches.append(f"request {request}, layer {traced.layer}, {step.phase}: {error}")
                self._keys[request, traced.layer] = _first(keys, start + n_kept)


def is_tie(model: Model, prompt: Sequence[int], tokens: Sequence[int], others: Sequence[int]) -> bool:
    """Whether two continuations of a prompt part at tokens that are as likely to within rounding."""
    n = next(i for i, (one, other) in enumerate(zip(tokens, others, strict=False)) if one != other)
    logits = model(jnp.array([[*prompt, *others[:n]]], jnp.int32))[0, -1]
    return bool(abs(logits[tokens[n]] - logits[others[n]]) < _TIE)


def _first(keys: hj.QuantizedKeys, n: int) -> hj.QuantizedKeys:
    return hj.QuantizedKeys(keys.values[:n], keys.scales[:n])
