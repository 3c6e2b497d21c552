"""What the functions over several devices share: how they run on a mesh, and checks of its axes."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
from jax.sharding import AbstractMesh, AxisType, Mesh

from hisa_jax import checks
from hisa_jax.layout import IndexCache


class Axes(NamedTuple):
    """A mesh, and its axes that split keys or pages (`context`), a batch (`data`) or queries; None: none does."""

    mesh: Mesh
    context: str | None = None
    data: str | None = None
    queries: str | None = None

    @property
    def n_devices(self) -> int:
        """That split keys or pages."""
        return self.size(self.context)

    def size(self, axis: str | None) -> int:
        return 1 if axis is None else self.mesh.shape[axis]


def check_arrays(call: str, mesh: Mesh | None, axes: dict[str, str | None], **arrays: Any) -> None:
    """Raises where a mesh comes without one of its axes or an axis without a mesh, or neither, and arrays are split."""
    given = {name: axis for name, axis in axes.items() if axis is not None}
    if mesh is None and given:
        name, axis = next(iter(given.items()))
        raise ValueError(f"{call}: {name}={axis!r} with mesh=None, wanted the mesh that has this axis")
    if mesh is None:
        checks.unsplit(call, **arrays)
    elif not given:
        raise ValueError(f"{call}: mesh= without {' or '.join(axes)}, wanted one of its axes")


def batch_axes(
    call: str, mesh: Mesh, context: str | None, data: str | None, what: str, S: int, B: int, unit: int = 1
) -> Axes:
    """The axes that split S tokens, called `what`, in whole units, and B sequences; raises unless they do."""
    _check_context_axis(call, mesh, context, S, what, unit)
    if data is not None:
        check_axis(call, "data_axis", mesh, data, B, "B")
    return Axes(mesh, context, data)


def page_axes(call: str, mesh: Mesh, context: str | None, cache: IndexCache) -> Axes:
    """The axis that splits a cache's pages; raises unless it does."""
    _check_context_axis(call, mesh, context, cache.n_pages, "the cache's n_pages")
    return Axes(mesh, context)


def page_and_query_axes(call: str, mesh: Mesh, context: str | None, queries: str | None, cache: IndexCache) -> Axes:
    """The axes that split a cache's pages and any number of queries, one or both; raises unless they do."""
    axes = Axes(mesh) if context is None else page_axes(call, mesh, context, cache)
    if queries is not None:
        check_axis(call, "query_axis", mesh, queries, 0, "")
    return axes._replace(queries=queries)


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
    run = jax.shard_map(one_device, mesh=automatic(mesh), in_specs=in_specs, out_specs=out_specs, check_vma=False)
    # Checkify gives the errors that it carries through a shard_map one of each device, and then cannot read them beside
    # others (jax 0.12). A function with a batching rule of its own it leaves alone.
    opaque = jax.custom_batching.custom_vmap(jax.jit(run))
    opaque.def_vmap(_cannot_be_batched)
    return opaque


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
