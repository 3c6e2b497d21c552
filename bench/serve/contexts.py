"""Long contexts by a few layers of a published model at its real widths, on one device or a mesh, by each method.

    time to first token     of a prompt alone, from `submit` on; and of the next turn: a prompt that begins like one
                            that was read before, and of which a chunk is new
    time per output token   of a step in which all requests decode
    tokens a second         of all requests together in such steps

Weights and prompts are random: what is measured is the engine and its passes. Methods share the weights. A method has
one engine for all contexts, made for the longest, since compiling takes most of the time. On NVIDIA GPUs the profiler
looks at one more prompt and one more step: what the first device's kernels are for, and what of the time is none.
"""

import dataclasses
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array
from jax.sharding import Mesh
from rich.console import Console

from bench import UserError, records, shapes
from bench.gpu.span import Event, by_jax
from bench.serve import nvlink
from bench.serve.timeline import lines as timeline_lines
from bench.serve.timeline import timeline
from hisa_jax import models
from hisa_jax.models.config import Config
from hisa_jax.models.engine import Engine
from hisa_jax.models.methods import make_method
from hisa_jax.models.sharding import size_of

CONFIGS = {"deepseek-v3.2": models.dsv32, "glm-5": models.glm5}
METHODS = ("dsa", "hisa", "scan")
_PROMPTS, _TURNS = 2, 3  # read alone, one after the other


@dataclasses.dataclass(frozen=True, kw_only=True)
class Load:
    """What is served: so many requests in each group of devices, which make `n_new` tokens together.

    Prompts are read `chunk` tokens at a time. Pages are of `page_size` tokens, None: of as many as the model has by
    itself.
    """

    requests: int
    n_new: int
    chunk: int
    page_size: int | None = None


class Row(NamedTuple):
    """What is measured."""

    method: str
    context: int

    @property
    def row(self) -> str:
        return f"{self.method} {shapes.label(self.context)}"

    def __str__(self) -> str:
        return self.row


class NoMlp(nnx.Module):
    """What layers have in place of MLP or experts where attention alone is measured."""

    def __call__(self, x: Array) -> Array:
        return jnp.zeros_like(x)


def run(
    name: str, layers: int, contexts: list[int], methods: Sequence[str], load: Load, mesh: Mesh | None, seed: int,
    out: Path | None, console: Console, *, attention_only: bool = False,
) -> int:  # fmt: skip
    """Every method at every context, a few lines each."""
    config = cut(CONFIGS[name](), layers, max(contexts))
    model = models.from_config(config, rngs=nnx.Rngs(seed), dtype=jnp.bfloat16, mesh=mesh)
    if attention_only:
        layer: Any  # whose MLP becomes one of another kind
        for layer in model.layers:
            layer.mlp = NoMlp()
    engines: dict[str, Engine] = {}

    def engine_of(method: str) -> Engine:
        if method in engines:
            return engines[method]
        engines.clear()  # its pages leave room for the next one's
        made = model.with_method(make_method(method, config))
        if load.page_size is not None:
            made = made.with_page_size(load.page_size)
        start = time.perf_counter()
        engines[method] = warm(made, load, max(contexts))
        console.print(f"{method}: compiled in {time.perf_counter() - start:.0f} s", highlight=False)
        return engines[method]

    def measure(row: Row) -> dict[str, Any]:
        try:
            found = measured(engine_of(row.method), row.context, load, seed)
        except Exception:
            engines.clear()  # it may hold requests, which the next context is not to meet
            raise
        shape = None if mesh is None else dict(mesh.shape)
        what = {"config": name, "layers": layers, "attention_only": attention_only, "indexer": row.method}
        return {"row": "serve_contexts", **what, "mesh": shape, **records.device(), **found}

    rows = [Row(method, context) for method in methods for context in contexts]
    return records.measure_all(rows, ["*"], measure, lambda row: "\n".join(lines(row)), out)


def cut(config: Config, layers: int, context: int = 0) -> Config:
    """The first layers, index keys as servers have them: e4m3, after the rotation that spreads outliers.

    A `context` may be longer than the model's own: what is measured is time.
    """
    if not 1 <= layers <= config.num_hidden_layers:
        raise UserError(f"--layers={layers}, wanted 1 to {config.num_hidden_layers}")
    return dataclasses.replace(
        config, max_position_embeddings=max(context, config.max_position_embeddings), num_hidden_layers=layers,
        layer_kinds=config.layer_kinds[:layers], indexer_kinds=config.indexer_kinds[:layers],
        index_key_dtype="float8_e4m3fn", index_hadamard=True,
    )  # fmt: skip


def warm(model: models.Model, load: Load, context: int) -> Engine:
    """A compiled engine for requests of up to `context` tokens. Each group of devices reads a prompt at a time."""
    n_devices, n_groups = size_of(model.mesh, "context"), size_of(model.mesh, "data")
    # Each device has room for its part of every request of its group, of a turn more, and for a page to copy.
    per_round = model.stripe * n_devices
    per_request = -(-(context + load.chunk) // per_round) * per_round // model.page_size + n_devices
    rows = load.requests * n_groups
    sizes: Any = dict(rows=rows, prefill_rows=n_groups, max_length=context, chunk=load.chunk)
    engine = Engine(model, n_pages=per_request * rows, **sizes)
    # Not by `warm_up`, which also compiles what is not asked for here: drawn tokens, and logprobs.
    engine.submit([0] * (load.chunk + 1), 2, ())
    while not engine.is_idle:
        engine.step()
    engine.release()
    return engine


def measured(engine: Engine, context: int, load: Load, seed: int) -> dict[str, Any]:
    """The figures of one method at one context."""
    n_groups = size_of(engine.model.mesh, "data")
    n_together, rng = load.requests * n_groups, np.random.default_rng(seed)
    # Those that are read first decode until the last one is read.
    n_new = load.n_new + -(-context // load.chunk) * (load.requests - 1)
    if context - n_new < load.chunk:
        raise UserError(f"a context of {context}, wanted {n_new + load.chunk} at least for {load.requests} requests")

    def prompts(n: int) -> list[list[int]]:
        return rng.integers(0, engine.model.config.vocab_size, (n, context - n_new)).tolist()

    first_s, turn_s = list[float](), list[float]()
    before = nvlink.sent_bytes()
    for prompt in prompts(_PROMPTS):
        first_s.append(read_alone(engine, prompt)[0])
    sent = nvlink.difference(before, nvlink.sent_bytes(), _PROMPTS)
    for turn in prompts(_TURNS):
        seconds_of_turn, shared = read_alone(engine, prompt[: -load.chunk] + turn[-load.chunk :])
        turn_s.append(seconds_of_turn)
    of_prompt = timeline(looked_at(lambda: read_alone(engine, prompts(1)[0])))

    for prompt in prompts(n_together):
        engine.submit(prompt, n_new, ())
    requests = list(engine.scheduler.waiting.values())
    while any(request.n_made == 0 for request in requests):
        engine.step()
    seconds, before = list[float](), nvlink.sent_bytes()
    while len(seconds) < load.n_new - 3:  # the first token is there, the last step is left out, one may be profiled
        start = time.perf_counter()
        engine.step()
        seconds.append(time.perf_counter() - start)
    sent_a_step = nvlink.difference(before, nvlink.sent_bytes(), len(seconds))
    of_step = timeline(looked_at(engine.step))
    while not engine.is_idle:
        engine.step()
    engine.release()
    step_s = float(np.median(seconds))
    return {
        "context": context, **dataclasses.asdict(load), "page_size": engine.model.page_size,
        "time_to_first_token_s": float(np.median(first_s)), "times_to_first_token_s": first_s,
        "time_to_first_token_of_a_turn_s": float(np.median(turn_s)), "shared_tokens_of_a_turn": shared,
        "prompt_tokens": context - n_new, "requests_together": n_together, "time_per_output_token_s": step_s,
        "tokens_per_s": n_together / step_s, "sent_bytes_of_a_prompt": sent, "sent_bytes_of_a_step": sent_a_step,
        "of_a_prompt": of_prompt._asdict(), "of_a_step": of_step._asdict(),
    }  # fmt: skip


def read_alone(engine: Engine, prompt: list[int]) -> tuple[float, int]:
    """Seconds until one token of a prompt is made, with nothing beside it, and how many of its tokens were there."""
    start, shared = time.perf_counter(), 0
    engine.submit(prompt, 1, ())
    while not engine.is_idle:
        shared += sum(n for *_, n in engine.step().forks)
    return time.perf_counter() - start, shared


def looked_at(run: Callable[[], object]) -> list[Event]:
    """The kernels of the first GPU meanwhile; elsewhere nothing is run or seen."""
    return by_jax(run) if jax.default_backend() == "gpu" else []


def lines(row: dict[str, Any]) -> Iterator[str]:
    mesh = "" if row["mesh"] is None else ", mesh " + ", ".join(f"{k}={v}" for k, v in row["mesh"].items())
    what = "attention alone of " if row["attention_only"] else ""
    yield (
        f"{row['config']}, {what}{row['layers']} layers, {row['context']} tokens, {row['indexer']}{mesh}: "
        f"{row['time_to_first_token_s']:.3f} s to the first token, "
        f"{row['time_to_first_token_of_a_turn_s']:.4f} of a turn with "
        f"{row['prompt_tokens'] - row['shared_tokens_of_a_turn']} new tokens, "
        f"{row['time_per_output_token_s'] * 1e3:.2f} ms a step of {row['requests_together']} requests, "
        f"{row['tokens_per_s']:.1f} tokens/s"
    )
    if row["sent_bytes_of_a_prompt"] is not None:
        yield (
            f"  the first GPU sent {row['sent_bytes_of_a_prompt'] / 1e6:.1f} MB for a prompt, "
            f"{row['sent_bytes_of_a_step'] / 1e3:.1f} KB a step"
        )
    yield from timeline_lines("a prompt", row["of_a_prompt"])
    yield from timeline_lines("a step", row["of_a_step"])
