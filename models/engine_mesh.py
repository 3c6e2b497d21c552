"""An engine on a mesh: how its sizes are split, and what the engines of all processes must have in common."""

from typing import get_args

from hisa_jax.models.modeling import Model
from hisa_jax.models.plan import Phase
from hisa_jax.models.sharding import size_of


def split_of(model: Model, sizes: dict[str, int]) -> dict[str, int]:
    """How a scheduler splits requests and pages on the model's mesh; raises unless the sizes are equal parts."""
    assert model.mesh is not None
    groups, devices = size_of(model.mesh, "data"), size_of(model.mesh, "context")
    for name, parts in (("n_pages", groups * devices), ("rows", groups), ("prefill_rows", groups)):
        if sizes[name] % parts:
            axes = "'data' and 'context'" if name == "n_pages" else "'data'"
            raise ValueError(f"Engine: {name}={sizes[name]}, wanted a multiple of {parts}, the mesh's {axes}")
    return dict(n_groups=groups, n_devices=devices, stripe=model.stripe)


def in_common(model: Model, sizes: dict[str, int], *options: object) -> dict[str, object]:
    """What the engines of all processes must have in common, by name."""
    assert model.mesh is not None
    config = {f"config.{field}": value for field, value in vars(model.config).items()}
    layers, phases = range(model.config.num_hidden_layers), get_args(Phase)
    methods = [model.plan(layer, phase) for layer in layers for phase in phases]
    mesh = dict(mesh=dict(model.mesh.shape), devices=[device.id for device in model.mesh.devices.flat])
    own = dict(methods=methods, page_size=model.page_size, dtype=str(model.embed[...].dtype), options=options)
    return config | sizes | mesh | own
