"""Continuous batching: requests come and go, prompts in chunks, then a token or a few a step, in two compiled programs.

All requests share the pages of one cache. One whose prompt begins as another's tokens did, of a running request or of a
finished one whose pages are still there, forks it and computes only the rest. A request is let in when there are pages
for it to its end, so none is ever thrown out. Decoding is greedy; with a draft a step verifies several proposed tokens
at once and truncates those that the model would not have chosen, so the tokens are the same as without.
"""

import collections
import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, get_args

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array

import hisa_jax as hj
from hisa_jax.pages import PagePool
from models.cache import Cache, empty_pages
from models.modeling import Model, Output
from models.plan import Phase

Pages = tuple[hj.IndexCache, ...]
# What a request may continue with: of its tokens so far and how many are wanted, proposals, or fewer, or none.
Draft = Callable[[Sequence[int], int], Sequence[int]]


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
    """What `Engine.step` did.

    Attributes:
        forks: (new request, its donor, tokens shared) of those let in that share a prefix.
        steps: forward passes, none to two.
        finished: new tokens by request.
    """

    forks: list[tuple[int, int, int]]
    steps: list[Step]
    finished: dict[int, list[int]]


@dataclasses.dataclass(kw_only=True)
class Request:
    """One that is not finished. `tokens` begins with the prompt; `end` is how many there may be."""

    id: int
    tokens: list[int]
    n_prompt: int
    end: int
    stop_ids: frozenset[int]
    must_copy: bool = False  # shares a part of a page, which somebody will have to copy


class Engine:
    """A model, its pages, and the requests on it.

    Args:
        model: on one device; its plan selects by phase.
        n_pages: pages of each layer, for all requests.
        rows: requests that decode at a time.
        max_length: tokens that a request may have.
        chunk: prompt tokens a request and step.
        prefill_rows: prompts that are read at a time.
        draft: proposes tokens to verify; None decodes one by one.
        n_draft: proposals a request and step.
        trace: whether steps say what was selected from what.
    """

    def __init__(
        self, model: Model, *, n_pages: int, rows: int = 8, max_length: int = 512, chunk: int = 64,
        prefill_rows: int = 2, draft: Draft | None = None, n_draft: int = 0, trace: bool = False,
    ) -> None:  # fmt: skip
        sizes = {"n_pages": n_pages, "rows": rows, "max_length": max_length, "chunk": chunk}
        for name, size in (sizes | {"prefill_rows": prefill_rows}).items():
            if size < 1:
                raise ValueError(f"Engine: {name}={size}, wanted at least 1")
        if (draft is None) != (n_draft == 0) or n_draft < 0:
            raise ValueError(
                f"Engine: n_draft={n_draft}, wanted {'0 without' if draft is None else '1 or more with'} a draft"
            )
        if model.mesh is not None:
            raise ValueError("Engine: model is on a mesh, wanted one on one device")
        if max_length > model.config.max_position_embeddings:
            room = model.config.max_position_embeddings
            raise ValueError(f"Engine: max_length={max_length}, wanted at most {room}, the model's positions")
        phases: tuple[Phase, ...] = get_args(Phase)
        layers = range(model.config.num_hidden_layers)
        self._graphs = {p: nnx.graphdef(model.with_method([model.plan(i, p) for i in layers])) for p in phases}
        self._state = nnx.state(model)
        self.model, self.trace = model, trace
        self.pool = PagePool(n_pages, model.page_size)
        self.pages: Pages = empty_pages(model.config, n_pages, model.page_size, model.embed[...].dtype)
        self.max_pages = -(-max_length // model.page_size)
        self.rows, self.prefill_rows, self.chunk, self.max_length = rows, prefill_rows, chunk, max_length
        self._draft, self._n_draft = draft, n_draft
        self.waiting: collections.deque[Request] = collections.deque()
        self.running: dict[int, Request] = {}
        self._donors: collections.OrderedDict[int, list[int]] = collections.OrderedDict()  # finished, oldest use first
        self._next_id = 0

    def submit(self, prompt: Sequence[int], max_new_tokens: int, stop_ids: Sequence[int] = ()) -> int:
        """Queues a request.

        Returns: its number.
        Raises: ValueError: an empty prompt, a token outside of the vocabulary, no token wanted, or more tokens or pages
            than there will ever be.
        """
        end, n_pages = len(prompt) + max_new_tokens, self.pool.n_pages
        if not len(prompt) or max_new_tokens < 1:
            raise ValueError(f"submit: {len(prompt)} prompt and {max_new_tokens} new tokens, wanted at least 1 each")
        if not 0 <= min(prompt) <= max(prompt) < (vocabulary := self.model.config.vocab_size):
            raise ValueError(f"submit: prompt has tokens {min(prompt)} to {max(prompt)}, wanted 0 to {vocabulary - 1}")
        # One page more than its tokens fill: that of a copy.
        needed = -(-end // self.pool.page_size) + 1
        if end > self.max_length or needed > n_pages:
            raise ValueError(
                f"submit: {end} tokens in {needed} pages, wanted at most max_length={self.max_length} in {n_pages}"
            )
        id, self._next_id = self._next_id, self._next_id + 1
        request = Request(id=id, tokens=list(prompt), n_prompt=len(prompt), end=end, stop_ids=frozenset(stop_ids))
        self.waiting.append(request)
        return id

    @property
    def is_idle(self) -> bool:
        return not self.waiting and not self.running

    def step(self) -> Report:
        """Lets requests in, reads a chunk of some prompts, then decodes one step of all that have read theirs."""
        forks, finished = self._admit(), {}
        steps = []
        if requests := self._prompts():
            steps.append(self._read(requests))
        if requests := self._decoding():
            steps.append(self._decode(requests))
        for request in list(self.running.values()):
            made = request.tokens[request.n_prompt :]
            stop = next((i + 1 for i, token in enumerate(made) if token in request.stop_ids), None)
            if stop is not None or len(request.tokens) >= request.end:
                finished[request.id] = made[:stop]
                self._donors[request.id] = request.tokens
                del self.running[request.id]
        return Report(forks=forks, steps=steps, finished=finished)

    def release(self) -> None:
        """Gives back the pages of finished requests, kept for others that begin alike."""
        while self._donors:
            self._drop_oldest_donor()

    def _admit(self) -> list[tuple[int, int, int]]:
        forks = []
        while self.waiting and len(self.running) < self.rows:
            request = self.waiting[0]
            donor, shared = self._longest_prefix(request.tokens[: request.n_prompt - 1])
            if donor is None:
                self.pool.add(request.id)
            else:
                self.pool.fork(donor, request.id, shared)
            request.must_copy = shared % self.pool.page_size > 0
            self.running[request.id] = request
            needed = sum(map(self._pages_to_come, self.running.values()))
            while needed > self.pool.n_free and self._donors:
                self._drop_oldest_donor()
            if needed > self.pool.n_free:
                del self.running[request.id]
                self.pool.free(request.id)
                break
            self.waiting.popleft()
            if donor is not None:
                forks.append((request.id, donor, shared))
        return forks

    def _pages_to_come(self, request: Request) -> int:
        size = self.pool.page_size
        return -(-request.end // size) - -(-self.pool.lengths[request.id] // size) + request.must_copy

    def _drop_oldest_donor(self) -> None:
        id, _ = self._donors.popitem(last=False)
        self.pool.free(id)

    def _longest_prefix(self, prompt: list[int]) -> tuple[int | None, int]:
        """Who has the most of these tokens in the cache, and how many; None for less than a page."""
        best, most, wanted = None, self.pool.page_size - 1, np.asarray(prompt)
        known = self._donors | {id: request.tokens for id, request in self.running.items()}
        for id, tokens in known.items():
            n = min(self.pool.lengths[id], len(wanted))
            if n > most:
                differs = np.flatnonzero(wanted[:n] != np.asarray(tokens[:n]))
                n = int(differs[0]) if len(differs) else n
                best, most = (id, n) if n > most else (best, most)
        if best is not None and best in self._donors:
            self._donors.move_to_end(best)
        return best, most if best is not None else 0

    def _prompts(self) -> list[Request]:
        unread = [request for request in self.running.values() if self.pool.lengths[request.id] < request.n_prompt]
        # A batch runs one program, so those whose phase has another one wait.
        same = [
            request for request in unread if self._graphs[self._phase(request)] == self._graphs[self._phase(unread[0])]
        ]
        return same[: self.prefill_rows]

    def _decoding(self) -> list[Request]:
        return [
            request for request in self.running.values()
            if self.pool.lengths[request.id] >= request.n_prompt and len(request.tokens) < request.end
            and request.tokens[-1] not in request.stop_ids
        ]  # fmt: skip

    def _phase(self, request: Request) -> Phase:
        is_last = request.n_prompt - self.pool.lengths[request.id] <= self.chunk
        return "last_prefill" if is_last else "prefill"

    def _read(self, requests: list[Request]) -> Step:
        phase = self._phase(requests[0])
        starts = [self.pool.lengths[request.id] for request in requests]
        news = [r.tokens[at : min(at + self.chunk, r.n_prompt)] for r, at in zip(requests, starts, strict=True)]
        arrays = self._batch(requests, news, self.prefill_rows, self.chunk)
        tokens, self.pages, traced = _read(
            self._state, self.pages, *arrays, graph=self._graphs[phase], trace=self.trace
        )
        for request, token in zip(requests, np.asarray(tokens).tolist(), strict=False):
            if self.pool.lengths[request.id] == request.n_prompt:
                request.tokens.append(token)
        n_new = list(map(len, news))
        return self._step(phase, requests, starts, n_new, n_new, traced)

    def _decode(self, requests: list[Request]) -> Step:
        starts, news = [self.pool.lengths[request.id] for request in requests], []
        for request in requests:
            room = min(self._n_draft, request.end - len(request.tokens) - 1)
            proposed = list(self._draft(request.tokens, room))[:room] if self._draft and room > 0 else []
            news.append([request.tokens[-1], *proposed])
        arrays = self._batch(requests, news, self.rows, 1 + self._n_draft)
        tokens, n_right, self.pages, traced = _verify(
            self._state, self.pages, *arrays, graph=self._graphs["decode"], trace=self.trace
        )
        rows, n_kept = np.asarray(tokens), (1 + np.asarray(n_right))[: len(requests)].tolist()
        for row, (request, start, new, kept) in enumerate(zip(requests, starts, news, n_kept, strict=True)):
            copies = self.pool.truncate(request.id, start + kept)
            assert not copies  # what was written in this step is nobody else's
            first = rows.shape[1] - len(new)
            request.tokens += rows[row, first : first + kept].tolist()
        return self._step("decode", requests, starts, list(map(len, news)), n_kept, traced)

    def _batch(self, requests: list[Request], news: list[list[int]], B: int, T: int) -> tuple[np.ndarray, ...]:
        """Makes room for new tokens; tables [B, P], lengths [B] before, ids [B, T] in the last columns, n_new [B]."""
        ids, lengths, n_new = np.zeros((B, T), np.int32), np.zeros(B, np.int32), np.zeros(B, np.int32)
        copies = []
        for row, (request, new) in enumerate(zip(requests, news, strict=True)):
            ids[row, T - len(new) :], lengths[row], n_new[row] = new, self.pool.lengths[request.id], len(new)
            copies += self.pool.extend(request.id, len(new))
            request.must_copy = False
        if copies:
            pairs = np.full((2, max(self.rows, self.prefill_rows)), -1, np.int32)
            pairs[:, : len(copies)] = np.transpose(copies)
            self.pages = _copy(self.pages, *pairs)
        tables = np.full((B, self.max_pages), -1, np.int32)
        tables[: len(requests)] = self.pool.table([request.id for request in requests], self.max_pages)
        return tables, lengths, ids, n_new

    def _step(
        self, phase: Phase, requests: list[Request], starts: list[int], n_new: list[int], n_kept: list[int], traced: Any
    ) -> Step:
        full = [i for i, kind in enumerate(self.model.config.indexer_kinds) if kind == "full"]
        layers = tuple(Traced(i, *layer) for i, layer in zip(full, traced, strict=False))
        ids = [request.id for request in requests]
        return Step(phase=phase, requests=ids, starts=starts, n_new=n_new, n_kept=n_kept, layers=layers)


def lookup(tokens: Sequence[int], n: int) -> list[int]:
    """A draft without a model: what followed the last two tokens when they last stood together."""
    last = tokens[-2:]
    for at in range(len(tokens) - 3, -1, -1):
        if tokens[at : at + 2] == last:
            return list(tokens[at + 2 : at + 2 + n])
    return []


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
    return jnp.argmax(out.logits[:, 0], axis=-1).astype(jnp.int32), out.cache.layers, traced


@functools.partial(jax.jit, static_argnames=("graph", "trace"), donate_argnames="pages")
def _verify(
    state: nnx.State, pages: Pages, tables: Array, lengths: Array, ids: Array, n_new: Array, *, graph: nnx.GraphDef,
    trace: bool,
) -> tuple[Array, Array, Pages, list]:  # fmt: skip
    """The last token and proposals: the likeliest token after each [B, T], how many proposals were right [B], the
    pages without the others, what was selected."""
    out, traced = _run(state, pages, tables, lengths, ids, n_new, graph, trace, last_only=False)
    tokens, T = jnp.argmax(out.logits, axis=-1).astype(jnp.int32), ids.shape[1]
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
