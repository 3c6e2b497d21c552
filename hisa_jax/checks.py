"""Errors that name the call, the argument, what was given and what is wanted.

Checks of shapes and dtypes run at trace time and always. Checks of values (lengths, positions, offsets) cost run time:
they run only under `checked`.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental import checkify

KEY_DTYPES = ("bfloat16", "float32", "float8_e4m3fn", "int8")


def checked[**P, R](function: Callable[P, R]) -> Callable[P, R]:
    """Wraps a function so that bad values in its calls to this library raise, for debugging.

    Without it, lengths beyond the keys, positions below -1 or offsets out of order select nothing there and are never
    read out of bounds, but nobody is told.

    Args:
        function: anything traceable that calls `select`, `select_packed` or `sparse_mla`, jitted or not.

    Returns: a function of the same arguments that raises `jax.experimental.checkify.JaxRuntimeError`, which names the
        argument, and otherwise returns what `function` returns. It waits for the result; call it outside of jit.
    Example:
        >>> hj.checked(hj.select)(q, k, w, method, lengths=lengths)  # doctest: +SKIP
    """

    @functools.wraps(function)
    def wrapper(*args: P.args, **kwargs: P.kwargs) -> R:
        # Methods and other options are not arrays: close over everything, so that nothing has to be a pytree.
        error, result = checkify.checkify(lambda: function(*args, **kwargs), errors=checkify.user_checks)()
        error.throw()
        return result

    return wrapper


def shape(call: str, name: str, array: Any, wanted: Sequence[int | str], why: str = "") -> None:
    """Raises ValueError unless `array` has the wanted shape; a str stands for any size and is printed."""
    given = tuple(array.shape)
    fits = len(given) == len(wanted) and all(
        isinstance(want, str) or want == got for want, got in zip(wanted, given, strict=True)
    )
    if not fits:
        reason = f": {why}" if why else ""
        raise ValueError(f"{call}: {name} is {_axes(given)}, wanted {_axes(wanted)}{reason}")


def dtype(call: str, name: str, array: Any, wanted: Sequence[str]) -> None:
    """Raises TypeError unless `array` is an array of one of the wanted dtypes."""
    if not hasattr(array, "dtype") or not hasattr(array, "shape"):
        raise TypeError(f"{call}: {name} is {type(array).__name__}, wanted an array of {_either(wanted)}")
    if array.dtype.name not in wanted:
        raise TypeError(f"{call}: {name} is {array.dtype.name}, wanted {_either(wanted)}")


def unsplit(call: str, **arguments: Any) -> None:
    """Raises ValueError for arrays whose type says that a mesh axis splits them, as under a mesh with Explicit axes."""
    for name, argument in arguments.items():
        for leaf in jax.tree.leaves(argument):
            axes = [axis for axis in jax.typeof(leaf).sharding.spec if axis is not None]
            if axes:
                raise ValueError(
                    f"{call}: {name} is split over the Explicit mesh axes {axes}, wanted the call inside "
                    "jax.shard_map, or a mesh whose axes are jax.sharding.AxisType.Auto"
                )


def value(condition: Array, message: str, **values: Array) -> None:
    """Under `checked` raises with `message` where `condition` is False; elsewhere costs nothing."""
    checkify.debug_check(jnp.all(condition), message, **values)


def _axes(axes: Sequence[int | str]) -> str:
    return f"[{', '.join(str(axis) for axis in axes)}]"


def _either(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} or {names[-1]}"
