"""Mixture of experts: a sigmoid router with limited groups, routed experts, shared experts."""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array, lax
from jax.sharding import Mesh

from hisa_jax.models.block_scaled import BlockScaled
from hisa_jax.models.config import Config
from hisa_jax.models.layers import Init, Mlp
from hisa_jax.models.sharding import mesh_axes, mesh_axis, per_device

Weights = Array | BlockScaled

# Keeps the division by the chosen experts' scores finite; the value of the published code.
_SUM_FLOOR = 1e-20
# Tokens up to which a TPU reads an expert's weights longer than it multiplies all tokens with them.
_FEW = 256


def route(logits: Array, bias: Array, config: Config) -> tuple[Array, Array]:
    """Chooses experts for each token, and their weights.

    Args:
        logits: [B, T, X] float32 router logits of X experts.
        bias: [X] float32, added to the scores for the choice alone.
        config: group and expert counts, scaling.

    Returns: experts [B, T, K] int32; weights [B, T, K] float32.
    Source: DeepSeek-V3, arXiv 2412.19437, section 2.1.2.
    """
    (B, T, X), groups = logits.shape, config.n_group
    scores = jax.nn.sigmoid(logits)
    biased = scores + bias[None, None, :]
    grouped = biased.reshape(B, T, groups, X // groups)
    group_scores = jnp.sum(lax.top_k(grouped, min(2, X // groups))[0], axis=-1)
    kept = lax.top_k(group_scores, config.topk_group)[1]
    is_kept = jnp.any(kept[..., None] == jnp.arange(groups)[None, None, None, :], axis=-2)  # [B, T, groups]
    # Not 0: a biased score may be below it.
    biased = jnp.where(is_kept[..., None], grouped, -jnp.inf).reshape(B, T, X)
    experts = lax.top_k(biased, config.num_experts_per_tok)[1]
    return experts, expert_weights(logits, experts, config)


def expert_weights(logits: Array, experts: Array, config: Config) -> Array:
    """[B, T, X] float32 router logits, [B, T, K] int32 experts -> [B, T, K] float32 weights, 0 for no expert (-1)."""
    is_one = (experts >= 0) & (experts < logits.shape[-1])
    chosen = jnp.take_along_axis(logits, jnp.where(is_one, experts, 0), axis=-1)
    weights = jnp.where(is_one, jax.nn.sigmoid(chosen), 0)
    if config.norm_topk_prob:
        weights = weights / (jnp.sum(weights, axis=-1, keepdims=True) + _SUM_FLOOR)
    return weights * config.routed_scaling_factor


def routed_experts(
    x: Array, experts: Array, weights: Array, gate: Weights, up: Weights, down: Weights, *, axes: Sequence[str] = (),
    batch_axis: str | None = None, are_routed: bool = False,
) -> Array:  # fmt: skip
    """Sum over each token's experts of weight times SwiGLU MLP.

    Args:
        x: [B, T, E].
        experts: [B, T, K] int32, numbered over all devices; what is no expert's number adds nothing.
        weights: [B, T, K] float32.
        gate, up: [X, E, F] weights of the experts here.
        down: [X, F, E].
        axes: mesh axes that the experts are split over, inside of shard_map; none if all are here.
        batch_axis: the one of them that also splits B: its devices bring their tokens together and share the sums out.
        are_routed: whether the router chose them, so that each is an expert's number, and none is there twice.

    Returns: [B, T, E] in x's dtype.
    """
    if not axes:
        wide = gate[...], up[...], down[...]
        return _by_sorted_pairs(x, experts, weights, *wide, None, are_routed).astype(x.dtype)
    rows = x, experts, weights
    if batch_axis is not None:
        rows = jax.tree.map(lambda x: lax.all_gather(x, batch_axis, axis=0, tiled=True), rows)
    first = lax.axis_index(axes) * gate.shape[0]
    if rows[0].shape[0] * rows[0].shape[1] <= _FEW:
        total = _by_expert(*rows, gate, up, down, first)
    else:
        total = _by_sorted_pairs(*rows, gate[...], up[...], down[...], first, are_routed)
    if batch_axis is not None:
        total = lax.psum_scatter(total, batch_axis, scatter_dimension=0, tiled=True)
    if others := tuple(axis for axis in axes if axis != batch_axis):
        total = lax.psum(total, others)
    return total.astype(x.dtype)


def _by_expert(
    x: Array, experts: Array, weights: Array, gate: Weights, up: Weights, down: Weights, first: Array
) -> Array:  # fmt: skip
    """[B, T, E] float32: every expert here takes all tokens, which costs less than to read its weights."""

    def add(total: Array, one: tuple[Array, Weights, Weights, Weights]) -> tuple[Array, None]:
        # One after the other, so that of 8-bit weights a matrix at a time is made wide.
        number, gate, up, down = one[0], *(weight[...] for weight in one[1:])
        is_chosen = experts == number
        weight = jnp.sum(jnp.where(is_chosen, weights, 0), axis=-1)
        out = ((jax.nn.silu(x @ gate) * (x @ up)) @ down).astype(jnp.float32)
        # What is not finite stays with the tokens that chose the expert.
        own = jnp.where(jnp.any(is_chosen, axis=-1)[..., None], out * weight[..., None], 0)
        return total + own, None

    n = gate.shape[0]
    numbers = first + jnp.arange(n, dtype=experts.dtype)
    return lax.scan(add, jnp.zeros(x.shape, jnp.float32), (numbers, gate, up, down), unroll=n == 1)[0]


def _by_sorted_pairs(
    x: Array, experts: Array, weights: Array, gate: Array, up: Array, down: Array, first: Array | None,
    are_routed: bool,
) -> Array:  # fmt: skip
    """[B, T, E] float32: each expert here, numbered from `first`, takes its tokens; None: all experts are here."""
    (B, T, E), K, X = x.shape, experts.shape[-1], gate.shape[0]
    local = experts.reshape(-1) - (0 if first is None else first)
    is_here = (local >= 0) & (local < X)
    # Pairs of token and expert, sorted by expert, those of other devices last, of which as many as can be here.
    n_pairs = B * T * (min(K, X) if are_routed else K)
    order = jnp.argsort(jnp.where(is_here, local, X))[:n_pairs]
    sizes = jnp.sum(local[None, :] == jnp.arange(X)[:, None], axis=1, dtype=jnp.int32)
    tokens = order // K
    rows = x.reshape(B * T, E)[tokens]
    if first is not None or not are_routed:
        # What the products below make of the others is unspecified, and so is their gradient: it must end here.
        rows = jnp.where((jnp.arange(order.shape[0]) < jnp.sum(sizes))[:, None], rows, 0)
    hidden = jax.nn.silu(lax.ragged_dot(rows, gate, sizes)) * lax.ragged_dot(rows, up, sizes)
    out = lax.ragged_dot(hidden, down, sizes).astype(jnp.float32)
    # Back to the tokens by a gather, whose sums have one order; those of a scatter have none on a GPU.
    places = jnp.zeros((B * T * K,), order.dtype)
    places = places.at[order].set(jnp.arange(n_pairs, dtype=order.dtype), unique_indices=True).reshape(B, T, K)
    is_here = is_here.reshape(B, T, K)
    # Rows beyond the sizes are unspecified, so they are replaced, not scaled.
    if first is None:
        return jnp.sum(jnp.where(is_here[..., None], out[places], 0) * weights[..., None], axis=2)
    # Few of a token's experts are here, so all of them together would be mostly zeros.
    total = jnp.zeros((B, T, E), jnp.float32)
    for k in range(K):
        total += jnp.where(is_here[..., k, None], out[places[..., k]], 0) * weights[..., k, None]
    return total


class Moe(nnx.Module):
    """Router, routed and shared experts, [B, T, E] -> [B, T, E]."""

    def __init__(self, config: Config, init: Init):
        E, F, X = config.hidden_size, config.moe_intermediate_size, config.n_routed_experts
        self.config = config
        self.router = init.weight((E, X), (None, None), jnp.float32)
        self.router_bias = init.constant((X,), 0.0)
        self.gate = init.matrix((X, E, F), ("experts", None, None), (1, E, F))
        self.up = init.matrix((X, E, F), ("experts", None, None), (1, E, F))
        self.down = init.matrix((X, F, E), ("experts", None, None), (1, F, E))
        self.shared = Mlp(config, F * config.n_shared_experts, init)

    def __call__(self, x: Array, mesh: Mesh | None = None, experts: Array | None = None) -> tuple[Array, Array, Array]:
        """Returns the output and each token's experts and their weights, [B, T, K]; `experts` are taken if given."""
        is_own = experts is None
        if experts is None:
            experts, weights = self.choose(x)
        else:
            weights = expert_weights(self._logits(x), experts, self.config)
        tokens, split = ("batch", None, None), ("experts", None, None)
        axes = mesh_axes(mesh, "experts", self.config.n_routed_experts)
        batch_axis = mesh_axis(mesh, "batch", x.shape[0])
        own = functools.partial(
            routed_experts, axes=axes, batch_axis=batch_axis if batch_axis in axes else None, are_routed=is_own
        )
        apply = per_device(own, mesh, (tokens, tokens, tokens, split, split, split), tokens)
        out = apply(x, experts, weights, *(weight.get_value() for weight in (self.gate, self.up, self.down)))
        return out + self.shared(x), experts, weights

    def choose(self, x: Array) -> tuple[Array, Array]:
        """What `route` chooses for [B, T, E]."""
        return route(self._logits(x), self.router_bias[...], self.config)

    def _logits(self, x: Array) -> Array:
        return x.astype(jnp.float32) @ self.router[...]
