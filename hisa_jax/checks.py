"""Errors that name the call, the argument, what was given and what is wanted.

Checks of shapes and dtypes run at trace time and always. Checks of values (lengths, positions, offsets) cost run time:
they run only under `checked`.
"""

import contextlib
import functools
import threading
from collections.abc import Callable, Iterator, Sequence
from types import UnionType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.experimental import checkify
from jax.experimental.xla_metadata import set_xla_metadata

INT32 = 2**31 - 1  # the largest: positions, and what is reckoned with them, are int32
KEY_DTYPES = ("bfloat16", "float32", "float8_e4m3fn", "int8")


class _State(threading.local):
    """Whether this thread is inside of `checked`: JAX's metadata, which tell its caches so, are each thread's, too."""

    checks_values = False


_state = _State()


def checked[**P, R](function: Callable[P, R]) -> Callable[P, R]:
    """Wraps a function so that bad values in its calls to this library raise, for debugging.

    Without it, lengths beyond the keys, positions below -1 or offsets out of order select nothing there and are never
    read out of bounds, but nothing says so.

    Args:
        function: anything traceable that calls `select`, `select_packed`, `select_paged`, `sparse_mla`,
            `sparse_mla_paged`, `sparse_attention`, `sparse_attention_paged`, `lighthouse_attention`, `append`,
            `truncate` or `copy_pages`, jitted or not.

    Returns: a function of the same arguments that raises `jax.experimental.checkify.JaxRuntimeError`, which names the
        argument, and otherwise returns what `function` returns. It waits for the result; call it outside of jit. What
        `function` does in other threads is not checked.
    Raises: TypeError: what cannot be called.
    Example:
        >>> hj.checked(hj.select)(q, k, w, method, lengths=lengths)  # doctest: +SKIP
    """

    if not callable(function):
        raise TypeError(f"checked: function is {type(function).__name__}, wanted what can be called")

    @functools.wraps(function)
    def wrapper(*args: P.args, **kwargs: P.kwargs) -> R:
        before, _state.checks_values = _state.checks_values, True
        try:
            # What has been traced before has no checks; under other metadata jax.jit traces it again.
            with set_xla_metadata(hisa_jax="checked"):
                # Methods and other options are not arrays: close over everything, so that nothing has to be a pytree.
                error, result = checkify.checkify(lambda: function(*args, **kwargs), errors=checkify.user_checks)()
        finally:
            _state.checks_values = before
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
        raise ValueError(f"{call}: {name} is {axes_of(array)}, wanted {_axes(wanted)}{reason}")


def dtype(call: str, name: str, array: Any, wanted: Sequence[str], *, or_abstract: bool = False) -> None:
    """Raises TypeError unless `array` is an array of one of the wanted dtypes, or, if so asked, only describes one."""
    # What wraps an array, such as a parameter of Flax, is one; of NumPy's masked arrays JAX may forget the mask.
    is_array = isinstance(array, Array | np.ndarray | np.generic) or hasattr(array, "__jax_array__")
    is_array = is_array and hasattr(array, "dtype") and not isinstance(array, np.ma.MaskedArray)
    if not is_array and not (or_abstract and isinstance(array, jax.ShapeDtypeStruct)):
        # Not converted: under jit each number of a list is an operand of its own.
        how = f": jnp.array({name}, jnp.{wanted[0]})" if isinstance(array, list | tuple) and len(wanted) == 1 else ""
        raise TypeError(f"{call}: {name} is {type(array).__name__}, wanted an array of {_either(wanted)}{how}")
    given = array.dtype.name
    if not getattr(array.dtype, "isnative", True):
        given = f"{given} in another byte order than this machine's"
    if given not in wanted:
        # Kernels have no such products, and a copy that nobody asked for would be made at every call.
        how = ": float32 holds float16 exactly" if given == "float16" and "float32" in wanted else ""
        raise TypeError(f"{call}: {name} is {given}, wanted {_either(wanted)}{how}")


def int32(call: str, name: str, array: Any, wanted: Sequence[int | str], why: str = "") -> None:
    """Raises unless `array` is an int32 array of the wanted shape, as `shape` has it."""
    dtype(call, name, array, ("int32",))
    shape(call, name, array, wanted, why)


def offsets(
    call: str, name: str, array: Any, wanted: Sequence[int | str], end: int, why: str = "", n_groups: int = 1
) -> None:  # fmt: skip
    """Raises unless `array` is int32 offsets of the wanted shape; under `checked` they must ascend from 0 to `end`.

    Those of several groups stand one after the other, each group's from 0 to its part of `end`.
    """
    int32(call, name, array, wanted, why)
    each, most = jnp.asarray(array).reshape(n_groups, -1), end // n_groups
    value(
        (jnp.diff(each, prepend=0) >= 0) & (each <= most) & (each[:, :1] == 0),
        f"{call}: {name} is {{offsets}}, wanted ascending offsets from 0 to at most {most}"
        f"{' in each group' if n_groups > 1 else ''}",
        offsets=array,
    )


def instance(call: str, name: str, given: Any, kind: type | UnionType, wanted: str) -> None:
    """Raises TypeError unless `given` is of a class, which the message calls `wanted`."""
    if not isinstance(given, kind):
        raise TypeError(f"{call}: {name} is {type(given).__name__}, wanted {wanted}")


def integer(call: str, name: str, given: Any, least: int | None = None, most: int | None = INT32) -> None:
    """Raises TypeError unless `given` is an int that is known when tracing, ValueError if it is out of range."""
    if isinstance(given, bool) or not isinstance(given, int | np.integer):
        raise TypeError(f"{call}: {name} is {type(given).__name__}, wanted an int")
    if least is not None and given < least:
        raise ValueError(f"{call}: {name}={given}, wanted at least {least}")
    if most is not None and given > most:
        raise ValueError(f"{call}: {name}={given}, wanted at most {most}")


def finite(call: str, name: str, given: Any) -> None:
    """Raises TypeError unless `given` is a number that is known when tracing, ValueError if float32 has no such."""
    if isinstance(given, bool) or not isinstance(given, int | float | np.integer | np.floating):
        raise TypeError(f"{call}: {name} is {type(given).__name__}, wanted a number")
    magnitude: Any = abs(given)
    if not magnitude <= float(np.finfo(np.float32).max):
        shown = str(given) if isinstance(given, float | np.floating) else "an int"  # of any length
        raise ValueError(f"{call}: {name}={shown}, wanted a finite float32 number")


def flags(call: str, **given: Any) -> None:
    """Raises TypeError unless each is a bool that is known when tracing."""
    for name, flag in given.items():
        if isinstance(flag, jax.core.Tracer):
            raise TypeError(f"{call}: {name} is traced, wanted a bool, under jit by static_argnames")
        if not isinstance(flag, bool | np.bool_):
            raise TypeError(f"{call}: {name} is {type(flag).__name__}, wanted a bool")


def one_dtype(call: str, name: str, given: Any, wanted: Sequence[str]) -> np.dtype:
    """The dtype that an argument names. Raises TypeError unless it is one of the wanted."""
    try:
        named = np.dtype(given)
    except TypeError:
        raise TypeError(f"{call}: {name} is {given!r}, wanted one of {', '.join(wanted)}") from None
    if named.name not in wanted:
        raise TypeError(f"{call}: {name} is {named.name}, wanted one of {', '.join(wanted)}")
    return named


def unsplit(call: str, **arguments: Any) -> None:
    """Raises ValueError for arrays whose type says that a mesh axis splits them, as under a mesh with Explicit axes."""
    for name, argument in arguments.items():
        for leaf in filter(lambda leaf: isinstance(leaf, jax.Array), jax.tree.leaves(argument)):
            axes = [axis for axis in jax.typeof(leaf).sharding.spec if axis is not None]
            if axes:
                raise ValueError(
                    f"{call}: {name} is split over the Explicit mesh axes {axes}, wanted the call inside "
                    "jax.shard_map, or a mesh whose axes are jax.sharding.AxisType.Auto"
                )


def checks_values() -> bool:
    """Whether this is traced inside of `checked`, for conditions that are work to find."""
    return _state.checks_values


def value(condition: Array, message: str, **values: Array) -> None:
    """Under `checked` raises with `message` where `condition` is False; elsewhere costs nothing.

    Elsewhere it leaves no effect either, with which `jax.export` could not write a program to bytes.
    """
    if _state.checks_values:
        checkify.debug_check(jnp.all(condition), message, **values)


def axes_of(array: Any) -> str:
    return _axes(array.shape)


def _axes(axes: Sequence[int | str]) -> str:
    return f"[{', '.join(str(axis) for axis in axes)}]"


def _either(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} or {names[-1]}"


class MissingExtra(ModuleNotFoundError):
    """A package is not installed that an extra of this one brings."""


# Package -> the extra of pyproject.toml that brings it.
_EXTRAS = {
    "datasets": "evaluate", "flax": "models", "gguf": "lab", "jinja2": "models", "lm_eval": "evaluate",
    "matplotlib": "bench", "optax": "models", "orbax": "models", "prometheus_client": "serve", "rich": "bench",
    "safetensors": "models", "starlette": "serve", "tokenizers": "models", "uvicorn": "serve",
}  # fmt: skip


@contextlib.contextmanager
def optional_packages() -> Iterator[None]:
    """Makes the imports inside say what to install.

    Raises: MissingExtra: a package that an extra brings is missing.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if isinstance(error, MissingExtra) or package not in _EXTRAS:
            raise
        command = f"pip install 'hisa_jax[{_EXTRAS[package]}]'"
        raise MissingExtra(f"the package {package} is missing: {command}", name=error.name) from error
