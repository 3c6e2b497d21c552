"""The small pieces all layers are made of: parameters with named axes, norms, the gated MLP."""

import functools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array
from jax.sharding import Mesh, NamedSharding
from jax.typing import DTypeLike

from hisa_jax.models.block_scaled import VALUE_DTYPE, BlockScaled, run_of
from hisa_jax.models.config import Config
from hisa_jax.models.sharding import Axes, sharding_of

# Standard deviation of random weights; published configs call it initializer_range.
_STD = 0.02


class Init:
    """Makes parameters, each one where it will lie.

    Args:
        rngs: stream "params".
        dtype: of weights that do not say theirs.
        mesh: what they are split over by the names of their axes, or None.
        block: numbers that share a scale, each way, where matrices are block-scaled float8_e4m3fn; None: they are not.
    """

    def __init__(self, rngs: nnx.Rngs, dtype: DTypeLike, mesh: Mesh | None, block: int | None = None):
        self.rngs, self.dtype, self.mesh, self.block = rngs, jnp.dtype(dtype), mesh, block

    def weight(self, shape: tuple[int, ...], axes: Axes, dtype: DTypeLike | None = None) -> nnx.Param:
        """A random parameter."""
        dtype = self.dtype if dtype is None else jnp.dtype(dtype)
        sharding = None if self.mesh is None else sharding_of(self.mesh, shape, axes)
        value = _normal(shape, dtype, sharding)(self.rngs.params())
        return _parameter(value, axes)

    def matrix(
        self, shape: tuple[int, ...], axes: Axes, runs: Sequence[int | Sequence[int]] | None = None
    ) -> nnx.Param:
        """A random parameter that checkpoints may have block-scaled.

        Args:
            runs: for each axis the sizes that lie together in the checkpoint's matrix, 1 for one that counts matrices
                or heads. Default: `shape`.
        """
        if self.block is None:
            return self.weight(shape, axes)
        n = [size // run_of(self.block, run) for size, run in zip(shape, runs or shape, strict=True)]
        shardings = [None if self.mesh is None else sharding_of(self.mesh, x, axes) for x in (shape, n)]
        values = _normal(shape, VALUE_DTYPE, shardings[0], 1.0)(self.rngs.params())
        scales = jnp.full(n, _STD, jnp.float32, device=shardings[1])
        return _parameter(BlockScaled(values=values, scales=scales, dtype=self.dtype), axes)

    def constant(self, shape: tuple[int, ...], value: float) -> nnx.Param:
        """A replicated float32 parameter: scale or bias of a norm or of the router."""
        axes = (None,) * len(shape)
        sharding = None if self.mesh is None else sharding_of(self.mesh, shape, axes)
        return _parameter(jnp.full(shape, value, jnp.float32, device=sharding), axes)


def _parameter(value: Array | BlockScaled, axes: Axes) -> nnx.Param:
    """Under a name of its own: what Flax calls `out_sharding` it reads as axes of whatever mesh `jax.set_mesh` set."""
    return nnx.Param(value, axes=tuple(axes))


@functools.lru_cache(maxsize=256)
def _normal(
    shape: tuple[int, ...], dtype: jnp.dtype, sharding: NamedSharding | None, std: float = _STD
) -> Callable[[Array], Array]:
    """A compiled function from key to weights; models have many weights of few shapes."""

    def draw(key: Array) -> Array:
        return (jax.random.normal(key, shape, jnp.float32) * std).astype(dtype)

    return jax.jit(draw, out_shardings=sharding)


def rms_norm(x: Array, scale: Array, eps: float) -> Array:
    """Divides x [B, T, E] by the root mean square of its last axis, in float32, and multiplies by scale [E]."""
    x32 = x.astype(jnp.float32)
    inverse = jax.lax.rsqrt(jnp.mean(x32 * x32, axis=-1, keepdims=True) + eps)
    return (x32 * inverse * scale[None, None, :]).astype(x.dtype)


def layer_norm(x: Array, scale: Array, bias: Array, eps: float) -> Array:
    """Brings the last axis of x [B, T, E] to mean 0 and variance 1, in float32, then to scale [E] and bias [E]."""
    x32 = x.astype(jnp.float32)
    centred = x32 - jnp.mean(x32, axis=-1, keepdims=True)
    inverse = jax.lax.rsqrt(jnp.mean(centred * centred, axis=-1, keepdims=True) + eps)
    return (centred * inverse * scale[None, None, :] + bias[None, None, :]).astype(x.dtype)


class Mlp(nnx.Module):
    """The SwiGLU MLP of dense layers and of shared experts, [B, T, E] -> [B, T, E]."""

    def __init__(self, config: Config, width: int, init: Init):
        E = config.hidden_size
        self.gate = init.matrix((E, width), (None, "ff"))
        self.up = init.matrix((E, width), (None, "ff"))
        self.down = init.matrix((width, E), ("ff", None))

    def __call__(self, x: Array) -> Array:
        return (jax.nn.silu(x @ self.gate[...]) * (x @ self.up[...])) @ self.down[...]
