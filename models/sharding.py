"""Where arrays lie on a mesh: named axes of parameters and activations, and the mesh axes that split them."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax import Array
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

Axes = Sequence[str | None]
MeshAxes = str | tuple[str, ...] | None

AXES = "data", "model", "context"
# Mesh axes that split an axis, the first ones first, each as far as it divides what is left: else it is replicated.
# Weights are split over `context`, too, whose devices would else have copies; experts over all devices.
_WEIGHTS = ("model", "context")
RULES: dict[str, tuple[str, ...]] = {
    "batch": ("data",),
    "heads": ("model",),
    "head_weights": _WEIGHTS,
    "index_heads": _WEIGHTS,
    "rank": _WEIGHTS,
    "ff": _WEIGHTS,
    "vocab": _WEIGHTS,
    "experts": ("model", "context", "data"),
}


def make_mesh(
    data: int = 1, model: int = 1, context: int = 1, devices: Sequence[jax.Device] | None = None
) -> Mesh:  # fmt: skip
    """Makes the mesh that the models are split over.

    Args:
        data: groups of devices that each take a part of the batch. Experts are split over all devices.
        model: devices of a group that each take a part of the heads, dense layers and vocabulary, and of the index
            queries.
        context: devices that each take a part of the pages of each row.
        devices: default: the first of all devices. Those of `context` are neighbours.

    Returns: a mesh with the axes "data", "model" and "context".
    Raises: ValueError: fewer devices than the mesh needs.
    """
    devices, sizes = jax.devices() if devices is None else devices, (data, model, context)
    if min(sizes) < 1 or math.prod(sizes) > len(devices):
        raise ValueError(
            f"make_mesh(data={data}, model={model}, context={context}): wanted at least 1 of each, there are "
            f"{len(devices)} devices"
        )
    grid = np.asarray(devices[: math.prod(sizes)]).reshape(sizes)
    return Mesh(grid, AXES, axis_types=(AxisType.Auto,) * 3)


def automatic(mesh: Mesh | None) -> Mesh | None:
    """The same mesh with all three axes, in their order and automatic, which the models rely on.

    Raises: ValueError: axes other than "data", "model" and "context".
    """
    if mesh is None:
        return None
    if not set(mesh.axis_names) <= set(AXES):
        raise ValueError(f"mesh has the axes {mesh.axis_names}, wanted some of 'data', 'model' and 'context'")
    order = [mesh.axis_names.index(axis) for axis in AXES if axis in mesh.axis_names]
    sizes = [mesh.shape.get(axis, 1) for axis in AXES]
    return Mesh(mesh.devices.transpose(order).reshape(sizes), AXES, axis_types=(AxisType.Auto,) * 3)


def mesh_axis(mesh: Mesh | None, name: str | None, size: int) -> MeshAxes:
    """Mesh axes over which an axis of that name and size is split, None if it is not."""
    if mesh is None or name is None:
        return None
    axes = list[str]()
    for axis in RULES.get(name, ()):
        n_devices = mesh.shape.get(axis, 1)
        if n_devices > 1 and size % n_devices == 0:
            axes.append(axis)
            size //= n_devices
    return None if not axes else axes[0] if len(axes) == 1 else tuple(axes)


def shares_selection(mesh: Mesh | None) -> bool:
    """Whether several devices share the pages of a row, or the index queries of a batch."""
    return mesh is not None and (mesh.shape["context"] > 1 or mesh.shape["model"] > 1)


def sharding_of(mesh: Mesh, shape: Sequence[int], axes: Axes) -> NamedSharding:
    """Placement of an array of that shape whose axes have these names."""
    return NamedSharding(mesh, spec_of(mesh, shape, axes))


def spec_of(mesh: Mesh, shape: Sequence[int], axes: Axes) -> PartitionSpec:
    """The mesh axes that split an array of that shape whose axes have these names."""
    return PartitionSpec(*(mesh_axis(mesh, name, size) for name, size in zip(axes, shape, strict=True)))


def parameter_sharding(mesh: Mesh, parameter: nnx.Variable) -> Any:
    """Placement of a parameter, from the axis names it was made with: one for each array in its value."""
    axes = parameter.get_metadata("axes")
    return jax.tree.map(lambda leaf: sharding_of(mesh, leaf.shape, axes), parameter.get_value())


def constrain(x: Array, mesh: Mesh | None, axes: Axes) -> Array:
    """Tells the compiler where an activation lies; without a mesh does nothing.

    Raises: ValueError: `jax.set_mesh` has set Explicit axes, under which JAX takes no such advice.
    """
    if mesh is None:
        return x
    if explicit := jax.sharding.get_abstract_mesh().explicit_axes:
        raise ValueError(
            f"Model: jax.set_mesh has set a mesh with the Explicit axes {explicit}, wanted Auto ones or no mesh around "
            "a model that has a mesh of its own"
        )
    return jax.lax.with_sharding_constraint(x, sharding_of(mesh, x.shape, axes))


def per_device(function: Callable[..., Any], mesh: Mesh | None, in_axes: Sequence[Axes], out_axes: Axes) -> Callable:
    """Runs a function on each device's own part of its arguments, since the compiler cannot look into kernels.

    Args:
        function: of arrays or pytrees of arrays.
        mesh: None calls it as it is.
        in_axes: names of the leading axes of each argument.
        out_axes: names of the leading axes of everything it returns.

    Returns: a function of the same arguments.
    """
    if mesh is None:
        return _by_one(function)

    def call(*arguments: Any) -> Any:
        placed: dict[str, MeshAxes] = {}
        for argument, axes in zip(arguments, in_axes, strict=True):
            for leaf in jax.tree.leaves(argument):
                for i, name in enumerate(axes):
                    if name is not None:
                        axis = mesh_axis(mesh, name, leaf.shape[i])
                        # Split everywhere or nowhere: rows and their pages stay together.
                        placed[name] = axis if axis == placed.get(name, axis) else None

        def spec(axes: Axes) -> PartitionSpec:
            return PartitionSpec(*(placed[name] if name else None for name in axes))

        return jax.shard_map(
            function,
            mesh=mesh,
            in_specs=tuple(spec(axes) for axes in in_axes),
            out_specs=spec(out_axes),
            check_vma=False,
        )(*arguments)

    return call


def _by_one(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function as it is, also under a mesh with Explicit axes that `jax.set_mesh` has set.

    There JAX asks of operations without a rule, of `ragged_dot` for instance, where their results shall lie.
    """

    def call(*arguments: Any) -> Any:
        if not jax.sharding.get_abstract_mesh().explicit_axes:
            return function(*arguments)
        return jax.sharding.auto_axes(function, out_sharding=PartitionSpec())(*arguments)

    return call
