"""One answer of the server, whole or as events: a task on the event loop that reads the pieces of its requests."""

import asyncio
import json
import time
import uuid
from collections.abc import AsyncIterator, Callable
from typing import Any

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from hisa_jax.models.async_engine import Stream
from hisa_jax.models.sampling import Logprobs
from hisa_jax.models.serve.metrics import Metrics
from hisa_jax.models.serve.protocol import Ask, RequestError, choice, show_logprobs, usage
from hisa_jax.models.tokens import Tokenizer


class Answer:
    """What the streams of one call make.

    Args:
        ask: what was asked for.
        streams: of its requests.
        name: of the model.
        ended: is told of each request that has ended: its tokens, its prompt and the reason.
    """

    def __init__(
        self, ask: Ask, streams: list[Stream], *, name: str, tokenizer: Tokenizer, metrics: Metrics,
        ended: Callable[[list[int], tuple[int, ...], str], None], start: float,
    ) -> None:  # fmt: skip
        self._ask, self._streams, self._name, self._tokenizer = ask, streams, name, tokenizer
        self._metrics, self._ended, self._start = metrics, ended, start
        self._id = ("chatcmpl-" if ask.is_chat else "cmpl-") + uuid.uuid4().hex
        self._created = int(time.time())
        self._n_made = [0] * len(streams)
        self._is_open = [True] * len(streams)

    async def whole(self) -> dict[str, Any]:
        parts = await asyncio.gather(*(self._collect(i) for i in range(len(self._streams))))
        return {**self._head(), "choices": list(parts), "usage": self._usage()}

    async def events(self) -> AsyncIterator[str]:
        """In the order in which pieces come. Raises RequestError: a request failed."""
        ask, n = self._ask, len(self._streams)
        for i in range(n):
            if ask.is_chat:
                yield self._event([choice(ask, i, "", None, None) | {"delta": {"role": "assistant", "content": ""}}])
            elif ask.echo:
                yield self._event([choice(ask, i, ask.echo[i // ask.n], None, None)])
        merged: asyncio.Queue[tuple[int, Any]] = asyncio.Queue()

        async def pump(i: int) -> None:
            async for piece in self._pieces(i):
                merged.put_nowait((i, piece))

        tasks = [asyncio.ensure_future(pump(i)) for i in range(n)]
        offsets = [len(ask.echo[i // ask.n]) if ask.echo else 0 for i in range(n)]
        try:
            n_open = n
            while n_open:
                i, piece = await merged.get()
                self._demand(piece)
                reason = piece.finish_reason
                n_open -= reason is not None
                logprobs = show_logprobs(ask, piece.logprobs, self._tokenizer, offsets[i])
                offsets[i] += len(piece.text)
                if piece.text or (logprobs and piece.logprobs):
                    yield self._event([choice(ask, i, piece.text, None, logprobs)])
                if reason is not None:
                    yield self._event([choice(ask, i, "", reason, None)])
        finally:
            for task in tasks:
                task.cancel()
        if ask.has_usage:
            yield self._event([], usage=self._usage())
        yield "data: [DONE]\n\n"

    def leave(self) -> None:
        """Cancels what has not ended."""
        for i, stream in enumerate(self._streams):
            if self._is_open[i]:
                self._is_open[i] = False
                stream.cancel()
                self._ended([], (), "cancelled")

    async def _pieces(self, i: int) -> AsyncIterator[Any]:
        tokens: list[int] = []
        async for piece in self._streams[i]:
            if not tokens and piece.tokens:
                self._metrics.first.observe(time.perf_counter() - self._start)
            tokens += piece.tokens
            self._metrics.made.inc(len(piece.tokens))
            self._n_made[i] = len(tokens)
            if piece.finish_reason is not None:
                self._is_open[i] = False
                prompt = self._ask.prompts[i // self._ask.n]
                self._ended(tokens, prompt, piece.finish_reason)
            yield piece

    async def _collect(self, i: int) -> dict[str, Any]:
        text, logprobs, reason = self._ask.echo[i // self._ask.n] if self._ask.echo else "", list[Logprobs](), None
        offset = len(text)
        async for piece in self._pieces(i):
            self._demand(piece)
            text, reason = text + piece.text, piece.finish_reason
            logprobs += piece.logprobs
        return choice(self._ask, i, text, reason, show_logprobs(self._ask, logprobs, self._tokenizer, offset))

    def _demand(self, piece: Any) -> None:
        if piece.finish_reason == "failed":
            raise RequestError(f"the request failed: {piece.error}", status=500, kind="server_error")
        if piece.finish_reason == "cancelled":
            raise RequestError("the server is stopping", status=503, kind="server_error")

    def _head(self) -> dict[str, Any]:
        kind = "text_completion" if not self._ask.is_chat else "chat.completion"
        kind += ".chunk" if self._ask.is_chat and self._ask.is_streamed else ""
        return {"id": self._id, "object": kind, "created": self._created, "model": self._name}

    def _event(self, choices: list[dict[str, Any]], **more: Any) -> str:
        with_usage = {"usage": None} if self._ask.has_usage else {}
        return f"data: {json.dumps({**self._head(), 'choices': choices, **with_usage, **more})}\n\n"

    def _usage(self) -> dict[str, int]:
        return usage(sum(map(len, self._ask.prompts)), sum(self._n_made))


class Events(Response):
    """Sends the events of an answer until they end or the client goes away."""

    media_type = "text/event-stream"

    def __init__(self, answer: Answer) -> None:
        super().__init__()
        self._answer = answer
        del self.headers["content-length"]
        self.headers["cache-control"] = "no-cache"

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        sending = asyncio.ensure_future(self._send(send))
        leaving = asyncio.ensure_future(disconnected(receive))
        try:
            await asyncio.wait({sending, leaving}, return_when=asyncio.FIRST_COMPLETED)
            if sending.done():
                sending.result()
        finally:
            leaving.cancel()
            sending.cancel()
            self._answer.leave()

    async def _send(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        try:
            async for event in self._answer.events():
                await send({"type": "http.response.body", "body": event.encode(), "more_body": True})
        except RequestError as error:  # too late for a status
            event = f"data: {json.dumps(error.body())}\n\n"
            await send({"type": "http.response.body", "body": event.encode(), "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})


async def disconnected(receive: Receive) -> None:
    """Returns when the client has gone away."""
    while (await receive())["type"] != "http.disconnect":
        pass
