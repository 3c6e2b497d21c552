"""A step of decoding is a handful of launches: what XLA adds between our kernels takes 1 us each."""

import os
import subprocess
import sys

import pytest

from tests.gpu import whole_kernels


@pytest.mark.exhaustive  # 10 s a case, where the tools are there
@pytest.mark.skipif(bool(whole_kernels.why_not()), reason=str(whole_kernels.why_not()))
@pytest.mark.parametrize(
    ("method", "requests", "ours", "of_xla"),
    [("hisa", 1, 4, 1), ("hisa", 32, 4, 2), ("hisa", 128, 3, 2), ("flat", 1, 2, 1), ("flat", 128, 2, 1)],
)
def test_xla_launches_little_between_our_kernels(method, requests, ours, of_xla, tmp_path):
    whole_kernels.make_stub(tmp_path)
    library = whole_kernels.plugin().parents[2] / "jax_cuda13_plugin" / "libmosaic_gpu_runtime.so"
    places = {"LD_LIBRARY_PATH": str(tmp_path), "MOSAIC_GPU_RUNTIME_LIB_PATH": str(library), "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-m", "tests.gpu.xla_step", method, str(requests)]
    said = subprocess.run(command, env={**os.environ, **places}, capture_output=True, text=True, check=True).stdout
    fusions = [name for name in said.split() if "fusion" in name]
    assert len(said.split()) - len(fusions) == ours, said
    assert len(fusions) <= of_xla, said
