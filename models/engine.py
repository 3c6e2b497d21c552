"""Continuous batching: requests come and go, prompts in chunks, then a token or a few a step, in two compiled programs.

All requests share the pages of one cache. One whose prompt begins as another's tokens did, of a running request or of a
finished one whose pages are still there, forks it and computes only the rest: `models.scheduler` says who runs and on
which pages. Decoding is greedy; with a draft a step verifies several proposed tokens at once and truncates those that
the model would not have chosen, so the tokens are the same as without. Whatever fails, a step is done or it is not.
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
from hisa_jax.models.cache import Cache, empty_pages
from hisa_jax.models.drafts import Draft, lookup, propose
from hisa_jax.models.generate import likeliest, phase_graphs
from hisa_jax.models.modeling import Model, Output
from hisa_jax.models.plan import Phase
from hisa_jax.models.scheduler import Request, Saved, Scheduler, Sharing
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
    """What `Engine.step` did. It is the caller's: what becomes of it does not touch the engine.

    Attributes:
        forks: (new request, its donor, tokens shared) of those let in that share a prefix.
        steps: forward passes, none to two.
        finished: new tokens by request.
        failed: requests that ended without, and why.
        draft_errors: requests whose draft raised or proposed what is no token, and what. They go on without proposals.
    """

    forks: list[tuple[int, int, int]] = dataclasses.field(default_factory=list)
    steps: list[Step] = dataclasses.field(default_factory=list)
    finished: dict[int, list[int]] = dataclasses.field(default_factory=dict)
    failed: dict[int, str] = dataclasses.field(default_factory=dict)
    draft_errors: dict[int, str] = dataclasses.field(default_factory=dict)


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
        max_overtakes: how many requests may be let in before one that came earlier and waits for pages; 0: none.
        trace: whether steps say what was selected from what.

    Raises: ValueError: sizes that are none, a draft without `n_draft` or the reverse, a model on a mesh, more tokens
        than it has positions.
    """

    def __init__(
        self, model: Model, *, n_pages: int, rows: int = 8, max_length: int = 512, chunk: int = 64,
        prefill_rows: int = 2, draft: Draft | None = None, n_draft: int = 0, max_overtakes: int = 16,
        trace: bool = False,
    ) -> None:  # fmt: skip
        call = "Engine"
        n_pages, self.rows = checks.whole(call, "n_pages", n_pages), checks.whole(call, "rows", rows)
        self.max_length, self.chunk = checks.whole(call, "max_length", max_length), checks.whole(call, "chunk", chunk)
        self.prefill_rows = checks.whole(call, "prefill_rows", prefill_rows)
        max_overtakes = checks.whole(call, "max_overtakes", max_overtakes, 0)
        self._draft, self._n_draft = draft, checks.whole(call, "n_draft", n_draft, 0)
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
        self.model, self.trace = model, trace
        self._graphs, self._state = phase_graphs(model), nnx.state(model)
        graphs = self._graphs
        sharing = Sharing.of(graphs["prefill"], graphs["last_prefill"], graphs["decode"], self.chunk)
        self.scheduler = Scheduler(
            n_pages=n_pages, page_size=model.page_size, rows=self.rows, max_overtakes=max_overtakes, sharing=sharing
        )
        self.max_pages = -(-self.max_length // model.page_size)
        self._pages: Pages | None = None
        self._next_id, self._is_in_step = 0, False
        jax.block_until_ready(self.pages)  # more than there is memory for show here

    @property
    def pool(self) -> PagePool:
        """Who holds which page."""
        return self.scheduler.pool

    @property
    def pages(self) -> Pages:
        """What the pages hold; empty ones at first, and after they were lost."""
        if self._pages is None:
            model = self.model
            self._pages = empty_pages(model.config, self.pool.n_pages, model.page_size, model.embed[...].dtype)
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
        Raises: ValueError: an empty prompt, what is no token of the vocabulary, no token wanted, or more tokens or
            pages than there will ever be. Nothing has changed then.
        """
        self._demand_no_step("submit")
        config = self.model.config
        tokens = checks.prompt("submit", "prompt", prompt, config.vocab_size)
        end = len(tokens) + checks.whole("submit", "max_new_tokens", max_new_tokens)
        stops = frozenset(checks.stop_ids("submit", stop_ids, config))
        # One page more than its tokens fill: that of a copy.
        needed, n_pages = -(-end // self.pool.page_size) + 1, self.pool.n_pages
        if end > self.max_length or needed > n_pages:
            sizes = f"{checks.shown(end)} tokens in {checks.shown(needed)} pages"
            raise ValueError(
                f"submit: prompt and max_new_tokens make {sizes}, wanted at most max_length={self.max_length} in "
                f"{n_pages}"
            )
        id, self._next_id = self._next_id, self._next_id + 1
        self.scheduler.waiting[id] = Request(id=id, tokens=tokens, n_prompt=len(tokens), end=end, stop_ids=stops)
        return id

    def cancel(self, id: int) -> bool:
        """Ends a request, whether it waits, is read or decodes. Its pages are free again, but those that others share.

        Returns: True; False if it had finished, failed or been cancelled before.
        Raises: ValueError: a number that `submit` never gave.
        """
        self._demand_no_step("cancel")
        number = checks.whole("cancel", "id", id, 0)
        if number >= self._next_id:
            raise ValueError(
                f"cancel: id={checks.shown(number)}, wanted one that submit gave: there were {self._next_id}"
            )
        return self.scheduler.drop(number)

    def release(self) -> None:
        """Gives back the pages of finished requests, kept for others that begin alike."""
        self._demand_no_step("release")
        self.scheduler.release()

    def step(self) -> Report:
        """Lets requests in, reads a chunk of some prompts, then decodes one step of all that have read theirs.

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
        if requests := self._unread():
            report.steps.append(self._read(requests, report))
        if requests := self._decoding():
            report.steps.append(self._decode(requests, report))
        for request in list(self.scheduler.running.values()):
            if request.is_finished:
                report.finished[request.id] = request.tokens[request.n_prompt :]
                self.scheduler.finish(request)
        return report

    def _undo_step(self, saved: Saved, pages: Pages | None) -> None:
        self.scheduler.restore(saved, are_pages_written=self._pages is not pages)
        if not _are_there(self._pages):
            self._pages = None
            self.scheduler.start_over()

    def _demand_no_step(self, call: str) -> None:
        if self._is_in_step:
            raise RuntimeError(f"{call}: called within a step, wanted after it")

    def _unread(self) -> list[Request]:
        """Those that read, as many as a batch takes."""
        unread = [r for r in self.scheduler.running.values() if self.pool.lengths[r.id] < r.n_known]
        # A batch runs one program, so those whose phase has another one wait.
        same = [r for r in unread if self._graphs[self._chunk(r)[0]] == self._graphs[self._chunk(unread[0])[0]]]
        return same[: self.prefill_rows]

    def _decoding(self) -> list[Request]:
        running = self.scheduler.running.values()
        return [r for r in running if self.pool.lengths[r.id] >= r.n_known and not r.is_finished]

    def _chunk(self, request: Request) -> tuple[Phase, list[int]]:
        """What a request reads next. Tokens that it had made before pages were lost are read as they were decoded."""
        start = self.pool.lengths[request.id]
        if start >= request.n_prompt:
            return "decode", request.tokens[start : min(start + self.chunk, request.n_known)]
        left = request.n_prompt - start
        n_new = (left - 1) % self.chunk + 1  # so that whole chunks are left
        return "last_prefill" if n_new == left else "prefill", request.tokens[start : start + n_new]

    def _read(self, requests: list[Request], report: Report) -> Step:
        phase = self._chunk(requests[0])[0]
        starts = [self.pool.lengths[request.id] for request in requests]
        news = [self._chunk(request)[1] for request in requests]
        arrays = self._batch(requests, news, self.prefill_rows, self.chunk)
        out, pages, traced = _read(self._state, self.pages, *arrays, graph=self._graphs[phase], trace=self.trace)
        tokens = np.asarray(out).tolist()  # an error of the device shows here, so before the pages are taken over
        self._pages = pages
        for request, token in zip(requests, tokens, strict=False):
            if self.pool.lengths[request.id] == request.n_prompt == len(request.tokens):
                self._take(request, [token], report)
        return self._step(phase, requests, starts, news, [len(new) for new in news], traced)

    def _decode(self, requests: list[Request], report: Report) -> Step:
        starts = [self.pool.lengths[request.id] for request in requests]
        news = [[request.tokens[-1], *self._proposals(request, report)] for request in requests]
        arrays = self._batch(requests, news, self.rows, 1 + self._n_draft)
        out, n_right, pages, traced = _verify(
            self._state, self.pages, *arrays, graph=self._graphs["decode"], trace=self.trace
        )
        rows, n_kept = np.asarray(out), (1 + np.asarray(n_right))[: len(requests)].tolist()
        self._pages = pages
        for row, (request, start, new, kept) in enumerate(zip(requests, starts, news, n_kept, strict=True)):
            copies = self.pool.truncate(request.id, start + kept)
            assert not copies  # what was written in this step is nobody else's
            first = rows.shape[1] - len(new)
            self._take(request, rows[row, first : first + kept].tolist(), report)
        return self._step("decode", requests, starts, news, n_kept, traced)

    def _proposals(self, request: Request, report: Report) -> list[int]:
        room = min(self._n_draft, request.end - len(request.tokens) - 1)
        if self._draft is None or room < 1:
            return []
        proposals, error = propose(self._draft, request.tokens, room, self.model.config.vocab_size)
        if error is not None:
            report.draft_errors[request.id] = error
        return proposals

    def _take(self, request: Request, tokens: list[int], report: Report) -> None:
        """Adds new tokens up to one that ends the request; -1, where the logits gave none, ends it as failed."""
        for token in tokens:
            if token < 0:
                n_made = len(request.tokens) - request.n_prompt
                report.failed[request.id] = f"logits are not finite (NaN or infinity) after {n_made} new tokens"
                self.scheduler.drop(request.id)
                return
            request.tokens.append(token)
            if request.is_finished:
                return

    def _batch(self, requests: list[Request], news: list[list[int]], B: int, T: int) -> tuple[np.ndarray, ...]:
        """Makes room for new tokens; tables [B, P], lengths [B] before, ids [B, T] in the last columns, n_new [B]."""
        ids, lengths, n_new = np.zeros((B, T), np.int32), np.zeros(B, np.int32), np.zeros(B, np.int32)
        copies = []
        for row, (request, new) in enumerate(zip(requests, news, strict=True)):
            ids[row, T - len(new) :], lengths[row], n_new[row] = new, self.pool.lengths[request.id], len(new)
            copies += self.scheduler.extend(request, len(new))
        if copies:
            pairs = np.full((2, max(self.rows, self.prefill_rows)), -1, np.int32)
            pairs[:, : len(copies)] = np.transpose(copies)
            self._pages = _copy(self.pages, *pairs)
        tables = np.full((B, self.max_pages), -1, np.int32)
        tables[: len(requests)] = self.pool.table([request.id for request in requests], self.max_pages)
        return tables, lengths, ids, n_new

    def _step(
        self, phase: Phase, requests: list[Request], starts: list[int], news: list[list[int]], n_kept: list[int],
        traced: Any,
    ) -> Step:  # fmt: skip
        full = [i for i, kind in enumerate(self.model.config.indexer_kinds) if kind == "full"]
        layers = tuple(Traced(i, *layer) for i, layer in zip(full, traced, strict=False))
        ids, n_new = [request.id for request in requests], [len(new) for new in news]
        return Step(phase=phase, requests=ids, starts=starts, n_new=n_new, n_kept=n_kept, layers=layers)


def _are_there(pages: Pages | None) -> bool:
    """Whether no page was given to a program that did not return, or returned by one that failed."""
    try:
        jax.block_until_ready(pages)  # raises for what was deleted, too
    except Exception:
        return False
    return True


def _run(
    state: nnx.State, pages: Pages, tables: Array, lengths: Array, ids: Array, n_new: Array, graph: nnx.GraphDef,
    trace: bool, last_only: bool,
) -> tuple[Output, list]:  # fmt: skip
    T = ids.shape[1]
    mask = jnp.arange(T)[None, :] >= T - n_new[:, None]
    cache = Cache(layers=pages, block_tables=tables, lengths=lengths)
    out = nnx.merge(graph, state).run(ids, cache=cache, mask=mask, last_only=last_only, trace=trace)
    return out, [(layer.selection, *layer.index_inputs) for layer in out.layers if layer.index_inputs is not None]


@functools.partial(jax.jit, static_argnames=("graph", "trace"), donate_argnames="pages")
def _read(
    state: nnx.State, pages: Pages, tables: Array, lengths: Array, ids: Array, n_new: Array, *, graph: nnx.GraphDef,
    trace: bool,
) -> tuple[Array, Pages, list]:  # fmt: skip
    """A chunk of prompts: the likeliest token [B] after it, the pages, what was selected."""
    out, traced = _run(state, pages, tables, lengths, ids, n_new, graph, trace, last_only=True)
    return likeliest(out.logits[:, 0]), out.cache.layers, traced


@functools.partial(jax.jit, static_argnames=("graph", "trace"), donate_argnames="pages")
def _verify(
    state: nnx.State, pages: Pages, tables: Array, lengths: Array, ids: Array, n_new: Array, *, graph: nnx.GraphDef,
    trace: bool,
) -> tuple[Array, Array, Pages, list]:  # fmt: skip
    """The last token and proposals: the likeliest token after each [B, T], how many proposals were right [B], the
    pages without the others, what was selected."""
    out, traced = _run(state, pages, tables, lengths, ids, n_new, graph, trace, last_only=False)
    tokens, T = likeliest(out.logits), ids.shape[1]
    is_proposal = jnp.arange(1, T)[None, :] > T - n_new[:, None]
    is_right = jnp.where(is_proposal, ids[:, 1:] == tokens[:, :-1], True)
    n_right = jnp.sum(jnp.cumprod(is_right, axis=1) * is_proposal, axis=1, dtype=jnp.int32)
    layers = out.cache.layers
    if T > 1:
        kept = lengths + jnp.minimum(n_new, 1 + n_right)
        layers = tuple(hj.truncate(p, tables, lengths + n_new, kept, max_tokens=T - 1) for p in layers)
    return tokens, n_right, layers, traced


@functools.partial(jax.jit, donate_argnums=0)
def _copy(pages: Pages, source: Array, target: Array) -> Pages:
    return tuple(hj.copy_pages(layer, source, target) for layer in pages)
