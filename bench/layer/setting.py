"""What `python -m bench layer` measures: a layer's random weights, a filled cache, and hidden states of new tokens."""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

import hisa_jax as hj
from hisa_jax.models import published
from hisa_jax.models.cache import kept_for
from hisa_jax.models.config import Config
from hisa_jax.models.dsa import Attention, Table
from hisa_jax.models.layers import Init
from hisa_jax.models.methods import make_method
from hisa_jax.models.rope import rope_table

MODELS = {"dsv32": published.dsv32, "glm5": published.glm5}
BF16 = jnp.bfloat16
PAGE = 64


@dataclasses.dataclass(frozen=True, kw_only=True)
class Setting:
    """B sequences of `context` tokens, of which the last T are new.

    Attributes:
        model: its name; `config`: its sizes, index keys in 8 bits.
    """

    model: str
    config: Config
    B: int
    T: int
    context: int

    @property
    def phase(self) -> str:
        return "decode" if self.T == 1 else "prefill"


class Inputs(NamedTuple):
    """Arrays of a call: state of the layer, x [B, T, E], and what `Attention` takes besides them."""

    state: Any
    x: Array
    table: Table
    slots: Array
    lengths: Array
    block_tables: Array


def served(config: Config, *, latents_in_8_bits: bool = False) -> Config:
    """As servers run it: index keys in e4m3, after the rotation that spreads outliers."""
    latent_dtype: Any = "float8_e4m3fn" if latents_in_8_bits else None
    return dataclasses.replace(
        config, index_key_dtype="float8_e4m3fn", index_hadamard=True, latent_dtype=latent_dtype
    )  # fmt: skip


def make(setting: Setting) -> tuple[nnx.GraphDef, Inputs, hj.IndexCache]:
    """The layer, the arrays of a call, and the pages of all tokens but the new ones, in random order."""
    config, B, T, S = setting.config, setting.B, setting.T, setting.context
    graph, state = nnx.split(Attention(config, 0, Init(nnx.Rngs(params=0), BF16, None)))
    n_pages = B * S // PAGE
    draws = jax.random.split(jax.random.key(1), 4)
    tables = jax.random.permutation(draws[0], n_pages).astype(jnp.int32).reshape(B, -1)
    slots = jnp.broadcast_to(jnp.arange(S - T, S, dtype=jnp.int32), (B, T))
    L = config.kv_lora_rank + config.qk_rope_head_dim
    inputs = Inputs(
        state=state,
        x=jax.random.normal(draws[1], (B, T, config.hidden_size), BF16),
        table=rope_table(config, slots),
        slots=slots,
        lengths=jnp.full((B,), S, jnp.int32),
        block_tables=tables,
    )

    block_size = kept_for([make_method("hisa", config)]).block_size

    @jax.jit  # one program, so that keys need not exist in more than 8 bits
    def pages() -> hj.IndexCache:
        keys = jax.random.normal(draws[2], (n_pages, PAGE, config.index_head_dim), BF16)
        latents: Any = jax.random.normal(draws[3], (n_pages, PAGE, L), BF16)
        if config.latent_dtype is not None:
            latents = hj.quantize_latents(latents, config.kv_lora_rank)
        dtype = config.index_key_dtype
        index_keys = keys if dtype is None else hj.quantize_keys(keys, dtype, config.index_key_scale)
        return hj.IndexCache.from_pages(index_keys, tables, inputs.lengths - T, latents=latents, block_size=block_size)

    return graph, inputs, pages()
