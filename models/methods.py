"""Methods by name, for the command line: one for all layers, or a file that says which layer has which.

The file is JSON: {"default": {"indexer": "hisa", "block_topk": 32}, "0": {"indexer": "dsa"}}. Keys are layers, or
"default" for those left out (else they keep the checkpoint's own method). `indexer` is dsa, hisa, scan or block-sparse;
the others are fields of that method. `topk` is the checkpoint's unless given, and so are HISA's sizes if it has them.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import hisa_jax as hj
from hisa_jax.methods import NAMES
from hisa_jax.models.config import Config
from hisa_jax.models.json_object import read_object


def make_method(name: str, config: Config, source: str = "indexer", /, **fields: Any) -> hj.Method:
    """Makes a method of its name.

    Args:
        name: "dsa", "hisa", "scan" or "block-sparse".
        config: gives `topk`, and HISA's `block_size` and `block_topk`, unless `fields` do.
        source: what error messages call it.
        fields: of the method.

    Returns: the method.
    Raises: ValueError: no such name, a field that the method does not have or take.
    """
    if not isinstance(name, str) or name not in NAMES:
        raise ValueError(f"{source}: indexer is {name!r}, wanted one of {', '.join(NAMES)}")
    own: dict[str, Any] = {"topk": config.index_topk}
    if name == "hisa":
        own |= {"block_size": config.hisa_k_block_size, "block_topk": config.hisa_block_topk}
    try:
        return NAMES[name](**(own | fields))
    except (TypeError, ValueError) as error:
        raise ValueError(f"{source}: {error}") from error


def read_methods(path: str | Path, config: Config) -> tuple[hj.Method, ...]:
    """Reads a per-layer file, see the head of this module.

    Args:
        path: of the file.
        config: of the model.

    Returns: one method a layer.
    Raises: FileNotFoundError: no such file. ValueError: not JSON in that form, a layer or method that does not exist.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"indexer is {path}, wanted one of {', '.join(NAMES)} or a file")
    given = read_object(path, 2**22)
    if not all(isinstance(item, Mapping) for item in given.values()):
        raise ValueError(f"{path}: wanted an object of objects, as {{'default': {{'indexer': 'hisa'}}}}")
    layers = [str(i) for i in range(config.num_hidden_layers)]
    for key in given:
        if key not in ("default", *layers):
            raise ValueError(f"{path}: names layer {key!r}, wanted 'default' or one from '0' to '{layers[-1]}'")
    default = given.get("default")
    return tuple(_method_of(given.get(key, default), config, f"{path}: {key}") for key in layers)


def _method_of(item: Mapping[str, Any] | None, config: Config, source: str) -> hj.Method:
    if item is None:
        return config.method
    fields = dict(item)
    return make_method(fields.pop("indexer", None), config, source, **fields)
