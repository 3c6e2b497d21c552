"""Runs the compiled passes of an engine on its model and its pages: the part of it that is on devices.

    Scheduler.batch -> place: tables, lengths, tokens on the host -> the other processes agree -> copies of pages
                    -> a pass of `models.passes`: logits, pages -> tokens are taken from the logits -> host

The pages are given to each pass, which writes them where they are. So where a pass fails they may be lost.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
from jax import Array

from hisa_jax.models import passes
from hisa_jax.models.agreement import Agreement
from hisa_jax.models.draws import ALL, LIKELIEST, SOME, Draws, draws_of
from hisa_jax.models.modeling import Model
from hisa_jax.models.passes import Pages, Taken, Trace
from hisa_jax.models.plan import Phase
from hisa_jax.models.replay.recorder import Rows
from hisa_jax.models.scheduler import Batch, Scheduler
from hisa_jax.models.structure import Structure, weights_of

_NAMES: dict[Phase, str] = {
    "prefill": "a prompt's chunks", "last_prefill": "a prompt's last chunk", "decode": "a decode step"
}  # fmt: skip


class Told(NamedTuple):
    """What the host has of a pass: tokens that were taken, and what queries and routers chose, if that is recorded."""

    taken: Taken
    choices: Rows | None


class PassRunner:
    """One pass at a time.

    Args:
        structures: of the model, one a phase.
        scheduler: says which rows and pages a batch has.
        agreement: is asked before each pass.
        n_draft: proposals of a row in a decode step.

    Attributes:
        written: the pages as the last pass left them; None before the first one, and after they were lost.
    """

    def __init__(
        self, model: Model, structures: Mapping[Phase, Structure], scheduler: Scheduler, agreement: Agreement,
        trace: Trace, n_draft: int,
    ) -> None:  # fmt: skip
        self._model, self._structures, self._weights = model, structures, weights_of(model)
        self._scheduler, self._agreement, self._trace = scheduler, agreement, trace
        self._n_tokens = 1 + n_draft  # of a row in a decode step
        self.formats = passes.formats_of(model, scheduler.pool.n_pages)
        self.written: Pages | None = None
        self._unfinished: Array | None = None  # a result of the last pass, if nobody has waited for it

    @property
    def pages(self) -> Pages:
        """What the pages hold; empty ones at first, and after they were lost."""
        if self.written is None:
            self.written = passes.empty(self._model, self._scheduler.pool.n_pages, self.formats)
        return self.written

    @property
    def is_ahead(self) -> bool:
        """Whether nobody has waited for the last pass, whose error a later one would raise."""
        return self._unfinished is not None

    def read(self, batch: Batch, draws: Draws, *, is_needed: bool) -> tuple[list, Told | None]:
        """Reads a chunk of prompts.

        Args:
            is_needed: whether the host needs anything of it. Otherwise it prepares the next pass while this one runs,
                one at a time; an error of the device shows in a later pass, which then finds the pages lost.

        Returns: of each layer what it selected from what, if that is traced; and what the host needs.
        """
        arrays = self._place(batch, self._scheduler.prefill_rows, self._scheduler.chunk, draws)
        static: Any = dict(structure=self._structures[batch.phase], trace=self._trace, formats=self.formats)
        logits, pages, seen = passes.read(self._weights, self.pages, *arrays, **static)
        if not is_needed:
            self.written, before, self._unfinished = pages, self._unfinished, logits
            jax.block_until_ready(before)
            return seen.layers, None
        # An error of the device shows here, so before the pages are taken over.
        told = jax.device_get((passes.taken(logits, draws, self._model.mesh, self._trace), seen.rows))
        self.written, self._unfinished = pages, None
        return seen.layers, Told(*told)

    def verify(self, batch: Batch, draws: Draws) -> tuple[list, Told, np.ndarray]:
        """Makes a decode step, and keeps the proposals that are right. As `read`; and how many are, [B]."""
        B, T, mesh = self._scheduler.rows, self._n_tokens, self._model.mesh
        arrays, n_right = self._place(batch, B, T, draws), np.zeros(B, np.int32)
        static: Any = dict(structure=self._structures["decode"], trace=self._trace, formats=self.formats)
        logits, pages, seen = passes.verify(self._weights, self.pages, *arrays, **static)
        taken = passes.taken(logits, draws, mesh, self._trace)
        if T > 1:
            n_right, pages = passes.keep(pages, *arrays, taken.tokens, mesh=mesh, formats=self.formats)
        taken, choices, n_right = jax.device_get((taken, seen.rows, n_right))
        self.written, self._unfinished = pages, None
        return seen.layers, Told(taken, choices), n_right

    def warm_up(self, progress: Callable[[str, int, int], None] | None) -> None:
        """Compiles the programs of all phases by passes without a token; `progress` as `Engine.warm_up` has it."""
        # A program a phase; phases of the same methods run the same one.
        scheduler, mesh = self._scheduler, self._model.mesh
        phases: tuple[Phase, ...] = ("last_prefill", "prefill")
        reads = {self._structures[phase]: phase for phase in phases}
        programs = [(phase, scheduler.prefill_rows, scheduler.chunk) for phase in reads.values()]
        programs.append(("decode", scheduler.rows, self._n_tokens))
        for done, (phase, B, T) in enumerate(programs):
            if progress is not None:
                progress(f"compiling {_NAMES[phase]}", done, len(programs))
            draws, run = draws_of([], [], B), passes.verify if done == len(programs) - 1 else passes.read
            arrays = self._place(scheduler.batch(phase, [], []), B, T, draws)
            static: Any = dict(structure=self._structures[phase], trace=self._trace, formats=self.formats)
            logits, pages, _ = run(self._weights, self.pages, *arrays, **static)
            for kind in (LIKELIEST, ALL, SOME):
                every = draws._replace(kind=np.int32(kind), has_logprobs=np.bool_(True))
                taken = passes.taken(logits, every, mesh, self._trace)
            if run is passes.verify and T > 1:
                _, pages = passes.keep(pages, *arrays, taken.tokens, mesh=mesh, formats=self.formats)
            self.written = jax.block_until_ready(pages)
        self._copy([])
        jax.block_until_ready(self.written)
        if progress is not None:
            progress("compiled", len(programs), len(programs))

    def has_lost_pages(self) -> bool:
        """After a pass that failed: whether the pages are lost with it; the next pass then begins with empty ones."""
        self._unfinished = None
        try:
            jax.block_until_ready(self.written)  # raises for what was deleted, too
        except Exception:
            self.written = None
            return True
        return False

    def _place(self, batch: Batch, B: int, T: int, draws: Draws) -> tuple[np.ndarray, ...]:
        """As `Scheduler.place`, and makes the copies, once all processes agree on the pass."""
        copies, arrays = self._scheduler.place(batch, B, T)
        tables, lengths, ids, n_new = arrays
        self._agreement.check(
            "step", pass_of=batch.phase, rows=B, tokens=ids, n_new=n_new, lengths=lengths, pages=tables, copies=copies,
            sampling=draws,
        )  # fmt: skip
        if copies:
            self._copy(copies)
        return arrays

    def _copy(self, copies: list[tuple[int, int]]) -> None:
        # The program has one size, whatever their number, so that it compiles once.
        most = max(self._scheduler.rows, self._scheduler.prefill_rows)
        pairs = self._scheduler.copies_of_groups(copies, most)
        self.written = passes.copy(self.pages, *pairs, mesh=self._model.mesh, formats=self.formats)
