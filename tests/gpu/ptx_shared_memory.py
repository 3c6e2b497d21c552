"""Shared memory of a CTA that sees races, for `ptx_machine.py`.

What a thread has written, or another one reads, since the last barrier may not be touched by others, but for atomics
among themselves. The same value from several threads is no race.
"""

import numpy as np

_ATOMIC, _SEVERAL = -2, -3  # in place of a thread


class Race(AssertionError):
    """Two threads at one word of shared memory without a barrier between them."""


class SharedMemory:
    """Of each word who has written and read it since the last barrier.

    Args:
        words: [n] uint32, what it begins with.
        threads: of the CTA, by number; those of others in its cluster have other numbers.
    """

    def __init__(self, words, threads):
        self.words, self.threads = words, threads
        self.forget()

    def forget(self):
        """Who has touched which word: after a barrier of all it does not matter."""
        self.written_by, self.read_by = (np.full(len(self.words), -1) for _ in range(2))

    def forget_own(self):
        """The same of the CTA's own threads, and of several readers, whoever they are."""
        first, end = self.threads.start, self.threads.stop
        for touched_by in (self.written_by, self.read_by):
            touched_by[(touched_by < 0) | ((touched_by >= first) & (touched_by < end))] = -1

    def read(self, threads, words):
        """What each thread finds at its word; one may be at several."""
        self._demand_none(self._written_by_others(threads, words), threads, words)
        # Several readers: of them any stands for all, who are not the writer to come.
        several = np.bincount(words, minlength=len(self.words))[words] > 1
        seen = self.read_by[words]
        self.read_by[words] = np.where(several | ((seen != -1) & (seen != threads)), _SEVERAL, threads)
        return self.words[words]

    def write(self, threads, words, values):
        """A value of each thread at its word."""
        others = self._written_by_others(threads, words)
        others |= (self.read_by[words] != -1) & (self.read_by[words] != threads)
        self._demand_none(others & (self.words[words] != values), threads, words)
        order = np.argsort(words, kind="stable")
        same = words[order][1:] == words[order][:-1]
        if (same & (values[order][1:] != values[order][:-1])).any():
            raise Race(f"several threads write words {words[order][1:][same][:4]}")
        self.written_by[words], self.words[words] = threads, values

    def add(self, words, amounts):
        """Atomically, one after the other, in this order: what each finds before."""
        for touched_by in (self.written_by, self.read_by):
            seen = touched_by[words]
            if ((seen != -1) & (seen != _ATOMIC)).any():
                raise Race(f"atomics and others at words {words[:4]}")
        self.written_by[words] = _ATOMIC
        before = np.zeros(len(words), np.uint32)
        for i, (word, amount) in enumerate(zip(words, amounts, strict=True)):
            before[i] = self.words[word]
            self.words[word] += amount
        return before

    def _written_by_others(self, threads, words):
        return (self.written_by[words] != -1) & (self.written_by[words] != threads)

    def _demand_none(self, others, threads, words):
        if others.any():
            i = np.flatnonzero(others)[0]
            other = max(self.written_by[words[i]], self.read_by[words[i]])  # of several, any
            raise Race(f"word {words[i]}: thread {threads[i]} after {other}, without a barrier between")
