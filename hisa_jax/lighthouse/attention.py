"""Lighthouse attention and its selection: the public functions, on one device or on a mesh.

q, k, v [T tokens] -> means -> entries that the selection has -> rotate -> dense causal attention -> spread
[B, T, ...]                    [B, S, ...], S < T / 3 at the paper's numbers                          [B, T, ...]
"""

from typing import Any

import jax.numpy as jnp
from jax import Array, lax
from jax.sharding import Mesh

from hisa_jax import checks, dispatch
from hisa_jax.lighthouse import dense, sharded
from hisa_jax.lighthouse.forward import Options, attend, strengths
from hisa_jax.lighthouse.method import DILATION, Lighthouse
from hisa_jax.lighthouse.rope import Rotation
from hisa_jax.lighthouse.selection import LighthouseSelection, select
from hisa_jax.sharded import meshes, varying
from hisa_jax.sharded.meshes import Axes

_DTYPES = ("bfloat16", "float32")


def lighthouse_select(
    q: Array,
    k: Array,
    method: Lighthouse,
    *,
    v: Array | None = None,
    mesh: Mesh | None = None,
    context_axis: str | None = None,
    data_axis: str | None = None,
    implementation: str = "auto",
) -> LighthouseSelection:
    """Selects the entries of the pyramid, one selection a sequence and key head.

    Args:
        q: [B, T, H, D] queries, bfloat16 or float32, as they are projected: normed ones all score alike.
        k: [B, T, G, D] keys, same dtype; H is a multiple of G. The score of queries is the best of a key head's group.
        method: `Lighthouse`; its windows and tiles divide T.
        v: [B, T, G, V] values, for scorer="dilated" alone, which then wants T to be a multiple of 4.
        mesh: run it on these devices, each sequence split over them in whole tiles; None: on one.
        context_axis: the mesh axis that splits T, in order.
        data_axis: the mesh axis that splits B; None: the whole batch on every device.
        implementation: that of the dilated scorer's attention, as for `lighthouse_attention`.

    Returns: `LighthouseSelection`, without gradient. Ties go to the lower entry; NaN scores below all.
    Raises: TypeError: other dtypes, a method that is none. ValueError: shapes that do not fit, a T that the method does
        not divide, an implementation that cannot run here, a mesh whose axes do not split the shapes.
    Source: Lighthouse Attention, arXiv 2605.06554.
    Example:
        >>> q, k = jnp.ones((1, 1024, 4, 32)), jnp.ones((1, 1024, 2, 32))
        >>> hj.lighthouse_select(q, k, hj.Lighthouse(topk=32, tile=16)).entries.shape
        (1, 335, 2)
    """
    call = "lighthouse_select"
    given: Any = dict(q=q, k=k, v=v)
    meshes.check_arrays(call, mesh, dict(context_axis=context_axis, data_axis=data_axis), **given)
    _check(call, q, k, v, method)
    if method.scorer == "dilated" and v is None:
        raise ValueError(f"{call}: v=None with scorer='dilated', wanted the values [B, T, G, V]")
    axes = _axes(call, mesh, context_axis, data_axis, q, method)
    if method.scorer == "norm" and implementation == "auto":
        implementation = "xla"  # nothing attends: what kernels want of the call is no matter
    options = _options(call, q, k if v is None else v, implementation)
    if q.shape[0] == 0:
        return _nothing(q, k, method)
    return _select(q, k, v, method, options, axes)


def lighthouse_attention(
    q: Array,
    k: Array,
    v: Array,
    method: Lighthouse,
    *,
    selection: LighthouseSelection | None = None,
    positions: Array | None = None,
    rope_theta: float | None = None,
    mesh: Mesh | None = None,
    context_axis: str | None = None,
    data_axis: str | None = None,
    implementation: str = "auto",
) -> Array:
    """Attends densely over the selected entries of a pyramid; each token gets its last complete window of each level.

    For training alone: the selection of a tile looks at all of its tokens, so a loss through this is no likelihood.
    Evaluate the same weights with dense or sparse attention.

    Args:
        q, k: as for `lighthouse_select`, not rotated if `rope_theta` is given. Logits are scaled by D ** -0.5.
        v: [B, T, G, V] values, same dtype.
        method: `Lighthouse`; its windows and tiles divide T.
        selection: of `lighthouse_select`, to keep one; None: that of q, k and v.
        positions: [B, T] int32 for the rotation. Default: 0 to T - 1.
        rope_theta: base of the rotary positions, of feature pairs (i, i + D / 2), applied as the method's `rope`
            says. None: no rotation here.
        mesh, context_axis, data_axis: as for `lighthouse_select`. Beside the attention, whose heads are distributed
            over the devices of `context_axis`, devices exchange a row a level and head. At most as many devices as key
            heads are busy in it.
        implementation: of the dense attention: "cudnn" on NVIDIA GPUs, "splash" on TPUs, "xla" anywhere; "auto": the
            first that can run here. `implementations` says why one cannot.

    Returns: [B, T, H, V] in q's dtype. Differentiable in q, k and v by reverse mode; the selection carries no
        gradient. With a mesh, by "xla" on CPUs, it and its gradients are those of one device bit for bit.
    Raises: as `lighthouse_select`.
    Source: Lighthouse Attention, arXiv 2605.06554.
    Example:
        >>> q, k = jnp.ones((1, 1024, 4, 32)), jnp.ones((1, 1024, 2, 32))
        >>> hj.lighthouse_attention(q, k, k, hj.Lighthouse(topk=32, tile=16), rope_theta=1e4).shape
        (1, 1024, 4, 32)
    """
    call = "lighthouse_attention"
    given: Any = dict(q=q, k=k, v=v, selection=selection, positions=positions)
    meshes.check_arrays(call, mesh, dict(context_axis=context_axis, data_axis=data_axis), **given)
    if v is None:
        raise TypeError(f"{call}: v is None, wanted an array [B, T, G, V]")
    _check(call, q, k, v, method)
    B, T, H, D = q.shape
    if rope_theta is not None:
        checks.finite(call, "rope_theta", rope_theta)
        if rope_theta <= 0 or D % 2:
            raise ValueError(f"{call}: rope_theta={rope_theta} with D = {D}, wanted a positive one and an even D")
    if positions is not None:
        checks.int32(call, "positions", positions, (B, T), f"one position a token (q is {checks.axes_of(q)})")
        if rope_theta is None:
            raise ValueError(f"{call}: positions with rope_theta=None, wanted rope_theta, which alone uses them")
    if selection is not None:
        _check_selection(call, selection, k, method)
    axes = _axes(call, mesh, context_axis, data_axis, q, method)
    options = _options(call, q, v, implementation)
    if B == 0:
        return jnp.zeros((B, T, H, v.shape[-1]), q.dtype)
    if positions is None:
        positions = jnp.broadcast_to(jnp.arange(T, dtype=jnp.int32)[None], (B, T))
    rotate = None if rope_theta is None else Rotation(float(rope_theta))
    if rotate is not None and method.rope == "before":
        q, k = (rotate(x[..., None, :], positions[..., None])[..., 0, :] for x in (q, k))
        rotate = None
    if selection is None:
        selection = _select(q, k, v, method, options, axes)
    run = attend if axes is None else sharded.attend_on(axes)
    return run(*varying.alike(q, k, v, selection, positions), method, options.rotated(rotate))


def implementations(q: Any, k: Any) -> dict[str, str | None]:
    """What `hisa_jax.implementations` answers for a `Lighthouse`; values have the size of keys."""
    call = "implementations"
    for name, x in (("q", q), ("k", k)):
        checks.dtype(call, name, x, _DTYPES, or_abstract=True)
        checks.shape(call, name, x, ("B", "T", "H" if name == "q" else "G", "D"))
    problem = dense.Problem(key_dim=q.shape[-1], value_dim=k.shape[-1], dtype=q.dtype.name)
    return dense.reasons(dispatch.Device.default(), problem)


def _select(
    q: Array, k: Array, v: Array | None, method: Lighthouse, options: Options, axes: Axes | None
) -> LighthouseSelection:
    arrays: tuple[Array, ...] = (q, k) if v is None or method.scorer == "norm" else (q, k, v)
    arrays = lax.stop_gradient(arrays)
    if axes is not None:
        return sharded.select_on(axes, arrays, method, options)
    arrays = varying.alike(*arrays)
    return select(*strengths(*arrays, method=method, options=options), method)


def _check(call: str, q: Array, k: Array, v: Array | None, method: Lighthouse) -> None:
    checks.instance(call, "method", method, Lighthouse, "a Lighthouse")
    checks.dtype(call, "q", q, _DTYPES)
    checks.dtype(call, "k", k, (q.dtype.name,))
    checks.shape(call, "q", q, ("B", "T", "H", "D"))
    B, T, H, D = q.shape
    checks.shape(call, "k", k, (B, T, "G", D), f"its axes but the heads must equal q's (q is {checks.axes_of(q)})")
    G = k.shape[2]
    if 0 in (H, D, G) or H % G:
        raise ValueError(
            f"{call}: q is {checks.axes_of(q)} and k is {checks.axes_of(k)}, wanted features, heads, and a number of "
            "query heads that is a multiple of that of key heads"
        )
    if v is not None:
        checks.dtype(call, "v", v, (q.dtype.name,))
        checks.shape(call, "v", v, (B, T, G, "V"), f"its first axes must equal k's (k is {checks.axes_of(k)})")
        if v.shape[-1] == 0:
            raise ValueError(f"{call}: v is {checks.axes_of(v)}, wanted at least one feature")
    method.check_tokens(call, "q's T", T)
    if method.scorer == "dilated" and T % DILATION:
        raise ValueError(f"{call}: q's T = {T}, wanted a multiple of {DILATION} for scorer='dilated'")


def _check_selection(call: str, selection: LighthouseSelection, k: Array, method: Lighthouse) -> None:
    checks.instance(call, "selection", selection, LighthouseSelection, "a LighthouseSelection")
    B, T, G, _ = k.shape
    S, P = method.n_entries(T), method.pyramid(T).n_windows
    for name, x, size, end in (("entries", selection.entries, S, P), ("slots", selection.slots, P, S)):
        checks.int32(call, f"selection.{name}", x, (B, size, G), f"of {method} and k {checks.axes_of(k)}")
        checks.value(
            (x >= -1) & (x < end),
            f"{call}: selection.{name} range from {{least}} to {{most}}, wanted -1 to {end - 1}",
            least=jnp.min(x, initial=-1),
            most=jnp.max(x, initial=-1),
        )


def _axes(
    call: str, mesh: Mesh | None, context: str | None, data: str | None, q: Array, method: Lighthouse
) -> Axes | None:
    if mesh is None:
        return None
    B, T = q.shape[:2]
    return meshes.batch_axes(call, mesh, context, data, "q's T", T, B, T // method.n_tiles)


def _options(call: str, q: Array, v: Array, implementation: str) -> Options:
    return Options(name=dense.choose(call, implementation, q, v), scale=q.shape[-1] ** -0.5)


def _nothing(q: Array, k: Array, method: Lighthouse) -> LighthouseSelection:
    (B, T), G = q.shape[:2], k.shape[2]
    empty = [jnp.zeros((B, size, G), jnp.int32) for size in (method.n_entries(T), method.pyramid(T).n_windows)]
    return LighthouseSelection(entries=empty[0], slots=empty[1])
