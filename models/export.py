"""Writes a model as a checkpoint in the published format: config.json and one safetensors file."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx
from safetensors.numpy import save_file

from hisa_jax.models.config import Config
from hisa_jax.models.modeling import Model
from hisa_jax.models.params import parameter_table


def save_pretrained(model: Model, folder: str | Path, *, overwrite: bool = False) -> None:
    """Writes what `from_pretrained` reads.

    Args:
        model: on one device. Matrices are written in its dtype, what it holds in float32 as such.
        folder: is made if need be.
        overwrite: whether a checkpoint that is there may be replaced.

    Raises: FileExistsError: there is one, and `overwrite` is False.
    """
    folder = Path(folder)
    path = folder / "model.safetensors"
    if path.exists() and not overwrite:
        raise FileExistsError(f"save_pretrained: folder {folder} holds a checkpoint already")
    folder.mkdir(parents=True, exist_ok=True)
    save_file(_tensors(model), path, {"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config_to_keys(model.config), indent=1) + "\n")


def save_indexers(model: Model, path: str | Path) -> None:
    """Writes the indexers' tensors alone, under their published names: all that a training of them changes."""
    save_file({key: x for key, x in _tensors(model).items() if ".indexer." in key}, path, {"format": "pt"})


def _tensors(model: Model) -> dict[str, np.ndarray]:
    """By their published names, as they are stored."""
    table = parameter_table(model.config)
    tensors: dict[str, np.ndarray] = {}
    for parameter_path, parameter in nnx.to_flat_state(nnx.state(model)):
        source, value = table[parameter_path], np.asarray(jax.device_get(parameter[...]))
        parts = value if source.is_stacked else [value]
        for key, part in zip(source.keys, parts, strict=True):
            stored = tensors.setdefault(key, np.empty(source.shape, value.dtype))
            # Layouts are views, so what is written to them lands where it is stored.
            source.layout(stored)[...] = part
    return tensors


def config_to_keys(config: Config) -> dict[str, Any]:
    """The keys of a config.json from which `config_from_keys` makes the same `Config`."""
    keys = dataclasses.asdict(config)
    keys["mlp_layer_types"], keys["indexer_types"] = (list(keys.pop(x)) for x in ("layer_kinds", "indexer_kinds"))
    keys["eos_token_id"] = list(keys.pop("eos_token_ids")) or None
    yarn, block = keys.pop("yarn"), keys.pop("weight_block_size")
    if yarn is not None:
        keys["rope_scaling"] = {"rope_type": "yarn", **yarn}
    if block != Config.__dataclass_fields__["weight_block_size"].default:
        keys["quantization_config"] = {"weight_block_size": list(block)}
    return {name: value for name, value in keys.items() if value is not None}
