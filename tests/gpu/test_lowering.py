"""Every kernel lowers for an H200 at the production shapes on a machine without one."""

import importlib
import re

import jax
import jax.numpy as jnp
import pytest
from jax._src.mesh import AbstractDevice

import hisa_jax as hj
from hisa_jax.kernels_pallas import mosaic_gpu, triton
from hisa_jax.kernels_pallas.mosaic_gpu import refine
from hisa_jax.kernels_pallas.triton.pool import pool
from hisa_jax.kernels_pallas.triton.sparse_mla import sparse_mla
from tests import kernel_calls

pytestmark = pytest.mark.filterwarnings("ignore:The Pallas Triton backend is deprecated:DeprecationWarning")
BACKENDS = {"mosaic_gpu": mosaic_gpu, "triton": triton}
E4M3, BF16 = jnp.float8_e4m3fn, jnp.bfloat16
_CUSTOM_CALLS = ("mosaic_gpu_v2", "__gpu$xla.gpu.triton")


def lower(f, *shapes):
    """StableHLO text of f for CUDA; Pallas lowers its kernels on the way."""
    device = AbstractDevice("NVIDIA H200", 132, "gpu")
    mesh = jax.sharding.AbstractMesh((1,), ("x",), abstract_device=device)
    checks = [jax.export.DisabledSafetyCheck.custom_call(name) for name in _CUSTOM_CALLS]
    with jax.sharding.use_abstract_mesh(mesh):
        exported = jax.export.export(jax.jit(f), platforms=["cuda"], disabled_checks=checks)
        return exported(*(jax.ShapeDtypeStruct(*shape) for shape in shapes)).mlir_module()


def _shapes(B, T, S, H, D, dtype):
    f32, i32 = jnp.float32, jnp.int32
    return ((B, T, H, D), dtype), ((B, S, D), dtype), ((B, S), f32), ((B, T, H), f32), ((B, T), i32)


# Prefill, and what nothing divides; decoding lowers over pages, and so does prefill on Triton.
@pytest.mark.gate("mosaic_gpu-dsv32_64k-e4m3", "mosaic_gpu-odd-bf16", "triton-odd_blocks-bf16")
@pytest.mark.oldest("mosaic_gpu-odd-bf16", "triton-odd_blocks-bf16")
@pytest.mark.parametrize("dtype", [E4M3, BF16], ids=["e4m3", "bf16"])
@pytest.mark.parametrize(
    ("B", "T", "S", "H"),
    [(1, 4096, 65536, 64), (1, 4096, 131072, 32), (32, 1, 131072, 64), (3, 77, 1000, 16), (1, 9, 9000, 16)],
    ids=["dsv32_64k", "glm5_128k", "decode_32", "odd", "odd_blocks"],
)
@pytest.mark.parametrize("backend", ["mosaic_gpu", "triton"])
def test_indexers_lower(backend, B, T, S, H, dtype):
    module, quantized = BACKENDS[backend], dtype == E4M3

    def all_of_them(q, k, k_scale, w, visible):
        k_scale = k_scale if quantized else None
        hisa = kernel_calls.select_hisa(module, q, k, k_scale, w, visible, topk=2048, block_size=128, block_topk=64)
        scan = module.select_scan(kernel_calls.call_of(q, k, k_scale, w, visible), hj.Scan(topk=300))
        return hisa, kernel_calls.select_flat(module, q, k, k_scale, w, visible, topk=2048), scan

    assert "custom_call" in lower(all_of_them, *_shapes(B, T, S, H, 128, dtype))


@pytest.mark.parametrize(
    ("H", "D", "block_size", "block_topk"),
    [(16, 64, 32, 16), (128, 128, 64, 16), (64, 64, 256, 16), (16, 64, 32, 300)],
    ids=["small", "many_heads", "long_blocks", "many_blocks"],
)
@pytest.mark.gate("many_heads", "long_blocks", "many_blocks")
def test_every_head_and_block_size_lowers(H, D, block_size, block_topk):
    def hisa(q, k, k_scale, w, visible):
        return kernel_calls.select_hisa(
            mosaic_gpu, q, k, k_scale, w, visible, topk=500, block_size=block_size, block_topk=block_topk
        )

    assert "custom_call" in lower(hisa, *_shapes(1, 100, 16384, H, D, E4M3))


def quantized_latents(B, S):
    """Shapes of the latents of `hj.quantize_latents`."""
    return ((B, S, 512), E4M3), ((B, S, 4), jnp.float32), ((B, S, 64), BF16)


@pytest.mark.parametrize("is_quantized", [False, True])
@pytest.mark.parametrize(("B", "T", "S", "N"), [(1, 4096, 65536, 128), (32, 1, 8192, 64)], ids=["prefill", "decode"])
@pytest.mark.gate("prefill-False", "decode-False", "decode-True")
def test_sparse_mla_lowers(B, T, S, N, is_quantized):
    def attend(q, indices, *kv):
        kv = hj.QuantizedLatents(*kv) if is_quantized else kv[0]
        return sparse_mla(q, kv, indices, value_dim=512, scale=0.1)

    kv = quantized_latents(B, S) if is_quantized else [((B, S, 576), BF16)]
    assert "custom_call" in lower(attend, ((B, T, N, 576), BF16), ((B, T, 2048), jnp.int32), *kv)


def test_refusals_say_why():
    shape = {"H": 64, "D": 128, "dtype": E4M3, "topk": 2048}
    assert mosaic_gpu.why_not("9.0", **shape) is None and triton.why_not("9.0", **shape) is None
    assert "Hopper" in mosaic_gpu.why_not("8.0", **shape)
    assert "8.9" in triton.why_not("8.0", **shape)
    assert "16, 32, 64 or 128 heads" in mosaic_gpu.why_not("9.0", **{**shape, "H": 48})
    assert "float8_e4m3fn or bfloat16" in mosaic_gpu.why_not("9.0", **{**shape, "dtype": jnp.float32})


def test_refine_fits_shared_memory():
    for H, D, itemsize in ((64, 128, 1), (64, 128, 2), (128, 128, 1), (32, 128, 1)):
        config = refine.heuristic(H, D, 64, 128, itemsize)
        assert config is not None and config.smem_bytes(H, D, 64, 128, itemsize) <= refine.SMEM_BYTES
    assert refine.heuristic(64, 128, 512, 128, 1) is None


def test_keys_beyond_32_bits_are_pooled_in_parts_and_refused_elsewhere():
    S = 3 << 23  # 3 * 2**30 bytes
    k, q, w = (jax.ShapeDtypeStruct(shape, E4M3) for shape in ((S, 128), (1, 64, 128), (1, 64)))
    counts = jax.ShapeDtypeStruct((S // 128,), jnp.int32)
    means, scale = jax.eval_shape(lambda k, counts: pool(k, None, counts, block_size=128), k, counts)
    assert means.shape == (S // 128, 2, 128) and scale.shape == (S // 128,)
    visible = jax.ShapeDtypeStruct((1, 1), jnp.int32)
    with pytest.raises(ValueError, match=r"triton: k has 3221225472 elements of one byte, wanted at most 2147483648"):
        jax.eval_shape(
            lambda q, k, w, v: kernel_calls.select_flat(triton, q[None], k[None], None, w[None], v, topk=64),
            q,
            k,
            w,
            visible,
        )


def without_locations(text):
    return [re.sub(r" ?loc\(.*?\)", "", line) for line in text.splitlines() if not line.startswith("#loc")]


@pytest.mark.parametrize("part", ["hisa", "flat", "packed", "scan", "attention"])
@pytest.mark.parametrize("backend", ["mosaic_gpu", "triton"])
@pytest.mark.gate("mosaic_gpu-packed", "mosaic_gpu-attention")  # each stage of HISA once
def test_programs_lower_in_64_bit_mode(backend, part):
    """Batches, packed batches and the attention; what reads pages is of the same stages.

    Triton's are those of 32-bit mode. Mosaic GPU lowers some index arithmetic otherwise.
    """
    module = BACKENDS[backend]
    attend = importlib.import_module(f"hisa_jax.kernels_pallas.{backend}.sparse_mla").sparse_mla

    def one(q, k, w, visible, cu_q, cu_k, mla_q, kv, indices):
        blocks = dict(topk=500, block_size=128, block_topk=16)
        arrays, packed = (q, k, None, w, visible), (q[0], k[0], None, w[0], visible[0])
        return dict(
            hisa=lambda: kernel_calls.select_hisa(module, *arrays, **blocks),
            flat=lambda: kernel_calls.select_flat(module, *arrays, topk=500),
            packed=lambda: kernel_calls.select_hisa(module, *packed, **blocks, cu_seqlens=(cu_q, cu_k)),
            scan=lambda: module.select_scan(kernel_calls.call_of(*arrays), hj.Scan(topk=500)),
            attention=lambda: attend(mla_q, kv, indices, value_dim=512, scale=0.1),
        )[part]()

    q, k, _, w, visible = _shapes(1, 70, 9000, 64, 128, BF16)
    cu_seqlens = ((4,), jnp.int32)
    mla = ((1, 70, 64, 576), BF16), ((1, 9000, 576), BF16), ((1, 70, 500), jnp.int32)
    shapes = (q, k, w, visible, cu_seqlens, cu_seqlens, *mla)
    texts = []
    for is_on in (False, True):  # from one line: kernels say in their bytes where they were called
        jax.clear_caches()  # what other tests have traced was called elsewhere
        with jax.enable_x64(is_on):
            texts.append(without_locations(lower(one, *shapes)))
    calls = [[line for line in text if "custom_call" in line] for text in texts]
    assert len(calls[0]) == len(calls[1]) > 0 and not any("f64" in line for line in texts[1])
    assert backend == "mosaic_gpu" or texts[0] == texts[1]
