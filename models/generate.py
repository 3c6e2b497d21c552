"""Generation: a prompt in chunks, then token by token, with static shapes throughout."""

import dataclasses
import functools
import time
from collections.abc import Callable, Collection, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from hisa_jax.models import checks
from hisa_jax.models.cache import Cache
from hisa_jax.models.draws import Draws, LogprobArrays, draws_of, logprobs_of, read_logprobs, take
from hisa_jax.models.modeling import Model
from hisa_jax.models.plan import Phase
from hisa_jax.models.prompts import prompt_ids, tokenizer_of
from hisa_jax.models.recall import RecallSums, no_recall, recall_of
from hisa_jax.models.replay.record import Rollout
from hisa_jax.models.replay.recorder import (
    Recorder,
    Rows,
    Steps,
    checked_start,
    empty_steps,
    logprob_of,
    put_step,
    rows_of,
)  # fmt: skip
from hisa_jax.models.request import Request
from hisa_jax.models.sampling import MOST_LOGPROBS, Logprobs, Sampling, short_form
from hisa_jax.models.streams import Reader
from hisa_jax.models.structure import Structure, structures_of, weights_of
from hisa_jax.models.text import Text
from hisa_jax.models.tokens import Tokenizer

_PIECE = 32  # tokens between looks for a stop text


@dataclasses.dataclass(frozen=True, kw_only=True)
class Generation:
    """What `generate` returns.

    Attributes:
        tokens: the new tokens of each prompt, a stop token at the end if there was one.
        texts: what they say, without a stop token or text; empty unless a prompt is text, a text may end one, or a
            tokenizer was given.
        logprobs: of each new token, for prompts that asked for them; else of none.
        prompt_tokens: how many the prompts had together.
        prefill_seconds, decode_seconds: wall time; the first call of each shape compiles within it.
        recall: by phase, "prefill" and "decode": mean recall of each layer's selection against the flat indexer on the
            same keys and queries, over the queries that see more than topk tokens; None where there are none. Empty
            unless asked for.
        rollout: what each query selected, which experts each token took, and log-probabilities, a prompt a row; None
            unless asked for.
    """

    tokens: list[list[int]]
    texts: list[str]
    logprobs: list[list[Logprobs]]
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
    prompts: Sequence[Sequence[int] | str],
    max_new_tokens: int | None = None,
    *,
    sampling: Sampling | Sequence[Sampling] | None = None,
    chunk: int = 512,
    temperature: float = 0.0,
    seed: int = 0,
    stop_ids: Collection[int] | None = None,
    tokenizer: Tokenizer | None = None,
    report_recall: bool = False,
    return_selections: bool = False,
    selections_from: int = 0,
    progress: Callable[[str, int, int], None] | None = None,
) -> Generation:
    """Continues prompts of any lengths.

    Args:
        model: whose plan selects in the phases "prefill", "last_prefill" (each prompt's last chunk) and "decode".
        prompts: token ids, one or more a prompt, or texts.
        max_new_tokens: how many to make.
        sampling: how to take tokens, one for all prompts or one each, in place of `max_new_tokens`, `temperature`,
            `seed` and `stop_ids`. A prompt's tokens do not depend on the other prompts.
        chunk: prompt tokens a forward pass.
        temperature: 0 takes the likeliest token, others divide the logits before one is drawn.
        seed: of the draws, an int of 64 bits.
        stop_ids: tokens that end a row; None: those of the model's config; () for none.
        tokenizer: for texts. Default: that of the folder which the model was loaded from.
        report_recall: whether to compare each selection with the flat indexer's.
        return_selections: whether to return a `Rollout`, for `training_forward`. On the device it takes
            `Rollout.bytes_per_token` for each token of a chunk, then for each new one.
        selections_from: leaves out what queries at positions before it selected. Nothing is lost up to topk: such
            queries select all that they see.
        progress: is told what is done, how much of it, and of how much, as `models.progress.Progress`.

    Returns: `Generation`.
    Raises: ValueError: no prompt, an empty one, tokens outside of the vocabulary, more tokens than the model has
        positions, sizes below 1, an invalid temperature or seed, texts without a tokenizer. FloatingPointError: logits
        without a likeliest token, since they are NaN or infinite; it names the prompts.
    """
    checks.whole("generate", "chunk", chunk)
    rows, has_text = _checked(model, prompts, tokenizer)
    short = dict(max_new_tokens=max_new_tokens, temperature=temperature, seed=seed, stop_ids=stop_ids)
    samplings = _samplings(model, sampling, len(rows), short)
    steps = max(one.max_tokens for one in samplings)
    _demand_room(rows, steps, model.config.max_position_embeddings)
    has_stop = any(one.stop for one in samplings)
    if has_text or has_stop:
        tokenizer = tokenizer or tokenizer_of(model)
    if has_stop and tokenizer is None:
        raise ValueError("generate: stop texts need a tokenizer, and the model has none: tokenizer= takes one")
    pairs = enumerate(zip(rows, samplings, strict=True))
    requests = [_request(i, model, prompt, one, tokenizer) for i, (prompt, one) in pairs]
    start_position = checked_start("generate", selections_from, return_selections)
    recorder = Recorder(model, start_position) if return_selections else None
    watch = Watch(recall=report_recall, choices=return_selections)
    ids, mask = pad_left(rows, chunk)
    # Whole chunks, so that prompts of about the same length run the same compiled programs; no more than there can be.
    capacity = -(-(max(map(len, rows)) + steps) // chunk) * chunk
    capacity = min(capacity, model.config.max_position_embeddings)
    structures, weights = structures_of(model), weights_of(model)

    start = time.perf_counter()
    cache, recall = model.empty_cache(len(rows), capacity), {}
    chunks = range(0, ids.shape[1], min(chunk, ids.shape[1]))
    prefill_recall = no_recall(model)
    for i, first in enumerate(chunks):
        if progress is not None:
            progress("reading prompts (the first chunk compiles)", i, len(chunks))
        part = slice(first, first + chunks.step)
        phase: Phase = "last_prefill" if first == chunks[-1] else "prefill"
        logits, cache, sums, chosen = _prefill(
            weights, cache, ids[:, part], mask[:, part], structure=structures[phase], watch=watch
        )  # fmt: skip
        prefill_recall += sums
        if recorder is not None and chosen is not None:
            recorder.write_chunk(np.asarray(mask), part, jax.device_get(chosen))
    jax.block_until_ready(logits)
    if progress is not None:
        progress("reading prompts", len(chunks), len(chunks))
    middle = time.perf_counter()
    draws = draws_of(samplings, [0] * len(rows), len(rows))
    room = _room(steps, return_selections)
    made, decode_recall = _empty(requests, room, model.config.vocab_size, draws), no_recall(model)
    if return_selections:
        made = made._replace(choices=empty_steps(model, len(rows), room, cache.capacity))
    pending, piece = logits, _PIECE if has_stop else steps
    for first in range(0, steps, piece):
        if progress is not None:
            progress("making tokens", first, steps)
        until = np.int32(min(first + piece, steps))
        cache, made, sums = _decode(
            weights, cache, pending, made, draws, until,
            structure=structures["decode"], kind=int(draws.kind), watch=watch,
        )  # fmt: skip
        pending, decode_recall = None, decode_recall + sums
        _read(requests, made)
        is_done = np.asarray(made.is_done) | [request.is_finished for request in requests]
        if is_done.all():
            break
        made = made._replace(is_done=jnp.asarray(is_done))
    end = time.perf_counter()
    if progress is not None:
        progress("making tokens", steps, steps)
    failed = [request for request in requests if not request.is_finished]
    if failed:
        where = ", ".join(f"prompts[{request.id}] after {request.n_made} new tokens" for request in failed)
        raise FloatingPointError(f"generate: logits are not finite (NaN or infinity): {where}")
    if report_recall:  # read after the clock has stopped
        recall = {"prefill": prefill_recall.means(), "decode": decode_recall.means()}
    rollout = None
    if recorder is not None and made.choices is not None:
        rollout = recorder.generated(rows, [request.tokens[request.n_prompt :] for request in requests], made.choices)
    pieces = [Reader(request, tokenizer).read() for request in requests]
    return Generation(
        tokens=[request.tokens[request.n_prompt :] for request in requests],
        texts=[] if tokenizer is None else [piece.text for piece in pieces if piece is not None],
        logprobs=_logprobs(requests, made), prompt_tokens=sum(map(len, rows)), prefill_seconds=middle - start,
        decode_seconds=end - middle, recall=recall, rollout=rollout,
    )  # fmt: skip


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


@functools.partial(jax.jit, static_argnames=("structure", "watch"), donate_argnames="cache")
def _prefill(
    weights: list[Array], cache: Cache, ids: Array, mask: Array, *, structure: Structure, watch: Watch
) -> tuple[Array, Cache, RecallSums, Rows | None]:
    """One chunk: logits [B, V] of its last column, the cache with its tokens, what was chosen."""
    model = structure.merge(weights)
    out = model.run(ids, cache=cache, mask=mask, last_only=True, trace=any(watch))
    return out.logits[:, 0], out.cache, recall_of(model, out, watch.recall), rows_of(out) if watch.choices else None


class _Made(NamedTuple):
    """What the rows of a batch have made, and what ends them.

    Attributes:
        n: int32 scalar, how many columns are made.
        token: [B] int32, the last one of each row.
        tokens: [B, steps] int32, -1 after a stop token, a failure or a row's limit.
        is_done, is_failed: [B] bool.
        logprobs: of the tokens; None if nobody asked.
        limits: [B] int32, tokens of each row at most.
        stops: [B, n] int32, tokens that end a row, then -1.
        choices: what they chose; None unless asked for.
    """

    n: Array
    token: Array
    tokens: Array
    is_done: Array
    is_failed: Array
    logprobs: LogprobArrays | None
    limits: Array
    stops: Array
    choices: Steps | None = None


def _room(steps: int, has_choices: bool) -> int:
    """Columns for so many new tokens: of few sizes, as the decoding program is compiled for each.

    Choices take much memory, so they have less to spare.
    """
    return -(-steps // _PIECE) * _PIECE if has_choices else max(_PIECE, 1 << (steps - 1).bit_length())


def _empty(requests: list[Request], steps: int, vocabulary: int, draws: Draws) -> _Made:
    B, K, most = len(requests), min(MOST_LOGPROBS, vocabulary), max(1, *(len(r.stop_ids) for r in requests))
    logprobs = None
    if draws.has_logprobs:
        ids, values = jnp.zeros((B, steps, K), jnp.int32), jnp.zeros((B, steps, K), jnp.float32)
        logprobs = LogprobArrays(values[..., 0], ids, values)
    stops = [sorted(r.stop_ids) + [-1] * (most - len(r.stop_ids)) for r in requests]
    none = jnp.zeros((B,), bool)
    return _Made(
        n=jnp.int32(0), token=jnp.zeros((B,), jnp.int32), tokens=jnp.full((B, steps), -1, jnp.int32), is_done=none,
        is_failed=none, logprobs=logprobs, limits=jnp.array([r.end - r.n_prompt for r in requests], jnp.int32),
        stops=jnp.array(stops, jnp.int32),
    )  # fmt: skip


@functools.partial(jax.jit, static_argnames=("structure", "kind", "watch"), donate_argnames="cache")
def _decode(
    weights: list[Array], cache: Cache, logits: Array | None, made: _Made, draws: Draws, until: Array, *,
    structure: Structure, kind: int, watch: Watch,
) -> tuple[Cache, _Made, RecallSums]:  # fmt: skip
    """Makes tokens until there are so many or all rows are done. `logits` [B, V] are the prompt's last, then None."""
    model = structure.merge(weights)

    def put(made: _Made, logits: Array, rows: Rows | None) -> _Made:
        token = take(logits[:, None], draws._replace(numbers=draws.numbers + made.n), kind)
        logprobs = made.logprobs
        if logprobs is not None:
            new = logprobs_of(logits[:, None], token)
            logprobs = jax.tree.map(lambda x, one: lax.dynamic_update_slice_in_dim(x, one, made.n, 1), logprobs, new)
        choices = made.choices
        if choices is not None:
            choices = put_step(choices, made.n, logprob_of(logits, token[:, 0]), rows)
        token = jnp.where(made.is_done, -1, token[:, 0])
        is_last = jnp.any(token[:, None] == made.stops, axis=1) | (token < 0) | (made.n + 1 >= made.limits)
        return made._replace(
            n=made.n + 1, token=token, tokens=made.tokens.at[:, made.n].set(token), is_done=made.is_done | is_last,
            is_failed=made.is_failed | (~made.is_done & (token < 0)), logprobs=logprobs, choices=choices,
        )  # fmt: skip

    def unfinished(carry: tuple) -> Array:
        _, made, _ = carry
        return (made.n < until) & ~jnp.all(made.is_done)

    def step(carry: tuple) -> tuple:
        cache, made, sums = carry
        ids = jnp.maximum(made.token, 0)  # rows that are done are masked
        out = model.run(ids[:, None], cache=cache, mask=~made.is_done[:, None], trace=any(watch))
        rows = rows_of(out) if watch.choices else None
        return out.cache, put(made, out.logits[:, 0], rows), sums + recall_of(model, out, watch.recall)

    made = made if logits is None else put(made, logits, None)
    return lax.while_loop(unfinished, step, (cache, made, no_recall(model)))


def _read(requests: list[Request], made: _Made) -> None:
    """Hands the requests their new tokens, as far as no stop text ends them."""
    for request, row in zip(requests, np.asarray(made.tokens).tolist(), strict=True):
        for token in row[request.n_made :]:
            if token < 0 or request.is_finished:
                break
            request.add(token)


def _logprobs(requests: list[Request], made: _Made) -> list[list[Logprobs]]:
    if made.logprobs is None:
        return [[] for _ in requests]
    found = jax.device_get(made.logprobs)
    return [
        [read_logprobs(found, row, i, token, n) for i, token in enumerate(request.tokens[request.n_prompt :])]
        if (n := request.sampling.logprobs) is not None
        else []
        for row, request in enumerate(requests)
    ]


def _checked(
    model: Model, prompts: Sequence[Sequence[int] | str], tokenizer: Tokenizer | None
) -> tuple[list[list[int]], bool]:  # fmt: skip
    """The prompts as lists of ints; whether one is text, or a tokenizer is given."""
    call, vocabulary = "generate", model.config.vocab_size
    if hasattr(prompts, "__array__"):
        prompts = np.asarray(prompts).tolist()
    if isinstance(prompts, str):
        text = checks.shown(prompts)
        raise ValueError(f"{call}: prompts is {text}, wanted a list of prompts, as [{text}]")
    if not isinstance(prompts, Sequence) or not prompts:
        raise ValueError(f"generate: prompts is {checks.shown(prompts)}, wanted a sequence of at least one prompt")
    if all(isinstance(one, int) and not isinstance(one, bool) for one in prompts):
        raise ValueError(
            f"generate: prompts is {checks.shown(prompts)} and prompts[0] is {checks.shown(prompts[0])}, wanted a "
            "sequence of ints for each prompt: [[1, 2, 3]] is one prompt"
        )

    def found() -> Tokenizer | None:
        return tokenizer or tokenizer_of(model)

    rows = [prompt_ids(call, f"prompts[{i}]", prompt, vocabulary, found) for i, prompt in enumerate(prompts)]
    return rows, tokenizer is not None or any(isinstance(prompt, str) for prompt in prompts)


def _samplings(model: Model, sampling: Any, n: int, short: dict[str, Any]) -> list[Sampling]:
    """One for each of n prompts."""
    if isinstance(sampling, Sequence) and not isinstance(sampling, str):
        if len(sampling) != n or None in sampling:
            raise ValueError(f"generate: sampling is of {len(sampling)}, wanted one Sampling, or one for each of {n}")
        return [short_form("generate", model.config, one, **short) for one in sampling]
    return [short_form("generate", model.config, sampling, **short)] * n


def _demand_room(rows: list[list[int]], steps: int, room: int) -> None:
    longest = max(map(len, rows)) + steps
    if longest > room:
        made = checks.shown(longest)
        raise ValueError(f"generate: prompt and max_new_tokens make {made} tokens, the model has {room} positions")


def _request(id: int, model: Model, prompt: list[int], sampling: Sampling, tokenizer: Tokenizer | None) -> Request:
    text = None
    if sampling.stop:
        assert tokenizer is not None  # refused before
        text = Text(tokenizer=tokenizer, stop=sampling.stop)
    return Request(
        id=id, tokens=list(prompt), n_prompt=len(prompt), end=len(prompt) + sampling.max_tokens,
        stop_ids=sampling.stop_ids_of("generate", model.config), sampling=sampling, text=text,
    )  # fmt: skip
