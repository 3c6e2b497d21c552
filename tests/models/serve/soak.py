"""64 streaming clients for minutes, of which a fifth go away: python -m tests.models.serve.soak, or make soak.

Each asks the byte model for one of some answers that another engine made before, one by one, without a draft. Wanted:
every whole answer is that one, no request and no page is left, and /health answers within 100 ms all the while. Beside
it an application that does nothing else is asked the same way: what it takes is the machine's. Needs httpx.
"""

import argparse
import asyncio
import contextlib
import dataclasses
import json
import pathlib
import random
import subprocess
import sys
import time
from collections.abc import Iterator

import httpx
import numpy as np

from hisa_jax import models
from hisa_jax.models import Sampling
from hisa_jax.models.progress import Progress

from .process import ROOT, served

MODEL, HEALTH_MS = "bytes", 100
LENGTH, CHUNK = 640, 64


@dataclasses.dataclass
class Counts:
    """What became of the requests."""

    whole: int = 0
    left: int = 0
    refused: int = 0
    tokens: int = 0
    wrong: list = dataclasses.field(default_factory=list)
    first_ms: list = dataclasses.field(default_factory=list)


def answers(n: int, longest: int) -> list[tuple[dict, str]]:
    """Requests of all kinds, and what each gets alone."""
    rng = random.Random(0)
    source = (models.sampling.__doc__ or "") + pathlib.Path(models.scheduler.__file__).read_text()
    heads = [source[i * 700 : i * 700 + 200] for i in range(4)]  # prefixes that requests share
    requests = []
    for i in range(n):
        at, size = rng.randrange(len(source) - 400), rng.randrange(8, 300)
        prompt = (heads[i % 4] if i % 2 else "") + source[at : at + size]
        body = {
            "prompt": prompt,
            "max_tokens": rng.randrange(4, longest),
            "seed": i,
            "temperature": (0, 1.0, 0.7)[i % 3],
        }
        body |= {"top_p": 0.9} if i % 4 == 1 else {"top_k": 20} if i % 4 == 2 else {}
        requests.append(body | ({"stop": ["\n\n", "):"]} if i % 5 == 0 else {}))
    model, told, progress = models.from_pretrained(MODEL, progress=Progress()), [], Progress()
    engine = models.Engine(model, n_pages=24, rows=1, max_length=LENGTH, chunk=CHUNK, prefill_rows=1)
    engine.warm_up(progress)
    for i, (prompt, how) in enumerate(samplings(requests)):
        progress("answers alone", i, n)
        told.append("".join(piece.text for piece in engine.stream(engine.submit(prompt, sampling=how))))
        engine.release()  # so that the next one shares nothing
    progress("answers alone", n, n)
    return list(zip(requests, told, strict=True))


def samplings(requests: list[dict]) -> Iterator[tuple[str, Sampling]]:
    for body in requests:
        fields = {name: value for name, value in body.items() if name != "prompt"}
        yield body["prompt"], Sampling(**fields | {"stop": tuple(fields.get("stop", ()))})


async def client(url: str, known: list, until: float, share: float, seed: int, counts: Counts) -> None:
    """One after the other until the time is over; some are left after a random number of events."""
    rng = random.Random(seed)
    async with httpx.AsyncClient(timeout=300) as http_client:
        while time.monotonic() < until:
            body, wanted = rng.choice(known)
            leaves = rng.randrange(6) if rng.random() < share else None
            start, text, reason, n = time.monotonic(), "", None, 0
            async with http_client.stream("POST", f"{url}/v1/completions", json=body | {"stream": True}) as response:
                if response.status_code == 429:
                    counts.refused += 1
                    await asyncio.sleep(0.5)
                    continue
                assert response.status_code == 200, (await response.aread()).decode()
                async for line in response.aiter_lines():
                    if n == leaves:
                        break
                    if not line.startswith("data: ") or line == "data: [DONE]":
                        continue
                    if n == 0:
                        counts.first_ms.append(1000 * (time.monotonic() - start))
                    choice = json.loads(line.removeprefix("data: "))["choices"][0]
                    text, reason, n = text + choice["text"], choice["finish_reason"] or reason, n + 1
            counts.tokens += n
            if leaves is not None:
                counts.left += 1
            else:
                counts.whole += 1
                if text != wanted or reason not in ("stop", "length"):
                    counts.wrong.append((body, text, wanted, reason))


@contextlib.contextmanager
def bare() -> Iterator[str]:
    """Where an application listens that has /health alone."""
    command = [sys.executable, "-m", "tests.models.serve.bare"]
    with subprocess.Popen(command, cwd=ROOT, text=True, stdout=subprocess.PIPE) as process:
        try:
            assert process.stdout is not None
            yield process.stdout.readline().strip()
        finally:
            process.kill()


def asking(url: str) -> subprocess.Popen:
    """A process that asks /health until its input ends."""
    command = [sys.executable, "-m", "tests.models.serve.health", url]
    return subprocess.Popen(command, cwd=ROOT, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE)


def told(times: list[float]) -> str:
    """How long answers took, and which were slow: to tell a start from a stall."""
    quick = np.percentile(times, (50, 99, 99.9))
    slow = {i: round(ms) for i, ms in enumerate(times) if ms > HEALTH_MS}
    return (
        f"{len(times)} times, {quick[0]:.1f} ms (median), {quick[1]:.1f} (99 %), {quick[2]:.1f} (99.9 %), "
        f"{max(times):.1f} at most, {len(slow)} times over {HEALTH_MS} ms: {slow}"
    )


def metric(text: str, name: str) -> float:
    return float(next(line for line in text.splitlines() if line.startswith(f"{name} ")).split()[1])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=300)
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--share", type=float, default=0.2, help="of requests that are left")
    parser.add_argument("--answers", type=int, default=40, help="different requests")
    parser.add_argument("--longest", type=int, default=48, help="new tokens of a request")
    options = parser.parse_args()
    known, counts = answers(options.answers, options.longest), Counts()
    sizes = ("--rows", 16, "--max-length", LENGTH, "--chunk", CHUNK, "--dtype", "float32", "--draft", 2, "--pages", 120)
    with served("--checkpoint", MODEL, *sizes, "--max-waiting", 64) as server, bare() as url:
        asked = [asking(server.url), asking(url)]
        until = time.monotonic() + options.seconds

        async def run() -> None:
            everyone = (
                client(server.url, known, until, options.share, seed, counts) for seed in range(options.clients)
            )
            working = asyncio.gather(*everyone)
            while not working.done():
                await asyncio.wait({working}, timeout=20)
                print(
                    f"{counts.whole} whole, {counts.left} left, {len(counts.wrong)} wrong, {counts.tokens} events",
                    flush=True,
                )
            await working

        asyncio.run(run())
        times, of_bare = (json.loads(process.communicate()[0]) for process in asked)
        text = httpx.get(f"{server.url}/metrics").text
        left = metric(text, "hisa_jax_requests_running") + metric(text, "hisa_jax_requests_waiting")
        status, are_pages_free = server.stop()
        first = np.percentile(counts.first_ms, (50, 99))
        print(f"{counts.whole} whole answers, {len(counts.wrong)} wrong; {counts.left} left by their clients")
        print(f"first event after {first[0]:.0f} ms (median), {first[1]:.0f} ms (99 %)")
        print(f"/health {told(times)}")
        print(f"/health of an application that does nothing else {told(of_bare)}")
        print(f"requests left {left:.0f}, all pages free: {are_pages_free}, exit status {status}")
        for name in ("shared_tokens", "proposals_accepted", "proposals", "step_faults"):
            print(f"{name} {metric(text, f'hisa_jax_{name}_total'):.0f}")
        for body, got, wanted, reason in counts.wrong[:3]:
            print(f"wrong: {body}\n got {got!r} ({reason})\n wanted {wanted!r}")
        is_good = not counts.wrong and counts.whole and not left and are_pages_free and status == 0
        return 0 if is_good and max(times) <= HEALTH_MS else 1


if __name__ == "__main__":
    sys.exit(main())
