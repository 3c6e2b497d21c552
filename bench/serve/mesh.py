"""The mesh of a command: its option, and devices for it, emulated ones on a CPU."""

import argparse
import contextlib
import math

import jax
from jax.sharding import Mesh

from bench import UserError
from hisa_jax import models

_AXES = ("data", "model", "context")


def mesh_sizes(text: str) -> tuple[int, int, int]:
    """ "data=2,context=4" -> (2, 1, 4)."""
    sizes = dict.fromkeys(_AXES, 1)
    for part in text.split(","):
        axis, _, size = part.partition("=")
        if axis not in sizes or not size.isdigit() or not 1 <= int(size) <= 4096:
            raise argparse.ArgumentTypeError(f"{text!r}, wanted sizes of {', '.join(_AXES)}: data=2,model=2,context=2")
        sizes[axis] = int(size)
    return sizes["data"], sizes["model"], sizes["context"]


def make_mesh(data: int, model: int, context: int) -> Mesh:
    """A mesh of the first devices; where JAX runs on the CPU, of as many emulated ones as it takes.

    Raises: UserError: there are fewer.
    """
    n_devices = math.prod((data, model, context))
    if jax.config.jax_platforms == "cpu":
        with contextlib.suppress(RuntimeError):  # JAX has started: those that it started with have to do
            jax.config.update("jax_num_cpu_devices", n_devices)
    try:
        return models.make_mesh(data, model, context)
    except ValueError as error:
        raise UserError(f"--mesh: {error}. JAX_PLATFORMS=cpu emulates them") from error
