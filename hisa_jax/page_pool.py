"""Who holds which page of a cache: the bookkeeping of a server, on the host.

Plain Python, next to the arrays of `cache.py`: it decides which pages requests get, share and give back, and tells
which pages must be copied before a write. It never touches keys.
"""

import collections
import copy
import itertools
from collections.abc import Hashable, Iterable, Sequence

import numpy as np

from hisa_jax import checks


class OutOfPages(Exception):
    """No page is free. The request that asked is as it was before."""


class PagePool:
    """The pages of one cache and the requests that hold them.

    Args:
        n_pages: pages of the cache.
        page_size: tokens of a page.
        n_devices: over how many devices they are split, equally and in order.
        stripe: tokens in a row that one device has, as in `select_paged`, whole pages; None: a page.
        n_groups: of so many devices each, which have equal parts of the pages, in order. Every request belongs to a
            group. Pages are numbered over all groups: the functions of a cache count those of a group from 0.

    Raises, as do its methods: TypeError: a number that is not an int. ValueError: pages that are not split equally, a
        stripe that is not whole pages; a request that is not there, a number out of range.
    """

    def __init__(
        self, n_pages: int, page_size: int, *, n_devices: int = 1, stripe: int | None = None, n_groups: int = 1
    ) -> None:  # fmt: skip
        stripe = page_size if stripe is None else stripe
        sizes = dict(n_pages=n_pages, page_size=page_size, n_devices=n_devices, stripe=stripe, n_groups=n_groups)
        for name, size in sizes.items():
            checks.integer("PagePool", name, size, 1)
        if n_pages % (n_devices * n_groups) or stripe % page_size:
            groups = f", n_groups={n_groups}" if n_groups > 1 else ""
            raise ValueError(
                f"PagePool: n_pages={n_pages}, n_devices={n_devices}{groups}, stripe={stripe}, wanted equal parts of "
                f"the pages and a stripe of whole pages of {page_size}"
            )
        self.page_size, self.n_devices, self.n_groups = page_size, n_devices, n_groups
        self._per_stripe, self._per_device = stripe // page_size, n_pages // (n_devices * n_groups)
        self._groups: dict[Hashable, int] = {}
        self.lengths: dict[Hashable, int] = {}  # tokens of each request
        self._pages: dict[Hashable, list[int]] = {}
        self._holders = [0] * n_pages  # how many requests hold each page
        pages = range(n_pages)
        self._free = [list(pages[i : i + self._per_device])[::-1] for i in range(0, n_pages, self._per_device)]

    @property
    def n_pages(self) -> int:
        return len(self._holders)

    @property
    def n_free(self) -> int:
        return sum(map(len, self._free))

    def copy(self) -> "PagePool":
        """The same requests and pages, from now on apart."""
        other = copy.copy(self)
        other.lengths, other._holders = dict(self.lengths), list(self._holders)
        other._groups = dict(self._groups)
        other._pages = {request: list(pages) for request, pages in self._pages.items()}
        other._free = [list(pages) for pages in self._free]
        return other

    def pages(self, request: Hashable) -> list[int]:
        """Those of a request, in the order of its tokens."""
        self._check_there("PagePool.pages", request)
        return list(self._pages[request])

    def group(self, request: Hashable) -> int:
        """Whose devices have the pages of a request."""
        self._check_there("PagePool.group", request)
        return self._groups[request]

    def n_free_on(self, group: int) -> list[int]:
        """Free pages on each device of a group."""
        self._check_group("PagePool.n_free_on", group)
        return [len(pages) for pages in self._free[group * self.n_devices :][: self.n_devices]]

    def n_on(self, pages: Iterable[int], group: int) -> list[int]:
        """How many of some pages lie on each device of a group."""
        self._check_group("PagePool.n_on", group)
        devices = np.fromiter(pages, np.int64) // self._per_device
        counts = np.bincount(devices, minlength=len(self._free)).tolist()
        return counts[group * self.n_devices :][: self.n_devices]

    def n_needed_on(self, n_tokens: int) -> list[int]:
        """Pages that a request of so many tokens has on each device of its group."""
        checks.integer("PagePool.n_needed_on", "n_tokens", n_tokens, 0, most=None)
        rounds, rest = divmod(self._n_pages(n_tokens), self._per_stripe * self.n_devices)
        last = (rest - device * self._per_stripe for device in range(self.n_devices))
        return [rounds * self._per_stripe + min(max(n, 0), self._per_stripe) for n in last]

    def n_own(self, request: Hashable) -> int:
        """How many of its pages no other request holds: what `free` would give back."""
        self._check_there("PagePool.n_own", request)
        return sum(self._holders[page] == 1 for page in self._pages[request])

    def n_own_on(self, request: Hashable) -> list[int]:
        """The same on each device of its group."""
        self._check_there("PagePool.n_own_on", request)
        own = (page for page in self._pages[request] if self._holders[page] == 1)
        return self.n_on(own, self._groups[request])

    def add(self, request: Hashable, group: int = 0) -> None:
        """A request without tokens, of a group. Raises ValueError: there is one of that name, no such group."""
        self._check_new("PagePool.add", request)
        self._check_group("PagePool.add", group)
        self._pages[request], self.lengths[request], self._groups[request] = [], 0, group

    def fork(self, request: Hashable, new: Hashable, length: int | None = None) -> None:
        """A new request that shares the first `length` tokens of another (all, if None), and the pages they are in."""
        call = "PagePool.fork"
        self._check_there(call, request)
        length = self.lengths[request] if length is None else length
        self._check_length(call, request, length)
        self._check_new(call, new)
        self.add(new, self._groups[request])
        self._pages[new] = self._pages[request][: self._n_pages(length)]
        self.lengths[new] = length
        for page in self._pages[new]:
            self._holders[page] += 1

    def extend(self, request: Hashable, n_tokens: int) -> list[tuple[int, int]]:
        """Makes room for `n_tokens` more and counts them.

        Returns: copies to make before the tokens are written, (from, to): a partly filled page that others hold too
            is replaced by one of its own.
        Raises: OutOfPages: nothing has changed then.
        """
        self._check_there("PagePool.extend", request)
        checks.integer("PagePool.extend", "n_tokens", n_tokens, 0, most=None)
        pages, length = self._pages[request], self.lengths[request]
        nth, within = divmod(length, self.page_size)
        shared = n_tokens > 0 and within > 0 and self._holders[pages[nth]] > 1
        if (wanted := self._n_pages(length + n_tokens) - len(pages) + shared) > self.n_pages:
            # Before they are listed, which of a number that is too large by far takes all memory.
            raise OutOfPages(f"request {request!r} needs {wanted} pages for {n_tokens} tokens, {self.n_free} are free")
        new = [*([nth] if shared else []), *range(len(pages), self._n_pages(length + n_tokens))]
        group = self._groups[request]
        for device, n_new in collections.Counter(self._device(group, nth) for nth in new).items():
            if n_new > len(self._free[device]):
                where = f" on device {device}" if len(self._free) > 1 else ""
                raise OutOfPages(
                    f"request {request!r} needs {n_new} pages{where} for {n_tokens} tokens, "
                    f"{len(self._free[device])} are free"
                )
        copies = []
        if shared:
            copies = [(pages[nth], self._take(group, nth))]
            self._holders[pages[nth]] -= 1
            pages[nth] = copies[0][1]
        pages += [self._take(group, i) for i in new[shared:]]
        self.lengths[request] = length + n_tokens
        return copies

    def truncate(self, request: Hashable, length: int) -> list[tuple[int, int]]:
        """Takes the tokens after the first `length` away and frees their pages; `cache.truncate` does the rest.

        Returns: copies to make first, as `extend`: the last page left, if it becomes a partly filled one that others
            hold, is replaced by a copy.
        Raises: OutOfPages: nothing has changed then.
        """
        self._check_there("PagePool.truncate", request)
        self._check_length("PagePool.truncate", request, length)
        pages, group = self._pages[request], self._groups[request]
        kept, lost = pages[: self._n_pages(length)], pages[self._n_pages(length) :]
        becomes_partial = length < self.lengths[request] and length % self.page_size > 0
        shared = becomes_partial and self._holders[kept[-1]] > 1
        if shared:
            device = self._device(group, len(kept) - 1)
            freed = (page for page in lost if self._holders[page] == 1 and page // self._per_device == device)
            if not self._free[device] and not any(True for _ in freed):
                raise OutOfPages(f"request {request!r} needs a page of its own to be truncated, none is free")
        for page in lost:
            self._give_back(page)
        copies = []
        if shared:
            copies = [(kept[-1], self._take(group, len(kept) - 1))]
            self._holders[kept[-1]] -= 1
            kept[-1] = copies[0][1]
        self._pages[request], self.lengths[request] = kept, length
        return copies

    def free(self, request: Hashable) -> None:
        """Gives back what a finished request holds."""
        self._check_there("PagePool.free", request)
        for page in self._pages.pop(request):
            self._give_back(page)
        del self.lengths[request], self._groups[request]

    def table(self, requests: Sequence[Hashable], max_pages: int) -> np.ndarray:
        """[R, max_pages] int32, the pages of each request, then -1. Raises ValueError: one has more."""
        checks.integer("PagePool.table", "max_pages", max_pages, 0)
        for request in requests:
            self._check_there("PagePool.table", request)
        table = np.full((len(requests), max_pages), -1, np.int32)
        for row, request in zip(table, requests, strict=True):
            pages = self._pages[request]
            if len(pages) > max_pages:
                raise ValueError(
                    f"PagePool.table: max_pages={max_pages}, wanted at least {len(pages)}, the pages of {request!r}"
                )
            row[: len(pages)] = pages
        return table

    def check(self) -> None:
        """Asserts that every page is either free, on its device, or counted as often as requests hold it."""
        holders = [0] * len(self._holders)
        for request, pages in self._pages.items():
            assert len(pages) == self._n_pages(self.lengths[request]), request
            for page in pages:
                holders[page] += 1
        assert holders == self._holders
        assert sorted(itertools.chain(*self._free)) == [page for page, n in enumerate(holders) if n == 0]
        for device, free in enumerate(self._free):
            assert {page // self._per_device for page in free} <= {device}, device
        for request, pages in self._pages.items():
            devices = [self._device(self._groups[request], nth) for nth in range(len(pages))]
            assert [page // self._per_device for page in pages] == devices, request

    def _check_there(self, call: str, request: Hashable) -> None:
        if request not in self._pages:
            raise ValueError(f"{call}: request {request!r} is not there, wanted one that was added")

    def _check_new(self, call: str, request: Hashable) -> None:
        if request in self._pages:
            raise ValueError(f"{call}: request {request!r} is there already, wanted another name")

    def _check_length(self, call: str, request: Hashable, length: int) -> None:
        checks.integer(call, "length", length)
        if not 0 <= length <= self.lengths[request]:
            raise ValueError(f"{call}: length={length}, wanted 0 to {self.lengths[request]}, what it has")

    def _check_group(self, call: str, group: int) -> None:
        checks.integer(call, "group", group, 0)
        if group >= self.n_groups:
            raise ValueError(f"{call}: group={group}, wanted 0 to {self.n_groups - 1}")

    def _n_pages(self, n_tokens: int) -> int:
        return -(-n_tokens // self.page_size)

    def _device(self, group: int, nth: int) -> int:
        """Where the nth page of a request of a group lies, among the devices of all groups."""
        return group * self.n_devices + nth // self._per_stripe % self.n_devices

    def _take(self, group: int, nth: int) -> int:
        page = self._free[self._device(group, nth)].pop()
        self._holders[page] = 1
        return page

    def _give_back(self, page: int) -> None:
        self._holders[page] -= 1
        if not self._holders[page]:
            self._free[page // self._per_device].append(page)
