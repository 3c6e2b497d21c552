"""The four TPU generations that kernels are compiled for: names, published peaks, sizes, clocks. One TensorCore each.

Peaks, memory and bandwidth are per chip in the sources, here divided by the TensorCores of the chip:
    https://cloud.google.com/tpu/docs/v5e, .../v5p, .../v6e, .../tpu7x ("System architecture" tables)
VMEM and the number and size of MXUs: JAX's own table, `jax/_src/tpu_info.py`.
Google publishes no clock for v6e and v7x. A clock here is the published bf16 peak over the multiply-adds of a cycle:
MXUs * size^2 * `rows_per_cycle`. v5e and v5p take one row a cycle, which gives the clocks that are known of them (1.5
and 1.75 GHz); v6e and v7x take two rows a cycle: the compiler's schedule of a large matrix product comes to that
within a third (tests/tpu/test_schedule.py).
"""

import dataclasses


@dataclasses.dataclass(frozen=True, kw_only=True)
class Chip:
    """One TensorCore of a TPU, and the topologies to compile for.

    Attributes:
        kind: JAX's `device_kind`; `topology`: the smallest that can be described; `pod`: the one the pod tests take.
        devices_per_chip: what JAX calls a device is one TensorCore on v7x and a whole chip elsewhere.
        cores_per_device: TensorCores that share the `parallel` grid axes of a kernel (two on v5p).
        bf16_flops, int8_ops, fp8_flops: a second, per TensorCore; 0 where the MXU does not take the type.
        hbm_bytes_per_s: per TensorCore; `hbm_bytes`: memory of a device.
        vmem_bytes: per TensorCore, all of it; a kernel can use a little less.
        mxus, mxu_size, rows_per_cycle: bf16.
        granule_bytes: unit of a DMA's size in the compiler's listing.
        ici_bytes_per_s: that a device sends over all its links to other chips; half of what is published, which counts
            both directions.
    """

    name: str
    kind: str
    accelerator: str
    topology: str
    pod: str
    pod_chips: int
    devices_per_chip: int = 1
    cores_per_device: int = 1
    bf16_flops: float
    int8_ops: float
    fp8_flops: float
    hbm_bytes_per_s: float
    hbm_bytes: int
    vmem_bytes: int
    mxus: int
    mxu_size: int
    rows_per_cycle: int
    ici_bytes_per_s: float
    granule_bytes: int = 32

    @property
    def clock_hz(self) -> float:
        return self.bf16_flops / (2 * self.mxus * self.mxu_size**2 * self.rows_per_cycle)

    def flops(self, dtype: str) -> float:
        """Peak of "bf16", "int8" or "e4m3" products a second; a type that is not native runs as bf16."""
        return {"int8": self.int8_ops, "e4m3": self.fp8_flops}.get(dtype, 0) or self.bf16_flops


_GIB = 1 << 30
_MIB = 1 << 20
V5E = Chip(
    name="v5e", kind="TPU v5 lite", accelerator="v5litepod-4", topology="v5e:2x2", pod="v5e:16x16", pod_chips=256,
    bf16_flops=197e12, int8_ops=394e12, fp8_flops=0, hbm_bytes_per_s=819e9, hbm_bytes=16 * _GIB,
    vmem_bytes=128 * _MIB, mxus=4, mxu_size=128, rows_per_cycle=1, ici_bytes_per_s=400e9 / 2,
)  # fmt: skip
V5P = Chip(
    name="v5p", kind="TPU v5", accelerator="v5p-8", topology="v5p:2x2x1", pod="v5p:4x4x8", pod_chips=128,
    cores_per_device=2, bf16_flops=459e12 / 2, int8_ops=918e12 / 2, fp8_flops=0, hbm_bytes_per_s=2765e9 / 2,
    hbm_bytes=95 * _GIB, vmem_bytes=64 * _MIB, mxus=4, mxu_size=128, rows_per_cycle=1, ici_bytes_per_s=1200e9 / 2,
)  # fmt: skip
V6E = Chip(
    name="v6e", kind="TPU v6 lite", accelerator="v6e-4", topology="v6e:2x2", pod="v6e:16x16", pod_chips=256,
    bf16_flops=918e12, int8_ops=1836e12, fp8_flops=0, hbm_bytes_per_s=1638e9, hbm_bytes=32 * _GIB,
    vmem_bytes=128 * _MIB, mxus=2, mxu_size=256, rows_per_cycle=2, ici_bytes_per_s=800e9 / 2,
)  # fmt: skip
V7X = Chip(
    name="v7x", kind="TPU7x", accelerator="tpu7x-8", topology="tpu7x:2x2x1", pod="tpu7x:4x4x8", pod_chips=128,
    devices_per_chip=2, bf16_flops=2307e12 / 2, int8_ops=0, fp8_flops=4614e12 / 2, hbm_bytes_per_s=7380e9 / 2,
    hbm_bytes=96 * _GIB, vmem_bytes=64 * _MIB, mxus=2, mxu_size=256, rows_per_cycle=2,
    ici_bytes_per_s=1200e9 / 2 / 2,
)  # fmt: skip
CHIPS = {chip.name: chip for chip in (V5E, V5P, V6E, V7X)}
