"""The language model in JAX, of one sequence: layers stacked along a first axis and run by one `lax.scan`.

SmolLM2 (arXiv 2502.02737) is of Llama's shape: RMSNorm, RoPE on interleaved pairs (as in GGUF files), grouped-query
attention, SwiGLU, the embedding read back as the head. What an attention does is the caller's: `run` hands it the
layer's normed input, queries, keys and values.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

KEPT = "kept"  # what a gradient does not make again
_CHUNK = 512  # queries at a time where scores of all keys are made


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """Sizes of a model: SmolLM2-135M's by default."""

    n_layers: int = 30
    width: int = 576
    n_heads: int = 9
    n_kv_heads: int = 3
    head_dim: int = 64
    ffn_width: int = 1536
    vocab: int = 49152
    theta: float = 1e5
    eps: float = 1e-5


class Layer(NamedTuple):
    """Weights of all layers, [L, in, out] or [L, width]."""

    norm: Array
    q: Array
    k: Array
    v: Array
    o: Array
    ffn_norm: Array
    gate: Array
    up: Array
    down: Array


class Weights(NamedTuple):
    """`embed` [V, E], also the head; `layers`; `norm` [E]."""

    embed: Array
    layers: Layer
    norm: Array


# (input, queries [T, N, d], keys [T, G, d], values [T, G, d], what is the layer's own) -> ([T, N, d], anything)
Attend = Callable[[Array, Array, Array, Array, Any], tuple[Array, Any]]


def random_weights(key: Array, config: Config, dtype: Any = jnp.float32) -> Weights:
    """Weights of a model that knows nothing, for tests."""
    c, shapes = config, layer_shapes(config)
    keys = iter(jax.random.split(key, 1 + len(shapes)))
    embed = jax.random.normal(next(keys), (c.vocab, c.width), dtype) * 0.02
    layers = {}
    for name, shape in shapes.items():
        drawn = jax.random.normal(next(keys), shape, dtype)
        layers[name] = 1 + 0.1 * drawn if len(shape) == 2 else drawn * shape[1] ** -0.5
    return Weights(embed, Layer(**layers), jnp.ones(c.width, dtype))


def layer_shapes(config: Config) -> dict[str, tuple[int, ...]]:
    """Shapes of `Layer`'s fields."""
    c = config
    L, E, F, N, G = c.n_layers, c.width, c.ffn_width, c.n_heads * c.head_dim, c.n_kv_heads * c.head_dim
    return {
        "norm": (L, E), "q": (L, E, N), "k": (L, E, G), "v": (L, E, G), "o": (L, N, E),
        "ffn_norm": (L, E), "gate": (L, E, F), "up": (L, E, F), "down": (L, F, E),
    }  # fmt: skip


def rms_norm(x: Array, weight: Array, eps: float) -> Array:
    """[t, E], [E] -> [t, E]."""
    x32 = x.astype(jnp.float32)
    return (x32 * lax.rsqrt(jnp.mean(x32 * x32, axis=-1, keepdims=True) + eps)).astype(x.dtype) * weight[None, :]


def rope_table(config: Config, positions: Array) -> tuple[Array, Array]:
    """[t] int32 -> cosines and sines [t, head_dim / 2]."""
    d = config.head_dim
    frequencies = config.theta ** (-jnp.arange(0, d, 2, dtype=jnp.float32) / d)
    angles = positions.astype(jnp.float32)[:, None] * frequencies[None, :]
    return jnp.cos(angles), jnp.sin(angles)


def rotate(x: Array, table: tuple[Array, Array]) -> Array:
    """[t, ..., head_dim], turned by pairs (2i, 2i + 1)."""
    cos, sin = (jnp.expand_dims(part, tuple(range(1, x.ndim - 1))) for part in table)
    a, b = x[..., 0::2].astype(jnp.float32), x[..., 1::2].astype(jnp.float32)
    return jnp.stack([a * cos - b * sin, a * sin + b * cos], axis=-1).reshape(x.shape).astype(x.dtype)


def run(
    weights: Weights, config: Config, tokens: Array, attend: Attend, own: Any = None, remat: bool = False
) -> tuple[Array, Any]:
    """Runs all layers over one sequence.

    Args:
        tokens: [T] int32.
        attend: the attention.
        own: a pytree with a first axis of layers, of which `attend` gets the layer's part.
        remat: whether a gradient runs each layer again and keeps its input alone, and what is named KEPT.

    Returns: [T, E] after the last norm, and what `attend` returned, stacked.
    """
    c, T = config, tokens.shape[0]
    table = rope_table(c, jnp.arange(T))

    def one(x: Array, of_layer: tuple[Layer, Any]) -> tuple[Array, Any]:
        layer, own = of_layer
        h = rms_norm(x, layer.norm, c.eps)
        q = rotate((h @ layer.q).reshape(T, c.n_heads, c.head_dim), table)
        k = rotate((h @ layer.k).reshape(T, c.n_kv_heads, c.head_dim), table)
        v = (h @ layer.v).reshape(T, c.n_kv_heads, c.head_dim)
        o, out = attend(h, q, k, v, own)
        x = x + o.reshape(T, -1) @ layer.o
        h = rms_norm(x, layer.ffn_norm, c.eps)
        return x + (jax.nn.silu(h @ layer.gate) * (h @ layer.up)) @ layer.down, out

    kept = jax.checkpoint_policies.save_only_these_names(KEPT)
    body = jax.checkpoint(one, policy=kept) if remat else one
    x, out = lax.scan(body, weights.embed[tokens], (weights.layers, own))
    return rms_norm(x, weights.norm, c.eps), out


def dense(h: Array, q: Array, k: Array, v: Array, own: Any) -> tuple[Array, None]:
    """Attention to all earlier tokens."""
    if jax.default_backend() == "gpu" and q.dtype == jnp.bfloat16:
        return jax.nn.dot_product_attention(q, k, v, is_causal=True, implementation="cudnn"), None
    T = q.shape[0]

    def some(rows: Array) -> Array:
        return masked(q[rows], k, v, jnp.arange(T)[None, :] <= rows[:, None])

    return chunked(some, T), None


def masked(q: Array, k: Array, v: Array, mask: Array) -> Array:
    """[t, N, d], [S, G, d], [S, G, d], [t, S] bool -> [t, N, d]."""
    return jax.nn.dot_product_attention(q, k, v, mask=mask[None])


def attention_mass(q: Array, k: Array, visible: Array) -> Array:
    """[t, N, d], [S, G, d], [t] int32 -> [t, S] float32: how much the heads look at each token, their mean."""
    (t, N, d), (S, G, _) = q.shape, k.shape
    logits = jnp.einsum("tgnd,sgd->tgns", q.reshape(t, G, N // G, d), k, preferred_element_type=jnp.float32)
    seen = jnp.arange(S)[None, :] < visible[:, None]
    logits = jnp.where(seen[:, None, None, :], logits * d**-0.5, -jnp.inf)
    return jnp.mean(jax.nn.softmax(logits, axis=-1), axis=(1, 2))


def chunked(some: Callable[[Array], Any], T: int, first: int = 0, chunk: int = _CHUNK) -> Any:
    """`some` of the rows [chunk] int32 from `first` to T, chunk after chunk, joined along the first axis."""
    chunk = min(chunk, T - first)
    if (T - first) % chunk:
        raise ValueError(f"chunked: {T - first} rows, wanted a multiple of {chunk}")
    rows = jnp.arange(first, T, dtype=jnp.int32).reshape(-1, chunk)
    return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), lax.map(some, rows))


def logits(weights: Weights, x: Array) -> Array:
    """[t, E] -> [t, V] float32."""
    return jnp.einsum("te,ve->tv", x, weights.embed, preferred_element_type=jnp.float32)
