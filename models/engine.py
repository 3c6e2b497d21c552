"""Continuous batching: requests come and go, prompts in chunks, then a token or a few a step, in two compiled programs.

All requests share the pages of one cache. A prompt that begins like the tokens of another request, which runs or whose
pages are still there, forks that request and computes only the rest. `models.scheduler` says which requests run and on
which pages, `models.pass_runner` runs the compiled programs. With a draft a step verifies several proposed tokens at
once and truncates those that would not have been taken, so the tokens are the same as without. Whatever fails, a step
is done or it is not. `models.streams` hands out tokens and text as they come.

On a mesh requests are spread over "data", and the pages of each over "context". Every process of the mesh has an engine
of its own, which is told the same and so decides the same; before each pass they make sure of it (`models.agreement`).
"""

from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any

import jax

from hisa_jax.models import checks
from hisa_jax.models.agreement import Agreement
from hisa_jax.models.drafts import Draft, lookup, propose
from hisa_jax.models.draws import Draws, draws_of, read_logprobs
from hisa_jax.models.engine_mesh import in_common, split_of
from hisa_jax.models.modeling import Model
from hisa_jax.models.pass_runner import PassRunner
from hisa_jax.models.passes import Pages, Taken, Trace
from hisa_jax.models.prompts import prompt_ids, tokenizer_of
from hisa_jax.models.replay.recorder import Recorder, Rows, checked_start
from hisa_jax.models.report import Report, Step, Traced
from hisa_jax.models.request import Request
from hisa_jax.models.sampling import Sampling, short_form
from hisa_jax.models.scheduler import Batch, Saved, Scheduler
from hisa_jax.models.stacked import Stacked
from hisa_jax.models.streams import Piece, Reader
from hisa_jax.models.structure import structures_of
from hisa_jax.models.text import Text
from hisa_jax.models.tokens import Tokenizer
from hisa_jax.page_pool import PagePool

__all__ = ["Draft", "Engine", "Report", "Step", "Traced", "lookup"]


class Engine:
    """A model, its pages, and the requests on it. For one thread.

    Args:
        model: on one device or a mesh; its plan selects by phase. The weights are those that it has now, by which pages
            are made: a model that was trained further takes another engine.
        n_pages: pages of each layer, for all requests. On a mesh each device of "data" and "context" has an equal part.
        rows: requests that decode at a time; on a mesh as many in each group of "data".
        max_length: tokens that a request may have.
        chunk: prompt tokens a request and step. Chunks are cut as `generate` cuts them, from a prompt's end.
        prefill_rows: prompts that are read at a time, likewise.
        draft: proposes tokens to verify; None decodes one by one.
        n_draft: proposals a request and step.
        max_overtakes: how many requests may be admitted before one that came earlier and waits for pages; 0: none.
        trace: whether steps say what was selected from what.
        tokenizer: makes text of tokens, for stop texts, streams and prompts that are text. Default: that of the folder
            which the model was loaded from.
        return_selections: whether reports have a `Rollout` of each request that finishes: of its own queries and those
            of a prefix that it shares. The host keeps `Rollout.bytes_per_token` of each token in the cache.
        selections_from: leaves out what queries at positions before it selected, as for `generate`.
        process_timeout_s: where devices of several processes make the mesh, how long a step waits for the others.

    Raises: ValueError: invalid sizes, or those that the mesh does not split; a draft without `n_draft` or the reverse;
        more tokens than the model has positions. RuntimeError: on all processes, that one has another config.
    """

    def __init__(
        self, model: Model, *, n_pages: int, rows: int = 8, max_length: int = 512, chunk: int = 64,
        prefill_rows: int = 2, draft: Draft | None = None, n_draft: int = 0, max_overtakes: int = 16,
        trace: bool = False, tokenizer: Tokenizer | None = None, return_selections: bool = False,
        selections_from: int = 0, process_timeout_s: float = 600.0,
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
        if isinstance(model, Stacked):
            raise ValueError("Engine: model is Stacked, wanted the one it was made of: pages are copied layer by layer")
        split = {} if model.mesh is None else split_of(model, sizes)
        if max_length > (room := model.config.max_position_embeddings):
            raise ValueError(
                f"Engine: max_length={checks.shown(max_length)}, wanted at most {room}, the model's positions"
            )
        start = checked_start("Engine", selections_from, return_selections)
        self.model, self._tokenizer, structures = model, tokenizer, structures_of(model)
        self._recorder = Recorder(model, start) if return_selections else None
        self.scheduler = Scheduler(**sizes, page_size=model.page_size, programs=structures, **split)
        timeout_s = checks.number("Engine", "process_timeout_s", process_timeout_s, 0.001, 86400)
        self._agreement = Agreement(model.mesh, timeout_s)
        if model.mesh is not None:
            self._agreement.check("Engine", **in_common(model, sizes, n_draft, trace, return_selections, start))
        self._runner = PassRunner(
            model, structures, self.scheduler, self._agreement, Trace(trace, return_selections), self._n_draft
        )  # fmt: skip
        self._is_in_step = False
        jax.block_until_ready(self.pages)  # more than there is memory for show here

    @property
    def pool(self) -> PagePool:
        """Who holds which page."""
        return self.scheduler.pool

    @property
    def pages(self) -> Pages:
        """What the pages hold; empty ones at first, and after they were lost."""
        return self._runner.pages

    @property
    def is_idle(self) -> bool:
        return not self.scheduler.waiting and not self.scheduler.running

    @property
    def is_ahead(self) -> bool:
        """Whether the last step did not wait for its pass, whose error a later step would raise."""
        return self._runner.is_ahead

    @property
    def tokenizer(self) -> Tokenizer | None:
        """What makes text of tokens; None if none was given and the model was not loaded from a folder that has one."""
        if self._tokenizer is None:
            self._tokenizer = tokenizer_of(self.model)
        return self._tokenizer

    def submit(
        self, prompt: Sequence[int] | str, max_new_tokens: int | None = None, stop_ids: Collection[int] | None = None,
        *, sampling: Sampling | None = None,
    ) -> int:  # fmt: skip
        """Queues a request.

        Args:
            prompt: token ids, copied, or text.
            max_new_tokens: how many to make at most.
            stop_ids: tokens that end it; None: those of the model's config; () for none.
            sampling: how to take tokens, in place of these two, which mean the likeliest tokens.

        Returns: its number.
        Raises: ValueError: an empty prompt, tokens outside of the vocabulary, max_new_tokens below 1, more tokens or
            pages than there will ever be, text without a tokenizer. Nothing has changed then.
        """
        self._demand_no_step("submit")
        config = self.model.config
        tokens = prompt_ids("submit", "prompt", prompt, config.vocab_size, lambda: self.tokenizer)
        how = short_form("submit", config, sampling, max_new_tokens=max_new_tokens, stop_ids=stop_ids)
        text = None
        if how.stop:
            if self.tokenizer is None:
                raise ValueError(
                    "submit: stop texts need a tokenizer, the model has none: Engine(tokenizer=) takes one"
                )
            text = Text(tokenizer=self.tokenizer, stop=how.stop)
        return self.scheduler.submit(tokens, how.max_tokens, how.stop_ids_of("submit", config), how, text)

    def stream(self, id: int) -> Iterator[Piece]:
        """Makes steps until a request has ended, and hands out its tokens and text as they come.

        Other requests go on in the same steps, and each may have a stream. Text is whole characters, and nothing of a
        stop text. Without a tokenizer it is empty. A stream that is begun late begins with all that was made.

        Args:
            id: of a request that has not ended.

        Returns: an iterator; the last piece has a `finish_reason`. What `step` raises ends it; another stream of the
            request begins anew.
        Raises: ValueError: a number that `submit` never gave, a request that has ended.
        """
        reader = self.reader("stream", id)

        def pieces() -> Iterator[Piece]:
            while True:
                if (piece := reader.read()) is not None:
                    yield piece
                    if piece.finish_reason is not None:
                        return
                else:
                    self.step()

        return pieces()

    def reader(self, call: str, id: int) -> Reader:
        """What reads the tokens and text of a request that has not ended."""
        number = self._number(call, id)
        if (request := self.scheduler.unfinished(number)) is None:
            raise ValueError(f"{call}: id={number}, wanted a request that has not ended")
        return Reader(request, self.tokenizer)

    def cancel(self, id: int) -> bool:
        """Ends a request, whether it waits, is read or decodes. Its pages are free again, but those that others share.

        Returns: True; False if it had finished, failed or been cancelled before.
        Raises: ValueError: a number that `submit` never gave.
        """
        return self._drop("cancel", id, is_cancelled=True)

    def fail(self, id: int, error: str) -> bool:
        """As `cancel`, with what its stream will say why."""
        return self._drop("fail", id, error=error)

    def _drop(self, call: str, id: int, **why: Any) -> bool:
        self._demand_no_step(call)
        request = self.scheduler.unfinished(self._number(call, id))
        if request is None:
            return False
        for name, value in why.items():
            setattr(request, name, value)
        return self.scheduler.drop(request.id)

    def warm_up(self, progress: Callable[[str, int, int], None] | None = None) -> None:
        """Compiles the programs of all phases, so that no request waits for it; by passes without a token.

        Args:
            progress: is told what is compiled, how many are done, and of how many.
        """
        self._demand_no_step("warm_up")
        self._runner.warm_up(progress)

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
        saved, pages = self.scheduler.save(), self._runner.written
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
        if not report.steps:
            self._agreement.check("step", pass_of="nothing")
        for request in [request for request in self.scheduler.running.values() if request.is_finished]:
            report.finished[request.id] = request.tokens[request.n_prompt :]
            if request.sampling.logprobs is not None:
                report.logprobs[request.id] = list(request.logprobs)
            if self._recorder is not None:
                of_request = request.id, request.tokens, request.n_prompt
                report.rollouts[request.id] = self._recorder.rollout([of_request])
            self.scheduler.finish(request)
        if self._recorder is not None:
            # Last of all: a step that is undone has forgotten nothing. Those that lost their pages wait with tokens.
            self._recorder.keep({*self.pool.lengths, *self.scheduler.waiting})
        return report

    def _undo_step(self, saved: Saved, pages: Pages | None) -> None:
        self.scheduler.restore(saved, are_pages_written=self._runner.written is not pages)
        if self._runner.has_lost_pages():
            self.scheduler.start_over()

    def _number(self, call: str, id: int) -> int:
        number = checks.whole(call, "id", id, 0)
        if number >= (n := self.scheduler.n_submitted):
            raise ValueError(f"{call}: id={checks.shown(number)}, wanted one that submit gave: there were {n}")
        return number

    def _demand_no_step(self, call: str) -> None:
        if self._is_in_step:
            raise RuntimeError(f"{call}: called within a step, wanted after it")

    def _read(self, batch: Batch, report: Report) -> Step:
        B, n_kept = self.scheduler.prefill_rows, [len(new) for new in batch.news]
        rows, draws = self.scheduler.rows_of(batch.requests, B), self._draws(batch, B, [0] * len(batch.requests))
        ends = [
            start + len(new) == request.n_prompt == len(request.tokens)
            for request, start, new in zip(*batch[1:], strict=True)
        ]
        layers, told = self._runner.read(batch, draws, is_needed=self._recorder is not None or any(ends))
        if told is not None:
            self._record(batch, rows, n_kept, told.choices)
            for row, request, is_end in zip(rows, batch.requests, ends, strict=True):
                if is_end:
                    self._take(request, told.taken, row, 0, 1, report)
        return self._step(batch, rows, n_kept, layers)

    def _decode(self, requests: list[Request], report: Report) -> Step:
        news = [[request.tokens[-1], *self._proposals(request, report)] for request in requests]
        batch, B = self.scheduler.batch("decode", requests, news), self.scheduler.rows
        firsts = [1 + self._n_draft - len(new) for new in news]  # columns
        rows, draws = self.scheduler.rows_of(requests, B), self._draws(batch, B, firsts)
        layers, told, n_right = self._runner.verify(batch, draws)
        n_kept = (1 + n_right)[rows].tolist()
        self._record(batch, rows, n_kept, told.choices)
        for row, request, start, first, kept in zip(rows, *batch[1:3], firsts, n_kept, strict=True):
            self.scheduler.truncate(request, start + kept)
            self._take(request, told.taken, row, first, first + kept, report)
        return self._step(batch, rows, n_kept, layers)

    def _record(self, batch: Batch, rows: list[int], n_kept: list[int], chosen: Rows | None) -> None:
        """Keeps what the new tokens of a pass chose, but for rejected proposals."""
        if self._recorder is None or chosen is None:
            return
        T = chosen.indices[0].shape[1]
        for row, request, start, new, kept in zip(rows, *batch[1:], n_kept, strict=True):
            first = T - len(new)
            self._recorder.write(request.id, start, chosen, row, slice(first, first + kept))

    def _proposals(self, request: Request, report: Report) -> list[int]:
        room = min(self._n_draft, request.end - len(request.tokens) - 1)
        if self._draft is None or room < 1:
            return []
        proposals, error = propose(self._draft, request.tokens, room, self.model.config.vocab_size)
        if error is not None:
            report.draft_errors[request.id] = error
        return proposals

    def _draws(self, batch: Batch, B: int, firsts: list[int]) -> Draws:
        """How each row's tokens are taken; `firsts` are the columns of their first ones."""
        numbers = [request.n_made - first for request, first in zip(batch.requests, firsts, strict=True)]
        rows = self.scheduler.rows_of(batch.requests, B)
        return draws_of([request.sampling for request in batch.requests], numbers, B, rows)

    def _take(self, request: Request, taken: Taken, row: int, first: int, end: int, report: Report) -> None:
        """Hands a request the tokens of its row from column `first` to `end`, on the host."""
        if self._recorder is not None and taken.logprob is not None:
            self._recorder.made(request.id, request.n_made, taken.logprob[row, first:end].tolist())
        n_before = request.n_made
        if (error := self.scheduler.take(request, taken.tokens[row, first:end].tolist())) is not None:
            report.failed[request.id] = error
        n = request.sampling.logprobs
        if taken.logprobs is not None and n is not None:
            for i, token in enumerate(request.tokens[request.n_prompt + n_before :], first):
                request.logprobs.append(read_logprobs(taken.logprobs, row, i, token, n))

    def _step(self, batch: Batch, rows: list[int], n_kept: list[int], traced: Any) -> Step:
        full = [i for i, kind in enumerate(self.model.config.indexer_kinds) if kind == "full"]
        layers = tuple(Traced(i, *layer) for i, layer in zip(full, traced, strict=False))
        ids, n_new = [request.id for request in batch.requests], [len(new) for new in batch.news]
        return Step(
            phase=batch.phase, requests=ids, rows=rows, starts=batch.starts, n_new=n_new, n_kept=n_kept, layers=layers
        )  # fmt: skip
