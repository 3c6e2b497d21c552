"""Whether all processes of `jax.distributed` are about to run the same program.

A collective in which they differ waits for what never comes, or mixes up what does. Shapes are the caller's on each
process, so nothing inside of a compiled program can tell.
"""

import jax
import numpy as np
from jax.experimental import multihost_utils

_NAME_BYTES, _MAX_AXES = 24, 8


def check_processes(call: str, **arrays: jax.Array) -> None:
    """Raises on every process unless each of them has arrays of the same global shapes and dtypes.

    Args:
        call: what error messages call it.
        arrays: by name, as many on every process; only their shapes and dtypes are exchanged. Call it outside of jit,
            on all processes.

    Raises: ValueError: which process has what. Where a process is gone, the error of JAX's runtime, within its
        time-outs (`heartbeat_timeout_seconds` of `jax.distributed.initialize`).
    Example:
        >>> hj.check_processes("step", q=jnp.ones((1, 2, 4, 32)), k=jnp.ones((1, 256, 32)))
    """
    # Bytes, of one size whatever they say: this exchange must not be where processes differ.
    own = np.stack([_description(array) for array in arrays.values()])
    everyone = np.asarray(multihost_utils.process_allgather(own)).reshape(jax.process_count(), *own.shape)
    for i, name in enumerate(arrays):
        said = [_text(process[i]) for process in everyone]
        if len(set(said)) > 1:
            each = ", ".join(f"{text} on process {n}" for n, text in enumerate(said))
            raise ValueError(f"{call}: {name} is {each}, wanted the same on all")


def _description(array: jax.Array) -> np.ndarray:
    """[_NAME_BYTES + 4 * (1 + _MAX_AXES)] uint8: dtype, number of axes, sizes."""
    sizes = np.zeros(1 + _MAX_AXES, np.int32)
    sizes[: 1 + array.ndim] = array.ndim, *array.shape
    name = np.frombuffer(array.dtype.name.encode().ljust(_NAME_BYTES), np.uint8)
    return np.concatenate([name, sizes.view(np.uint8)])


def _text(description: np.ndarray) -> str:
    n_axes, *sizes = description[_NAME_BYTES:].copy().view(np.int32).tolist()
    return f"{description[:_NAME_BYTES].tobytes().decode().strip()} {sizes[:n_axes]}"
