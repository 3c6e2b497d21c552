"""`python -m bench tune`: the fastest launch configuration of each kernel at the named shapes, into tuned.json.

Every candidate runs on the same inputs in the same process; what a configuration changes is speed alone, which the
tests of the kernels promise. Entries of other devices stay as they are.
"""

import argparse
import dataclasses
import fnmatch
import itertools
import json
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bench import UserError, shapes
from bench.gpu.inputs import BF16, E4M3, draw
from bench.gpu.row import K
from bench.timing import device_times
from hisa_jax.kernels_pallas import tuning
from hisa_jax.kernels_pallas.mosaic_gpu import refine as mosaic_refine
from hisa_jax.kernels_pallas.mosaic_gpu.stages import n_sms
from hisa_jax.kernels_pallas.operands import KeptBlocks, Operands
from hisa_jax.kernels_pallas.triton import refine as triton_refine
from hisa_jax.kernels_pallas.triton import sparse_mla as triton_sparse_mla


@dataclasses.dataclass(frozen=True, kw_only=True)
class Target:
    """A kernel at a shape.

    Attributes:
        kernel, shape: as `tuning.tuned` looks them up.
        heuristic: the configuration that runs where none is tuned.
        candidates: configurations to try; those that do not fit are left out.
        make: () -> (f of a configuration and the operands, the operands; the last is int32).
    """

    kernel: str
    shape: dict[str, int | str]
    heuristic: Any
    candidates: list[Any]
    make: Callable[[], tuple[Callable[..., Any], tuple]]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--kernels", default="*", help="only kernels whose name matches this pattern")
    parser.add_argument("--samples", type=int, default=5, help="timed programs a configuration")


def run(args: argparse.Namespace) -> int:
    if jax.default_backend() != "gpu":
        raise UserError(f"needs an NVIDIA GPU, this machine has {jax.default_backend()}")
    warnings.filterwarnings("ignore", message="The Pallas Triton backend is deprecated")
    device = jax.devices()[0].device_kind
    for target in targets():
        if fnmatch.fnmatch(target.kernel, args.kernels):
            write(device, target, best_of(target, args.samples))
    return 0


def best_of(target: Target, samples: int) -> dict[str, Any]:
    """The fastest configuration and its milliseconds; prints all."""
    f, operands = target.make()
    print(f"{target.kernel} {target.shape}", flush=True)
    times: dict[Any, float] = {}
    # The heuristic, too: its time is kept beside the best one's.
    for config in dict.fromkeys([target.heuristic, *target.candidates]):
        try:
            times[config] = float(np.median(device_times(lambda *x, c=config: f(c, *x), operands, samples)))
        except Exception as error:  # too much shared memory or too many registers: the compiler says which
            print(f"  {config}: {type(error).__name__}", flush=True)
            continue
        print(f"  {config}: {times[config]:.4f} ms", flush=True)
    best = min(times, key=lambda config: times[config])
    return {"config": dataclasses.asdict(best), "ms": times[best], "heuristic_ms": times[target.heuristic]}


def write(device: str, target: Target, best: dict[str, Any]) -> None:
    """Puts an entry in the place of an older one of the same device, kernel and shape."""
    entries = json.loads(tuning.FILE.read_text()) if tuning.FILE.exists() else []
    new = {"device": device, "kernel": target.kernel, "shape": target.shape, "jax": jax.__version__, **best}
    same = tuning.key(device, target.kernel, target.shape)
    entries = [x for x in entries if tuning.key(x["device"], x["kernel"], x["shape"]) != same] + [new]
    entries.sort(key=lambda x: tuning.key(x["device"], x["kernel"], x["shape"]))
    tuning.FILE.write_text(json.dumps(entries, indent=1) + "\n")


def targets() -> Iterator[Target]:
    for model, dtype in itertools.product((shapes.DSV32, shapes.GLM5), (E4M3, BF16)):
        yield _mosaic_refine(model, dtype)
        yield _triton_refine(model, dtype)
    yield _triton_sparse_mla(shapes.DSV32)


def _grid(config: type, **choices: tuple) -> list[Any]:
    """Configurations of all combinations that the class accepts."""
    found = []
    for values in itertools.product(*choices.values()):
        try:
            found.append(config(**dict(zip(choices, values, strict=True))))
        except ValueError:
            continue
    return found


def _refine_operands(model: shapes.Model, dtype: Any) -> tuple[Operands, KeptBlocks, Any]:
    """4096 queries of 64K tokens and their blocks; what they see once more, since the last operand is int32."""
    T, context = 4096, 64 * K
    q, k, k_scale, w, visible = jax.tree.map(lambda x: x[0], draw(model, 1, T, context, dtype))
    picked = jax.random.uniform(jax.random.key(1), (T, context // model.block_size))
    block_ids = jnp.sort(jax.lax.top_k(picked, model.block_topk)[1], axis=1).astype(jnp.int32)
    kept = KeptBlocks(ids=block_ids, visible=visible, first=jnp.zeros((T,), jnp.int32), size=model.block_size)
    return Operands(q, w, k, k_scale), kept, visible


def _mosaic_refine(model: shapes.Model, dtype: Any) -> Target:
    size = jnp.dtype(dtype).itemsize

    def f(config, operands, kept, visible):
        kept = dataclasses.replace(kept, visible=visible)
        return mosaic_refine.refine(operands, kept, k_top=model.topk, config=config, n_ctas=n_sms())

    grid = _grid(mosaic_refine.Config, tile_s=(128,), n_score=(4, 2), ring=(4, 8), n_sort_keys=(1, 2, 3))
    shape = (model.H, model.D, model.block_topk, model.block_size, size)
    return Target(
        kernel="mosaic_gpu.refine",
        shape={"H": model.H, "D": model.D, "m": model.block_topk, "block_size": model.block_size, "itemsize": size},
        heuristic=mosaic_refine.heuristic(*shape),
        candidates=[config for config in grid if config.smem_bytes(*shape) <= mosaic_refine.SMEM_BYTES],
        make=lambda: (f, _refine_operands(model, dtype)),
    )


def _triton_refine(model: shapes.Model, dtype: Any) -> Target:
    def f(config, operands, kept, visible):
        return triton_refine.refine_scores(operands, dataclasses.replace(kept, visible=visible), config=config)

    grid = _grid(triton_refine.Config, tile_s=(32, 64, 128), tile_m=(16, 64), num_warps=(4, 8), num_stages=(2, 3, 4))
    return Target(
        kernel="triton.refine",
        shape={"H": model.H, "D": model.D, "block_size": model.block_size, "itemsize": jnp.dtype(dtype).itemsize},
        heuristic=triton_refine.heuristic(model.H, model.block_size),
        candidates=grid,
        make=lambda: (f, _refine_operands(model, dtype)),
    )


def _triton_sparse_mla(model: shapes.Model) -> Target:
    T, context = 1024, 64 * K
    N, E, V, topk = model.mla_heads, model.mla_dim, model.mla_value_dim, model.topk

    def make():
        keys = jax.random.split(jax.random.key(3), 2)
        q, kv = jax.random.normal(keys[0], (1, T, N, E), BF16), jax.random.normal(keys[1], (1, context, E), BF16)
        indices = jnp.broadcast_to(jnp.arange(topk, dtype=jnp.int32) * (context // topk), (1, T, topk))

        def f(config, *operands):
            return triton_sparse_mla.sparse_mla(*operands, value_dim=V, scale=E**-0.5, config=config)

        return f, (q, kv, indices)

    grid = _grid(triton_sparse_mla.Config, tile_n=(16, 32, 64), tile_s=(32, 64), num_warps=(4, 8), num_stages=(1, 2, 3))
    return Target(
        kernel="triton.sparse_mla",
        shape={"N": N, "key_dim": E, "value_dim": V},
        heuristic=triton_sparse_mla.heuristic(T, N, topk),
        candidates=grid,
        make=make,
    )
