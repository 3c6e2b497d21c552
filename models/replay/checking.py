"""What a record must be before a model runs it. Shapes are checked when tracing, values on the host or by `checked`."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from hisa_jax import checks
from hisa_jax.models.config import Config
from hisa_jax.models.replay.record import Rollout, places


def selecting_layers(config: Config) -> list[int]:
    """Layers that select by an indexer of their own."""
    return [i for i, kind in enumerate(config.indexer_kinds) if kind == "full"]


def expert_layers(config: Config) -> list[int]:
    """Layers that route tokens to experts."""
    return [i for i, kind in enumerate(config.layer_kinds) if kind == "sparse"]


def check_shapes(call: str, rollout: Rollout, config: Config) -> None:
    """Raises TypeError or ValueError unless a record's dtypes and shapes are those of a model's."""
    checks.instance(call, "selections", rollout, Rollout, "a Rollout")
    checks.int32(call, "selections.tokens", rollout.tokens, ("B", "T"))
    B, T = rollout.tokens.shape
    same = "those of selections.tokens"
    for name in ("targets", "sequence"):
        checks.int32(call, f"selections.{name}", getattr(rollout, name), (B, T), same)
    for name, dtype in (("logprobs", "float32"), ("is_made", "bool")):
        checks.dtype(call, f"selections.{name}", getattr(rollout, name), (dtype,))
        checks.shape(call, f"selections.{name}", getattr(rollout, name), (B, T), same)
    check_offsets(call, "selections.cu_seqlens", rollout.cu_seqlens, B, T)
    layers, routed = selecting_layers(config), expert_layers(config)
    for name, n in (("indices", len(rollout.indices)), ("topk", len(rollout.topk))):
        if n != len(layers):
            raise ValueError(
                f"{call}: selections.{name} has {n} layers, wanted {len(layers)}: one for each that selects, {layers}"
            )
    if len(rollout.experts) not in (0, len(routed)):
        raise ValueError(
            f"{call}: selections.experts has {len(rollout.experts)} layers, wanted {len(routed)}: one for each that "
            f"has experts, {routed}; or none"
        )
    for n, indices in enumerate(rollout.indices):
        name = f"selections.indices[{n}]"
        checks.int32(call, name, indices, (B, "T - skipped", "K"))
        allowed = (T, max(T - rollout.start, 0)) if rollout.cu_seqlens.shape[1] == 2 else (T,)
        if indices.shape[1] not in allowed or indices.shape[1] != rollout.indices[0].shape[1]:
            wanted = " or ".join(map(str, dict.fromkeys(allowed)))
            raise ValueError(
                f"{call}: {name} is {checks.axes_of(indices)}, wanted [{B}, {wanted}, K], the same in each layer: "
                f"selections.tokens is {[B, T]} and start is {rollout.start}"
            )
    for n, experts in enumerate(rollout.experts):
        wanted_shape = (B, T, config.num_experts_per_tok)
        checks.int32(call, f"selections.experts[{n}]", experts, wanted_shape, "experts of each token")


def check_offsets(call: str, name: str, offsets: Any, B: int, T: int) -> None:
    """Raises unless offsets of packed rows are [B, R + 1] int32 and, where they can be known, ascend from 0 to T."""
    checks.int32(call, name, offsets, (B, "R + 1"), "offsets of each row")
    if offsets.shape[1] < 2:
        raise ValueError(f"{call}: {name} is {checks.axes_of(offsets)}, wanted R of 1 or more")
    wanted = f"wanted ascending offsets from 0 to at most {T}"
    if is_known(offsets):
        rows = np.asarray(offsets)
        is_wrong = (rows[:, 0] != 0) | (np.diff(rows, axis=1) < 0).any(1) | (rows[:, -1] > T)
        if is_wrong.any():
            row = int(np.flatnonzero(is_wrong)[0])
            raise ValueError(f"{call}: {name}[{row}] is {rows[row].tolist()}, {wanted}")
    else:
        ascend = jnp.all(jnp.diff(offsets, axis=1) >= 0, axis=1) & (offsets[:, 0] == 0) & (offsets[:, -1] <= T)
        checks.value(ascend, f"{call}: {name} is {{offsets}}, {wanted}", offsets=offsets)


def check_tokens(call: str, tokens: Any, rollout: Rollout) -> None:
    """Raises ValueError unless the tokens that are to be run are those of the record, as far as can be known."""
    checks.shape(call, "tokens", tokens, rollout.tokens.shape, "the shape of selections.tokens")
    if is_known(tokens, rollout.tokens):
        differ = np.argwhere(np.asarray(tokens) != np.asarray(rollout.tokens))
        if len(differ):
            b, t = differ[0]
            raise ValueError(
                f"{call}: tokens[{b}, {t}] is {tokens[b, t]}, wanted {rollout.tokens[b, t]}: the selections were "
                "recorded of other tokens"
            )
    else:
        checks.value(tokens == rollout.tokens, f"{call}: tokens are not those that the selections were recorded of")


def check_values(call: str, rollout: Rollout, config: Config) -> None:
    """Raises ValueError for a record on the host whose numbers cannot be run. Its shapes fit."""
    T = rollout.tokens.shape[1]
    positions, _ = places(np.asarray(rollout.cu_seqlens), T, np)
    for name in ("tokens", "targets"):
        ids = np.asarray(getattr(rollout, name))
        bad = (positions >= 0) & ((ids < 0) | (ids >= config.vocab_size))
        if bad.any():
            b, t = np.argwhere(bad)[0]
            raise ValueError(
                f"{call}: selections.{name}[{b}, {t}] is {ids[b, t]}, wanted tokens from 0 to {config.vocab_size - 1}"
            )
    at = positions[:, rollout.skipped :]
    is_recorded = at >= rollout.start if rollout.start else at >= 0
    for n, indices in enumerate(map(np.asarray, rollout.indices)):
        name, chosen = f"selections.indices[{n}]", indices >= 0
        bad = is_recorded[..., None] & ((indices < -1) | (indices > at[..., None]))
        if bad.any():
            b, t, k = np.argwhere(bad)[0]
            raise ValueError(
                f"{call}: {name}[{b}, {t}] selects {indices[b, t, k]}, wanted -1 or positions from 0 to "
                f"{at[b, t]}, which its query sees"
            )
        ordered = np.sort(np.where(chosen, indices, -1), axis=-1)
        twice = is_recorded & ((np.diff(ordered, axis=-1) == 0) & (ordered[..., 1:] >= 0)).any(-1)
        for what, where in (("a token twice", twice), ("nothing", is_recorded & ~chosen.any(-1))):
            if where.any():
                b, t = np.argwhere(where)[0]
                raise ValueError(
                    f"{call}: {name}[{b}, {t}] selects {what}, wanted tokens that its query sees, each once"
                )
    for n, experts in enumerate(map(np.asarray, rollout.experts)):
        ordered = np.sort(experts, axis=-1)
        is_out = (ordered[..., 0] < 0) | (ordered[..., -1] >= config.n_routed_experts)
        bad = (positions >= 0) & (is_out | (np.diff(ordered, axis=-1) == 0).any(-1))
        if bad.any():
            b, t = np.argwhere(bad)[0]
            raise ValueError(
                f"{call}: selections.experts[{n}][{b}, {t}] is {experts[b, t].tolist()}, wanted numbers from 0 to "
                f"{config.n_routed_experts - 1}, each once"
            )


def check_traced(call: str, rollout: Rollout, config: Config, positions: Any) -> None:
    """The same of a record that is traced: only under `hisa_jax.checked`."""
    at = positions[:, rollout.skipped :, None]
    for n, indices in enumerate(rollout.indices):
        name = f"{call}: selections.indices[{n}]"
        is_recorded = (at >= 0) & (at >= rollout.start)
        checks.value(
            jnp.where(is_recorded, (indices >= -1) & (indices <= at), True),
            f"{name} select tokens that their queries do not see",
        )
        some = jnp.any(indices >= 0, axis=-1, keepdims=True)
        checks.value(jnp.where(is_recorded, some, True), f"{name} select nothing for some queries")
    for n, experts in enumerate(rollout.experts):
        is_there = (experts >= 0) & (experts < config.n_routed_experts)
        checks.value(
            is_there | (positions < 0)[..., None],
            f"{call}: selections.experts[{n}] are not all from 0 to {config.n_routed_experts - 1}",
        )


def is_known(*arrays: Any) -> bool:
    """Whether the values of all these are known here, and not traced."""
    return not any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves(arrays))
