"""What the public selections share behind their checks: choose an implementation, prepare its arguments."""

import jax
import jax.numpy as jnp
from jax import Array, lax

from hisa_jax import dispatch
from hisa_jax.check_select import check_options
from hisa_jax.layout import Keys
from hisa_jax.methods import Method
from hisa_jax.sharded import varying
from hisa_jax.xla import select


def problem_of(q: Array, keys: Keys, method: Method) -> dispatch.Problem:
    H, D = q.shape[-2:]
    k_dtype, S, is_packed = keys.values.dtype.name, keys.values.shape[-2], q.ndim == 3
    return dispatch.Problem(H=H, D=D, S=S, q_dtype=q.dtype.name, k_dtype=k_dtype, method=method, is_packed=is_packed)


def choose(
    call: str,
    problem: dispatch.Problem,
    implementation: str,
    tiles: select.Tiles | None,
    *,
    return_scores: bool,
    return_blocks: bool,
    needs: str = "select",
) -> str:
    """Checks what is no array and returns the name of the implementation to run, one that has the function `needs`."""
    check_options(call, problem.method, return_scores, return_blocks, tiles)
    why_not = {
        name: f"it has no {needs}" if getattr(dispatch.IMPLEMENTATIONS[name], needs) is None else reason
        for name, reason in dispatch.reasons(dispatch.Device.default(), problem).items()
    }
    name = dispatch.choose(call, implementation, why_not)
    if tiles is not None and name != "xla":
        raise ValueError(f'{call}: tiles={tiles} with implementation="{name}", wanted implementation="xla"')
    return name


def default_tiles() -> select.Tiles:
    return select.Tiles.heuristic(dispatch.Device.default().platform)


def visible_tokens(positions: Array, lengths: Array) -> Array:
    """How many tokens each query sees: min(position + 1, length), 0 for padding, without overflow."""
    return jnp.maximum(jnp.minimum(positions, lengths - 1) + 1, 0)


def constants[*Trees](*trees: *Trees) -> tuple[*Trees]:
    """The operands of an implementation: it is handed arrays, all of which vary over the same mesh axes.

    The selection is piecewise constant: the gradient is cut here, where loops need not be differentiated.
    """
    return varying.alike(*jax.tree.map(lambda x: lax.stop_gradient(jnp.asarray(x)), trees))
