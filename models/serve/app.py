"""The server as an ASGI application: OpenAI's endpoints, health, metrics, and the page.

Each answer (`answer.py`) is a task on the event loop. A client that goes away ends the task, and the task ends the
requests.
"""

import asyncio
import contextlib
import functools
import hmac
import json
import time
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, Response
from starlette.routing import Route

from hisa_jax.models.async_engine import AsyncEngine, BusyError, ClosedError, Stream
from hisa_jax.models.chat import ChatTemplate
from hisa_jax.models.checks import shown
from hisa_jax.models.engine import Engine
from hisa_jax.models.serve import look
from hisa_jax.models.serve.answer import Answer, Events, disconnected
from hisa_jax.models.serve.metrics import Metrics
from hisa_jax.models.serve.protocol import Ask, RequestError, read_chat, read_completion
from hisa_jax.models.tokens import Tokenizer

_LARGEST_BODY = 2**23
_KEPT = 8  # texts of finished requests, of which recall is measured
_PAGE = Path(__file__).parent / "page.html"


class Server:
    """The endpoints and what they share.

    Args:
        engine: warmed up; with a tokenizer.
        name: of the model.
        template: makes prompts of messages; None for none.
        api_keys: of which a client sends one; none: everybody is served.
        most_waiting: requests that may wait for the engine.
    """

    def __init__(
        self, engine: Engine, name: str, *, template: ChatTemplate | None = None, api_keys: Sequence[str] = (),
        most_waiting: int = 64,
    ) -> None:  # fmt: skip
        tokenizer = engine.tokenizer
        if tokenizer is None:
            raise ValueError("Server: engine has no tokenizer, wanted one")
        self.tokenizer: Tokenizer = tokenizer
        self.name, self.template, self.most_waiting = name, template, most_waiting
        self._keys = [key.encode() for key in api_keys]
        self.metrics = Metrics(engine)
        self._model, self._config, self._room = engine.model, engine.model.config, engine.scheduler.max_length
        self._created = int(time.time())
        self._engine = engine
        self._serving: AsyncEngine | None = None
        self._looking = asyncio.Lock()
        self._finished: deque[tuple[int, ...]] = deque(maxlen=_KEPT)

    @property
    def serving(self) -> AsyncEngine:
        """The engine's thread, while the application runs."""
        if self._serving is None:
            raise ClosedError("the server has not started")
        return self._serving

    def application(self) -> Starlette:
        """For an ASGI server; when it shuts down, requests that run are cancelled."""

        @contextlib.asynccontextmanager
        async def lifespan(_: Starlette) -> AsyncIterator[None]:
            self._serving = AsyncEngine(self._engine, self.metrics.after_step, self.metrics.after_fault)
            yield
            await self._serving.close()

        get, post = ["GET"], ["POST"]
        routes = [
            Route("/", self._page, methods=get),
            Route("/health", self._health, methods=get),
            Route("/metrics", self._metrics, methods=get),
            Route("/v1/models", self._keyed(self._models), methods=get),
            Route("/v1/models/{name:path}", self._keyed(self._models), methods=get),
            Route("/v1/completions", self._keyed(self._completions), methods=post),
            Route("/v1/chat/completions", self._keyed(self._chat), methods=post),
            Route("/look", self._keyed(self._look), methods=post),
        ]
        handlers: dict[Any, Any] = {
            HTTPException: _on_http_error,
            RequestError: _on_request_error,
            Exception: _on_error,
        }
        return Starlette(routes=routes, lifespan=lifespan, exception_handlers=handlers)

    # Endpoints.

    async def _health(self, request: Request) -> Response:
        is_alive = self._serving is not None and self._serving.is_alive
        return JSONResponse({"status": "ok" if is_alive else "the engine has ended"}, 200 if is_alive else 503)

    async def _page(self, request: Request) -> Response:
        policy = {"content-security-policy": "default-src 'self' 'unsafe-inline'"}
        return HTMLResponse(_PAGE.read_text(), headers=policy)

    async def _metrics(self, request: Request) -> Response:
        if request.query_params.get("recall") in ("1", "true"):
            if not self._finished:
                raise RequestError("recall: no request has finished yet", status=409, param="recall")
            tokens = max(self._finished, key=len)
            async with self._looking:
                found = await asyncio.to_thread(look.recall, self._model, tokens)
            if not found:
                raise RequestError(
                    f"recall: the longest of the last answers has {len(tokens)} tokens, not more than are selected",
                    status=409, param="recall",
                )  # fmt: skip
            self.metrics.show_recall(found)
        return Response(self.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    async def _models(self, request: Request) -> Response:
        card = {
            "id": self.name, "object": "model", "created": self._created, "owned_by": "hisa_jax",
            "max_model_len": self._room,
        }  # fmt: skip
        if "name" not in request.path_params:
            return JSONResponse({"object": "list", "data": [card]})
        self._demand_model(request.path_params["name"])
        return JSONResponse(card)

    async def _completions(self, request: Request) -> Response:
        body = await self._body(request)
        ask = await asyncio.to_thread(read_completion, body, self.tokenizer, self._config.vocab_size, self._room)
        return await self._answer(ask, request)

    async def _chat(self, request: Request) -> Response:
        body = await self._body(request)
        render = None if self.template is None else self.template.render
        ask = await asyncio.to_thread(read_chat, body, self.tokenizer, self._config.vocab_size, self._room, render)
        return await self._answer(ask, request)

    async def _look(self, request: Request) -> Response:
        body = await self._body(request)
        known = {"text", "layer", "query", "topk", "model"}
        if body.keys() - known:
            raise RequestError(f"{shown(sorted(body.keys() - known))}: wanted {', '.join(sorted(known))}")
        text = body.get("text")
        if not isinstance(text, str) or not text:
            raise RequestError(f"text is {shown(text)}, wanted one that is not empty", param="text")
        try:
            tokens = await asyncio.to_thread(self.tokenizer.encode, text)
        except ValueError as error:
            raise RequestError(str(error), param="text") from error
        if not 2 <= len(tokens) <= self._room:
            raise RequestError(f"text has {len(tokens)} tokens, wanted 2 to {self._room}", param="text")
        layers = [i for i, kind in enumerate(self._config.indexer_kinds) if kind == "full"]
        layer, query = body.get("layer", layers[0]), body.get("query", len(tokens) - 1)
        most = min(self._config.index_topk, len(tokens))
        # Unless told, an eighth of a short text, since else nothing is left out; a power of 2, which blocks divide.
        topk = body.get("topk", min(most, 1 << max(len(tokens) // 8, 1).bit_length() - 1))
        for name, value, allowed in (
            ("layer", layer, layers), ("query", query, range(len(tokens))), ("topk", topk, range(1, most + 1)),
        ):  # fmt: skip
            if type(value) is not int or value not in allowed:
                raise RequestError(f"{name} is {shown(value)}, wanted one of {shown(list(allowed))}", param=name)
        methods = look.methods_to_look_at(topk)
        async with self._looking:
            found = await asyncio.to_thread(look.look, self._model, tokens, layer, query, methods)
        texts = await asyncio.to_thread(look.texts_of, tokens, self.tokenizer)
        return JSONResponse(
            {"tokens": texts, "layers": layers, "layer": layer, "query": query, "topk": topk, "methods": found}
        )

    # What they share.

    def _keyed(self, endpoint: Callable[[Request], Awaitable[Response]]) -> Callable[[Request], Awaitable[Response]]:
        async def checked(request: Request) -> Response:
            given = request.headers.get("authorization", "")
            key = given.removeprefix("Bearer ").encode() if given.startswith("Bearer ") else b""
            are_equal = [hmac.compare_digest(key, one) for one in self._keys]  # all, each in constant time
            if self._keys and not any(are_equal):
                raise RequestError("the API key is missing or wrong", status=401, code="invalid_api_key")
            return await endpoint(request)

        return checked

    async def _body(self, request: Request) -> dict[str, Any]:
        data = bytearray()
        async for part in request.stream():
            data += part
            if len(data) > _LARGEST_BODY:
                raise RequestError(f"the body has more than {_LARGEST_BODY} bytes", status=413, code="too_large")
        try:
            body = json.loads(bytes(data).decode())
        except (ValueError, RecursionError) as error:
            raise RequestError(f"the body is not JSON: {str(error)[:200]}") from error
        if not isinstance(body, dict):
            raise RequestError(f"the body is {shown(body)}, wanted a JSON object")
        if "model" in body:
            self._demand_model(body["model"])
        return body

    def _demand_model(self, name: Any) -> None:
        if name != self.name:
            raise RequestError(
                f"the model {shown(name)} is not served, {self.name!r} is", status=404, param="model",
                code="model_not_found",
            )  # fmt: skip

    async def _answer(self, ask: Ask, request: Request) -> Response:
        start = time.perf_counter()
        streams = await self._submit(ask)
        answer = Answer(
            ask, streams, name=self.name, tokenizer=self.tokenizer, metrics=self.metrics, start=start,
            ended=functools.partial(self._count, start),
        )  # fmt: skip
        if ask.is_streamed:
            return Events(answer)
        collecting = asyncio.ensure_future(answer.whole())
        leaving = asyncio.ensure_future(disconnected(request.receive))
        try:
            await asyncio.wait({collecting, leaving}, return_when=asyncio.FIRST_COMPLETED)
            if not collecting.done():  # nobody reads this
                return Response(status_code=499)
            return JSONResponse(collecting.result())
        finally:
            leaving.cancel()
            collecting.cancel()
            answer.leave()

    async def _submit(self, ask: Ask) -> list[Stream]:
        """A request of the engine for each answer: all of them, or none."""
        requests = [(prompt, sampling) for prompt in ask.prompts for sampling in ask.samplings]
        try:
            return await self.serving.submit_all(requests, self.most_waiting)
        except BusyError as error:
            self.metrics.requests.labels(outcome="refused").inc(len(requests))
            raise RequestError(
                "too many requests wait already: try again later", status=429, code="queue_full",
                kind="rate_limit_error",
            ) from error  # fmt: skip
        except ClosedError as error:
            raise RequestError("the server is stopping", status=503, kind="server_error") from error
        except ValueError as error:
            raise RequestError(str(error).removeprefix("submit: ")) from error

    def _count(self, start: float, tokens: list[int], prompt: tuple[int, ...], reason: str) -> None:
        """Of a request that ended."""
        self.metrics.requests.labels(outcome=reason).inc()
        self.metrics.whole.observe(time.perf_counter() - start)
        if reason in ("stop", "length"):
            self._finished.append((*prompt, *tokens))


async def _on_request_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestError)
    return JSONResponse(error.body(), error.status)


async def _on_http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    told = RequestError(f"{request.method} {request.url.path}: {error.detail}", status=error.status_code)
    return JSONResponse(told.body(), told.status, headers=error.headers)


async def _on_error(request: Request, error: Exception) -> Response:
    told = RequestError(f"the server failed: {type(error).__name__}", status=500, kind="server_error")
    return JSONResponse(told.body(), told.status)
