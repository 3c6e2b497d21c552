"""The arms of an experiment: does training on pooled keys make block means better summaries?

All begin with the same weights, short texts read densely, then differ in the attention of the stage at 16K. A third of
`byte_recipe`'s bytes: after fewer short texts the model would answer no question, which block means could then lose.

    dense             16K by dense attention
    lighthouse        16K by Lighthouse for 62.5 % of the steps, then dense
    lighthouse-only   16K by Lighthouse for as many steps; the bytes of the dense end are read with sparse attention
"""

import dataclasses
import functools

from hisa_jax.models.training.recipe import LIGHTHOUSE, Recipe, Stage, byte_recipe

_SHORT, _LONG, _WARM_UP, _SPARSE = 400, 120, (80, 20), 24  # steps
_BY_ENTRIES = _LONG * 5 // 8


def short_texts(seed: int = 0) -> Recipe:
    """What all arms begin with."""
    return _recipe(seed, dataclasses.replace(_stage("dense 2K", seed), steps=_SHORT))


def arm(name: str, seed: int = 0) -> Recipe:
    """One arm, to start with the weights that `short_texts` gives.

    Raises: ValueError: no arm has this name.
    """
    # In two passes: all rows on one device take more memory than it has.
    dense = dataclasses.replace(_stage("dense 16K", seed), steps=_LONG, accumulate=2)
    entries = dataclasses.replace(
        dense, name="lighthouse 16K", attention="lighthouse", method=LIGHTHOUSE, dense_ends=1, dense_after=_BY_ENTRIES
    )
    sparse = dataclasses.replace(_stage("sparse 16K", seed), steps=_SPARSE)
    unread = (_LONG - _BY_ENTRIES) * dense.rows // sparse.rows
    stages = {
        "dense": (dense, sparse),
        "lighthouse": (entries, sparse),
        "lighthouse-only": (
            dataclasses.replace(entries, steps=_BY_ENTRIES, dense_after=None),
            dataclasses.replace(sparse, steps=_SPARSE + unread),
        ),
    }
    if name not in stages:
        raise ValueError(f"arm: name is {name!r}, wanted one of {', '.join(stages)}")
    first, last = stages[name]
    warm_up = (
        dataclasses.replace(_stage(stage, seed), steps=steps)
        for stage, steps in zip(("warm-up 4K", "warm-up 16K"), _WARM_UP, strict=True)
    )
    return _recipe(seed, first, *warm_up, last)


def _stage(name: str, seed: int) -> Stage:
    return next(stage for stage in byte_recipe(seed).stages if stage.name == name)


def _recipe(seed: int, *stages: Stage) -> Recipe:
    return dataclasses.replace(byte_recipe(seed), stages=stages)


ARMS = {"arms": short_texts} | {
    f"arm-{name}": functools.partial(arm, name) for name in ("dense", "lighthouse", "lighthouse-only")
}
"""Recipes by the name that `train` knows them by: "arms" is what the others start with."""
