"""Generation: a prompt in chunks, then token by token, with static shapes throughout."""

import dataclasses
import functools
import sys
import time
from collections.abc import Collection, Sequence
from typing import NamedTuple, get_args

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array, lax

import hisa_jax as hj
from hisa_jax.models import checks
from hisa_jax.models.cache import Cache
from hisa_jax.models.dsa import select
from hisa_jax.models.modeling import Model, Output
from hisa_jax.models.plan import Phase
from hisa_jax.models.replay.record import Rollout
from hisa_jax.models.replay.recorder import Recorder, Rows, checked_start, empty_steps, logprob_of, put_step, rows_of


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class RecallSums:
    """Recall against the flat indexer, summed over queries that see more than topk tokens, and their number.

    Attributes:
        total, count: [layers] float32; 0 in layers that share a selection.
    """

    total: Array
    count: Array

    def __add__(self, other: "RecallSums") -> "RecallSums":
        return RecallSums(self.total + other.total, self.count + other.count)

    def means(self) -> list[float | None]:
        """Mean recall of each layer, None where there was no such query."""
        pairs = zip(np.asarray(self.total).tolist(), np.asarray(self.count).tolist(), strict=True)
        return [total / count if count else None for total, count in pairs]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Generation:
    """What `generate` returns.

    Attributes:
        tokens: the new tokens of each prompt, a stop token at the end if there was one.
        prompt_tokens: how many the prompts had together.
        prefill_seconds, decode_seconds: wall time; the first call of each shape compiles within it.
        recall: by phase, "prefill" and "decode": mean recall of each layer's selection against the flat indexer on the
            same keys and queries, over the queries that see more than topk tokens; None where there are none. Empty
            unless asked for.
        rollout: what each query selected, which experts each token took, and log-probabilities, a prompt a row; None
            unless asked for.
    """

    tokens: list[list[int]]
    prompt_tokens: int
    prefill_seconds: float
    decode_seconds: float
    recall: dict[str, list[float | None]]
    rollout: Rollout | None = None

    @property
    def prefill_rate(self) -> float:
        """Prompt tokens per second."""
        return self.prompt_tokens / self.prefill_seconds

    @property
    def decode_rate(self) -> float:
        """New tokens per second, over all prompts; each one's first token belongs to the prefill."""
        return sum(len(row) - 1 for row in self.tokens) / self.decode_seconds


def generate(
    model: Model,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    *,
    chunk: int = 512,
    temperature: float = 0.0,
    seed: int = 0,
    stop_ids: Collection[int] | None = None,
    report_recall: bool = False,
    return_selections: bool = False,
    selections_from: int = 0,
) -> Generation:
    """Continues prompts of any lengths.

    Args:
        model: whose plan selects in the phases "prefill", "last_prefill" (each prompt's last chunk) and "decode".
        prompts: token ids, one or more a prompt.
        max_new_tokens: how many to make.
        chunk: prompt tokens a forward pass.
        temperature: 0 takes the likeliest token, others divide the logits before one is drawn.
        seed: of the draws, an int of 64 bits.
        stop_ids: tokens that end a row; None: those of the model's config; () for none.
        report_recall: whether to compare each selection with the flat indexer's.
        return_selections: whether to return a `Rollout`, for `training_forward`. On the device it takes
            `Rollout.bytes_per_token` for each token of a chunk, then for each new one.
        selections_from: leaves out what queries at positions before it selected. Nothing is lost up to topk: such
            queries select all that they see.

    Returns: `Generation`.
    Raises: ValueError: no prompt, an empty one, tokens outside of the vocabulary, more tokens than the model has
        positions, sizes below 1, an invalid temperature or seed. FloatingPointError: logits without a likeliest
        token, since they are NaN or infinite; it names the prompts.
    """
    prompts = _checked(model, prompts, max_new_tokens, chunk, temperature)
    stops = checks.stop_ids("generate", stop_ids, model.config)
    seed = checks.random_seed("generate", seed)
    start_position = checked_start("generate", selections_from, return_selections)
    recorder = Recorder(model, start_position) if return_selections else None
    watch = Watch(recall=report_recall, choices=return_selections)
    ids, mask = pad_left(prompts, chunk)
    # Whole chunks, so that prompts of about the same length run the same compiled programs; no more than there can be.
    capacity = -(-(max(map(len, prompts)) + max_new_tokens) // chunk) * chunk
    capacity = min(capacity, model.config.max_position_embeddings)
    graphs, state = phase_graphs(model), nnx.state(model)

    start = time.perf_counter()
    cache, recall = model.empty_cache(len(prompts), capacity), {}
    chunks = range(0, ids.shape[1], min(chunk, ids.shape[1]))
    prefill_recall = _no_recall(model)
    for first in chunks:
        part = slice(first, first + chunks.step)
        phase: Phase = "last_prefill" if first == chunks[-1] else "prefill"
        logits, cache, sums, rows = _prefill(
            state, cache, ids[:, part], mask[:, part], graph=graphs[phase], watch=watch
        )
        prefill_recall += sums
        if recorder is not None and rows is not None:
            recorder.write_chunk(np.asarray(mask), part, jax.device_get(rows))
    jax.block_until_ready(logits)
    middle = time.perf_counter()
    key = jax.random.key(seed)
    tokens, is_failed, decode_recall, made = _decode(
        state, cache, logits, key, jnp.float32(temperature), graph=graphs["decode"], steps=max_new_tokens,
        is_greedy=temperature == 0, stop_ids=stops, watch=watch,
    )  # fmt: skip
    rows = [[token for token in row if token >= 0] for row in np.asarray(tokens).tolist()]
    end = time.perf_counter()
    if failed := np.flatnonzero(is_failed).tolist():
        where = ", ".join(f"prompts[{row}] after {len(rows[row])} new tokens" for row in failed)
        raise FloatingPointError(f"generate: logits are not finite (NaN or infinity): {where}")
    if report_recall:  # read after the clock has stopped
        recall = {"prefill": prefill_recall.means(), "decode": decode_recall.means()}
    rollout = None
    if recorder is not None and made is not None:
        rollout = recorder.generated(prompts, rows, *jax.device_get(made))
    return Generation(
        tokens=rows, prompt_tokens=sum(map(len, prompts)), prefill_seconds=middle - start,
        decode_seconds=end - middle, recall=recall, rollout=rollout,
    )  # fmt: skip


def likeliest(logits: Array) -> Array:
    """[..., V] -> [...] int32, the likeliest token; -1 where there is none: a NaN, or nothing that is finite."""
    return jnp.where(has_likeliest(logits), jnp.argmax(logits, axis=-1).astype(jnp.int32), -1)


def has_likeliest(logits: Array) -> Array:
    """[..., V] -> [...] bool. A maximum is NaN if anything is."""
    return jnp.isfinite(jnp.max(logits, axis=-1))


def phase_graphs(model: Model) -> dict[Phase, nnx.GraphDef]:
    """The model with the methods of each phase, a rule asked once: phases of the same methods run the same program."""
    layers = range(model.config.num_hidden_layers)
    phases: tuple[Phase, ...] = get_args(Phase)
    return {phase: nnx.graphdef(model.with_method([model.plan(i, phase) for i in layers])) for phase in phases}


def pad_left(prompts: Sequence[Sequence[int]], multiple: int) -> tuple[Array, Array]:
    """Lines prompts up at their ends.

    Args:
        prompts: token ids.
        multiple: the width is rounded up to a multiple of it if it is larger.

    Returns: ids [B, W] int32 and mask [B, W] bool, False where there is padding.
    """
    width = max(map(len, prompts))
    if width > multiple:
        width = -(-width // multiple) * multiple
    ids = np.zeros((len(prompts), width), np.int32)
    mask = np.zeros((len(prompts), width), bool)
    for row, prompt in enumerate(prompts):
        ids[row, width - len(prompt) :] = prompt
        mask[row, width - len(prompt) :] = True
    return jnp.asarray(ids), jnp.asarray(mask)


class Watch(NamedTuple):
    """What is wanted beside tokens: recall against the flat indexer; what queries and routers chose."""

    recall: bool
    choices: bool


@functools.partial(jax.jit, static_argnames=("graph", "watch"), donate_argnames="cache")
def _prefill(
    state: nnx.State, cache: Cache, ids: Array, mask: Array, *, graph: nnx.GraphDef, watch: Watch
) -> tuple[Array, Cache, RecallSums, Rows | None]:
    """One chunk: logits [B, V] of its last column, the cache with its tokens, what was chosen."""
    model = nnx.merge(graph, state)
    out = model.run(ids, cache=cache, mask=mask, last_only=True, trace=any(watch))
    return out.logits[:, 0], out.cache, _recall(model, out, watch), rows_of(out) if watch.choices else None


@functools.partial(jax.jit, static_argnames=("graph", "steps", "is_greedy", "stop_ids", "watch"))
def _decode(
    state: nnx.State, cache: Cache, logits: Array, key: Array, temperature: Array, *, graph: nnx.GraphDef, steps: int,
    is_greedy: bool, stop_ids: tuple[int, ...], watch: Watch,
) -> tuple[Array, Array, RecallSums, tuple[Array, Rows] | None]:  # fmt: skip
    """From the prompt's last logits [B, V]: new tokens [B, steps], -1 after a stop token or a failure; failed [B];
    log-probabilities of the tokens [B, steps], and what the first steps - 1 of them chose [B, steps - 1, ...]."""
    model = nnx.merge(graph, state)

    def choose(logits: Array, i: Array) -> Array:
        if is_greedy:
            return likeliest(logits)
        # Differences from the largest, by a number that is neither 0 nor infinite: no quotient is NaN or +inf.
        below = logits - jnp.max(logits, axis=-1, keepdims=True)
        limits = jnp.finfo(jnp.float32)
        scaled = below / jnp.clip(temperature, limits.tiny, limits.max)
        drawn = jax.random.categorical(jax.random.fold_in(key, i), scaled, axis=-1).astype(jnp.int32)
        return jnp.where(has_likeliest(logits), drawn, -1)

    def put(tokens: Array, token: Array, is_done: Array, is_failed: Array, i: Array) -> tuple[Array, Array, Array]:
        token = jnp.where(is_done, -1, token)
        is_failed |= ~is_done & (token < 0)
        is_stop = jnp.isin(token, jnp.asarray((-1, *stop_ids), jnp.int32))
        return tokens.at[:, i].set(token), is_done | is_stop, is_failed

    def unfinished(carry: tuple) -> Array:
        i, _, _, _, is_done, *_ = carry
        return (i < steps) & ~jnp.all(is_done)

    def step(carry: tuple) -> tuple:
        i, cache, token, tokens, is_done, is_failed, sums, made = carry
        ids = jnp.maximum(token, 0)  # rows that are done are masked
        out = model.run(ids[:, None], cache=cache, mask=~is_done[:, None], trace=any(watch))
        token = choose(out.logits[:, 0], i)
        tokens, is_done, is_failed = put(tokens, token, is_done, is_failed, i)
        if made is not None:
            made = put_step(made, i, logprob_of(out.logits[:, 0], token), rows_of(out))
        return i + 1, out.cache, token, tokens, is_done, is_failed, sums + _recall(model, out, watch), made

    B = logits.shape[0]
    token, none = choose(logits, jnp.int32(0)), jnp.zeros((B,), bool)
    rows = put(jnp.full((B, steps), -1, jnp.int32), token, none, none, jnp.int32(0))
    made = None
    if watch.choices:
        made = empty_steps(model, B, steps, cache.capacity, logprob_of(logits, token))
    carry = (jnp.int32(1), cache, token, *rows, _no_recall(model), made)
    *_, tokens, _, is_failed, sums, made = lax.while_loop(unfinished, step, carry)
    return tokens, is_failed, sums, made


def _no_recall(model: Model) -> RecallSums:
    zeros = jnp.zeros((model.config.num_hidden_layers,), jnp.float32)
    return RecallSums(zeros, zeros)


def _recall(model: Model, out: Output, watch: Watch) -> RecallSums:
    sums = _no_recall(model)
    if not watch.recall:
        return sums
    for i, layer in enumerate(out.layers):
        if layer.index_inputs is None:
            continue
        flat = hj.Dsa(topk=model.plan.layers[i].topk)
        q, _, w = layer.index_inputs
        reference = select(
            q, w, out.cache.layers[i], out.cache.block_tables, out.slots, out.cache.lengths, flat, model.mesh
        )
        chooses = out.slots >= flat.topk  # a query that sees no more than topk tokens selects them all
        recall = jnp.where(chooses, hj.compare(layer.selection, reference).recall, 0)
        sums += RecallSums(
            jnp.zeros_like(sums.total).at[i].set(jnp.sum(recall)),
            jnp.zeros_like(sums.count).at[i].set(jnp.sum(chooses, dtype=jnp.float32)),
        )
    return sums


def _checked(
    model: Model, prompts: Sequence[Sequence[int]], max_new_tokens: int, chunk: int, temperature: float
) -> list[list[int]]:
    """The prompts as lists of ints."""
    call, vocabulary = "generate", model.config.vocab_size
    n_new = checks.whole(call, "max_new_tokens", max_new_tokens)
    checks.whole(call, "chunk", chunk)
    is_number = isinstance(temperature, int | float | np.number) and not isinstance(temperature, bool)
    if not is_number or not 0 <= temperature <= sys.float_info.max:
        raise ValueError(f"generate: temperature={checks.shown(temperature)}, wanted a number of at least 0")
    if hasattr(prompts, "__array__"):
        prompts = np.asarray(prompts).tolist()
    if not isinstance(prompts, Sequence) or isinstance(prompts, str) or not prompts:
        raise ValueError(f"generate: prompts is {checks.shown(prompts)}, wanted a sequence of at least one prompt")
    rows = [checks.prompt(call, f"prompts[{i}]", prompt, vocabulary) for i, prompt in enumerate(prompts)]
    longest, room = max(map(len, rows)) + n_new, model.config.max_position_embeddings
    if longest > room:
        made = checks.shown(longest)
        raise ValueError(f"generate: prompt and max_new_tokens make {made} tokens, the model has {room} positions")
    return rows
