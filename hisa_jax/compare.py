"""How close one selection comes to another."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from hisa_jax import checks
from hisa_jax.selection import Selection


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Comparison:
    """Agreement of a selection with a reference, query by query. Axes are those of `Selection.count`.

    Attributes:
        recall: [...] float32, share of the reference's tokens that were selected.
        iou: [...] float32, tokens in both over tokens in either.
        mass: [...] float32, share of the reference's relu score that was captured; None if it had no scores.
        is_real: [...] bool, False for queries of which the reference selects nothing (padding); they count as 1 above
            and are left out of `summary`.
    """

    recall: Array
    iou: Array
    mass: Array | None
    is_real: Array

    def summary(self) -> dict[str, float]:
        """Mean, least and fifth percentile of each measure over the real queries, as "recall", "recall_min", ...

        NaN where there is no real query. Not for use under jit.
        """
        is_real = np.asarray(self.is_real)
        result = {"queries": float(is_real.sum())}
        for name in ("recall", "iou", "mass"):
            values = getattr(self, name)
            if values is None:
                continue
            values = np.asarray(values, np.float64)[is_real]
            if not values.size:
                values = np.array([np.nan])
            result[name] = float(np.mean(values))
            result[f"{name}_min"] = float(np.min(values))
            result[f"{name}_p5"] = float(np.percentile(values, 5))
        return result


def compare(selection: Selection, reference: Selection) -> Comparison:
    """Measures how much of a reference selection another one holds.

    Args:
        selection: of the same queries; its `topk` may differ.
        reference: usually that of the flat indexer. With its scores (`return_scores=True`) the mass is measured, too.

    Returns: `Comparison`, a value a query.
    Raises: TypeError: no selection. ValueError: selections of different queries.
    Source: recall and IoU as in HISA, arXiv 2603.28458; the mass sums relu(score) over the tokens in both.
    Example:
        >>> q, k, w = jnp.ones((1, 16, 4, 32)), jnp.ones((1, 1024, 32)), jnp.ones((1, 16, 4))
        >>> flat = hj.select(q, k, w, hj.Dsa(topk=128), return_scores=True)
        >>> hisa = hj.select(q, k, w, hj.Hisa(topk=128, block_size=64, block_topk=4))
        >>> round(hj.compare(hisa, flat).summary()["recall"], 3)
        1.0
    """
    for name, value in (("selection", selection), ("reference", reference)):
        checks.instance("compare", name, value, Selection, "a Selection")
        checks.dtype("compare", f"{name}.count", value.count, ("int32",))
        checks.int32("compare", f"{name}.indices", value.indices, (*value.count.shape, "topk"), "a list a query")
    checks.shape("compare", "selection.count", selection.count, reference.count.shape, "that of the reference")
    checks.unsplit("compare", selection=selection, reference=reference)
    return _compare(selection, reference)


@jax.jit
def _compare(selection: Selection, reference: Selection) -> Comparison:
    both = _is_in(reference.indices, selection.indices)
    n_both = jnp.sum(both, axis=-1, dtype=jnp.float32)
    n_reference = reference.count.astype(jnp.float32)
    n_either = n_reference + selection.count.astype(jnp.float32) - n_both
    mass = None
    if reference.scores is not None:
        # Relu of the -inf that fills up is 0; tokens of an open tail, which nothing chose, have infinity.
        score = jnp.where(reference.scores == jnp.inf, 0.0, jnp.maximum(reference.scores, 0))
        mass = _share(jnp.sum(jnp.where(both, score, 0), axis=-1), jnp.sum(score, axis=-1))
    return Comparison(
        recall=_share(n_both, n_reference), iou=_share(n_both, n_either), mass=mass, is_real=reference.count > 0
    )


def _share(part: Array, whole: Array) -> Array:
    """The share of part in whole, and 1 where there is nothing to have a share of."""
    return jnp.where(whole > 0, part / jnp.where(whole > 0, whole, 1), 1.0)


def _is_in(needles: Array, haystack: Array) -> Array:
    """[..., K], [..., L], both ascending and then -1 -> [..., K] bool: which needles stand in the haystack."""
    flat_needles = needles.reshape(-1, needles.shape[-1])
    flat_haystack = haystack.reshape(-1, haystack.shape[-1])
    end = jnp.iinfo(jnp.int32).max
    ordered = jnp.where(flat_haystack < 0, end, flat_haystack)
    at = jax.vmap(jnp.searchsorted)(ordered, flat_needles)
    found = jnp.take_along_axis(ordered, jnp.minimum(at, ordered.shape[-1] - 1), axis=-1)
    return ((found == flat_needles) & (flat_needles >= 0)).reshape(needles.shape)
