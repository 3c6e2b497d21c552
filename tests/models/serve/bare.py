"""An application that has /health alone, as slow as the machine: prints where it listens, serves until it is killed."""

import socket

import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Route


async def health(request: Request) -> JSONResponse:
    return JSONResponse({"status": "ok"})


if __name__ == "__main__":
    listening = socket.create_server(("127.0.0.1", 0))
    print(f"http://127.0.0.1:{listening.getsockname()[1]}", flush=True)
    config = uvicorn.Config(Starlette(routes=[Route("/health", health)]), log_level="warning", access_log=False)
    uvicorn.Server(config).run(sockets=[listening])
