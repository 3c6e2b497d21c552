"""A step of decoding is a handful of launches: what XLA adds between our kernels takes 1 us each."""

import collections
import os
import re
import subprocess
import sys

import pytest

from tests.gpu import whole_kernels


@pytest.mark.exhaustive  # 10 s a case, where the tools are there
@pytest.mark.skipif(bool(whole_kernels.why_not()), reason=str(whole_kernels.why_not()))
@pytest.mark.parametrize(
    ("method", "requests", "ours", "of_xla"),
    [("hisa", 1, 4, 1), ("hisa", 32, 4, 2), ("hisa", 128, 3, 2), ("flat", 1, 2, 0), ("flat", 128, 2, 1)],
)
def test_xla_launches_little_between_our_kernels(method, requests, ours, of_xla, tmp_path):
    said = _run(tmp_path, method, str(requests))
    fusions = [name for name in said.split() if "fusion" in name]
    assert len(said.split()) - len(fusions) == ours, said
    assert len(fusions) <= of_xla, said


@pytest.mark.exhaustive  # 10 s, where the tools are there
@pytest.mark.skipif(bool(whole_kernels.why_not()), reason=str(whole_kernels.why_not()))
def test_the_best_of_a_tile_stays_in_registers(tmp_path):
    """`units` of a tile that is reshaped first took 896 shuffles and 36 barriers a tile, and ten times as long."""
    _run(tmp_path, "units", XLA_FLAGS=f"--xla_dump_to={tmp_path} --xla_dump_emitter_re=.*")
    (ptx,) = (path for path in tmp_path.glob("*.ptx") if "wgmma" in path.read_text())
    program = whole_kernels.assembled(ptx, tmp_path)
    counts = collections.Counter(x.opcode.partition(".")[0] for x in program.instructions)
    # There are two loops, of tiles that all queries see whole and of others: 8 shuffles and 3 barriers each.
    assert counts["HGMMA"] == 2 * 16
    assert counts["SHFL"] <= 2 * 8 + 5
    assert counts["BAR"] <= 2 * 3 + 6
    assert "0 bytes spill stores" in program.said
    assert int(re.search(r"Used (\d+) registers", program.said)[1]) <= 128  # two programs of 256 threads


def _run(folder, *arguments, **environment):
    """What `tests.gpu.xla_step` says."""
    whole_kernels.make_stub(folder)
    library = whole_kernels.plugin().parents[2] / "jax_cuda13_plugin" / "libmosaic_gpu_runtime.so"
    places = {"LD_LIBRARY_PATH": str(folder), "MOSAIC_GPU_RUNTIME_LIB_PATH": str(library), "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-m", "tests.gpu.xla_step", *arguments]
    environment = {**os.environ, **places, **environment}
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout
