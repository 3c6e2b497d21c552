"""MaxText: an indexer of this library in the place of `maxtext.layers.attention_mla.Indexer`.

    install(hj.Hisa(topk=2048))        # before the model is made; install(None) puts theirs back

Projections, weights and cache are MaxText's, and so is what comes out: a mask, indices, scores. Only the choice is made
here. A row of MaxText's batch may hold several sequences one after the other (packed training) or tokens with gaps
between them (the caches of prefill and decoding). Its mask says what a query sees; rows.py takes it apart.

Keys come whole at every call, so block means are made anew each time. That reads every key once, as the flat indexer
does: HISA then saves products and most of the top-k, not reading. The scores are for MaxText's own loss. They are made
by all heads for all tokens, as MaxText makes them; under jit they cost nothing where nothing uses them, as in inference
and with indexer_loss_scaling_factor = 0.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.sharding import Mesh, PartitionSpec

import hisa_jax as hj
from hisa_jax.check_select import check_plain
from hisa_jax.integrations import rows
from hisa_jax.selection import selected_mask

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
        mesh, batch_axes: a mesh, and its axes that split the batch ("data" and "fsdp", for instance): each device
            chooses for its own rows. None: for models on one device; on several XLA gathers what it thinks it needs.
        implementation: as for `select`.

    Returns: a subclass of `Indexer`. A call gives the mask [b, t, s], 0 for what is chosen; indices [b, t, topk] int32,
        ascending columns of the mask, then -1; scores [b, t, s] float32. Where s is at most topk it gives what
        MaxText's does, the attention's own mask as mask and scores, and None for indices.
    Raises: TypeError: another method. ValueError: a mesh without axes of it that split the batch, or axes without a
        mesh. ModuleNotFoundError: no MaxText. Its __init__ raises ValueError: another `indexer_topk` than the method's,
        `indexer_use_approx_top_k`, tokens out of order by load-balanced context parallelism.
    Source: written for MaxText 0.2.5.
    """
    check_plain("integrations.maxtext", method)
    batch_axes = tuple(batch_axes)
    known = () if mesh is None else mesh.axis_names
    if (mesh is not None and not batch_axes) or not set(batch_axes) <= set(known):
        raise ValueError(f"integrations.maxtext: batch_axes={batch_axes}, wanted axes of the mesh, which has {known}")
    return _made(method, mesh, batch_axes, implementation)


@functools.cache
def _made(method: hj.Method, mesh: Mesh | None, batch_axes: tuple[str, ...], implementation: str) -> type:
    """One class for one choice: what MaxText compiles is compiled once."""
    select: Any = functools.partial(rows.select, method=method, implementation=implementation)
    if mesh is not None:
        batch = PartitionSpec(batch_axes)
        select = jax.shard_map(select, mesh=mesh, in_specs=batch, out_specs=batch)

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
            indices = select(*map(lax.stop_gradient, (q, keys, w)), rows.seen_of(is_seen, columns), columns)

            is_chosen = selected_mask(indices, S) & is_seen
            chosen_mask = jnp.where(is_chosen, 0.0, _masked()).astype(self.dtype)
            chunk = getattr(config, "mla_qk_head_chunk_size", 0) or H
            return chosen_mask, indices, rows.scores(q, k, w, chunk, config.matmul_precision) + mask

    return Indexer


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
        # MaxText's wheel asks for none of the packages that it imports.
        package = (error.name or "maxtext").partition(".")[0]
        reason = "" if package == "maxtext" else ", which MaxText imports"
        raise ModuleNotFoundError(
            f"integrations.maxtext: the package {package} is missing{reason}: pip install {package}", name=error.name
        ) from error
    return attention_mla


def _their_class() -> type:
    return _theirs[0] if _theirs else _attention_mla().Indexer


def _masked() -> float:
    """What MaxText adds to scores that do not count."""
    return _attention_mla().DEFAULT_MASK_VALUE
