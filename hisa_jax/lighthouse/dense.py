"""The dense causal attention in the middle, by maintained libraries; which runs, and why the others do not."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax

from hisa_jax import dispatch
from hisa_jax.lighthouse import sums
from hisa_jax.xla.causal import causal_attention

_ROWS = 128  # sub-sequences are made a multiple of it for kernels
_SPLASH_TILES = (1024, 512, 256, 128)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Problem:
    """What the choice depends on of the call: sizes of key and value, dtype."""

    key_dim: int
    value_dim: int
    dtype: str


def reasons(device: dispatch.Device, problem: Problem) -> dict[str, str | None]:
    """Why each implementation cannot run, None for those that can, in the order of preference."""
    return {"cudnn": _no_cudnn(device, problem), "splash": _no_splash(device, problem), "xla": None}


def _no_cudnn(device: dispatch.Device, problem: Problem) -> str | None:
    if not device.compute_capability:
        return f"needs an NVIDIA GPU, this device is {device.kind!r}"
    if float(device.compute_capability) < 8:
        return f"needs compute capability 8.0, this device is {device.kind!r}"
    most = 256 if float(device.compute_capability) >= 9 else 128
    if problem.dtype != "bfloat16":
        return f"needs bfloat16, not {problem.dtype}"
    if problem.key_dim != problem.value_dim:
        return f"needs keys and values of one size, not {problem.key_dim} and {problem.value_dim}"
    if problem.key_dim % 8 or problem.key_dim > most:
        return f"needs heads of a multiple of 8 up to {most} features, not {problem.key_dim}"
    return None


def _no_splash(device: dispatch.Device, problem: Problem) -> str | None:
    if device.platform != "tpu":
        return f"needs a TPU, this device is {device.kind!r}"
    if problem.key_dim != problem.value_dim or problem.key_dim % 128:
        return f"needs keys and values of one multiple of 128 features, not {problem.key_dim} and {problem.value_dim}"
    return None


def choose(call: str, implementation: str, q: Array, v: Array) -> str:
    """The name of the implementation that attends here; raises as `dispatch.choose`."""
    problem = Problem(key_dim=q.shape[-1], value_dim=v.shape[-1], dtype=q.dtype.name)
    return dispatch.choose(call, implementation, reasons(dispatch.Device.default(), problem))


def rows(name: str) -> int:
    """What the length of a sub-sequence must be a multiple of; places at its end may be empty."""
    return 1 if name == "xla" else _ROWS


def attention(name: str, scale: float) -> Callable[[Array, Array, Array], Array]:
    """Causal attention of [B, S, H, D], [B, S, G, D] and [B, S, G, V] -> [B, S, H, V], differentiable."""

    def run(q: Array, k: Array, v: Array) -> Array:
        if name == "cudnn":
            return jax.nn.dot_product_attention(q, k, v, scale=scale, is_causal=True, implementation="cudnn")
        if name == "splash":
            return splash(q, k, v, scale)
        if sums.is_in_one_order():
            return _in_turn(q, k, v, scale)
        return causal_attention(q, k, v, scale)

    return run


def _in_turn(q: Array, k: Array, v: Array, scale: float) -> Array:
    """One sequence and key head at a time: products of one shape, however many of them a device of a mesh has."""
    (B, S, H, _), G = q.shape, k.shape[2]

    def split(x: Array) -> Array:
        """[B, S, heads, E] -> [B * G, 1, S, heads / G, E]."""
        return x.reshape(B, S, G, -1, x.shape[-1]).swapaxes(1, 2).reshape(B * G, 1, S, -1, x.shape[-1])

    def one(each: tuple[Array, Array, Array]) -> Array:
        q, k, v = each
        return causal_attention(q, k, v, scale)

    out = lax.map(one, (split(q), split(k), split(v)))
    return out.reshape(B, G, S, H // G, -1).swapaxes(1, 2).reshape(B, S, H, -1)


def splash(q: Array, k: Array, v: Array, scale: float, interpret: bool = False) -> Array:
    """Splash attention, JAX's own for TPUs; sequences are a multiple of 128."""
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel, splash_attention_mask

    S, H = q.shape[1:3]
    tile = next(size for size in _SPLASH_TILES if S % size == 0)
    names = [field.name for field in dataclasses.fields(splash_attention_kernel.BlockSizes) if "block" in field.name]
    sizes: Any = dict.fromkeys((name for name in names if name != "use_fused_bwd_kernel"), tile)
    # Made while tracing, from NumPy alone.
    with jax.ensure_compile_time_eval():
        kernel = splash_attention_kernel.make_splash_mha(
            splash_attention_mask.MultiHeadMask([splash_attention_mask.CausalMask((S, S))] * H),
            block_sizes=splash_attention_kernel.BlockSizes(**sizes), head_shards=1, q_seq_shards=1, interpret=interpret,
        )  # fmt: skip
    q, k, v = (x.swapaxes(1, 2) for x in ((q.astype(jnp.float32) * scale).astype(q.dtype), k, v))
    return jax.vmap(kernel)(q, k, v).swapaxes(1, 2)
