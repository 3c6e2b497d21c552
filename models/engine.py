"""Continuous batching: requests come and go, prompts in chunks, then a token or a few a step, in two compiled programs.

All requests share the pages of one cache. A prompt that begins like the tokens of another request, which runs or whose
pages are still there, forks that request and computes only the rest. `models.scheduler` says which requests run and on
which pages; here are the compiled programs. Decoding is greedy; with a draft a step verifies several proposed tokens at
once and truncates those that the model would not have chosen, so the tokens are the same as without. Whatever fails, a
step is done or it is not.
"""

import dataclasses
import functools
from collections.abc import Collection, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array

import hisa_jax as hj
from hisa_jax.models import checks
from hisa_jax.models.cache import Cache
from hisa_jax.models.drafts import Draft, lookup, propose
from hisa_jax.models.generate import likeliest, phase_graphs
from hisa_jax.models.modeling import Model, Output
from hisa_jax.models.plan import Phase
from hisa_jax.models.replay.record import Rollout
from hisa_jax.models.replay.recorder import Recorder, Rows, checked_start, logprob_of, rows_of
from hisa_jax.models.scheduler import Batch, Request, Saved, Scheduler
from hisa_jax.page_pool import PagePool

__all__ = ["Draft", "Engine", "Report", "Step", "Traced", "lookup"]

Pages = tuple[hj.IndexCache, ...]


class Traced(NamedTuple):
    """What one layer selected in a step, and from what.

    Attributes:
        layer: its number.
        selection: of [B, T]; the new tokens of a row are its last columns.
        q, k, w: index queries [B, T, H, D], index keys [B, T, D] and head weights [B, T, H] of the new tokens.
    """

    layer: int
    selection: hj.Selection
    q: Array
    k: Array | hj.QuantizedKeys
    w: Array


class Trace(NamedTuple):
    """What a pass tells beside tokens: what was selected from what; what queries and routers chose, for rollouts."""

    inputs: bool
    choices: bool


class Chosen(NamedTuple):
    """What a pass chose, and the log-probabilities of its tokens, [B, T] or [B, 1]."""

    rows: Rows
    logprobs: Array


class Seen(NamedTuple):
    """What a pass tells: of each layer that selects (selection, q, k, w), and its choices, if asked for."""

    layers: list
    chosen: Chosen | None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Step:
    """One forward pass.

    Attributes:
        phase: "decode", or that of the chunks.
        requests: of each row.
        starts, n_new: tokens of each before, and how many went in.
        n_kept: how many of those stayed; the others were rejected proposals.
        layers: of those that select, if the engine traces.
    """

    phase: Phase
    requests: list[int]
    starts: list[int]
    n_new: list[int]
    n_kept: list[int]
    layers: tuple[Traced, ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Report:
    """What `Engine.step` did. The caller may change it without effect on the engine.

    Attributes:
        forks: (new request, its donor, tokens shared) of those admitted that share a prefix.
        steps: forward passes, none to two.
        finished: new tokens by request.
        failed: requests that ended without, and why.
        draft_errors: requests whose draft raised or proposed something that is not a token, and what that was. They go
            on without proposals.
        rollouts: of those that finished, if the engine returns selections.
    """

    forks: list[tuple[int, int, int]] = dataclasses.field(default_factory=list)
    steps: list[Step] = dataclasses.field(default_factory=list)
    finished: dict[int, list[int]] = dataclasses.field(default_factory=dict)
    failed: dict[int, str] = dataclasses.field(default_factory=dict)
    draft_errors: dict[int, str] = dataclasses.field(default_factory=dict)
    rollouts: dict[int, Rollout] = dataclasses.field(default_factory=dict)


class Engine:
    """A model, its pages, and the requests on it. For one thread.

    Args:
        model: on one device; its plan selects by phase.
        n_pages: pages of each layer, for all requests.
        rows: requests that decode at a time.
        max_length: tokens that a request may have.
        chunk: prompt tokens a request and step. Chunks are cut as `generate` cuts them, from a prompt's end.
        prefill_rows: prompts that are read at a time.
        draft: proposes tokens to verify; None decodes one by one.
        n_draft: proposals a request and step.
        max_overtakes: how many requests may be admitted before one that came earlier and waits for pages; 0: none.
        trace: whether steps say what was selected from what.
        return_selections: whether reports have a `Rollout` of each request that finishes: of its own queries and those
            of a prefix that it shares. The host keeps `Rollout.bytes_per_token` of each token in the cache.
        selections_from: leaves out what queries at positions before it selected, as for `generate`.

    Raises: ValueError: invalid sizes, a draft without `n_draft` or the reverse, a model on a mesh, more tokens
        than it has positions.
    """

    def __init__(
        self, model: Model, *, n_pages: int, rows: int = 8, max_length: int = 512, chunk: int = 64,
        prefill_rows: int = 2, draft: Draft | None = None, n_draft: int = 0, max_overtakes: int = 16,
        trace: bool = False, return_selections: bool = False, selections_from: int = 0,
    ) -> None:  # fmt: skip
        sizes = dict(
            n_pages=n_pages, max_length=max_length, rows=rows, prefill_rows=prefill_rows, chunk=chunk,
            max_overtakes=max_overtakes,
        )  # fmt: skip
        for name, size in sizes.items():
            sizes[name] = checks.whole("Engine", name, size, 0 if name == "max_overtakes" else 1)
        self._draft, self._n_draft = draft, checks.whole("Engine", "n_draft", n_draft, 0)
        if (draft is None) != (n_draft == 0):
            raise ValueError(
                f"Engine: n_draft={n_draft}, wanted {'0 without' if draft is None else '1 or more with'} a draft"
            )
        if draft is not None and not callable(draft):
            raise ValueError(f"Engine: draft={checks.shown(draft)}, wanted what can be called, or None")
        if model.mesh is not None:
            raise ValueError("Engine: model is on a mesh, wanted one on one device")
        if max_length > (room := model.config.max_position_embeddings):
            raise ValueError(
                f"Engine: max_length={checks.shown(max_length)}, wanted at most {room}, the model's positions"
            )
        start = checked_start("Engine", selections_from, return_selections)
        self.model, self._trace = model, Trace(trace, return_selections)
        self._recorder = Recorder(model, start) if return_selections else None
        self._graphs, self._state = phase_graphs(model), nnx.state(model)
        self.scheduler = Scheduler(**sizes, page_size=model.page_size, programs=self._graphs)
        self._pages: Pages | None = None
        self._is_in_step = False
        jax.block_until_ready(self.pages)  # more than there is memory for show here

    @property
    def pool(self) -> PagePool:
        """Who holds which page."""
        return self.scheduler.pool

    @property
    def pages(self) -> Pages:
        """What the pages hold; empty ones at first, and after they were lost."""
        if self._pages is None:
            self._pages = self.model.empty_pages(self.pool.n_pages)
        return self._pages

    @property
    def is_idle(self) -> bool:
        return not self.scheduler.waiting and not self.scheduler.running

    def submit(self, prompt: Sequence[int], max_new_tokens: int, stop_ids: Collection[int] | None = None) -> int:
        """Queues a request.

        Args:
            prompt: token ids, copied.
            max_new_tokens: how many to make at most.
            stop_ids: tokens that end it; None: those of the model's config; () for none.

        Returns: its number.
        Raises: ValueError: an empty prompt, tokens outside of the vocabulary, max_new_tokens below 1, more tokens or
            pages than there will ever be. Nothing has changed then.
        """
        self._demand_no_step("submit")
        config = self.model.config
        tokens = checks.prompt("submit", "prompt", prompt, config.vocab_size)
        n_new = checks.whole("submit", "max_new_tokens", max_new_tokens)
        stops = frozenset(checks.stop_ids("submit", stop_ids, config))
        return self.scheduler.submit(tokens, n_new, stops)

    def cancel(self, id: int) -> bool:
        """Ends a request, whether it waits, is read or decodes. Its pages are free again, but those that others share.

        Returns: True; False if it had finished, failed or been cancelled before.
        Raises: ValueError: a number that `submit` never gave.
        """
        self._demand_no_step("cancel")
        number = checks.whole("cancel", "id", id, 0)
        if number >= (n := self.scheduler.n_submitted):
            raise ValueError(f"cancel: id={checks.shown(number)}, wanted one that submit gave: there were {n}")
        return self.scheduler.drop(number)

    def release(self) -> None:
        """Frees the pages of finished requests, which were kept for others that begin alike."""
        self._demand_no_step("release")
        self.scheduler.release()

    def step(self) -> Report:
        """Admits requests, reads a chunk of some prompts, then decodes one step of all that have read theirs.

        Raises: whatever went wrong, out of memory or an interrupt for instance. The step was not done then: requests
            are as before it, and the next call does it again. If the pages were lost on the way, every running request
            waits again before all others and reads its tokens anew; the tokens stay the same.
        """
        self._demand_no_step("step")
        saved, pages = self.scheduler.save(), self._pages
        try:
            self._is_in_step = True
            return self._do_step()
        except BaseException:
            self._undo_step(saved, pages)
            raise
        finally:
            self._is_in_step = False

    def _do_step(self) -> Report:
        report = Report(forks=self.scheduler.admit())
        if self._recorder is not None:
            for fork in report.forks:
                self._recorder.fork(*fork)
        if batch := self.scheduler.next_chunks():
            report.steps.append(self._read(batch, report))
        # Those whose last chunk was just read decode in the same step.
        if requests := self.scheduler.decoding():
            report.steps.append(self._decode(requests, report))
        for request in [request for request in self.scheduler.running.values() if request.is_finished]:
            report.finished[request.id] = request.tokens[request.n_prompt :]
            if self._recorder is not None:
                of_request = request.id, request.tokens, request.n_prompt
                report.rollouts[request.id] = self._recorder.rollout([of_request])
            self.scheduler.finish(request)
        if self._recorder is not None:
            # Last of all: a step that is undone has forgotten nothing. Those that lost their pages wait with tokens.
            self._recorder.keep({*self.pool.lengths, *self.scheduler.waiting})
        return report

    def _undo_step(self, saved: Saved, pages: Pages | None) -> None:
        self.scheduler.restore(saved, are_pages_written=self._pages is not pages)
        if not _are_there(self._pages):
            self._pages = None
            self.scheduler.start_over()

    def _demand_no_step(self, call: str) -> None:
        if self._is_in_step:
            raise RuntimeError(f"{call}: called within a step, wanted after it")

    def _read(self, batch: Batch, report: Report) -> Step:
        arrays = self._place(batch, self.scheduler.prefill_rows, self.scheduler.chunk)
        graph = self._graphs[batch.phase]
        out, pages, traced = _read(self._state, self.pages, *arrays, graph=graph, trace=self._trace)
        tokens = np.asarray(out).tolist()  # an error of the device shows here, so before the pages are taken over
        chosen = jax.device_get(traced.chosen)
        self._pages = pages
        n_kept = [len(new) for new in batch.news]
        self._record(batch, n_kept, chosen)
        for row, (request, token) in enumerate(zip(batch.requests, tokens, strict=False)):
            if self.pool.lengths[request.id] == request.n_prompt == len(request.tokens):
                self._record_made(request, chosen, row, slice(-1, None))
                self._take(request, [token], report)
        return self._step(batch, n_kept, traced.layers)

    def _decode(self, requests: list[Request], report: Report) -> Step:
        news = [[request.tokens[-1], *self._proposals(request, report)] for request in requests]
        batch = self.scheduler.batch("decode", requests, news)
        arrays = self._place(batch, self.scheduler.rows, 1 + self._n_draft)
        graph = self._graphs["decode"]
        out, n_right, pages, traced = _verify(self._state, self.pages, *arrays, graph=graph, trace=self._trace)
        rows, n_kept = np.asarray(out), (1 + np.asarray(n_right))[: len(requests)].tolist()
        chosen = jax.device_get(traced.chosen)
        self._pages = pages
        self._record(batch, n_kept, chosen)
        for i, (request, start, new, kept) in enumerate(zip(*batch[1:], n_kept, strict=True)):
            self.scheduler.truncate(request, start + kept)
            first = rows.shape[1] - len(new)
            self._record_made(request, chosen, i, slice(first, first + kept))
            self._take(request, rows[i, first : first + kept].tolist(), report)
        return self._step(batch, n_kept, traced.layers)

    def _record(self, batch: Batch, n_kept: list[int], chosen: Chosen | None) -> None:
        """Keeps what the new tokens of a pass chose, but for rejected proposals."""
        if self._recorder is None or chosen is None:
            return
        T = chosen.rows.indices[0].shape[1]
        for row, (request, start, new, kept) in enumerate(zip(*batch[1:], n_kept, strict=True)):
            first = T - len(new)
            self._recorder.write(request.id, start, chosen.rows, row, slice(first, first + kept))

    def _record_made(self, request: Request, chosen: Chosen | None, row: int, columns: slice) -> None:
        """Keeps the log-probabilities of tokens that a request is about to take."""
        if self._recorder is not None and chosen is not None:
            n_before = len(request.tokens) - request.n_prompt
            self._recorder.made(request.id, n_before, chosen.logprobs[row, columns].tolist())

    def _proposals(self, request: Request, report: Report) -> list[int]:
        room = min(self._n_draft, request.end - len(request.tokens) - 1)
        if self._draft is None or room < 1:
            return []
        proposals, error = propose(self._draft, request.tokens, room, self.model.config.vocab_size)
        if error is not None:
            report.draft_errors[request.id] = error
        return proposals

    def _take(self, request: Request, tokens: list[int], report: Report) -> None:
        if (error := self.scheduler.take(request, tokens)) is not None:
            report.failed[request.id] = error

    def _place(self, batch: Batch, B: int, T: int) -> tuple[np.ndarray, ...]:
        """As `Scheduler.place`, and makes the copies."""
        copies, arrays = self.scheduler.place(batch, B, T)
        if copies:
            # Of one size, whatever their number, so that the program compiles once.
            pairs = np.full((2, max(self.scheduler.rows, self.scheduler.prefill_rows)), -1, np.int32)
            pairs[:, : len(copies)] = np.transpose(copies)
            self._pages = _copy(self.pages, *pairs)
        return arrays

    def _step(self, batch: Batch, n_kept: list[int], traced: Any) -> Step:
        full = [i for i, kind in enumerate(self.model.config.indexer_kinds) if kind == "full"]
        layers = tuple(Traced(i, *layer) for i, layer in zip(full, traced, strict=False))
        ids, n_new = [request.id for request in batch.requests], [len(new) for new in batch.news]
        return Step(phase=batch.phase, requests=ids, starts=batch.starts, n_new=n_new, n_kept=n_kept, layers=layers)


def _are_there(pages: Pages | None) -> bool:
    """Whether no page was given to a program that did not return, or returned by one that failed."""
    try:
        jax.block_until_ready(pages)  # raises for what was deleted, too
    except Exception:
        return False
    return True


def _run(
    state: nnx.State, pages: Pages, tables: Array, lengths: Array, ids: Array, n_new: Array, graph: nnx.GraphDef,
    trace: Trace, last_only: bool,
) -> Output:  # fmt: skip
    T = ids.shape[1]
    mask = jnp.arange(T)[None, :] >= T - n_new[:, None]
    cache = Cache(layers=pages, block_tables=tables, lengths=lengths)
    return nnx.merge(graph, state).run(ids, cache=cache, mask=mask, last_only=last_only, trace=any(trace))


def _seen(out: Output, tokens: Array, trace: Trace) -> Seen:
    """Of a pass that chose `tokens` [B, T], or [B, 1] after its last one."""
    layers = [layer for layer in out.layers if trace.inputs and layer.index_inputs is not None]
    chosen = Chosen(rows_of(out), logprob_of(out.logits, tokens)) if trace.choices else None
    return Seen([(layer.selection, *(layer.index_inputs or ())) for layer in layers], chosen)


@functools.partial(jax.jit, static_argnames=("graph", "trace"), donate_argnames="pages")
def _read(
    state: nnx.State, pages: Pages, tables: Array, lengths: Array, ids: Array, n_new: Array, *, graph: nnx.GraphDef,
    trace: Trace,
) -> tuple[Array, Pages, Seen]:  # fmt: skip
    """A chunk of prompts: the likeliest token [B] after it, the pages, what was selected."""
    out = _run(state, pages, tables, lengths, ids, n_new, graph, trace, last_only=True)
    tokens = likeliest(out.logits)
    return tokens[:, 0], out.cache.layers, _seen(out, tokens, trace)


@functools.partial(jax.jit, static_argnames=("graph", "trace"), donate_argnames="pages")
def _verify(
    state: nnx.State, pages: Pages, tables: Array, lengths: Array, ids: Array, n_new: Array, *, graph: nnx.GraphDef,
    trace: Trace,
) -> tuple[Array, Array, Pages, Seen]:  # fmt: skip
    """The last token and proposals: the likeliest token after each [B, T], how many proposals were right [B], the
    pages without the others, what was selected."""
    out = _run(state, pages, tables, lengths, ids, n_new, graph, trace, last_only=False)
    tokens, T = likeliest(out.logits), ids.shape[1]
    is_proposal = jnp.arange(1, T)[None, :] > T - n_new[:, None]
    is_right = jnp.where(is_proposal, ids[:, 1:] == tokens[:, :-1], True)
    n_right = jnp.sum(jnp.cumprod(is_right, axis=1) * is_proposal, axis=1, dtype=jnp.int32)
    layers = out.cache.layers
    if T > 1:
        kept = lengths + jnp.minimum(n_new, 1 + n_right)
        layers = tuple(hj.truncate(p, tables, lengths + n_new, kept, max_tokens=T - 1) for p in layers)
    return tokens, n_right, layers, _seen(out, tokens, trace)


@functools.partial(jax.jit, donate_argnums=0)
def _copy(pages: Pages, source: Array, target: Array) -> Pages:
    return tuple(hj.copy_pages(layer, source, target) for layer in pages)
