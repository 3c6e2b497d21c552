"""Compiles for TPUs on a machine without one, and hands out the compiler's schedule of each kernel.

The compiler is the one a TPU host runs: the `libtpu` wheel. It is told what to describe and what to dump by environment
variables that are read once, when it is loaded, so this module sets them before the first compile of the process; all
generations share a process. Memory that does not fit (VMEM, SMEM, HBM) is an error here as it is there.
"""

import atexit
import dataclasses
import functools
import importlib.util
import os
import pathlib
import re
import shutil
import tempfile
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import topologies
from jax.sharding import AbstractDevice, AbstractMesh, AxisType, Mesh, SingleDeviceSharding

from bench import UserError
from bench.tpu import schedule as tpu_schedule
from bench.tpu.chips import CHIPS, Chip

_KERNEL = re.compile(r"^(\d+)-(.+?)(\.\d+)?-\d+-final_bundles\.txt$")


@dataclasses.dataclass(frozen=True)
class Program:
    """A compiled program.

    Attributes:
        compiled: JAX's; `memory_analysis()` and `as_text()` are real, `cost_analysis()` knows nothing of kernels.
        schedules: one for each kernel, in the order of the listing; empty where it was not asked for.
    """

    chip: Chip
    compiled: Any
    schedules: list[tpu_schedule.Schedule]

    def schedule(self, name: str) -> tpu_schedule.Schedule:
        """The schedule of the kernel called `name`."""
        found = [schedule for schedule in self.schedules if schedule.name == name]
        if len(found) != 1:
            raise KeyError(f"{len(found)} kernels are called {name}; there are {[s.name for s in self.schedules]}")
        return found[0]

    @property
    def temp_bytes(self) -> int:
        return self.compiled.memory_analysis().temp_size_in_bytes


def why_not() -> str | None:
    """None, or why nothing can be compiled here."""
    return None if importlib.util.find_spec("libtpu") else "needs the libtpu wheel: pip install 'jax[tpu]'"


def compile_for(chip: str, f: Callable, *operands: Any, schedules: bool = True, of_xla: bool = False) -> Program:
    """Compiles f(*operands) for one device of a chip.

    Args:
        chip: a name of `bench.tpu.chips.CHIPS`.
        operands: arrays or `jax.ShapeDtypeStruct`s, in any pytree.
        schedules: whether to read the schedules too.
        of_xla: whether also those of the operations that XLA makes.
    """
    device = _topology(CHIPS[chip].topology).devices[0]
    _take_schedules(keep=False)  # what a compile that failed has left
    with jax.sharding.use_abstract_mesh(abstract_mesh(chip)):
        lowered = jax.jit(f, in_shardings=SingleDeviceSharding(device)).trace(*operands)
        compiled = lowered.lower(lowering_platforms=("tpu",)).compile()
    return Program(CHIPS[chip], compiled, _take_schedules(keep=schedules, of_xla=of_xla))


def compile_sharded(
    chip: str, f: Callable, mesh: Mesh, *operands: Any, schedules: bool = False, **options: Any
) -> Program:
    """Compiles `jax.jit(f, **options)`, sharded over `pod_mesh(chip, ...)`; the operands carry their shardings."""
    _take_schedules(keep=False)  # what a compile that failed has left
    with jax.sharding.use_abstract_mesh(abstract_mesh(chip, mesh)):
        compiled = jax.jit(f, **options).trace(*operands).lower(lowering_platforms=("tpu",)).compile()
    return Program(CHIPS[chip], compiled, _take_schedules(keep=schedules))


def pod_mesh(chip: str, **axes: int) -> Mesh:
    """A mesh over all devices of the chip's pod slice, e.g. data=32, context=8."""
    return topologies.make_mesh(_topology(CHIPS[chip].pod), tuple(axes.values()), tuple(axes))


def small_mesh(chip: str, **axes: int) -> Mesh:
    """The same over the smallest slice that can be described: four chips."""
    return topologies.make_mesh(_topology(CHIPS[chip].topology), tuple(axes.values()), tuple(axes))


def abstract_mesh(chip: str, mesh: Mesh | None = None) -> AbstractMesh:
    """What tells the lowering of a kernel which chip it is for."""
    device = AbstractDevice(CHIPS[chip].kind, CHIPS[chip].cores_per_device, "tpu")
    if mesh is None:
        return AbstractMesh((1,), ("device",), axis_types=(AxisType.Auto,), abstract_device=device)
    return AbstractMesh(mesh.axis_sizes, mesh.axis_names, axis_types=mesh.axis_types, abstract_device=device)


def shaped(*shape: int, dtype: Any = jnp.bfloat16) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype)


@functools.cache
def prepare() -> pathlib.Path:
    """Sets the environment that libtpu reads when it is loaded, if it is not too late; returns the folder of dumps."""
    reason = why_not()
    if reason:
        raise UserError(reason)
    folder = tempfile.mkdtemp(prefix="hisa_tpu_")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    # Of the eighty listings of a kernel the two that are read: writing the others takes as long as compiling.
    dump = f"--xla_jf_dump_to={folder} --xla_jf_dump_llo_text=true --xla_jf_dump_llo_pass_label_regex=final_.*|post-ra"
    os.environ["LIBTPU_INIT_ARGS"] = f"{os.environ.get('LIBTPU_INIT_ARGS', '')} {dump}".strip()
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5litepod-4")
    os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
    os.environ.setdefault("TPU_LOG_DIR", "disabled")
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")  # nothing here holds a TPU
    return pathlib.Path(folder)


@functools.cache
def _topology(name: str) -> Any:
    prepare()
    return topologies.get_topology_desc(platform="tpu", topology_name=name)


def _take_schedules(*, keep: bool, of_xla: bool = False) -> list[tpu_schedule.Schedule]:
    """Reads and removes the dumps of the last compile."""
    found = []
    folder = prepare()
    for path in sorted(folder.iterdir()) if keep else ():
        match = _KERNEL.match(path.name)
        if not match or match.group(2) == "TLP" or match.group(2).startswith("<"):
            continue
        text = path.read_text()
        if not of_xla and "= custom-call(" not in text:  # XLA's own operations
            continue
        others = [
            next(folder.glob(f"{match.group(1)}-{match.group(2)}*-{what}.txt")).read_text()
            for what in ("final_hlo-static-per-bundle-utilization", "[0-9][0-9]-post-ra")
        ]
        found.append(tpu_schedule.read(match.group(2), text, *others))
    if keep and not any(folder.iterdir()):
        raise RuntimeError("libtpu was loaded before bench.tpu.aot.prepare() was called, so it writes no schedules")
    for path in folder.iterdir():
        path.unlink()
    return found
