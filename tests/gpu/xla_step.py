"""Prints what XLA launches for a step of decoding on an H200, without one: `python -m tests.gpu.xla_step hisa 32`.

Of `units`, which is Triton's, it compiles the kernel alone. XLA compiles for a described GPU.
`whole_kernels.make_stub` stands for the driver, which the plugin wants to load.
"""

import re
import sys

import jax
from jax._src.lib import _jax, xla_client
from jax._src.mesh import AbstractDevice
from jax.experimental import topologies
from jax.sharding import AbstractMesh, SingleDeviceSharding

from tests.gpu import whole_kernels
from tests.gpu.test_units import prefill

_H200 = """gpu_device_info {
  threads_per_block_limit: 1024 threads_per_warp: 32 shared_memory_per_block: 49152 shared_memory_per_core: 233472
  threads_per_core_limit: 2048 core_count: 132 fpus_per_core: 128 memory_bandwidth: 4800000000000
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535 l2_cache_size: 62914560
  clock_rate_ghz: 1.98 device_memory_size: 150000000000 shared_memory_per_block_optin: 232448
  cuda_compute_capability { major: 9 minor: 0 } registers_per_core_limit: 65536 registers_per_block_limit: 65536
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 1 }
device_description_str: "NVIDIA H200"
"""


def compiled(f, *shapes):
    """The text of the program that XLA makes of f."""
    xla_client.load_pjrt_plugin_dynamically("cuda", str(whole_kernels.plugin()))
    xla_client.initialize_pjrt_plugin("cuda")
    options = {"topology": "1x1x1", "target_config": _H200}
    topology = _jax.get_default_c_api_topology("cuda", "1x1x1", options)
    (device,) = topologies.TopologyDescription(topology._make_compile_only_devices()).devices
    arguments = [jax.ShapeDtypeStruct(*shape, sharding=SingleDeviceSharding(device)) for shape in shapes]
    mesh = AbstractMesh((1,), ("x",), abstract_device=AbstractDevice("NVIDIA H200", 132, "gpu"))
    with jax.sharding.use_abstract_mesh(mesh):
        lowered = jax.jit(f).trace(*arguments).lower(lowering_platforms=("cuda",))
    return lowered.compile(compiler_options={"xla_gpu_autotune_level": "0"}).as_text()


def launches(text):
    """Names of fusions and custom calls of a program, in order."""
    entry = text[text.index("ENTRY") :]
    return re.findall(r"%([\w.-]+) = [^=]*? (?:fusion|custom-call|copy|sort|while)\(", entry)


if __name__ == "__main__":
    decode = lambda method, R: whole_kernels.decode(getattr(whole_kernels, method), int(R), 64)  # noqa: E731
    asked = prefill() if sys.argv[1] == "units" else decode(*sys.argv[1:3])
    print(*launches(compiled(*asked)), sep="\n")
