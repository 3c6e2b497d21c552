"""A trained model with another selection put in: logits, and what each layer's indexer saw and chose."""

import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array, lax

import hisa_jax as hj
from bench import UserError
from bench.quality.variants import Variant
from hisa_jax import models
from hisa_jax.methods import flat_of
from hisa_jax.models.checkpoint import name_of
from hisa_jax.models.dsa import Attention, Projections, Table, absorb
from hisa_jax.models.layers import rms_norm
from hisa_jax.models.modeling import Layer
from hisa_jax.models.params import from_pretrained, parameter_table
from hisa_jax.models.rope import rope_table
from hisa_jax.models.safetensors_io import Reader
from hisa_jax.models.training.forward import dense, heads_of, layer_forward
from hisa_jax.models.training.weights import Skeleton, Stacked, weights_of
from hisa_jax.selection import selected_mask

_CHUNKS = 4  # of a CPU's queries: each sees the keys up to its end, so 3 of 8 products are saved
_LONG = 4096  # queries from which on that saves more than compiling takes
_TILE = 256  # queries whose logits stand in a CPU's memory
BYTES = Path(models.__file__).parent / "bytes"  # the trained model that comes along
INDEXERS = "hisa_aware"  # folder in a checkpoint's: indexers trained under the block filter, as `train` hands them on


class Seen(NamedTuple):
    """What one layer selects from and selects: q [B, T, H, D], k [B, T, D], w [B, T, H], indices [B, T, K]."""

    q: Array
    k: Array
    w: Array
    indices: Array


def load(folder: Path) -> Stacked:
    """The model of a checkpoint, float32 on a CPU, which is faster there, and bfloat16 elsewhere."""
    try:
        model = from_pretrained(folder)
        return Skeleton(model.config, dtype=_dtype()).stacked(weights_of(model))
    except (OSError, ValueError) as error:
        raise UserError(f"--checkpoint {folder}: {error}") from error


def load_hisa_aware(folder: Path) -> Stacked | None:
    """The same model with the indexers that were trained under the block filter, None if there are none."""
    trained = folder / INDEXERS
    if not trained.is_dir():
        return None
    try:
        model = from_pretrained(folder)
        weights = {name: np.array(x) for name, x in weights_of(model).items()}
        reader = Reader(trained, model.config.weight_block_size)
        for path, source in parameter_table(model.config).items():
            if "indexer" in path:
                key = source.keys[0]
                if key not in reader:
                    raise UserError(f"{trained}: {key} is missing")
                weights[f"layers.{name_of(path[2:])}"][path[1]] = source.layout(reader.tensor(key))
        return Skeleton(model.config, dtype=_dtype()).stacked({name: jnp.asarray(x) for name, x in weights.items()})
    except (OSError, ValueError) as error:
        raise UserError(f"{trained}: {error}") from error


def _dtype() -> str:
    return "float32" if jax.default_backend() == "cpu" else "bfloat16"


def logits_of(
    stacked: Stacked, tokens: np.ndarray, variant: Variant, after_layer: Callable[[Array], object] = lambda _: None
) -> Array:
    """uint8 [B, T] -> float32 [B, T, V]; `after_layer` is given what each layer makes."""
    for last, _ in _hidden(stacked, tokens, variant, see=False):
        after_layer(last)
    return logits_from(stacked, last)


def logits_from(stacked: Stacked, x: Array) -> Array:
    """Of what the last layer makes [B, T, E], float32 [B, T, V]."""
    head = stacked.embed.T if stacked.head is None else stacked.head
    return _logits(x, stacked.norm, head, stacked.config.rms_norm_eps)


def layers_of(stacked: Stacked, tokens: np.ndarray, variant: Variant) -> Iterator[Seen]:
    """What each layer saw and selected, one layer in memory at a time."""
    for _, seen in _hidden(stacked, tokens, variant, see=True):
        yield seen


def _hidden(stacked: Stacked, tokens: np.ndarray, variant: Variant, see: bool) -> Iterator[tuple[Array, Any]]:
    x = stacked.embed[jnp.asarray(tokens, jnp.int32)]
    table = rope_table(stacked.config, jnp.arange(tokens.shape[1], dtype=jnp.int32)[None, :])
    for at in range(stacked.config.num_hidden_layers):
        state = jax.tree.map(lambda leaf, at=at: leaf[at], stacked.layers)
        x, seen = _layer(stacked.graph, state, x, table, variant.at(at), see)
        yield x, seen


@functools.partial(jax.jit, static_argnums=(0, 4, 5))
def _layer(
    graph: nnx.GraphDef[Layer], state: nnx.State, x: Array, table: Table, variant: Variant, see: bool
) -> tuple[Array, Seen | None]:
    def attend(attention: Attention, x: Array, table: Table, made: Projections) -> tuple[Array, Seen | None]:
        if not see and variant.takes_all(x.shape[1]):
            return dense(attention, x, table, made)
        assert attention.indexer is not None  # `Skeleton` has checked that every layer has one
        q, w = attention.indexer.queries(made.q_latent, x, table)
        k = attention.indexer.keys(x, table)
        assert isinstance(k, Array)
        indices = _selected(variant, q, k, w)
        return attended(attention, made, indices), Seen(q, k, w, indices) if see else None

    return layer_forward(nnx.merge(graph, state), x, table, attend)


def _selected(variant: Variant, q: Array, k: Array, w: Array) -> Array:
    """[B, T, K] int32, the flat indexer's for the last `flat_last` queries."""
    T = q.shape[1]
    flat = dataclasses.replace(variant, method=flat_of(variant.method))
    first_flat = max(0, T - variant.flat_last)
    parts = []
    for first, end in _chunks(T):
        for of, start, stop in ((variant, first, min(end, first_flat)), (flat, max(first, first_flat), end)):
            if start < stop:
                # The queries are the last of these keys, so nothing needs saying of positions.
                parts.append(of.select(q[:, start:stop], k[:, :stop], w[:, start:stop]).indices)
    return jnp.concatenate(parts, axis=1)


def attended(attention: Attention, made: Projections, indices: Array) -> Array:
    """Heads' values [B, T, N, V] of the selected tokens."""
    config = attention.config
    k_b, v_b, scale, L = attention.k_b[...], attention.v_b[...], config.softmax_scale, config.kv_lora_rank
    if jax.default_backend() != "cpu":
        absorbed = absorb(made.q_nope, made.q_rope, k_b)
        out = hj.sparse_mla(absorbed, made.kv, indices, scale=scale, value_dim=L)
        assert isinstance(out, Array)  # no logsumexp was asked for
        return jnp.einsum("btnl,lnd->btnd", out, v_b)
    # A CPU gathers slowly and multiplies well: all heads' keys, and a mask of the selected ones.
    q, k, v = heads_of(attention, made)
    return jnp.concatenate([
        _masked(q[:, first:end], k[:, :end], v[:, :end], indices[:, first:end], scale)
        for first, end in _chunks(q.shape[1])
    ], axis=1)  # fmt: skip


def _masked(q: Array, k: Array, v: Array, indices: Array, scale: float) -> Array:
    (B, T, N, _), S = q.shape, k.shape[1]
    tile = min(_TILE, T)
    n = -(-T // tile)

    def cut(x: Array, fill: int) -> Array:
        pads = ((0, 0), (0, n * tile - T), *((0, 0),) * (x.ndim - 2))
        return jnp.pad(x, pads, constant_values=fill).reshape(B, n, tile, *x.shape[2:]).swapaxes(0, 1)

    def one(operands: tuple[Array, Array]) -> Array:
        q, indices = operands
        is_selected = selected_mask(indices, S)
        return jax.nn.dot_product_attention(q, k, v, mask=is_selected[:, None], scale=scale)

    out = lax.map(one, (cut(q, 0), cut(indices, 0)))
    return out.swapaxes(0, 1).reshape(B, n * tile, N, v.shape[-1])[:, :T]


def _chunks(T: int) -> list[tuple[int, int]]:
    n = _CHUNKS if jax.default_backend() == "cpu" and T >= _LONG else 1
    edges = [T * i // n for i in range(n + 1)]
    return list(itertools.pairwise(edges))


@functools.partial(jax.jit, static_argnums=3)
def _logits(x: Array, norm: Array, head: Array, eps: float) -> Array:
    return jnp.einsum("bte,ev->btv", rms_norm(x, norm, eps), head, preferred_element_type=jnp.float32)
