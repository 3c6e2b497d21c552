"""What the functions over several devices share: checks of a mesh's axes."""

from jax.sharding import AxisType, Mesh


def automatic(mesh: Mesh) -> Mesh:
    """The mesh with automatic axes: the caller's arrays may lie anywhere, and are moved to where specs want them."""
    return Mesh(mesh.devices, mesh.axis_names, axis_types=(AxisType.Auto,) * len(mesh.axis_names))


def check_axis(call: str, name: str, mesh: Mesh, axis: str, size: int, what: str, unit: int = 1) -> int:
    """Raises unless the mesh has the axis and it splits `size`, called `what`, in whole units; returns its devices."""
    if axis not in mesh.axis_names:
        raise ValueError(f"{call}: {name}={axis!r}, wanted one of the mesh's axes {mesh.axis_names}")
    n_devices: int = mesh.shape[axis]
    if size % (n_devices * unit):
        raise ValueError(f"{call}: {what} = {size}, wanted a multiple of {n_devices * unit} for {name}={axis!r}")
    return n_devices
