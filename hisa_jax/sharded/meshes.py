"""What the functions over several devices share: how they run on a mesh, and checks of its axes."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
from jax import Array
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from hisa_jax import checks
from hisa_jax.layout import IndexCache


class Axes(NamedTuple):
    """A mesh, and its axes that split keys or pages (`context`), a batch or groups of requests (`data`), queries, or
    heads of the attention; None: none does."""

    mesh: Mesh
    context: str | None = None
    data: str | None = None
    queries: str | None = None
    heads: str | None = None

    @property
    def n_devices(self) -> int:
        """That split keys or pages."""
        return self.size(self.context)

    @property
    def pages(self) -> PartitionSpec:
        """How the pages of a cache are split: those of a group together, over the devices of the group."""
        return PartitionSpec(tuple(axis for axis in (self.data, self.context) if axis is not None) or None)

    @property
    def requests(self) -> PartitionSpec:
        """How what belongs to requests is split: to the devices of their group."""
        return PartitionSpec(self.data)

    def size(self, axis: str | None) -> int:
        return 1 if axis is None else self.mesh.shape[axis]


def check_arrays(call: str, mesh: Mesh | None, axes: dict[str, str | None], **arrays: Any) -> None:
    """Raises where a mesh comes without one of its axes, or with one twice, or with arrays that lie on other devices or
    in another order; where an axis comes without a mesh; where neither comes, and arrays are split."""
    given = {name: axis for name, axis in axes.items() if axis is not None}
    if mesh is None and given:
        name, axis = next(iter(given.items()))
        raise ValueError(f"{call}: {name}={axis!r} with mesh=None, wanted the mesh that has this axis")
    if mesh is None:
        checks.unsplit(call, **arrays)
    elif not given:
        raise ValueError(f"{call}: mesh= without {' or '.join(axes)}, wanted one of its axes")
    elif len(set(given.values())) < len(given):
        shown = ", ".join(f"{name}={axis!r}" for name, axis in axes.items())
        raise ValueError(f"{call}: {shown}, wanted different axes")
    elif isinstance(mesh, Mesh):
        _check_devices(call, mesh, arrays)


def _check_devices(call: str, mesh: Mesh, arrays: dict[str, Any]) -> None:
    """Raises for arrays that were put on other devices, or on the mesh's in another order, by which JAX runs nothing.

    Those that a program closes over may lie anywhere; where the arguments of a program lie, JAX knows and says.
    """
    wanted = list(mesh.devices.flat)
    for name, array in arrays.items():
        for leaf in jax.tree.leaves(array):
            if not isinstance(leaf, Array) or isinstance(leaf, jax.core.Tracer) or not leaf.committed:
                continue
            given = list(leaf.sharding.devices_indices_map(leaf.shape))
            if given == wanted or _is_traced():
                continue
            what = "them in the order of the mesh" if set(given) == set(wanted) else "those of the mesh"
            ids, those = ([device.id for device in some] for some in (given, wanted))
            raise ValueError(f"{call}: {name} is on the devices {ids}, wanted {what}, {those}")


def _is_traced() -> bool:
    return isinstance(jax.numpy.zeros(()), jax.core.Tracer)


def batch_axes(
    call: str, mesh: Mesh, context: str | None, data: str | None, what: str, S: int, B: int, unit: int = 1
) -> Axes:
    """The axes that split S tokens, called `what`, in whole units, and B sequences; raises unless they do."""
    _check_context_axis(call, mesh, context, S, what, unit)
    if data is not None:
        check_axis(call, "data_axis", mesh, data, B, "B")
    return Axes(mesh, context, data)


def page_axes(
    call: str, mesh: Mesh, axes: dict[str, str | None], cache: IndexCache, n_groups: int, N: int = 0
) -> Axes:  # fmt: skip
    """The axes that split a cache's pages in groups and over devices, any number of queries, and N heads, as far as
    they are given; raises unless they do."""
    context, queries, heads = (axes.get(name) for name in ("context_axis", "query_axis", "head_axis"))
    if context is not None:
        check_axis(call, "context_axis", mesh, context, cache.n_pages, "the cache's n_pages", unit=n_groups)
    if queries is not None:
        check_axis(call, "query_axis", mesh, queries, 0, "")
    if heads is not None:
        check_axis(call, "head_axis", mesh, heads, N, "q's N")
    return Axes(mesh, context, axes.get("data_axis"), queries, heads)


def groups(call: str, mesh: Mesh | None, data: str | None, **arrays: Any) -> int:
    """How many groups of devices `data_axis` makes; raises unless it splits the first axis of every array."""
    if mesh is None or data is None:
        return 1
    check_axis(call, "data_axis", mesh, data, 0, "")
    n_groups: int = mesh.shape[data]
    for name, array in arrays.items():
        for shape in map(jax.numpy.shape, filter(_has_axes, jax.tree.leaves(array))):
            if shape[0] % n_groups:
                raise ValueError(
                    f"{call}: {name} is {list(shape)}, wanted a multiple of {n_groups} first for data_axis={data!r}"
                )
    return n_groups


def _has_axes(leaf: Any) -> bool:
    return len(getattr(leaf, "shape", ())) > 0


def _check_context_axis(call: str, mesh: Mesh, axis: str | None, size: int, what: str, unit: int = 1) -> None:
    if axis is None:
        raise ValueError(f"{call}: context_axis=None with mesh=, wanted one of its axes")
    check_axis(call, "context_axis", mesh, axis, size, what, unit)


def automatic(mesh: Mesh) -> Mesh:
    """The mesh with automatic axes: the caller's arrays may lie anywhere, and are moved to where specs want them."""
    return Mesh(mesh.devices, mesh.axis_names, axis_types=(AxisType.Auto,) * len(mesh.axis_names))


def on_devices(one_device: Callable[..., Any], mesh: Mesh, in_specs: Any, out_specs: Any) -> Callable[..., Any]:
    """`jax.shard_map` over the mesh, for what carries no gradient; checks of values belong outside of `one_device`.

    That what is gathered is the same everywhere is known to the caller, not to the checker.
    """
    auto = automatic(mesh)
    per_device = jax.shard_map(one_device, mesh=auto, in_specs=in_specs, out_specs=out_specs, check_vma=False)

    def run(*operands: Any) -> Any:
        return per_device(*jax.tree.map(functools.partial(_placed, auto), in_specs, operands))

    # Checkify gives the errors that it carries through a shard_map one of each device, and then cannot read them beside
    # others (jax 0.12). A function with a batching rule of its own it leaves alone.
    opaque = jax.custom_batching.custom_vmap(jax.jit(run))
    opaque.def_vmap(_cannot_be_batched)
    return opaque


def _placed(mesh: Mesh, spec: PartitionSpec, operand: Any) -> Any:
    """Arrays whose type says where they lie, on a mesh with Explicit axes, put to where the specs want them.

    `jax.shard_map` takes the type at its word, and cannot lower the program where it differs.
    """

    def place(leaf: Array) -> Array:
        is_explicit = not jax.typeof(leaf).sharding.mesh.empty
        return jax.lax.with_sharding_constraint(leaf, NamedSharding(mesh, spec)) if is_explicit else leaf

    return jax.tree.map(place, operand)


def _cannot_be_batched(*_: Any) -> Any:
    raise NotImplementedError("jax.vmap of a function over a mesh: give it the batch")


def check_axis(call: str, name: str, mesh: Mesh, axis: str, size: int, what: str, unit: int = 1) -> None:
    """Raises unless the mesh has the axis and it splits `size`, called `what`, in whole units.

    Also where the call is made under another mesh, on which JAX cannot run this one.
    """
    checks.instance(call, "mesh", mesh, Mesh | AbstractMesh, "a Mesh")
    _check_context(call, mesh)
    if axis not in mesh.axis_names:
        raise ValueError(f"{call}: {name}={axis!r}, wanted one of the mesh's axes {mesh.axis_names}")
    n_devices: int = mesh.shape[axis]
    if size % (n_devices * unit):
        raise ValueError(f"{call}: {what} = {size}, wanted a multiple of {n_devices * unit} for {name}={axis!r}")


def _check_context(call: str, mesh: Mesh) -> None:
    """Raises inside `jax.shard_map`, and where `jax.set_mesh` has set a mesh that is not this one, with Auto axes."""
    context = jax.sharding.get_abstract_mesh()
    if context.manual_axes:
        raise ValueError(
            f"{call}: called inside jax.shard_map over {context.manual_axes}, wanted a call outside of it: it runs on "
            "all devices of its mesh by itself"
        )
    set_axes = list(zip(context.axis_names, context.axis_sizes, context.axis_types, strict=True))
    own_axes = [(name, mesh.shape[name], AxisType.Auto) for name in mesh.axis_names]
    if set_axes and set_axes != own_axes:
        raise ValueError(
            f"{call}: jax.set_mesh has set {_mesh(set_axes)}, wanted {_mesh(own_axes)} as in mesh=, or none"
        )


def _mesh(axes: list[tuple[str, int, AxisType]]) -> str:
    return f"a mesh of {', '.join(f'{name!r}: {size} ({kind.name})' for name, size, kind in axes)}"
