"""MaxText: an indexer of this library in the place of `maxtext.layers.attention_mla.Indexer`.

    install(hj.Hisa(topk=2048))        # before the model is made; install(None) puts theirs back

Projections, weights and cache are MaxText's, and so is what comes out: a mask, indices, scores. Only the choice is made
here. A row of MaxText's batch may hold several sequences one after the other (packed training) or tokens with gaps
between them (the caches of prefill and decoding). Its mask says what a query sees: tokens in a row of one sequence.

    row            a a a a b b b . .     two sequences and padding; a query of b sees the b's up to its own
    select, 1st    a a a a               a sequence at a time, from its own start: there its blocks begin
    select, 2nd            b b b

Keys come whole at every call, so block means are made anew each time. That reads every key once, as the flat indexer
does: HISA then saves products and most of the top-k, not reading. The scores are for MaxText's own loss. They are made
by all heads for all tokens, as MaxText makes them; under jit they cost nothing where nothing uses them, as in inference
and with indexer_loss_scaling_factor = 0.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.sharding import Mesh, PartitionSpec

import hisa_jax as hj
from hisa_jax import checks
from hisa_jax.check_select import check_method
from hisa_jax.selection import selected_mask
from hisa_jax.sharded import varying

_theirs: list[type] = []  # MaxText's own class, while another one has its place


def install(
    method: hj.Method | None,
    *,
    mesh: Mesh | None = None,
    batch_axes: tuple[str, ...] = (),
    implementation: str = "auto",
) -> None:
    """Makes the MLA layers of the models that MaxText makes from now on choose tokens by a method.

    Args:
        method: whose topk is MaxText's `indexer_topk`; None: MaxText's own indexer again.
        mesh, batch_axes, implementation: as for `indexer_class`.

    Raises: as `indexer_class`.
    """
    theirs = _their_class()
    options: Any = dict(mesh=mesh, batch_axes=batch_axes, implementation=implementation)
    chosen = theirs if method is None else indexer_class(method, **options)
    _theirs[:] = [theirs]
    _attention_mla().Indexer = chosen


def indexer_class(
    method: hj.Method,
    *,
    mesh: Mesh | None = None,
    batch_axes: tuple[str, ...] = (),
    implementation: str = "auto",
) -> type:
    """MaxText's `Indexer`, but for the choice.

    Args:
        method: `Dsa`, `Hisa`, `Scan` or `BlockSparse`. By `Dsa` the mask is that of MaxText with
            `indexer_mask_exact_topk`: to rounding in float32; in bfloat16 MaxText rounds what heads score, which is
            exact here, so tokens near the threshold differ.
        mesh, batch_axes: a mesh, and its axes that split the batch, each device choosing for its rows; MaxText's are
            "data" and "fsdp", for instance. None: all rows are chosen for by one program.
        implementation: as for `select`.

    Returns: a subclass of `Indexer`. A call gives the mask [b, t, s], 0 for what is chosen; indices [b, t, topk] int32,
        ascending columns of the mask, then -1; scores [b, t, s] float32. Where s is at most topk it gives what
        MaxText's does, the attention's own mask as mask and scores, and None for indices.
    Raises: TypeError: another method. ValueError: a mesh without axes of it that split the batch, or axes without a
        mesh. ModuleNotFoundError: no MaxText. Its __init__ raises ValueError: another `indexer_topk` than the method's,
        `indexer_use_approx_top_k`, tokens out of order by load-balanced context parallelism.
    Source: written for MaxText 0.2.5.
    """
    check_method("integrations.maxtext", method)
    batch_axes = tuple(batch_axes)
    known = () if mesh is None else mesh.axis_names
    if (mesh is not None and not batch_axes) or not set(batch_axes) <= set(known):
        raise ValueError(f"integrations.maxtext: batch_axes={batch_axes}, wanted axes of the mesh, which has {known}")
    return _made(method, mesh, batch_axes, implementation)


@functools.cache
def _made(method: hj.Method, mesh: Mesh | None, batch_axes: tuple[str, ...], implementation: str) -> type:
    """One class for one choice: what MaxText compiles is compiled once."""
    select: Any = functools.partial(_select, method=method, implementation=implementation)
    if mesh is not None:
        rows = PartitionSpec(batch_axes)
        select = jax.shard_map(select, mesh=mesh, in_specs=rows, out_specs=rows)

    class Indexer(_their_class()):  # type: ignore[misc]  # a class that is made when it is asked for
        """MaxText's, with the choice by a method of hisa_jax."""

        def __init__(self, config: Any, *args: Any, **options: Any):
            _check_config(config, method)
            super().__init__(config, *args, **options)

        def __call__(
            self,
            inputs_q: Array,
            low_rank_q: Array,
            inputs_kv: Array,
            inputs_positions: Array | None = None,
            attention_mask: Array | None = None,
            decoder_segment_ids: Array | None = None,
            previous_chunk: Any = None,
            kv_cache: Any = None,
            model_mode: str = "train",
        ) -> tuple[Array | None, Array | None, Array | None]:
            config = self.config
            # The indexer learns from its own loss alone, and teaches the rest of the model nothing.
            inputs_q, low_rank_q, inputs_kv = map(lax.stop_gradient, (inputs_q, low_rank_q, inputs_kv))
            q = self.apply_partial_rope(self.wq_b(low_rank_q), inputs_positions)
            k = self.k_norm(self.wk(inputs_kv))[:, :, None, :]
            k = self.apply_partial_rope(k, inputs_positions)[:, :, 0, :]
            segments = None  # of the cache's columns; not above 0 where there is no token
            if model_mode != "train":
                cached, segments = self.update_indexer_cache(
                    kv_cache, k, decoder_segment_ids, model_mode, previous_chunk
                )
                k = k if cached is None else cached
            (B, T, H, D), S = q.shape, k.shape[1]
            if method.topk >= S:
                return attention_mask, None, attention_mask
            w = self.weights_proj(inputs_q).astype(jnp.float32) * (H * D) ** -0.5

            mask = jnp.zeros((B, T, S), jnp.float32)
            if segments is not None:
                mask += jnp.where(segments > 0, 0.0, _masked())[:, None, :]
            if attention_mask is not None:
                mask += attention_mask
            is_seen = mask >= _masked() / 2
            # Keys are chosen by as they would be cached, in the activations' dtype, whatever LayerNorm computes in.
            keys = k.astype(q.dtype)
            columns = None if segments is None else jnp.argsort(segments <= 0, axis=1, stable=True)
            indices = select(*map(lax.stop_gradient, (q, keys, w)), _seen_of(is_seen, columns), columns)

            is_chosen = selected_mask(indices, S) & is_seen
            chosen_mask = jnp.where(is_chosen, 0.0, _masked()).astype(self.dtype)
            chunk = getattr(config, "mla_qk_head_chunk_size", 0) or H
            return chosen_mask, indices, _scores(q, k, w, chunk, config.matmul_precision) + mask

    return Indexer


class Seen(NamedTuple):
    """What queries see of the tokens that a row has, counted from its first one.

    Attributes: `first` [b, t] int32, the first token of the query's sequence; `visible` [b, t] int32, how many there
        are of it and those after it; `order` [b, t] int32, which of the row's sequences that is.
    """

    first: Array
    visible: Array
    order: Array


def _seen_of(is_seen: Array, columns: Array | None) -> Seen:
    """[b, t, s] bool, and the columns that hold tokens, first -> what each query sees."""
    S = is_seen.shape[2]
    token = jnp.broadcast_to(jnp.arange(S, dtype=jnp.int32), (is_seen.shape[0], S))
    if columns is not None:
        token = jnp.argsort(columns, axis=1).astype(jnp.int32)  # the inverse: the number of each column's token
    token = token[:, None, :]
    visible = jnp.sum(is_seen, axis=2, dtype=jnp.int32)
    first = jnp.min(jnp.where(is_seen, token, S), axis=2)
    last = jnp.max(jnp.where(is_seen, token, -1), axis=2)
    checks.value(
        (last - first + 1 == visible) | (visible == 0),
        "integrations.maxtext: attention_mask lets a query see tokens with others between them, wanted all from its "
        "sequence's first on",
    )
    order = jnp.cumsum(first[:, 1:] != first[:, :-1], axis=1, dtype=jnp.int32)
    return Seen(first, visible, jnp.pad(order, ((0, 0), (1, 0))))


def _select(
    q: Array, k: Array, w: Array, seen: Seen, columns: Array | None, *, method: hj.Method, implementation: str
) -> Array:
    """[b, t, h, d], [b, s, d], [b, t, h] -> [b, t, topk] int32, the columns that each query chooses.

    The i-th sequence of every row at a time: as often as the row with the most has sequences.
    """
    (B, T, _, _), S = q.shape, k.shape[1]
    if columns is not None:
        k = jnp.take_along_axis(k, columns[..., None], axis=1)
    last = jnp.max(jnp.where(seen.visible > 0, seen.order, -1))

    def one(carry: tuple[Array, Array]) -> tuple[Array, Array]:
        i, found = carry
        is_own = (seen.order == i) & (seen.visible > 0)
        start = jnp.min(jnp.where(is_own, seen.first, S), axis=1) % S
        visible = jnp.where(is_own, seen.visible, 0)
        keys = jax.vmap(lambda k, start: jnp.roll(k, -start, axis=0))(k, start)
        indices = hj.select(
            q, keys, w, method, query_positions=visible - 1, lengths=jnp.max(visible, axis=1),
            implementation=implementation,
        ).indices  # fmt: skip
        chosen = jnp.where(indices < 0, -1, indices + start[:, None, None])
        return i + 1, jnp.where(is_own[..., None], chosen, found)

    nothing = jnp.full((B, T, method.topk), -1, jnp.int32)
    start = varying.like((jnp.zeros((), jnp.int32), nothing), q)
    _, found = lax.while_loop(lambda carry: carry[0] <= last, one, start)
    if columns is None:
        return found
    at = jax.vmap(lambda columns, found: columns[jnp.maximum(found, 0)])(columns, found)
    return jnp.where(found < 0, -1, at.astype(jnp.int32))


def _scores(q: Array, k: Array, w: Array, chunk: int, precision: Any) -> Array:
    """The indexer's scores [b, t, s] float32, with gradients; the products of `chunk` heads at a time are in memory."""
    einsum = functools.partial(jnp.einsum, precision=precision, preferred_element_type=jnp.float32)

    @jax.checkpoint
    def add(total: Array, heads: tuple[Array, Array]) -> tuple[Array, None]:
        q, w = heads
        return total + einsum("btsh,bth->bts", jax.nn.relu(einsum("bthd,bsd->btsh", q, k)), w), None

    (B, T, H, D), S = q.shape, k.shape[1]
    heads = jnp.moveaxis(q.reshape(B, T, H // chunk, chunk, D), 2, 0), jnp.moveaxis(w.reshape(B, T, -1, chunk), 2, 0)
    return lax.scan(add, jnp.zeros((B, T, S), jnp.float32), heads)[0]


def _check_config(config: Any, method: hj.Method) -> None:
    def demand(holds: bool, name: str, wanted: str) -> None:
        if not holds:
            raise ValueError(f"integrations.maxtext: {name}={getattr(config, name)}, wanted {wanted}")

    demand(config.indexer_topk == method.topk, "indexer_topk", f"{method.topk}, the topk of {method}")
    demand(not config.indexer_use_approx_top_k, "indexer_use_approx_top_k", f"False: {method} chooses exactly")
    devices = [getattr(config, f"{net}_{config.context_sharding}_parallelism", 1) for net in ("ici", "dcn")]
    in_order = max(devices) == 1 or not config.context_parallel_load_balance
    demand(in_order, "context_parallel_load_balance", "False: tokens must be in the order of their sequence")


def _attention_mla() -> Any:
    try:
        from maxtext.layers import attention_mla
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"integrations.maxtext: the package {error.name} is missing, which MaxText needs: pip install maxtext",
            name=error.name,
        ) from error
    return attention_mla


def _their_class() -> type:
    return _theirs[0] if _theirs else _attention_mla().Indexer


def _masked() -> float:
    """What MaxText adds to scores that do not count."""
    return _attention_mla().DEFAULT_MASK_VALUE
