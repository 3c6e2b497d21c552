"""An engine for asyncio: a thread makes its steps, and coroutines submit requests and read their pieces.

```
event loop    submit ---.                .--> pieces of one request, a queue each
                        v                |
              calls, in a queue    steps and reads
                        '--> thread -----'
```

`Engine` is for one thread, so nothing but that thread touches it: what a coroutine wants of it goes through the queue
and runs between two steps.
"""

import asyncio
import contextlib
import logging
import queue
import threading
from collections.abc import AsyncIterator, Callable, Collection, Sequence
from concurrent.futures import Future
from typing import Any, Self, TypeVar

from hisa_jax.models.engine import Engine, Report
from hisa_jax.models.sampling import Sampling
from hisa_jax.models.streams import Piece, Reader

Result = TypeVar("Result")
_LOG = logging.getLogger(__name__)
_MOST_FAULTS = 3  # steps in a row that may fail before their requests do


class Stream:
    """The pieces of one request, as an async iterator; the last one has a `finish_reason`.

    Attributes:
        id: the request's number.
        n_prompt: its prompt's tokens.
    """

    def __init__(self, owner: "AsyncEngine", id: int, n_prompt: int, reader: Reader, loop: asyncio.AbstractEventLoop):
        self.id, self.n_prompt, self.reader = id, n_prompt, reader
        self._owner, self._loop = owner, loop
        self._pieces: asyncio.Queue[Piece] = asyncio.Queue()
        self._is_done = False

    def __aiter__(self) -> AsyncIterator[Piece]:
        return self

    async def __anext__(self) -> Piece:
        if self._is_done:
            raise StopAsyncIteration
        piece = await self._pieces.get()
        self._is_done = piece.finish_reason is not None
        return piece

    def cancel(self) -> None:
        """Ends the request if it has not ended; from the event loop. Does not wait for it."""
        self._is_done = True
        self._owner.call(self._owner.engine.cancel, self.id)

    def put(self, piece: Piece) -> None:
        """From the engine's thread."""
        with contextlib.suppress(RuntimeError):  # the event loop is closed: there is no reader
            self._loop.call_soon_threadsafe(self._pieces.put_nowait, piece)


class AsyncEngine:
    """Runs an engine in a thread of its own.

    Args:
        engine: that only this object uses from now on.
        after_step: is handed what `Engine.step` reports, in the thread; for counting.
        after_fault: is handed what it raises, which is logged, too.
    """

    def __init__(
        self, engine: Engine, after_step: Callable[[Report], None] | None = None,
        after_fault: Callable[[Exception], None] | None = None,
    ) -> None:  # fmt: skip
        self.engine, self._after_step, self._after_fault = engine, after_step, after_fault
        self._calls: queue.SimpleQueue[tuple[Future, Callable, tuple]] = queue.SimpleQueue()
        self._streams: dict[int, Stream] = {}
        self._is_closing, self._must_finish, self._is_closed = False, False, False
        self._n_faults = 0
        self._lock = threading.Lock()
        self._thread = threading.Thread(target=self._run, name="hisa-jax-engine", daemon=True)
        self._thread.start()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *error: object) -> None:
        await self.close()

    @property
    def is_alive(self) -> bool:
        """Whether the thread runs."""
        return self._thread.is_alive()

    async def submit(
        self, prompt: Sequence[int] | str, max_new_tokens: int | None = None, stop_ids: Collection[int] | None = None,
        *, sampling: Sampling | None = None,
    ) -> Stream:  # fmt: skip
        """Queues a request.

        Args:
            prompt, max_new_tokens, stop_ids, sampling: as `Engine.submit` takes them.

        Returns: its pieces.
        Raises: ValueError: as `Engine.submit`. ClosedError: the engine is closing.
        """
        loop = asyncio.get_running_loop()
        return (await self._in_thread(lambda: [self._open(loop, prompt, max_new_tokens, stop_ids, sampling=sampling)]))[
            0
        ]

    async def submit_all(
        self, requests: Sequence[tuple[Sequence[int] | str, Sampling]], most_waiting: int | None = None
    ) -> list[Stream]:
        """Queues some requests, all or none.

        Args:
            requests: prompts and how to continue them.
            most_waiting: requests that may wait for a row then; None: any number.

        Returns: the pieces of each.
        Raises: as `submit`. BusyError: more would wait.
        """
        loop = asyncio.get_running_loop()

        def open_all() -> list[Stream]:
            scheduler, streams = self.engine.scheduler, list[Stream]()
            n = len(scheduler.waiting) + len(scheduler.running) + len(requests) - scheduler.rows
            if most_waiting is not None and n > most_waiting:
                raise BusyError(f"submit: {n} requests would wait, wanted at most {most_waiting}")
            try:
                for prompt, sampling in requests:
                    streams.append(self._open(loop, prompt, sampling=sampling))
            except BaseException:
                for stream in streams:
                    self._streams.pop(stream.id)
                    self.engine.cancel(stream.id)
                raise
            return streams

        return await self._in_thread(open_all)

    def _open(self, loop: asyncio.AbstractEventLoop, *arguments: Any, **options: Any) -> Stream:
        if self._is_closing:
            raise ClosedError("submit: the engine is closing")
        id = self.engine.submit(*arguments, **options)
        reader = self.engine.reader("submit", id)
        self._streams[id] = Stream(self, id, reader.n_prompt, reader, loop)
        return self._streams[id]

    async def _in_thread(self, open_streams: Callable[[], list[Stream]]) -> list[Stream]:
        future = self.call(open_streams)
        try:
            return await asyncio.wrap_future(future)
        except asyncio.CancelledError:  # the caller went away: whatever was queued has no reader
            future.add_done_callback(_cancel_unread)
            raise

    def call(self, function: Callable[..., Result], *arguments: Any) -> "Future[Result]":
        """Runs a function in the engine's thread, between steps.

        Returns: its result, later. Of a closed engine: a future that raises ClosedError.
        """
        future: Future = Future()
        with self._lock:
            if self._is_closed:
                future.set_exception(ClosedError("the engine is closed"))
            else:
                self._calls.put((future, function, arguments))
        return future

    async def close(self, *, finish: bool = False, timeout: float | None = None) -> None:
        """Ends the thread. Requests are cancelled, or finished first.

        Args:
            finish: whether to finish them; no other is taken from now on.
            timeout: seconds after which those that have not finished are cancelled.
        """
        if finish and not self._is_closed:
            self._must_finish = True
            self._is_closing = True
            self.call(lambda: None)  # wakes the thread
            await asyncio.to_thread(self._thread.join, timeout)
        self._must_finish, self._is_closing = False, True
        self.call(lambda: None)
        await asyncio.to_thread(self._thread.join)

    def _run(self) -> None:
        try:
            while True:
                is_idle = self.engine.is_idle
                if self._is_closing and (is_idle or not self._must_finish):
                    return
                self._do_calls(wait=is_idle)
                if not self.engine.is_idle:
                    self._step()
        finally:
            self._end()

    def _do_calls(self, *, wait: bool) -> None:
        while True:
            try:
                future, function, arguments = self._calls.get(block=wait)
            except queue.Empty:
                break
            wait = False
            if future.set_running_or_notify_cancel():
                try:
                    future.set_result(function(*arguments))
                except BaseException as error:
                    future.set_exception(error)
        self._hand_out()

    def _step(self) -> None:
        try:
            report = self.engine.step()
        except Exception as error:
            # The step was not done, and the next one does it again. What stays wrong ends the requests, by its name.
            _LOG.exception("a step failed and is done again")
            self._n_faults += 1
            if self._after_fault is not None:
                self._after_fault(error)
            if self._n_faults >= _MOST_FAULTS:
                self._n_faults = 0
                self._fail(f"{type(error).__name__}: {error}")
        else:
            if not self.engine.is_ahead:  # else nobody knows yet
                self._n_faults = 0
            if self._after_step is not None:
                self._after_step(report)
        self._hand_out()

    def _hand_out(self) -> None:
        for id, stream in list(self._streams.items()):
            if (piece := stream.reader.read()) is not None:
                stream.put(piece)
                if piece.finish_reason is not None:
                    del self._streams[id]

    def _fail(self, error: str) -> None:
        for id in list(self._streams):
            self.engine.fail(id, error)
        self._hand_out()

    def _end(self) -> None:
        with self._lock:
            self._is_closed = self._is_closing = True
        for id in list(self._streams):
            self.engine.cancel(id)
        self._hand_out()
        self._do_calls(wait=False)
        self.engine.release()


class BusyError(RuntimeError):
    """Too many requests wait."""


class ClosedError(RuntimeError):
    """The engine takes no more requests."""


def _cancel_unread(future: "Future[list[Stream]]") -> None:
    if not future.cancelled() and future.exception() is None:
        for stream in future.result():
            stream.cancel()
