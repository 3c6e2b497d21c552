"""What attention remembers of the tokens before: one latent, one rope key and one index key a token and layer.

A token lies in the slot of its number in its sequence, whatever column of a padded batch it came in. So the selection,
which counts tokens from the start of the sequence, sees the same for a prompt alone, padded, or cut into chunks.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import DTypeLike

import hisa_jax as hj
from models.config import Config


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class LayerCache:
    """One layer's cache.

    Attributes:
        kv: [B, S, L + R], each token's latent after its norm, then its rotated rope key.
        index_key: [B, S, D] index keys after norm and RoPE, quantised if the config says so; None in layers that share
            the selection of another one.
    """

    kv: Array
    index_key: Array | hj.QuantizedKeys | None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Cache:
    """The caches of all layers: a value that goes into a forward pass and comes out of it with more tokens.

    Attributes:
        layers: one `LayerCache` a layer.
        lengths: [B] int32, tokens in each row.
    """

    layers: tuple[LayerCache, ...]
    lengths: Array

    @property
    def capacity(self) -> int:
        """Tokens each row has room for; those beyond are dropped."""
        return self.layers[0].kv.shape[1]


def empty_cache(config: Config, batch: int, capacity: int, dtype: DTypeLike) -> Cache:
    """A cache with room for `capacity` tokens in each of `batch` rows.

    Args:
        config: sizes, and the dtype of the index keys.
        batch: B.
        capacity: S.
        dtype: of latents, rope keys, and index keys that are not quantised.

    Returns: `Cache` of zeros with lengths 0.
    """
    shape = (batch, capacity, config.index_head_dim)

    def index_key() -> Array | hj.QuantizedKeys:
        if config.index_key_dtype is None:
            return jnp.zeros(shape, dtype)
        return hj.QuantizedKeys(jnp.zeros(shape, config.index_key_dtype), jnp.zeros(shape[:2], jnp.float32))

    kv_dim = config.kv_lora_rank + config.qk_rope_head_dim
    layers = tuple(
        LayerCache(kv=jnp.zeros((batch, capacity, kv_dim), dtype), index_key=index_key() if kind == "full" else None)
        for kind in config.indexer_kinds
    )
    return Cache(layers=layers, lengths=jnp.zeros((batch,), jnp.int32))


def write[Tree](cached: Tree, new: Tree, slots: Array) -> Tree:
    """Puts tokens into their slots.

    Args:
        cached: [B, S, ...], an array or a pytree of arrays.
        new: [B, T, ...].
        slots: [B, T] int32; tokens with -1 or a slot beyond S are dropped.

    Returns: what `cached` was, with the tokens in it.
    """

    def write_leaf(leaf: Array, values: Array) -> Array:
        targets = jnp.where(slots < 0, leaf.shape[1], slots)
        # Batched explicitly, so that rows that lie on different devices stay there.
        return jax.vmap(lambda row, at, value: row.at[at].set(value, mode="drop"))(leaf, targets, values)

    return jax.tree.map(write_leaf, cached, new)
