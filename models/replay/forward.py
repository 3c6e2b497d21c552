"""Whole sequences through any model, differentiable, with selections and experts of one's own choice or a rollout's."""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from hisa_jax import checks
from hisa_jax.models.dsa import Table
from hisa_jax.models.layers import rms_norm
from hisa_jax.models.modeling import HIDDEN, Layer, Model
from hisa_jax.models.replay.checking import check_offsets
from hisa_jax.models.replay.choices import Choices, is_same_set, layout_of
from hisa_jax.models.replay.record import Rollout
from hisa_jax.models.replay.recorder import logprob_of
from hisa_jax.models.rope import rope_table
from hisa_jax.models.sharding import constrain
from hisa_jax.models.training.forward import run_layer
from hisa_jax.models.training.sparse import Seen, Sparse, alike


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainingOutput:
    """What `training_forward` returns.

    Attributes:
        logits: [B, T, V] float32.
        logprobs: [B, T] float32, the log-softmax at the targets; None without targets.
        kl: [layers that select, B, T] float32, each indexer's loss over the tokens that were attended to; 0 in padding.
        same_selections: [layers that select, B, T] bool, whether the layer's own indexer selects exactly what the
            rollout's query did; None unless asked for. It means nothing where nothing is recorded.
        same_experts: [layers with experts, B, T] bool, likewise of experts; None also where none were recorded.
    """

    logits: Array
    logprobs: Array | None
    kl: Array
    same_selections: Array | None
    same_experts: Array | None


def training_forward(
    model: Model, tokens: Array, *, selections: Rollout | None = None, targets: Array | None = None,
    cu_seqlens: Array | None = None, compare: bool = False, remat: bool = False,
) -> TrainingOutput:  # fmt: skip
    """Runs whole sequences, to be differentiated: through sparse MLA, experts, and the indexers' loss.

    Args:
        model: of any layers, on one device or a mesh, which then splits batch, heads and experts.
        tokens: [B, T] int32.
        selections: what a rollout of these tokens selected, and the experts it took. Exactly these are run: gradients
            reach the router's weights of these experts, and the KL is over these tokens. None: the model chooses.
        targets: [B, T] int32, whose log-probabilities are wanted, -1 for none. None: those of `selections`.
        cu_seqlens: [B, R + 1] int32, where the sequences of packed rows begin, and the end of the last. None: that of
            `selections`, or one sequence a row.
        compare: whether to say where the model would have chosen otherwise; costs each indexer's selection.
        remat: whether each layer is computed again in the backward pass, which saves memory.

    Returns: `TrainingOutput`. Logits are those of the rollout up to rounding, if its weights are the model's. Those of
        padding mean nothing. The indexers learn from `kl` alone, and nothing else does.
    Raises: TypeError, ValueError: shapes and dtypes that do not fit, tokens other than those of the record. Outside of
        jit also what `Rollout.check` raises; under jit a token that its query does not see is left out, and
        `hisa_jax.checked` raises.
    Source: replay of a router's experts: R3, arXiv 2510.11370; of DSA's selections: GLM-5, arXiv 2602.15763.
    Example:
        >>> out = models.training_forward(model, rollout.tokens, selections=rollout)  # doctest: +SKIP
    """
    call, config = "training_forward", model.config
    tokens = jnp.asarray(tokens)
    checks.int32(call, "tokens", tokens, ("B", "T"))
    checks.flags(call, compare=compare, remat=remat)
    if compare and selections is None:
        raise ValueError(f"{call}: compare=True without selections, wanted a Rollout to compare with")
    choices = _choices(call, model, tokens, selections, cu_seqlens)
    if targets is None and selections is not None:
        targets = jnp.asarray(selections.targets)
    if targets is not None:
        checks.int32(call, "targets", targets, tokens.shape, "one for each token")

    layout, mesh = choices.layout, model.mesh
    table = rope_table(config, layout.positions)
    recorded, experts = iter(choices.recorded), iter(choices.experts)
    x = constrain(model.embedded(tokens, layout.positions >= 0), mesh, HIDDEN)
    shared, kls, same_selections, same_experts = None, [], [], []
    for i, layer in enumerate(model.layers):
        of_rollout = next(recorded, None) if layer.attention.indexer is not None else None
        taken = next(experts, None) if config.layer_kinds[i] == "sparse" else None
        attend = Sparse(
            method=model.plan(i, "prefill"), layout=layout, recorded=of_rollout, start=choices.start, shared=shared,
            mesh=mesh, compares=compare,
        )  # fmt: skip
        x, seen, own = _layer(layer, x, table, attend, taken, remat)
        shared = seen.indices
        if seen.kl is not None:
            kls.append(seen.kl)
        if compare and of_rollout is not None:
            assert seen.own is not None  # it was asked for
            same_selections.append(is_same_set(*alike(seen.own, of_rollout)))
        if compare and own is not None and taken is not None:
            same_experts.append(is_same_set(own, taken))
    logits = model.logits(rms_norm(x, model.norm[...], config.rms_norm_eps))
    return TrainingOutput(
        logits=logits, logprobs=None if targets is None else logprob_of(logits, targets), kl=jnp.stack(kls),
        same_selections=jnp.stack(same_selections) if same_selections else None,
        same_experts=jnp.stack(same_experts) if same_experts else None,
    )  # fmt: skip


def _choices(call: str, model: Model, tokens: Array, selections: Rollout | None, cu_seqlens: Array | None) -> Choices:
    if selections is not None:
        return Choices.of(call, model.config, tokens, selections, cu_seqlens)
    B, T = tokens.shape
    if cu_seqlens is None:
        cu_seqlens = jnp.broadcast_to(jnp.array([0, T], jnp.int32), (B, 2))
    check_offsets(call, "cu_seqlens", cu_seqlens, B, T)
    return Choices(layout=layout_of(cu_seqlens, T), recorded=(), experts=(), start=0)


def _layer(
    layer: Layer, x: Array, table: Table, attend: Sparse, experts: Array | None, remat: bool
) -> tuple[Array, Seen, Array | None]:
    if not remat:
        return run_layer(layer, x, table, attend, experts, attend.mesh)
    graph, state = nnx.split(layer)

    def again(state: nnx.State, x: Array) -> tuple[Array, Seen, Array | None]:
        return run_layer(nnx.merge(graph, state), x, table, attend, experts, attend.mesh)

    return jax.checkpoint(again)(state, x)
