"""The packages that `python -m bench peers` compares with: which are installed, and how to get the others."""

import importlib
import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from bench import UserError


class Package(NamedTuple):
    """A package by its import name.

    Attributes:
        gives: what is compared with it; `get`: how to install it.
    """

    name: str
    gives: str
    get: str


TORCH = Package("torch", "what all peers run in", "pip install torch")
DEEP_GEMM = Package("deep_gemm", "index scores, of rows and of pages", "pip install sgl-deep-gemm")
FLASH_MLA = Package("flash_mla", "sparse attention", "pip install sgl-flash-mla")
SGL_KERNEL = Package("sgl_kernel", "a top-2048 of scores", "pip install sgl-kernel")
TVM_FFI = Package("tvm_ffi", "a loader for --topk-library", "pip install apache-tvm-ffi")
PACKAGES = (TORCH, DEEP_GEMM, FLASH_MLA, SGL_KERNEL, TVM_FFI)

# (scores [M, L] float32, lengths [M] int32, k) -> columns [M, k] int32, -1 where there are fewer.
TopK = Callable[[Any, Any, int], Any]


class Peers(NamedTuple):
    """What is there to compare with.

    Attributes:
        torch, deep_gemm, flash_mla: modules, None if not installed.
        selectors: top-k by name, `torch.topk` among them.
        notes: a line for each package that is not installed, or does not import, and what to do.
    """

    torch: Any
    deep_gemm: Any
    flash_mla: Any
    selectors: dict[str, TopK]
    notes: tuple[str, ...]


def load(topk_library: Path | None) -> Peers:
    """Imports what is installed.

    Args:
        topk_library: a shared object of sglang's second top-k with its functions `topk_transform_ragged`,
            `topk_transform_paged` and `topk_plan`, to be loaded by tvm_ffi; docs/peers.md says how to build it.

    Raises: UserError: no torch, no such library.
    """
    found = {package.name: _import(package) for package in PACKAGES}
    modules = {name: module for name, (module, _) in found.items()}
    torch = modules[TORCH.name]
    if torch is None:
        raise UserError(f"needs torch, which all peers run in: {found[TORCH.name][1]}")
    selectors: dict[str, TopK] = {"torch.topk": _torch_topk(torch)}
    if modules[SGL_KERNEL.name] is not None:
        selectors["sgl_kernel"] = _sgl_topk(modules[SGL_KERNEL.name])
    if topk_library is not None:
        if not topk_library.is_file():
            raise UserError(f"--topk-library {topk_library}: no such file")
        if modules[TVM_FFI.name] is None:
            raise UserError(f"--topk-library needs tvm_ffi: {found[TVM_FFI.name][1]}")
        library = modules[TVM_FFI.name].load_module(str(topk_library))
        selectors["sglang topk_v2"] = _ragged_topk(torch, library)
        selectors["sglang topk_v2 paged"] = _paged_topk(torch, library)
    notes = tuple(note for _, note in found.values() if note)
    return Peers(torch, modules[DEEP_GEMM.name], modules[FLASH_MLA.name], selectors, notes)


def _import(package: Package) -> tuple[Any, str]:
    """The module and "", or None and what to do about it."""
    if importlib.util.find_spec(package.name) is None:
        return None, f"not installed: {package.name} ({package.gives}): {package.get}"
    try:
        return importlib.import_module(package.name), ""
    except Exception as error:  # whatever a package demands of the machine when it is imported
        return None, f"does not import: {package.name} ({package.gives}): {type(error).__name__}: {error}"


def _torch_topk(torch: Any) -> TopK:
    def select(scores: Any, lengths: Any, k: int) -> Any:
        column = torch.arange(scores.shape[1], device=scores.device)
        scores = scores.masked_fill(column[None, :] >= lengths[:, None], float("-inf"))
        found = torch.topk(scores, min(k, scores.shape[1]), dim=1, sorted=False)
        return torch.where(found.values == float("-inf"), -1, found.indices).to(torch.int32)

    return select


def _sgl_topk(module: Any) -> TopK:
    return lambda scores, lengths, k: module.fast_topk_v2(scores, lengths, k)


def _ragged_topk(torch: Any, library: Any) -> TopK:
    first: dict[int, Any] = {}  # by the number of rows: each begins at column 0

    def select(scores: Any, lengths: Any, k: int) -> Any:
        M = scores.shape[0]
        if M not in first:
            first[M] = torch.zeros(M, dtype=torch.int32, device=scores.device)
        out = torch.empty(M, k, dtype=torch.int32, device=scores.device)
        library.topk_transform_ragged(scores, lengths, None, first[M], out)
        return out

    return select


def _paged_topk(torch: Any, library: Any) -> TopK:
    """Of pages of one token, so that columns are positions."""
    # What is planned of lengths holds for all calls with them; they are kept, so that no others get their address.
    plans: dict[int, tuple[Any, Any]] = {}

    def select(scores: Any, lengths: Any, k: int) -> Any:
        M, at = scores.shape[0], lengths.data_ptr()
        if at not in plans:
            plan = torch.zeros(M + 1, 2, dtype=torch.int32, device=scores.device)
            library.topk_plan(lengths, plan, -1)
            plans[at] = plan, lengths
        out = torch.empty(M, k, dtype=torch.int32, device=scores.device)
        library.topk_transform_paged(scores, lengths, None, out, 1, plans[at][0], None)
        return out

    return select
