"""What the public selections share: check, choose an implementation, prepare its arguments."""

from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax

from hisa_jax import checks, dispatch, varying, xla
from hisa_jax.keys import Keys
from hisa_jax.methods import BlockSparse, Dsa, Hisa, Method
from hisa_jax.quantize import QuantizedKeys


def keys_of(k: Array | QuantizedKeys) -> Keys:
    return Keys(k.values, k.scales) if isinstance(k, QuantizedKeys) else Keys(k, None)


def axes_of(array: Array) -> str:
    return f"[{', '.join(map(str, array.shape))}]"


def check_dtypes(call: str, q: Array, keys: Keys, w: Array) -> None:
    checks.dtype(call, "q", q, checks.KEY_DTYPES)
    checks.unsplit(call, q=q, k=keys, w=w)
    checks.dtype(call, "w", w, ("float32",))
    if keys.scales is None:
        checks.dtype(call, "k", keys.values, checks.KEY_DTYPES)
    else:
        checks.dtype(call, "k.values", keys.values, ("float8_e4m3fn", "int8"))
        checks.dtype(call, "k.scales", keys.scales, ("float32",))


def problem_of(q: Array, keys: Keys, method: Method) -> dispatch.Problem:
    H, D = q.shape[-2:]
    k_dtype, S, is_packed = keys.values.dtype.name, keys.values.shape[-2], q.ndim == 3
    return dispatch.Problem(H=H, D=D, S=S, q_dtype=q.dtype.name, k_dtype=k_dtype, method=method, is_packed=is_packed)


def choose(
    call: str,
    problem: dispatch.Problem,
    implementation: str,
    return_blocks: bool,
    tiles: xla.Tiles | None,
    *,
    needs: str = "select",
) -> str:
    """Checks what is no array and returns the name of the implementation to run, one that has the function `needs`."""
    method: Any = problem.method
    if not isinstance(method, Hisa | Dsa | BlockSparse):
        raise TypeError(f"{call}: method is {method!r}, wanted a Hisa, Dsa or BlockSparse")
    if return_blocks and isinstance(method, Dsa):
        raise ValueError(f"{call}: return_blocks=True with {method}: the flat indexer keeps no blocks")
    why_not = {
        name: f"it has no {needs}" if getattr(dispatch.IMPLEMENTATIONS[name], needs) is None else reason
        for name, reason in dispatch.reasons(dispatch.Device.default(), problem).items()
    }
    name = dispatch.choose(call, implementation, why_not)
    if tiles is not None and name != "xla":
        raise ValueError(f'{call}: tiles={tiles} with implementation="{name}", wanted implementation="xla"')
    return name


def default_tiles() -> xla.Tiles:
    return xla.Tiles.heuristic(dispatch.Device.default().platform)


def visible_tokens(positions: Array, lengths: Array) -> Array:
    """How many tokens each query sees: min(position + 1, length), 0 for padding, without overflow."""
    return jnp.maximum(jnp.minimum(positions, lengths - 1) + 1, 0)


def constants[*Trees](*trees: *Trees) -> tuple[*Trees]:
    """The operands of an implementation: it is handed arrays, all of which vary over the same mesh axes.

    The selection is piecewise constant: the gradient is cut here, where loops need not be differentiated.
    """
    return varying.alike(*jax.tree.map(lambda x: lax.stop_gradient(jnp.asarray(x)), trees))
