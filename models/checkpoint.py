"""Saves a model with its config, and restores it onto any mesh; by Orbax."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from flax import nnx
from jax.sharding import Mesh, SingleDeviceSharding
from jax.typing import DTypeLike

from hisa_jax.models.config import Config, Yarn
from hisa_jax.models.json_object import read_object
from hisa_jax.models.modeling import Model
from hisa_jax.models.plan import MethodLike
from hisa_jax.models.sharding import parameter_sharding

_CONFIG, _WEIGHTS = "hisa_config.json", "weights"


def save(model: Model, folder: str | Path) -> None:
    """Saves weights and config. The method is no part of them.

    Args:
        model: on any mesh.
        folder: a new folder; each process of a multi-host program calls with the same one.

    Raises: FileExistsError: there is a saved model already.
    """
    folder = Path(folder).absolute()
    if (folder / _CONFIG).exists() or (folder / _WEIGHTS).exists():
        raise FileExistsError(f"save: folder {folder} holds a saved model already")
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(folder / _WEIGHTS, by_name(nnx.state(model)))
    if jax.process_index() == 0:
        (folder / _CONFIG).write_text(json.dumps(dataclasses.asdict(model.config), indent=1))


def restore(
    folder: str | Path, method: MethodLike = None, dtype: DTypeLike | None = None, mesh: Mesh | None = None
) -> Model:
    """Restores what `save` saved, each device's part by itself.

    Args:
        folder: given to `save`.
        method, mesh: as for `models.from_pretrained`; the mesh may be another one than before.
        dtype: of weights and activations; None for that of the saved model.

    Returns: the model.
    Raises: FileNotFoundError: no saved model there. ValueError: a config that `save` did not write.
    """
    folder = Path(folder).absolute()
    if not (folder / _CONFIG).is_file():
        raise FileNotFoundError(f"restore: folder {folder} holds no {_CONFIG}, wanted one that models.save wrote")
    config = _read_config(folder / _CONFIG)
    with ocp.StandardCheckpointer() as checkpointer:
        stored = checkpointer.metadata(folder / _WEIGHTS).item_metadata if (folder / _WEIGHTS).is_dir() else None
        if stored is None or "embed" not in stored:
            raise ValueError(f"restore: {folder / _WEIGHTS} holds no weights that can be read: missing or corrupt")
        if dtype is None:
            dtype = stored["embed"].dtype
        model = nnx.eval_shape(lambda: Model(config, method=method, dtype=dtype, mesh=mesh, rngs=nnx.Rngs(0)))
        graph, state = nnx.split(model)
        one_device = SingleDeviceSharding(jnp.zeros(()).device)
        wanted = {
            name_of(path): jax.ShapeDtypeStruct(
                parameter.get_value().shape,
                parameter.get_value().dtype,
                sharding=one_device if model.mesh is None else parameter_sharding(model.mesh, parameter),
            )
            for path, parameter in nnx.to_flat_state(state)
        }
        arrays = checkpointer.restore(folder / _WEIGHTS, wanted)
    restored = [(path, parameter.replace(arrays[name_of(path)])) for path, parameter in nnx.to_flat_state(state)]
    return nnx.merge(graph, nnx.from_flat_state(restored))


def by_name(state: nnx.State) -> dict[str, jax.Array]:
    """A model's parameters under names such as "layers.0.attention.q_a"."""
    return {name_of(path): parameter[...] for path, parameter in nnx.to_flat_state(state)}


def name_of(path: tuple[Any, ...]) -> str:
    """The name of a parameter's path in the state."""
    return ".".join(map(str, path))


def _read_config(file: Path) -> Config:
    """Undoes what JSON does to a Config: tuples become lists, the nested Yarn a dict."""
    keys = read_object(file, 2**22)
    values: dict[str, Any] = {name: tuple(value) if isinstance(value, list) else value for name, value in keys.items()}
    try:
        if isinstance(values.get("yarn"), dict):
            values["yarn"] = Yarn(**values["yarn"])
        return Config(**values)
    except (TypeError, ValueError) as error:  # a TypeError: unknown keys, or too few
        raise ValueError(f"{file}: {error}") from error
