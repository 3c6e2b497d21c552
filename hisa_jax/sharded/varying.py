"""What a function needs to run inside `jax.shard_map` with its default `check_vma=True`.

There the type of a value says over which mesh axes it differs, and what goes round a loop or comes out of the branches
of a condition must have one type. Constants, the same on all devices, have to be declared to vary like the values that
take their place. Everywhere else these functions return what they are given.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax


def alike[*Trees](*trees: *Trees) -> tuple[*Trees]:
    """The same values, each declared to vary over every mesh axis that one of them varies over.

    A gradient goes back as a sum over those axes, which is the gradient of what is the same on all devices.
    """
    return like(trees, trees)


def like[Tree](constants: Tree, *others: Any) -> Tree:
    """The same values, declared to vary over every mesh axis that one of the others varies over."""
    axes = _axes(others)

    def declared(leaf: Any) -> Any:
        missing = sorted(axes - _axes(leaf), key=str)
        return lax.pcast(leaf, tuple(missing), to="varying") if missing else leaf

    return jax.tree.map(declared, constants) if axes else constants


def constants[Tree](tree: Tree) -> Tree:
    """The operands of an implementation: arrays that vary alike, without gradients.

    A selection is piecewise constant: the gradient is cut here, where loops need not be differentiated.
    """
    (declared,) = alike(jax.tree.map(lambda x: lax.stop_gradient(jnp.asarray(x)), tree))
    return declared


def is_checked() -> bool:
    """Whether this is traced inside `jax.shard_map` with `check_vma=True`."""
    return any(_axes(lax.axis_index(axis)) for axis in jax.sharding.get_abstract_mesh().manual_axes)


def _axes(tree: Any) -> frozenset[Any]:
    return frozenset().union(*(jax.typeof(leaf).manual_axis_type.varying for leaf in jax.tree.leaves(tree)))
