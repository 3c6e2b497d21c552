"""Which requests run, what goes into the next pass, and on which pages: the bookkeeping of `Engine`, on the host.

It counts tokens and page numbers and never touches an array of the device. A request is admitted when there are pages
for it and all running ones to their ends. Requests are admitted in the order they came, but one that waits for pages is
overtaken by those that fit, up to a limit. Finished requests keep their pages until others need them: a new request
whose prompt begins alike shares them. Such a request, running or finished, is called its donor.

On a mesh the requests are spread over groups of devices, which have equal parts of the rows and pages. A request goes
to the group that has most of its prefix, of those to the one with fewest requests. Pages of a request go round the
devices of its group, so they must suffice on each of them.
"""

import dataclasses
from collections import Counter
from collections.abc import Hashable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from hisa_jax.models.checks import shown
from hisa_jax.models.plan import Phase
from hisa_jax.models.prefixes import Sharing, longest_prefix
from hisa_jax.models.request import Request
from hisa_jax.models.sampling import Sampling
from hisa_jax.models.text import Text
from hisa_jax.page_pool import PagePool


class Batch(NamedTuple):
    """What goes into one forward pass.

    Attributes:
        phase: says which program runs.
        requests: one a row.
        starts: tokens of each that are in the cache.
        news: tokens of each that go in.
    """

    phase: Phase
    requests: list[Request]
    starts: list[int]
    news: list[list[int]]


class Saved(NamedTuple):
    """What `Scheduler.restore` goes back to; `marks` are what changes in a request, by request."""

    pool: PagePool
    waiting: dict[int, Request]
    running: dict[int, Request]
    donors: dict[int, Request]
    marks: list[tuple[Request, int, Text | None, bool, int]]


@dataclasses.dataclass
class _Room:
    """What running requests of a group have: the pages `held`, their number on each device, pages `to_come` on each,
    and how many requests there are."""

    held: set[int]
    n_held: np.ndarray
    to_come: np.ndarray
    n_running: int


class _Place(NamedTuple):
    """Where a request is admitted: the donor in this group with whom it shares so many tokens in some pages; of these
    on each device those that no running one holds yet, and the pages of its own."""

    group: int
    donor: int | None
    shared: int
    shared_pages: list[int]
    n_more_held: np.ndarray
    own: np.ndarray


class Scheduler:
    """Requests and their pages.

    Args:
        n_pages, page_size: of the cache.
        max_length: tokens that a request may have.
        rows: requests that run at a time, in all groups.
        prefill_rows: prompts that are read in one pass, in all groups.
        chunk: prompt tokens a request and pass.
        max_overtakes: how often a request that waits for pages is overtaken. Then it is admitted before all others.
        programs: what each phase runs. Equal ones cache a token alike, and their requests share a pass.
        n_groups, n_devices, stripe: groups of devices, devices that share the pages of a request, and tokens in a row
            on one of them, as `PagePool` has them.

    Attributes:
        pool: who holds which page.
        max_pages: the most that a request may have.
        n_submitted: how many requests there ever were; they are numbered from 0.
        waiting, running: requests by number, waiting ones in the order of their turns.
        donors: finished requests whose pages are kept, oldest use first.
    """

    def __init__(
        self, *, n_pages: int, page_size: int, max_length: int, rows: int, prefill_rows: int, chunk: int,
        max_overtakes: int, programs: Mapping[Phase, Hashable], n_groups: int = 1, n_devices: int = 1,
        stripe: int | None = None,
    ) -> None:  # fmt: skip
        self.pool = PagePool(n_pages, page_size, n_devices=n_devices, stripe=stripe, n_groups=n_groups)
        self.max_length, self.max_pages = max_length, -(-max_length // page_size)
        self.rows, self.prefill_rows, self.chunk = rows, prefill_rows, chunk
        self.max_overtakes, self.programs = max_overtakes, programs
        self.sharing = Sharing.of(programs["prefill"], programs["last_prefill"], programs["decode"], chunk)
        self.n_submitted = 0
        self.waiting: dict[int, Request] = {}
        self.running: dict[int, Request] = {}
        self.donors: dict[int, Request] = {}

    def submit(
        self, tokens: list[int], max_new_tokens: int, stop_ids: frozenset[int], sampling: Sampling | None = None,
        text: Text | None = None,
    ) -> int:  # fmt: skip
        """Queues a prompt; its number. Raises ValueError: more tokens or pages than there will ever be."""
        end, n_pages = len(tokens) + max_new_tokens, self.pool.n_pages // (self.pool.n_groups * self.pool.n_devices)
        needed = max(self.pool.n_needed_on(end)) + 1  # one more than its tokens fill: that of a copy
        if end > self.max_length or needed > n_pages:
            where = " of a device" if self.pool.n_groups * self.pool.n_devices > 1 else ""
            raise ValueError(
                f"submit: prompt and max_new_tokens make {shown(end)} tokens in {shown(needed)} pages{where}, wanted "
                f"at most max_length={self.max_length} in {n_pages}"
            )
        id, self.n_submitted = self.n_submitted, self.n_submitted + 1
        self.waiting[id] = Request(
            id=id, tokens=tokens, n_prompt=len(tokens), end=end, stop_ids=stop_ids, sampling=sampling or Sampling(),
            text=text,
        )  # fmt: skip
        return id

    def admit(self) -> list[tuple[int, int, int]]:
        """Admits the requests that there are rows and pages for.

        Returns: (request, its donor, tokens shared) of those that share.
        """
        forks: list[tuple[int, int, int]] = []
        too_big: list[Request] = []
        if not self.waiting or len(self.running) == self.rows:
            return forks
        rooms = [self._room(group) for group in range(self.pool.n_groups)]
        for request in list(self.waiting.values()):
            if len(self.running) == self.rows or len(too_big) > self.max_overtakes:
                break
            if (place := self._find_place(request, rooms)) is None:
                too_big.append(request)
                if request.n_overtaken >= self.max_overtakes:
                    break
                continue
            del self.waiting[request.id]
            room = rooms[place.group]
            if place.donor is None:
                self.pool.add(request.id, place.group)
            else:
                self.pool.fork(place.donor, request.id, place.shared)
                forks.append((request.id, place.donor, place.shared))
                if place.donor in self.donors:
                    self.donors[place.donor] = self.donors.pop(place.donor)  # the last one used
            request.must_copy = place.shared % self.pool.page_size > 0
            self.running[request.id] = request
            room.held.update(place.shared_pages)
            room.n_held += place.n_more_held
            room.to_come += place.own
            room.n_running += 1
            self._make_room(place.group, room.to_come)
            for other in too_big:
                other.n_overtaken += 1
            if any(other.n_overtaken >= self.max_overtakes for other in too_big):
                break
        return forks

    def next_chunks(self) -> Batch | None:
        """The next chunks of prompts, of as many as one pass takes; None if all are read."""
        unread = [r for r in self.running.values() if self.pool.lengths[r.id] < r.n_known]
        if not unread:
            return None
        phases, chunks = zip(*map(self._chunk, unread), strict=True)
        # A pass runs one program, so requests wait whose phase has another one.
        program, most = self.programs[phases[0]], self.prefill_rows // self.pool.n_groups
        chosen, n_chosen = list[int](), Counter[int]()
        for i, phase in enumerate(phases):
            group = self.pool.group(unread[i].id)
            if self.programs[phase] == program and n_chosen[group] < most:
                chosen.append(i)
                n_chosen[group] += 1
        return self.batch(phases[0], [unread[i] for i in chosen], [chunks[i] for i in chosen])

    def decoding(self) -> list[Request]:
        """Requests whose next token is to be made."""
        return [r for r in self.running.values() if self.pool.lengths[r.id] >= r.n_known and not r.is_finished]

    def batch(self, phase: Phase, requests: list[Request], news: list[list[int]]) -> Batch:
        """What goes into a pass: some requests' new tokens, after those that are in the cache."""
        return Batch(phase, requests, [self.pool.lengths[request.id] for request in requests], news)

    def place(self, batch: Batch, B: int, T: int) -> tuple[list[tuple[int, int]], tuple[np.ndarray, ...]]:
        """Makes room for the new tokens of a batch.

        Args:
            batch: of at most B requests with at most T new tokens each.
            B, T: sizes of the arrays.

        Returns: copies of pages to make first; int32 arrays: block tables [B, max_pages], tokens in the cache [B], new
            tokens [B, T], which fill the last columns, and how many each row has [B]. Requests are in their `rows_of`;
            tables count pages from the first one of the group.
        """
        lengths, ids, n_new = np.zeros(B, np.int32), np.zeros((B, T), np.int32), np.zeros(B, np.int32)
        tables = np.full((B, self.max_pages), -1, np.int32)
        copies, rows = [], self.rows_of(batch.requests, B)
        for row, request, start, new in zip(rows, *batch[1:], strict=True):
            lengths[row], ids[row, T - len(new) :], n_new[row] = start, new, len(new)
            copies += self.extend(request, len(new))
        for row, request in zip(rows, batch.requests, strict=True):
            pages = np.array(self.pool.pages(request.id), np.int32)
            tables[row, : len(pages)] = pages % (self.pool.n_pages // self.pool.n_groups)
        return copies, (tables, lengths, ids, n_new)

    def rows_of(self, requests: Sequence[Request], B: int) -> list[int]:
        """The row of each request in a pass of B rows, of which each group has as many, in order."""
        n_before, rows = Counter[int](), list[int]()
        for request in requests:
            group = self.pool.group(request.id)
            rows.append(group * (B // self.pool.n_groups) + n_before[group])
            n_before[group] += 1
        return rows

    def copies_of_groups(self, copies: Sequence[tuple[int, int]], n: int) -> np.ndarray:
        """Copies of pages as [2, n] int32, those of each group in its part, counted from its first page, then -1."""
        n_groups, pairs, n_before = self.pool.n_groups, np.full((2, n), -1, np.int32), Counter[int]()
        for pair in copies:
            group, own = pair[1] // (self.pool.n_pages // n_groups), np.array(pair) % (self.pool.n_pages // n_groups)
            pairs[:, group * (n // n_groups) + n_before[group]] = own
            n_before[group] += 1
        return pairs

    def extend(self, request: Request, n_tokens: int) -> list[tuple[int, int]]:
        """Makes room for new tokens; copies of pages to make first."""
        copies = self.pool.extend(request.id, n_tokens)
        request.must_copy = False
        return copies

    def truncate(self, request: Request, n_tokens: int) -> None:
        """Takes back the room of the last pass's tokens after the first `n_tokens`."""
        copies = self.pool.truncate(request.id, n_tokens)
        assert not copies  # no other request shares what was written in this pass

    def take(self, request: Request, tokens: Sequence[int]) -> str | None:
        """Adds new tokens up to one that ends the request.

        Returns: None, or why it failed: at -1, where the logits gave no token, or at one that its tokenizer cannot
            decode, it ends without.
        """
        for token in tokens:
            if token < 0:
                return self._fail(request, f"logits are not finite (NaN or infinity) after {request.n_made} new tokens")
            try:
                request.add(token)
            except ValueError as error:
                return self._fail(request, str(error))
            if request.is_finished:
                break
        return None

    def _fail(self, request: Request, error: str) -> str:
        self.drop(request.id)
        request.error = error
        return error

    def unfinished(self, id: int) -> Request | None:
        """A request that waits or runs."""
        return self.waiting.get(id) or self.running.get(id)

    def finish(self, request: Request) -> None:
        """Ends it; its pages serve others."""
        del self.running[request.id]
        self.donors[request.id] = request

    def drop(self, id: int) -> bool:
        """Ends an unfinished request and frees its pages, but those that others share; whether there was one."""
        if self.waiting.pop(id, None) is not None:
            return True
        if self.running.pop(id, None) is None:
            return False
        self.pool.free(id)
        return True

    def release(self) -> None:
        """Gives back the pages of all donors."""
        while self.donors:
            self._drop_donor(next(iter(self.donors)))

    def save(self) -> Saved:
        """What everything is now."""
        requests = [*self.waiting.values(), *self.running.values()]
        marks = [(r, len(r.tokens), r.text, r.must_copy, r.n_overtaken) for r in requests]
        return Saved(self.pool.copy(), dict(self.waiting), dict(self.running), dict(self.donors), marks)

    def restore(self, saved: Saved, *, are_pages_written: bool) -> None:
        """Goes back.

        Args:
            saved: by `save`, not before the last step.
            are_pages_written: whether tokens may have been written since. Then a page that a request gave back since,
                or replaced by a copy, may hold others' tokens. Donors that had such a page are not restored; running
                requests that had one wait again before all others and read their tokens anew.
        """
        known = [*saved.donors, *saved.running]
        lost = [id for id in known if not self._holds_pages_of(id, saved.pool)] if are_pages_written else []
        self.pool, self.waiting, self.running, self.donors, marks = saved
        for request, n_tokens, text, must_copy, n_overtaken in marks:
            del request.tokens[n_tokens:], request.logprobs[n_tokens - request.n_prompt :]
            request.text, request.error = text, None
            request.must_copy, request.n_overtaken = must_copy, n_overtaken
        for id in lost:
            self.pool.free(id)
        self.waiting = {id: self.running.pop(id) for id in lost if id in self.running} | self.waiting
        self.donors = {id: donor for id, donor in self.donors.items() if id not in lost}

    def start_over(self) -> None:
        """All pages are lost: running requests wait again, before all others, with the tokens that they have."""
        for id in list(self.pool.lengths):
            self.pool.free(id)
        self.waiting, self.running, self.donors = self.running | self.waiting, {}, {}

    def _chunk(self, request: Request) -> tuple[Phase, list[int]]:
        """What a request reads next. Tokens that it had made before pages were lost are read as they were decoded."""
        start = self.pool.lengths[request.id]
        if start >= request.n_prompt:
            return "decode", request.tokens[start : min(start + self.chunk, request.n_known)]
        left = request.n_prompt - start
        n_new = (left - 1) % self.chunk + 1  # so that whole chunks are left
        return "last_prefill" if n_new == left else "prefill", request.tokens[start : start + n_new]

    def _holds_pages_of(self, id: int, earlier: PagePool) -> bool:
        """Whether a request still has every page that it had, so that no other has written to one."""
        had = earlier.pages(id)
        return id in self.pool.lengths and self.pool.pages(id)[: len(had)] == had

    def _n_pages(self, n_tokens: int) -> int:
        return -(-n_tokens // self.pool.page_size)

    def _room(self, group: int) -> "_Room":
        """What running requests of a group have and will take."""
        running = [request for request in self.running.values() if self.pool.group(request.id) == group]
        held = {page for request in running for page in self.pool.pages(request.id)}
        none = np.zeros(self.pool.n_devices, int)
        to_come = sum((self._still_needed(r.end, self.pool.lengths[r.id], r.must_copy) for r in running), none)
        return _Room(held, np.array(self.pool.n_on(held, group)), to_come, len(running))

    def _find_place(self, request: Request, rooms: list["_Room"]) -> "_Place | None":
        """Where a request can be admitted, None if nowhere. Only counted: no donor loses its pages before it is known
        that they are enough."""
        options = [
            (-shared, room.n_running, group, donor)
            for group, room in enumerate(rooms)
            if room.n_running < self.rows // self.pool.n_groups
            for donor, shared in [self._longest_prefix(request, group)]
        ]
        n_pages = self.pool.n_pages // (self.pool.n_groups * self.pool.n_devices)
        for less, _, group, donor in sorted(options, key=lambda option: option[:3]):
            # What it shares takes no page, but one that it shares in part will be copied, which takes another.
            shared, room = -less, rooms[group]
            pages = [] if donor is None else self.pool.pages(donor)[: self._n_pages(shared)]
            own = self._still_needed(request.end, shared, shared % self.pool.page_size > 0)
            more = np.array(self.pool.n_on((page for page in pages if page not in room.held), group))
            if (room.to_come + own <= n_pages - room.n_held - more).all():
                return _Place(group, donor, shared, pages, more, own)
        return None

    def _still_needed(self, end: int, n_tokens: int, must_copy: bool) -> np.ndarray:
        """Pages on each device that a request takes to its end, which has so many tokens."""
        needed, size = self.pool.n_needed_on, self.pool.page_size
        to_come = np.subtract(needed(end), needed(n_tokens))
        if must_copy:  # the page that its last token is in
            to_come += np.subtract(needed(n_tokens), needed(n_tokens // size * size))
        return to_come

    def _make_room(self, group: int, n_pages: np.ndarray) -> None:
        """Drops a group's donors, oldest use first, as far as needed: first those with pages of their own, then any."""
        for has_own in (True, False):
            for id in [id for id in self.donors if self.pool.group(id) == group]:
                is_short = np.array(self.pool.n_free_on(group)) < n_pages
                if not is_short.any():
                    return
                if not has_own or np.array(self.pool.n_own_on(id))[is_short].any():
                    self._drop_donor(id)

    def _drop_donor(self, id: int) -> None:
        del self.donors[id]
        self.pool.free(id)

    def _longest_prefix(self, request: Request, group: int) -> tuple[int | None, int]:
        """The donor of a group with the most of its first tokens in the cache, and how many; None for less than a
        page."""
        known = (*self.donors.values(), *self.running.values())
        in_group = [other for other in known if self.pool.group(other.id) == group]
        return longest_prefix(request, in_group, self.pool.lengths, self.sharing, self.pool.page_size)
