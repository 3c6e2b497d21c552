"""Which implementation runs a stage that is chosen by itself: attention over what was selected, and `append`.

`dispatch.py` does so for selections. A backend that has such a stage has a file of its name with `why_not`.
"""

import dataclasses
import importlib
from collections.abc import Callable, Iterable
from typing import Any

from jax import Array

from hisa_jax.dispatch import NO_NVIDIA, NO_TPU, Device


@dataclasses.dataclass(frozen=True, kw_only=True)
class AttentionProblem:
    """What the choice of a sparse attention depends on: heads, sizes of key and value, dtype, form of the latents."""

    N: int
    key_dim: int
    value_dim: int
    dtype: str
    is_quantized: bool = False


def attention(name: str) -> Callable[..., tuple[Array, Array]]:
    """The forward pass of a backend: (q, kv, indices, *, value_dim, scale) -> (out, lse)."""
    return _stage(name, "sparse_mla").sparse_mla


def attention_reasons(device: Device, problem: AttentionProblem) -> dict[str, str | None]:
    """As `reasons`, for the sparse attention."""
    # Hopper's kernel works on 64 heads at a time.
    nvidia = ("triton", "mosaic_gpu") if problem.N % 64 else ("mosaic_gpu", "triton")
    return _stage_reasons(device, "sparse_mla", (*nvidia, "mosaic_tpu"), problem)


@dataclasses.dataclass(frozen=True, kw_only=True)
class GroupedProblem:
    """What the choice of a sparse grouped-query attention depends on: heads, groups, sizes of key and value, blocks.

    Attributes:
        n_listed: entries of all lists of a query.
    """

    Hq: int
    G: int
    D: int
    V: int
    dtype: str
    block_size: int
    n_listed: int


def grouped_attention(name: str) -> Callable[..., tuple[Array, Array]]:
    """The forward pass of a backend: (q, k, v, lists, *, scale, block_size) -> (out, lse)."""
    return _stage(name, "sparse_attention").sparse_attention


def grouped_reasons(device: Device, problem: GroupedProblem) -> dict[str, str | None]:
    """As `reasons`, for the sparse grouped-query attention."""
    return _stage_reasons(device, "sparse_attention", ("triton", "mosaic_tpu"), problem)


@dataclasses.dataclass(frozen=True, kw_only=True)
class AppendProblem:
    """What the choice of who writes new tokens depends on: requests, pages and their size, features, dtype of keys.

    Attributes:
        latent_values: features of latents that are kept in 8 bits.
    """

    n_requests: int
    n_pages: int
    page_size: int
    D: int
    dtype: str
    latent_values: int = 0


def appender(name: str) -> Callable[..., Any]:
    """`append` of a backend: (cache, (keys, scales, latents), block_tables, cu_seqlens, lengths) -> cache."""
    return _stage(name, "append").append


def append_reasons(device: Device, problem: AppendProblem) -> dict[str, str | None]:
    """As `reasons`, for `append`."""
    return _stage_reasons(device, "append", ("triton",), problem)


def _stage(name: str, stage: str) -> Any:
    """A backend's module of a stage that is chosen by itself."""
    return importlib.import_module(f"hisa_jax.kernels_pallas.{name}.{stage}")


def _stage_reasons(
    device: Device, stage: str, names: Iterable[str], problem: AttentionProblem | GroupedProblem | AppendProblem
) -> dict[str, str | None]:  # fmt: skip
    """Why each backend's kernel of a stage cannot run, in this order; then XLA, which can."""

    def why_not(name: str) -> str | None:
        if name == "mosaic_tpu":
            where, missing = device.kind if device.platform == "tpu" else "", NO_TPU
        else:
            where, missing = device.compute_capability, NO_NVIDIA
        return (
            _stage(name, stage).why_not(where, **dataclasses.asdict(problem)) if where else missing.format(device.kind)
        )

    return {name: why_not(name) for name in names} | {"xla": None}
