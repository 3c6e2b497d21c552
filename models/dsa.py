"""DeepSeek Sparse Attention: multi-head latent attention over the tokens that an indexer selects.

Two forms of the attention compute the same. The expanded form makes every head's keys and values from the latents and
masks what is not selected: cheap while the context is a few times topk. The absorbed form moves the queries into the
latent space and reads the selected latents alone: decoding, and prefill of long contexts.
"""

import functools
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import scipy.linalg
from flax import nnx
from jax import Array, lax
from jax.sharding import Mesh

import hisa_jax as hj
from hisa_jax.models.cache import over_context, pack, packing, plain_latents, unpack, write
from hisa_jax.models.config import Config
from hisa_jax.models.layers import Init, layer_norm, rms_norm
from hisa_jax.models.memory import Memory, memory_of
from hisa_jax.models.rope import rotate
from hisa_jax.models.sharding import mesh_axis, per_device, size_of
from hisa_jax.selection import selected_mask

Form = Literal["auto", "expanded", "absorbed"]
# Queries of a pass from which a copy of all absorbed ones takes longer than padding the weights, 19 MB for V3.2.
_MANY = 512
Table = tuple[Array, Array]
IndexKeys = Array | hj.QuantizedKeys
IndexInputs = tuple[Array, IndexKeys, Array]


class Projections(NamedTuple):
    """What attention makes of hidden states: query latents [B, T, Q] (which the indexer shares), queries
    [B, T, N, P] and [B, T, N, R], latents with rope keys [B, T, L + R]."""

    q_latent: Array
    q_nope: Array
    q_rope: Array
    kv: Array


class Indexer(nnx.Module):
    """Makes what the selection is made of: index queries, index keys, head weights."""

    def __init__(self, config: Config, init: Init):
        E, H, D = config.hidden_size, config.index_n_heads, config.index_head_dim
        self.config = config
        self.q = init.matrix((config.q_lora_rank, H, D), (None, "index_heads", None), (config.q_lora_rank, 1, D))
        self.k = init.matrix((E, D), (None, None))
        self.k_norm = init.constant((D,), 1.0)
        self.k_norm_bias = init.constant((D,), 0.0)
        self.w = init.weight((E, H), (None, None), jnp.float32)

    def keys(self, x: Array, table: Table) -> IndexKeys:
        """Hidden states [B, T, E] -> index keys [B, T, D], quantised if the config says so."""
        k, config = self.plain_keys(x, table), self.config
        if config.index_key_dtype is None:
            return k
        return hj.quantize_keys(k, config.index_key_dtype, config.index_key_scale)

    def queries(self, q_latent: Array, x: Array, table: Table) -> tuple[Array, Array]:
        """Query latents [B, T, Q] and hidden states [B, T, E] -> q [B, T, H, D], w [B, T, H] float32; as `keys`."""
        (q, w), config = self.plain_queries(q_latent, x, table), self.config
        if config.index_key_dtype is None:
            return q, w
        return hj.quantize_queries(q, w, config.index_key_dtype, config.index_key_scale)

    def plain_keys(self, x: Array, table: Table) -> Array:
        """Index keys before they are quantised, which training differentiates."""
        k = layer_norm(x @ self.k[...], self.k_norm[...], self.k_norm_bias[...], self.config.index_norm_eps)
        return self._turn(k, table)

    def plain_queries(self, q_latent: Array, x: Array, table: Table) -> tuple[Array, Array]:
        """Index queries and head weights likewise."""
        config = self.config
        q = self._turn(jnp.einsum("btl,lhd->bthd", q_latent, self.q[...]), table)
        return q, x.astype(jnp.float32) @ self.w[...] * (config.index_n_heads * config.index_head_dim) ** -0.5

    def _turn(self, x: Array, table: Table) -> Array:
        """RoPE on the first dims, which MLA has last, then the Hadamard rotation."""
        R = self.config.qk_rope_head_dim
        rotated = rotate(x[..., :R], table, self.config.indexer_rope_interleave)
        x = jnp.concatenate([rotated, x[..., R:]], axis=-1)
        if not self.config.index_hadamard:
            return x
        D = x.shape[-1]
        return x @ jnp.asarray(scipy.linalg.hadamard(D) * D**-0.5, x.dtype)


class Attention(nnx.Module):
    """One layer's attention: MLA and, unless the layer shares another one's selection, its indexer."""

    def __init__(self, config: Config, layer: int, init: Init):
        E, N, L, R = config.hidden_size, config.num_attention_heads, config.kv_lora_rank, config.qk_rope_head_dim
        Q, P, V = config.q_lora_rank, config.qk_nope_head_dim, config.v_head_dim
        self.config = config
        self.q_a = init.matrix((E, Q), (None, "rank"))
        self.q_a_norm = init.constant((Q,), 1.0)
        self.q_b = init.matrix((Q, N, P + R), (None, "head_weights", None), (Q, 1, P + R))
        self.kv_a = init.matrix((E, L + R), (None, None))
        self.kv_a_norm = init.constant((L,), 1.0)
        # Keys and values of a head lie together in the checkpoint's matrix, and blocks go on from one to the other.
        self.k_b = init.matrix((L, N, P), (None, "head_weights", None), (L, 1, (P, V)))
        self.v_b = init.matrix((L, N, V), (None, "head_weights", None), (L, 1, (P, V)))
        self.o = init.matrix((N, V, E), ("head_weights", None, None), (1, V, E))
        is_full = config.indexer_kinds[layer] == "full"
        self.indexer = Indexer(config, init) if is_full else None

    def __call__(
        self, x: Array, *, table: Table, slots: Array, lengths: Array, pages: hj.IndexCache, block_tables: Array,
        method: hj.Method, selection: hj.Selection | None, form: Form, mesh: Mesh | None, stripe: int | None = None,
    ) -> tuple[Array, hj.IndexCache, hj.Selection, IndexInputs | None]:  # fmt: skip
        """Writes the new tokens to the cache, selects, and attends to what is selected.

        Args:
            x: [B, T, E] normed hidden states.
            table: cos and sin of the tokens' positions.
            slots: [B, T] int32, each token's number in its sequence, -1 for padding.
            lengths: [B] int32, tokens in each sequence, the new ones among them.
            pages: the layer's, before these tokens.
            block_tables: [B, P] int32, the pages of each sequence.
            method: how to select.
            selection: that of the last full layer, for layers that share it.
            form: see `choose_form`.
            mesh: what the model is split over, or None.
            stripe: tokens of a row one after the other that one device has, where several share its pages.

        Returns: output [B, T, E]; the pages with the new tokens; the selection; what these tokens brought to it, None
            if shared.
        """
        config = self.config
        q_latent, q_nope, q_rope, kv = self.project(x, table)
        keys = None if self.indexer is None else self.indexer.keys(x, table)
        pages = write(pages, keys, kv, block_tables, slots, lengths, mesh)
        inputs: IndexInputs | None = None
        memory = memory_of(config, Memory(pages, block_tables, mesh, stripe), slots.shape[1])
        if self.indexer is not None and keys is not None:
            index_q, index_w = self.indexer.queries(q_latent, x, table)
            inputs = index_q, keys, index_w
            selection = select(index_q, index_w, memory, slots, lengths, method)
        assert selection is not None  # Config has checked that layer 0 selects

        (_, T), S = slots.shape, block_tables.shape[1] * pages.page_size
        if form == "auto" and over_context(memory.mesh, 1):
            form = "absorbed"  # the other one would bring all latents of a request to every device
        elif form == "auto":
            form = choose_form(config, T, S, selection.indices.shape[-1])
        k_b, v_b, scale = self.k_b[...], self.v_b[...], config.softmax_scale
        if form == "absorbed":
            out = absorbed(q_nope, q_rope, memory, selection.indices, k_b, v_b, scale)
        else:
            latents = plain_latents(memory.pages, memory.block_tables, lengths, kv.dtype, memory.mesh)
            out = expanded(q_nope, q_rope, latents, selection.indices, k_b, v_b, scale)
        return self.merge_heads(out), pages, selection, inputs

    def project(self, x: Array, table: Table) -> Projections:
        """Normed hidden states [B, T, E] -> queries and latents of these tokens, RoPE applied."""
        config = self.config
        P, L = config.qk_nope_head_dim, config.kv_lora_rank
        q_latent = rms_norm(x @ self.q_a[...], self.q_a_norm[...], config.lora_norm_eps)
        q = jnp.einsum("btl,lnd->btnd", q_latent, self.q_b[...])
        q_nope, q_rope = q[..., :P], rotate(q[..., P:], table, config.rope_interleave)
        kv = x @ self.kv_a[...]
        latent = rms_norm(kv[..., :L], self.kv_a_norm[...], config.lora_norm_eps)
        kv = jnp.concatenate([latent, rotate(kv[..., L:], table, config.rope_interleave)], axis=-1)
        return Projections(q_latent, q_nope, q_rope, kv)

    def merge_heads(self, out: Array) -> Array:
        """Heads' values [B, T, N, V] -> [B, T, E]."""
        return jnp.einsum("btnv,nve->bte", out, self.o[...])


def select(
    q: Array, w: Array, memory: Memory, slots: Array, lengths: Array, method: hj.Method
) -> hj.Selection:  # fmt: skip
    """`hj.select_paged`, the one line that a method changes, on each device for its part of the batch.

    Args:
        q, w: index queries [B, T, H, D], head weights [B, T, H].
        memory: that holds the index keys.
        slots: [B, T] int32, each query's number in its sequence, -1 for padding.
        lengths: [B] int32, tokens in each sequence, the queries its last ones.
        method: how to select.

    Returns: the selection.
    """
    pages, block_tables, mesh, stripe = memory
    over = over_context(mesh, slots.shape[0]) | (dict(stripe=stripe) if over_context(mesh, 1) else {})
    if size_of(mesh, "model") > 1:
        # Ranks of tensor parallelism would all select the same: each takes a share of the queries.
        over |= dict(mesh=mesh, query_axis="model", data_axis=mesh_axis(mesh, "batch", slots.shape[0]))
    if over:
        cu_seqlens, q, w = pack(slots, (q, w), mesh)
        chosen = hj.select_paged(q, w, pages, block_tables, cu_seqlens, lengths, method, **over)
        return unpack(slots, chosen, mesh)

    def call(q: Array, w: Array, pages: hj.IndexCache, tables: Array, slots: Array, lengths: Array) -> hj.Selection:
        rows = packing(slots)
        selection = hj.select_paged(rows.pack(q), rows.pack(w), pages, tables, rows.cu_seqlens, lengths, method)
        return jax.tree.map(rows.unpack, selection)

    call = per_device(call, mesh, (("batch",),) * 6, ("batch",))
    return call(q, w, pages, block_tables, slots, lengths)


def choose_form(config: Config, T: int, S: int, topk: int) -> Form:
    """The form of attention with fewer multiplications a head.

    Args:
        config: dims of the heads.
        T: queries.
        S: tokens that the cache has room for.
        topk: tokens that each query attends to.

    Returns: "expanded" or "absorbed". For V3.2 prefill in chunks of 2048 changes over at a context of 6,100 tokens.
    """
    L, R, P, V = config.kv_lora_rank, config.qk_rope_head_dim, config.qk_nope_head_dim, config.v_head_dim
    expanded_cost = S * L * (P + V) + T * S * (P + R + V)
    absorbed_cost = T * L * (P + V) + T * min(topk, S) * (L + R + L)
    return "expanded" if expanded_cost < absorbed_cost else "absorbed"


def expanded(
    q_nope: Array,
    q_rope: Array,
    kv: Array,
    indices: Array,
    k_b: Array,
    v_b: Array,
    scale: float,
) -> Array:
    """Attention with every head's keys and values in full and a mask.

    Args:
        q_nope, q_rope: [B, T, N, P] and [B, T, N, R].
        kv: [B, S, L + R] cached latents and rope keys.
        indices: [B, T, K] int32, selected tokens, -1 where there is none.
        k_b, v_b: [L, N, P] and [L, N, V].
        scale: factor of the logits.

    Returns: [B, T, N, V], zeros where nothing is selected, NaN where a selected token's latent is not finite. Nothing
        of a token that a query does not select reaches its output.
    """
    L = k_b.shape[0]
    # What is not selected gets the weight 0, and 0 * NaN is NaN: such values stay out of the products.
    is_finite = jnp.all(jnp.isfinite(kv), axis=-1)
    kv = jnp.where(is_finite[..., None], kv, jnp.zeros((), kv.dtype))
    latent, k_rope = kv[..., :L], kv[..., L:]
    k_nope = jnp.einsum("bsl,lnd->bsnd", latent, k_b)
    v = jnp.einsum("bsl,lnd->bsnd", latent, v_b)
    sum32 = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)
    logits = sum32("btnd,bsnd->bnts", q_nope, k_nope) + sum32("btnd,bsd->bnts", q_rope, k_rope)
    logits = jnp.where(is_finite[:, None, None, :], logits, jnp.nan)
    is_selected = selected_mask(indices, kv.shape[1])[:, None, :, :]
    # Softmax over where it is selected; rows that select nothing get zeros, not NaN.
    p = jax.nn.softmax(jnp.where(is_selected, logits * scale, jnp.finfo(jnp.float32).min), axis=-1)
    p = jnp.where(is_selected, p, 0).astype(v.dtype)
    return jnp.einsum("bnts,bsnd->btnd", p, v)


def absorbed(
    q_nope: Array,
    q_rope: Array,
    memory: Memory,
    indices: Array,
    k_b: Array,
    v_b: Array,
    scale: float,
) -> Array:
    """Attention in the latent space, which all heads share, to latents where they lie.

    Args:
        q_nope, q_rope, indices, k_b, v_b, scale: as for `expanded`.
        memory: that holds the latents and rope keys.

    Returns: as `expanded`.
    """
    (L, N, _), q, heads = k_b.shape, absorb(q_nope, q_rope, k_b), ("batch", None, "heads")
    pages, block_tables, mesh, _ = memory

    def attend(q: Array, pages: hj.IndexCache, tables: Array, indices: Array, **over: Any) -> Array:
        # Padding selects nothing, so it counts as a query of its row: packing would move all heads' queries.
        B, T = indices.shape[:2]
        n_groups = 1 if over.get("data_axis") is None else size_of(mesh, over["data_axis"])
        starts = jnp.tile(jnp.arange(B // n_groups + 1, dtype=jnp.int32) * T, n_groups)
        flat, chosen = (x.reshape(B * T, *x.shape[2:]) for x in (q, indices))
        out = hj.sparse_mla_paged(flat, pages, chosen, tables, starts, value_dim=L, scale=scale, **over)
        assert isinstance(out, Array)  # no logsumexp was asked for
        return out.reshape(B, T, *out.shape[1:])

    if over := over_context(mesh, indices.shape[0]):
        head_axis = "model" if size_of(mesh, "model") > 1 and N % size_of(mesh, "model") == 0 else None
        out = attend(q, pages, block_tables, indices, head_axis=head_axis, **over)
    else:
        out = per_device(attend, mesh, (heads, *(("batch",),) * 3), heads)(q, pages, block_tables, indices)
    return jnp.einsum("btnl,lnd->btnd", out, v_b)


def absorb(q_nope: Array, q_rope: Array, k_b: Array) -> Array:
    """[B, T, N, P], [B, T, N, R], [L, N, P] -> [B, T, N, L + R], queries for latents instead of keys."""
    if q_nope.shape[0] * q_nope.shape[1] < _MANY:
        return absorbed_beside(q_nope, q_rope, k_b)
    return lax.platform_dependent(q_nope, q_rope, k_b, cuda=absorbed_in_place, default=absorbed_beside)


def absorbed_beside(q_nope: Array, q_rope: Array, k_b: Array) -> Array:
    """`absorb` by a product and a copy of it that has the rope parts beside it."""
    return jnp.concatenate([jnp.einsum("btnd,lnd->btnl", q_nope, k_b), q_rope], axis=-1)


def absorbed_in_place(q_nope: Array, q_rope: Array, k_b: Array) -> Array:
    """`absorb` by a product that leaves room for the rope parts: 147 KB a token and layer of V3.2 are moved once."""
    L = k_b.shape[0]
    wide = jnp.pad(k_b, ((0, q_rope.shape[-1]), (0, 0), (0, 0)))
    zero = jnp.int32(0)
    return lax.dynamic_update_slice(
        jnp.einsum("btnd,lnd->btnl", q_nope, wide), q_rope, (zero, zero, zero, jnp.int32(L))
    )
