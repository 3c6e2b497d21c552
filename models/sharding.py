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

AXES = "data", "model", "context"
# The mesh axes that split an axis: of those that are there as many, from the first on, as together divide its size.
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
    "experts": ("model", "data", "context"),
}


def make_mesh(
    data: int = 1, model: int = 1, context: int = 1, devices: Sequence[jax.Device] | None = None
) -> Mesh:  # fmt: skip
    """Makes the mesh that the models are split over.

    Args:
        data: groups of devices that each take a part of the batch. Experts are split over the devices of all groups.
        model: devices of a group that each take a part of the heads, dense layers and vocabulary, and of the index
            queries.
        context: devices that each take a part of the pages of each row, and of the weights. They are neighbours.
        devices: default: the first of all devices.

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
    """The same mesh with automatic axes, which the models rely on.

    Raises: ValueError: axes other than "data", "model" and "context".
    """
    if mesh is None:
        return None
    if not set(mesh.axis_names) <= {"data", "model", "context"}:
        raise ValueError(f"mesh has the axes {mesh.axis_names}, wanted 'data', 'model' and 'context' or some of them")
    return Mesh(mesh.devices, mesh.axis_names, axis_types=(AxisType.Auto,) * len(mesh.axis_names))


def mesh_axes(mesh: Mesh | None, name: str | None, size: int) -> tuple[str, ...]:
    """Mesh axes over which an axis of that name and size is split, the first the slowest; none if it is not."""
    found: tuple[str, ...] = ()
    for axis in RULES.get(name, ()) if name and mesh is not None else ():
        n_devices = size_of(mesh, axis)
        if n_devices > 1 and size % n_devices == 0:
            found, size = (*found, axis), size // n_devices
    return found


def size_of(mesh: Mesh | None, axis: str) -> int:
    """Devices along an axis of a mesh, 1 where there is none."""
    return 1 if mesh is None else mesh.shape.get(axis, 1)


def mesh_axis(mesh: Mesh | None, name: str | None, size: int) -> str | None:
    """The one mesh axis over which an axis of that name is split, None if it is not."""
    found = mesh_axes(mesh, name, size)
    assert len(found) <= 1, found
    return found[0] if found else None


def sharding_of(mesh: Mesh, shape: Sequence[int], axes: Axes) -> NamedSharding:
    """Placement of an array of that shape whose axes have these names."""
    return NamedSharding(mesh, spec_of(mesh, shape, axes))


def spec_of(mesh: Mesh, shape: Sequence[int], axes: Axes) -> PartitionSpec:
    """The mesh axes that split an array of that shape whose axes have these names."""
    found = (mesh_axes(mesh, name, size) for name, size in zip(axes, shape, strict=True))
    return PartitionSpec(*(x[0] if len(x) == 1 else x or None for x in found))


def parameter_sharding(mesh: Mesh, parameter: nnx.Variable) -> Any:
    """Placement of a parameter, from the axis names it was made with: one for each array in its value."""
    axes = parameter.get_metadata("axes")
    return jax.tree.map(lambda leaf: sharding_of(mesh, leaf.shape, axes), parameter.get_value())


def constrain(x: Array, mesh: Mesh | None, axes: Axes) -> Array:
    """Tells the compiler where an activation lies; without a mesh does nothing. Raises as `check_axes_around`."""
    if mesh is None:
        return x
    check_axes_around(mesh)
    return jax.lax.with_sharding_constraint(x, sharding_of(mesh, x.shape, axes))


def check_axes_around(mesh: Mesh | None) -> None:
    """Raises ValueError if `jax.set_mesh` has set Explicit axes around a model of this mesh, which takes none."""
    explicit = jax.sharding.get_abstract_mesh().explicit_axes
    if mesh is not None and explicit:
        raise ValueError(
            f"Model: jax.set_mesh has set a mesh with the Explicit axes {explicit}, wanted Auto ones or no mesh around "
            "a model that has a mesh of its own"
        )


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
        placed: dict[str, tuple[str, ...]] = {}
        for argument, axes in zip(arguments, in_axes, strict=True):
            for leaf in jax.tree.leaves(argument):
                for i, name in enumerate(axes):
                    if name is not None:
                        found = mesh_axes(mesh, name, leaf.shape[i])
                        # Split everywhere or nowhere: rows and their pages stay together.
                        placed[name] = found if found == placed.get(name, found) else ()

        def spec(axes: Axes) -> PartitionSpec:
            return PartitionSpec(*(placed[name] or None if name else None for name in axes))

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
