"""Which implementation selects, and why the others do not. Kernels are imported here and in `dispatch_stage.py`."""

import dataclasses
import functools
import importlib
from collections.abc import Callable, Iterator
from typing import Any

import jax
from jax import Array

from hisa_jax import kernel_heads
from hisa_jax.check_select import check_options
from hisa_jax.layout import NO_LIMITS, IndexCache, Keys, Limits
from hisa_jax.methods import BlockSparse, Hisa, Method, Scan, has_ratio, is_by_best_token, name_of
from hisa_jax.pallas import Backend, Kernels
from hisa_jax.selection import Selection
from hisa_jax.sharded import select_kernels, select_xla, varying
from hisa_jax.xla import select as xla

NO_NVIDIA = "needs an NVIDIA GPU, this device is {!r}"
NO_TPU = "needs a TPU, this device is {!r}"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Device:
    """What a choice depends on of the hardware.

    Attributes:
        platform: "cpu", "gpu" or "tpu".
        kind: as the vendor names it, "NVIDIA H200".
        compute_capability: of an NVIDIA GPU, "9.0"; else "".
    """

    platform: str
    kind: str
    compute_capability: str = ""

    @classmethod
    def default(cls) -> "Device":
        """The device on which JAX puts new arrays."""
        device = jax.config.jax_default_device or jax.devices()[0]
        if isinstance(device, str):
            device = jax.devices(device)[0]
        capability = getattr(device, "compute_capability", "")
        return cls(platform=device.platform, kind=device.device_kind, compute_capability=capability)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Problem:
    """What a choice depends on of the call: index heads, their size, most keys a sequence, dtypes, and the method.

    `is_packed` tells sequences of any lengths from a batch, `page_size` pages from contiguous keys, of `n_requests`;
    `is_split`, whether keys are split over devices; `returns_blocks`, whether the kept blocks are asked for;
    `keeps_sketch`, whether the pages do; `n_listed`, how many keys a query's list may name, 0 without lists, in blocks
    of `listed_size`; `has_budget`, whether queries have one.
    """

    H: int
    D: int
    S: int
    q_dtype: str
    k_dtype: str
    method: Method
    is_packed: bool = False
    page_size: int | None = None
    n_requests: int = 0
    is_split: bool = False
    returns_blocks: bool = False
    keeps_sketch: bool = False
    n_listed: int = 0
    listed_size: int = 1
    has_budget: bool = False

    @classmethod
    def of(
        cls,
        q: Any,
        keys: Keys,
        method: Method,
        *,
        S: int | None = None,
        is_split: bool = False,
        limits: Limits = NO_LIMITS,
    ) -> "Problem":
        """Of queries [B, T, H, D] and keys [B, S, D], or packed without B; shapes and dtypes do."""
        H, D = q.shape[-2:]
        S = keys.values.shape[-2] if S is None else S
        rest: Any = dict(q_dtype=q.dtype.name, k_dtype=keys.values.dtype.name, has_budget=limits.budget is not None)
        if (listed := limits.candidates) is not None:
            rest["listed_size"] = size = listed.block_size
            rest["n_listed"] = min(listed.ids.shape[-1], -(-S // size)) * size
        H = 1 if method.per_head else H  # heads are queries then
        return cls(H=H, D=D, S=S, method=method, is_packed=len(q.shape) == 3, is_split=is_split, **rest)

    @classmethod
    def of_pages(
        cls, q: Array, cache: IndexCache, table: Array, method: Method, *, is_split: bool, n_groups: int = 1,
        limits: Limits = NO_LIMITS,
    ) -> "Problem":  # fmt: skip
        """Of queries [T, H, D] and a table [R, P], of which each group of devices has its part; pages of keys."""
        (R, P), size, keeps_sketch = table.shape, cache.page_size, cache.codes is not None
        problem = cls.of(q, Keys(cache.keys, None), method, S=P * size, is_split=is_split, limits=limits)
        return dataclasses.replace(problem, page_size=size, n_requests=R // n_groups, keeps_sketch=keeps_sketch)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Implementation:
    """A way to run the selection.

    Attributes:
        why_not: None if it can run this problem on this device, else the sentence that the user reads. The problem
            is None where only the device is asked about.
        select: as `xla.select.select`.
        select_shard: what one device does of it where keys are split over devices, as that of sharded/select_xla.py;
            None: `why_not` declines every such call.
    """

    why_not: Callable[[Device, Problem | None], str | None]
    select: Callable[..., Selection]
    select_shard: Callable[..., Selection] | None = None


def backend(name: str) -> Backend:
    """A backend of kernels_pallas, by name."""
    module: Any = importlib.import_module(f"hisa_jax.kernels_pallas.{name}")
    return module


def _kernels(name: str, why_not: Callable[[Device, Problem | None], str | None], **options: bool) -> Implementation:
    kernels = Kernels(lambda: backend(name), **options)
    shard = functools.partial(select_kernels.select_shard, lambda: backend(name))
    return Implementation(why_not=why_not, select=kernels.select, select_shard=shard)


def _nvidia(name: str) -> Implementation:
    def why_not(device: Device, problem: Problem | None) -> str | None:
        if not device.compute_capability:
            return NO_NVIDIA.format(device.kind)
        module: Any = backend(name)
        if problem is None:
            return module.why_not(device.compute_capability, H=64, D=128, dtype="bfloat16")
        if reason := _no_kernels(problem) or _no_scan(problem):
            return reason
        if isinstance(problem.method, Scan) and not kernel_heads.is_flat(problem.method, problem.H):
            scan: Any = importlib.import_module("hisa_jax.kernels_pallas.scan")
            if reason := scan.why_not(problem.method, problem.keeps_sketch):
                return reason
            if reason := scan.why_not(kernel_heads.of_heads(problem.H, problem.method), problem.keeps_sketch):
                times = kernel_heads.n_heads(problem.H, problem.method) // problem.H
                return f"takes each of {problem.H} heads for {times}, and {reason}"
        lists: Any = importlib.import_module("hisa_jax.kernels_pallas.lists")
        if reason := lists.why_not(problem.n_listed):
            return reason
        if problem.q_dtype != problem.k_dtype:
            return f"needs queries and keys of one dtype, not {problem.q_dtype} and {problem.k_dtype}"
        method = problem.method
        blocks = _blocks(method, problem.S) if isinstance(method, Hisa | BlockSparse) else {}
        if is_by_best_token(method):
            del blocks["block_size"]  # of any size
        if problem.page_size is not None:
            unit = blocks.get("block_size", problem.page_size)
            pages: Any = importlib.import_module("hisa_jax.kernels_pallas.pages")
            if reason := pages.why_not(problem.n_requests, problem.S, unit):
                return reason
        return module.why_not(
            device.compute_capability,
            H=kernel_heads.n_heads(problem.H, problem.method),
            D=problem.D,
            dtype=problem.k_dtype,
            # A block-sparse selection takes its tokens from the blocks, not by a top-k.
            topk=None if isinstance(method, BlockSparse) else method.topk,
            page_size=problem.page_size,
            **blocks,
        )

    return _kernels(name, why_not)


def _tpu(name: str) -> Implementation:
    def why_not(device: Device, problem: Problem | None) -> str | None:
        if device.platform != "tpu":
            return NO_TPU.format(device.kind)
        module: Any = backend(name)
        if problem is None:
            return module.why_not(device.kind, H=64, D=128, q_dtype="bfloat16", k_dtype="bfloat16")
        method = problem.method
        if reason := _no_kernels(problem) or _no_scan(problem):
            return reason
        if problem.has_budget and isinstance(method, Scan):
            return "has no kernels for a budget of a Scan"
        if problem.is_split and isinstance(method, Scan):
            return "has no kernels for a Scan of keys that are split over devices"
        if (
            isinstance(method, Scan)
            and not kernel_heads.is_flat(method, problem.H)
            and (reason := module.why_not_scan(method, problem.D, problem.page_size is not None))
        ):
            return reason
        blocks = {}
        if isinstance(method, Hisa | BlockSparse):
            blocks = {"block_size": method.block_size, "block_topk": method.block_topk}
        elif problem.n_listed:
            blocks = {"block_size": problem.listed_size, "block_topk": problem.n_listed // problem.listed_size}
        return module.why_not(
            device.kind,
            H=kernel_heads.n_heads(problem.H, problem.method),
            D=problem.D,
            q_dtype=problem.q_dtype,
            k_dtype=problem.k_dtype,
            # A block-sparse selection takes its tokens from the blocks, not by a top-k.
            topk=None if isinstance(method, BlockSparse) else method.topk,
            is_by_best_token=is_by_best_token(method),
            page_size=problem.page_size,
            n_keys=problem.S,
            **blocks,
        )

    # By the schedule HISA takes 1.15 to 1.3 times as long as the flat indexer at 8K; on Hopper, measured, 0.89 times.
    return _kernels(name, why_not, flat_if_all_kept=True)


def _no_kernels(problem: Problem) -> str | None:
    """None, or what of the method or the call no kernels can do, by name."""
    method = problem.method
    for name, function in method.given().items():
        return f"has no kernels for a {type(method).__name__} of {name}={name_of(function)}"
    if reason := kernel_heads.why_not(problem.H, problem.q_dtype, method):
        return reason
    what = next(_of_one_device(problem), None)
    if what is not None and problem.is_split:
        return f"has no kernels for {what} of keys that are split over devices"
    return None


def _of_one_device(problem: Problem) -> Iterator[str]:
    """What there is of it that no kernels do with keys that are split over devices."""
    method = problem.method
    if isinstance(method, Hisa) and has_ratio(method):
        yield f"a Hisa of block_ratio={method.block_ratio}"
    if is_by_best_token(method):
        yield "a BlockSparse of scored_by='max'"
    if problem.n_listed:
        yield "candidates"
    if problem.has_budget:
        yield "a budget"


def _no_scan(problem: Problem) -> str | None:
    """None, or why no kernels can run a Scan."""
    if not isinstance(problem.method, Scan):
        return None
    if problem.returns_blocks:
        return "has no kernels for a Scan with return_blocks=True: they score more tokens than its blocks hold"
    return None


def _blocks(method: Hisa | BlockSparse, S: int) -> dict[str, int]:
    return {"block_size": method.block_size, "block_topk": method.block_topk, "n_blocks": -(-S // method.block_size)}


# In the order in which "auto" tries them.
IMPLEMENTATIONS: dict[str, Implementation] = {
    "mosaic_gpu": _nvidia("mosaic_gpu"),
    "triton": _nvidia("triton"),
    "mosaic_tpu": _tpu("mosaic_tpu"),
    "xla": Implementation(
        why_not=lambda device, problem: None,
        select=xla.select,
        select_shard=select_xla.select_shard,
    ),
}


def reasons(device: Device, problem: Problem | None) -> dict[str, str | None]:
    """Why each implementation cannot run, None for those that can, in the order of preference."""
    return {name: implementation.why_not(device, problem) for name, implementation in IMPLEMENTATIONS.items()}


def choose(call: str, implementation: str, why_not: dict[str, str | None]) -> str:
    """The name of the implementation that runs: the one asked for, or the first that can.

    Raises: ValueError: one that does not exist, or one that cannot run here: says why and which can. Kernels inside
        `jax.shard_map` with its checks on: XLA in their place would be slow, and nothing would say so.
    """
    if not isinstance(implementation, str) or (implementation != "auto" and implementation not in why_not):
        names = ", ".join(["auto", *why_not])
        raise ValueError(f"{call}: implementation={implementation!r}, wanted one of {names}")
    usable = [name for name, reason in why_not.items() if reason is None]
    name = usable[0] if implementation == "auto" else implementation
    if why_not[name] is not None:
        raise ValueError(
            f'{call}: implementation="{name}" cannot run here: {why_not[name]}. Usable: {", ".join(usable)}'
        )
    if name != "xla" and varying.is_checked():
        raise ValueError(
            f'{call}: implementation="{name}" inside jax.shard_map with check_vma=True, wanted check_vma=False, since '
            'kernels do not say over which axes their results vary, or implementation="xla"'
        )
    return name


def choose_select(
    call: str,
    problem: Problem,
    implementation: str,
    tiles: xla.Tiles | None,
    *,
    return_scores: bool,
    return_blocks: bool,
) -> str:
    """`choose` for a selection; checks what is no array before, and that `tiles` go with "xla"."""
    check_options(call, problem.method, return_scores, return_blocks, tiles)
    problem = dataclasses.replace(problem, returns_blocks=return_blocks)
    name = choose(call, implementation, reasons(Device.default(), problem))
    if tiles is not None and name != "xla":
        raise ValueError(f'{call}: tiles={tiles} with implementation="{name}", wanted implementation="xla"')
    return name


def default_tiles() -> xla.Tiles:
    """Of the default device."""
    return xla.Tiles.heuristic(Device.default().platform)
