"""Whole Mosaic kernels in machine code, without a GPU: what is read there holds for what runs.

`MosaicGpuCompile` of jax's CUDA plugin writes the PTX of a lowered kernel. Of the driver it asks nothing but the chip,
which a stub answers; to load the result it then tries in vain. `ptxas` and `nvdisasm` do the rest.
"""

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental.mosaic.gpu import core

import hisa_jax as hj
from hisa_jax.kernels_pallas import mosaic_gpu
from hisa_jax.layout import Call
from tests.gpu.test_lowering import E4M3, lower

_STUB = """int cuInit(unsigned flags) { return 0; }
int cuDriverGetVersion(int *version) { *version = 13000; return 0; }
int cuCtxGetDevice(int *device) { *device = 0; return 0; }
int cuDeviceGet(int *device, int i) { *device = 0; return 0; }
int cuDeviceGetCount(int *n) { *n = 1; return 0; }
int cuDeviceGetAttribute(int *value, int attribute, int device) { *value = attribute == 75 ? 9 : 0; return 0; }
int cuGetErrorString(int error, const char **text) { *text = "stub"; return 0; }
int cuGetErrorName(int error, const char **text) { *text = "stub"; return 0; }
"""  # attribute 75: the first number of the compute capability, 9.0
_COMPILE = """import ctypes, sys
module = open(sys.argv[2], "rb").read()
compile = ctypes.CDLL(sys.argv[1]).MosaicGpuCompile
compile.argtypes = [ctypes.c_char_p, ctypes.c_int]
compile(module, len(module))
"""


def why_not() -> str | None:
    """None, or what is missing here."""
    missing = [tool for tool in ("cc", "ptxas", "nvdisasm") if shutil.which(tool) is None]
    if missing:
        return f"needs {', '.join(missing)} on the path"
    return None if plugin() else "needs jax's CUDA 13 plugin"


def plugin() -> Path | None:
    if importlib.util.find_spec("jax_plugins") is None:
        return None
    spec = importlib.util.find_spec("jax_plugins.xla_cuda13")
    return None if spec is None or spec.origin is None else Path(spec.origin).parent / "xla_cuda_plugin.so"


def make_stub(folder: Path) -> None:
    """A driver for who has `folder` in LD_LIBRARY_PATH."""
    (folder / "stub.c").write_text(_STUB)
    subprocess.run(["cc", "-shared", "-fPIC", "stub.c", "-o", "libcuda.so.1"], cwd=folder, check=True)


def decode(select, R, page_size, *, H=64, context=131072, each=1, sketch=None):
    """A step of `each` queries of each of R requests from pages, and the shapes and dtypes that it takes.

    Args:
        select: of a `Call`.
    """
    P, T, i32 = context // page_size, R * each, jnp.int32
    cache = jax.eval_shape(lambda: hj.init_cache(R * P, page_size, 128, E4M3, block_size=128, sketch=sketch))
    leaves, structure = jax.tree.flatten(cache)

    def step(q, w, visible, table, offsets, *leaves):
        cache = jax.tree.unflatten(structure, leaves)
        return select(Call(q=q, w=w, visible=visible, query_offsets=offsets, table=table, cache=cache))

    of_queries = ((T, H, 128), E4M3), ((T, H), jnp.float32), ((T,), i32)
    return step, *of_queries, ((R, P), i32), ((R + 1,), i32), *((x.shape, x.dtype) for x in leaves)


def flat(call):
    return mosaic_gpu.select_flat(call, 2048)


def hisa(call):
    return mosaic_gpu.select_hisa(call, hj.Hisa())


class Instruction(NamedTuple):
    predicate: str  # "" for none
    opcode: str
    operands: str


class Program(NamedTuple):
    """A kernel.

    Attributes:
        following: which instructions may come next.
        said: by ptxas, of registers and spills.
    """

    name: str
    instructions: list[Instruction]
    following: list[list[int]]
    said: str


def compiled(folder: Path, f, *shapes) -> list[Program]:
    """The Mosaic kernels of f, lowered for these shapes and dtypes as `lower` takes them."""
    core.KNOWN_KERNELS.clear()
    jax.clear_caches()  # a kernel that was lowered before is not lowered again
    lower(f, *shapes)
    make_stub(folder)
    return [_program(folder, i, module) for i, module in enumerate(core.KNOWN_KERNELS.values())]


def _program(folder: Path, i: int, module: bytes) -> Program:
    (folder / f"{i}.module").write_bytes(module)
    to = folder / str(i)
    to.mkdir()
    dump = {"MOSAIC_GPU_DUMP_PTX": "1", "MOSAIC_GPU_DUMP_TO": str(to), "LD_LIBRARY_PATH": str(folder)}
    command = [sys.executable, "-c", _COMPILE, str(plugin()), str(folder / f"{i}.module")]
    subprocess.run(command, env={**os.environ, **dump}, capture_output=True, check=True)
    (ptx,) = to.glob("*.ptx")
    return assembled(ptx, to)


def assembled(ptx: Path, to: Path) -> Program:
    """The kernel of a file of PTX."""
    command = ["ptxas", "-arch=sm_90a", "-O3", "-v", str(ptx), "-o", str(to / "cubin")]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    command = ["nvdisasm", "-c", str(to / "cubin")]
    return parsed(ptx.stem, subprocess.run(command, capture_output=True, text=True, check=True).stdout, said)


def parsed(name: str, listing: str, said: str = "") -> Program:
    instructions: list[Instruction] = []
    labels: dict[str, int] = {}
    for line in listing.splitlines():
        if label := re.match(r"(\.L_x_\d+):", line.strip()):
            labels[label[1]] = len(instructions)
        elif found := re.match(r"\s*/\*[0-9a-f]+\*/\s+(@!?U?P\w+\s+)?([A-Z][\w.]*)\s*([^;]*);", line):
            instructions.append(Instruction((found[1] or "").strip(), found[2], found[3].strip()))
    following = [_following(i, x, labels, len(instructions)) for i, x in enumerate(instructions)]
    return Program(name, instructions, following, said)


def _following(i: int, x: Instruction, labels: dict[str, int], n: int) -> list[int]:
    ends = x.opcode in ("BRA", "EXIT") and not x.predicate and not re.match(r"!?U?P\d", x.operands)
    after = [] if ends or i + 1 == n else [i + 1]
    target = re.search(r"\.L_x_\d+", x.operands) if x.opcode.startswith("BRA") else None
    return after + ([labels[target[0]]] if target else [])
