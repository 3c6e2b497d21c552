"""What is compiled once and fuzzed often: a method, dtypes and array shapes, for each implementation.

Everything else of a case is traced: lengths, positions, pages, offsets and the values themselves.
"""

import dataclasses
import functools
import importlib
from typing import Any

import jax

import hisa_jax as hj
from hisa_jax import dispatch, dispatch_stage
from hisa_jax.pallas import Kernels


@dataclasses.dataclass(frozen=True, kw_only=True)
class Setup:
    """Shapes of selections.

    Attributes:
        q_dtype, k_dtype: of queries and keys.
        scale: format of the keys' scales, "float32" or "ue8m0"; None: keys without scales.
        R, T, S: requests, most queries of one, most keys of one.
        H, D: index heads and their size.
        page_size: of the paged forms; None: none of them.
        implementation: what runs it.
        devices: emulated ones, over which forms on a mesh split keys and pages; 1: no such forms.
    """

    method: hj.Method
    q_dtype: str = "float32"
    k_dtype: str = "float32"
    scale: str | None = None
    R: int = 3
    T: int = 24
    S: int = 192
    H: int = 4
    D: int = 16
    page_size: int | None = 16
    implementation: str = "xla"
    devices: int = 1

    @property
    def kind(self) -> str:
        return type(self.method).__name__

    @property
    def dtype(self) -> str:
        """In words, for the table."""
        scale = f" {self.scale}" if self.scale else ""
        return self.k_dtype + scale if self.q_dtype == self.k_dtype else f"{self.q_dtype} x {self.k_dtype}{scale}"

    @property
    def unit(self) -> int:
        """Tokens of a block, of a page where there are no blocks or smaller ones."""
        if isinstance(self.method, hj.Hisa | hj.BlockSparse):
            return self.method.block_size
        unit = self.method.unit if isinstance(self.method, hj.Scan) else 1
        return max(unit, self.page_size or 8)

    @property
    def is_split(self) -> bool:
        """Whether the devices can share the keys of a sequence equally."""
        return self.devices > 1 and self.S % (self.devices * self.unit) == 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class MlaSetup:
    """Shapes of the sparse attention: N heads, K listed tokens, the rest as for `Setup`."""

    dtype: str = "float32"
    R: int = 3
    T: int = 12
    S: int = 96
    N: int = 4
    K: int = 24
    key_dim: int = 24
    value_dim: int = 16
    page_size: int = 16
    implementation: str = "xla"

    @property
    def kind(self) -> str:
        return "sparse_mla"

    @property
    def pages(self) -> int:
        return -(-self.S // self.page_size)

    @property
    def n_pages(self) -> int:
        return self.R * self.pages + 3


def _xla() -> list[Setup | MlaSetup]:
    f32, bf16, e4m3, int8 = "float32", "bfloat16", "float8_e4m3fn", "int8"

    def setup(method: hj.Method, q: str, k: str = "", scale: str | None = None, **sizes: Any) -> Setup:
        return Setup(method=method, q_dtype=q, k_dtype=k or q, scale=scale, **sizes)

    hisa = hj.Hisa(topk=24, block_size=16, block_topk=4)
    return [
        setup(hisa, f32),
        setup(hj.Scan(topk=24, candidates=48, exact_heads=0), f32, page_size=8),
        setup(hj.Dsa(topk=24), e4m3, e4m3, "ue8m0", page_size=8),
        setup(hj.BlockSparse(topk=64, block_size=16), bf16, page_size=4),
        MlaSetup(),
        setup(hj.Hisa(topk=20, block_size=32, block_topk=3), e4m3, e4m3, "float32"),
        setup(
            hj.Scan(topk=20, candidates=64, unit=8, exact_heads=2, keep_first=2, keep_last=3),
            e4m3, e4m3, "ue8m0", page_size=4,
        ),
        setup(hj.Dsa(topk=24), f32, page_size=64),
        setup(hj.BlockSparse(topk=48, block_size=16, keep_first=0, keep_last=0, scored_by="max"), f32),
        setup(hj.Hisa(topk=24, block_size=16, block_topk=6, keep_first=2, keep_last=3), bf16),
        MlaSetup(dtype=bf16, page_size=4),
        # More keys than are sampled, so that they are taken at steps.
        setup(hj.Scan(topk=17, candidates=17, exact_heads=0), bf16, S=600, R=2, T=16, page_size=32),
        setup(hj.BlockSparse(topk=48, block_size=8, keep_first=0, keep_last=2), int8, int8, "float32", page_size=8),
        setup(hj.Hisa(topk=7, block_size=8, block_topk=5, keep_first=0), int8, page_size=1),
        setup(hj.Dsa(topk=1), bf16, page_size=32),
        setup(hj.Hisa(topk=20, block_size=16, block_topk=4, activation=None), bf16, page_size=8),
        setup(
            hj.BlockSparse(topk=36, block_size=12, keep_first=2, scored_by="max", activation=None),
            e4m3, e4m3, "float32", page_size=2, S=600,
        ),
        setup(
            hj.Scan(topk=24, candidates=40, unit=2, exact_heads=1, slopes="plain", sketch="int4"),
            bf16, e4m3, "float32", D=40,
        ),
        setup(hj.Hisa(topk=20, block_size=12, block_topk=5), f32, page_size=4, H=3, D=24),
        setup(hj.BlockSparse(topk=64, block_size=32, keep_first=1, keep_last=1), f32, page_size=32, H=1),
        setup(hisa, bf16, e4m3, "float32", page_size=8),
        setup(
            hj.Scan(topk=16, candidates=64, unit=32, exact_heads=3, keep_first=0),
            int8, int8, "ue8m0", page_size=1, H=3, D=24,
        ),
        setup(hj.Hisa(topk=24, block_size=16, block_topk=32), e4m3),
        MlaSetup(N=3, K=130, page_size=32),
        setup(hj.Dsa(topk=256), int8, int8, "ue8m0"),
        setup(
            hj.Scan(topk=64, candidates=128, unit=128, exact_heads=1, keep_first=0, slopes="plain"),
            f32, S=300, page_size=64, H=1,
        ),
        setup(hisa, int8, int8, "ue8m0"),
        setup(hj.BlockSparse(topk=36, block_size=12), e4m3, e4m3, "float32", page_size=2, H=3, D=24),
        setup(hj.Hisa(topk=64, block_size=64, block_topk=2), bf16, page_size=64, H=8, D=64),
        setup(hj.Dsa(topk=24), f32, int8, "float32"),
        setup(hj.Scan(topk=24, candidates=36, unit=4, exact_heads=0, sketch="int4"), f32, H=64, D=128, T=8),
        setup(hisa, f32, H=64, D=128, T=8),
        setup(hj.Hisa(topk=24, block_size=16, block_topk=9, block_ratio=3), f32),
        setup(hj.Hisa(topk=7, block_size=16, block_topk=40, block_ratio=2, keep_first=0), bf16, e4m3, "float32"),
        setup(
            hj.Scan(topk=9, candidates=64, unit=32, exact_heads=2, slopes="plain", sketch="int4"),
            int8, int8, "ue8m0", page_size=4,
        ),
        setup(hj.Scan(topk=24, exact_heads=2), f32, S=640, page_size=32),
        setup(hj.Scan(topk=7, candidates=40, unit=4, exact_heads=0, keep_first=0), f32, page_size=1, H=1, D=65),
        setup(hj.Scan(topk=24, candidates=48, exact_heads=1, sketch="int4"), bf16, D=40),
        setup(
            hj.Scan(topk=5, candidates=32, unit=2, exact_heads=3, keep_last=3, sketch="int4"),
            f32, e4m3, "float32", page_size=8,
        ),
    ]  # fmt: skip


def _kernels(implementation: str) -> list[Setup | MlaSetup]:
    """Shapes that kernels take; few queries, since an interpreter is slow."""
    if implementation == "mosaic_tpu":
        size, dtypes = 64, (("bfloat16", None), ("float8_e4m3fn", "float32"), ("int8", "ue8m0"))
    else:
        size, dtypes = 32, (("bfloat16", None), ("float8_e4m3fn", "float32"), ("float8_e4m3fn", "ue8m0"))
    methods = (
        hj.Hisa(topk=40, block_size=size, block_topk=3),
        hj.Dsa(topk=40),
        hj.BlockSparse(topk=3 * size, block_size=size),
        hj.Hisa(topk=40, block_size=size, block_topk=5, keep_first=2, keep_last=2),
    )
    # Interpreted, these take minutes a call.
    T = 4 if implementation == "triton" else 2
    setups: list[Setup | MlaSetup] = []
    for i, method in enumerate(methods):
        dtype, scale = dtypes[i % 3]
        page_size = size if i % 2 == 0 or implementation == "mosaic_gpu" else size // 2
        shapes: dict[str, Any] = dict(R=3, T=T, S=6 * size + 13, H=16, D=64, page_size=page_size)
        options: dict[str, Any] = dict(method=method, q_dtype=dtype, k_dtype=dtype, scale=scale)
        setups.append(Setup(**options, **shapes, implementation=implementation))
    sizes = dict(key_dim=576, value_dim=512) if implementation == "mosaic_gpu" else dict(key_dim=192, value_dim=128)
    for page_size, K in ((16, 128), (64, 37)):
        setups.append(
            MlaSetup(
                dtype="bfloat16",
                R=2,
                T=T,
                S=200,
                N=16,
                K=K,
                page_size=page_size,
                implementation=implementation,
                **sizes,
            )
        )
    return setups


def all_of(implementation: str, devices: int = 1) -> list[Setup | MlaSetup]:
    """What is fuzzed of an implementation, in turn."""
    setups = _xla() if implementation == "xla" else _kernels(implementation)
    return [dataclasses.replace(s, devices=devices) if isinstance(s, Setup) else s for s in setups]


def interpret(implementation: str) -> None:
    """Makes kernels whose device is not here run in their interpreter, in this process, under their own name."""
    if implementation == "xla" or hj.implementations()[implementation] is None:
        return
    how: Any = True
    if implementation == "mosaic_gpu":
        from jax.experimental.pallas import mosaic_gpu as plgpu

        how = plgpu.InterpretGPUParams()
        stages: Any = importlib.import_module("hisa_jax.kernels_pallas.mosaic_gpu").stages
        stages.n_sms = lambda: 2
    if implementation == "mosaic_tpu":
        from jax.experimental.pallas import tpu as pltpu

        how = pltpu.InterpretParams(dma_execution_mode="on_wait", uninitialized_memory="nan")
    is_tpu = implementation == "mosaic_tpu"
    kernels = Kernels(lambda: dispatch.backend(implementation), flat_if_all_kept=is_tpu, interpret=how)
    dispatch.IMPLEMENTATIONS[implementation] = dispatch.Implementation(
        why_not=lambda device, problem: None, select=kernels.select
    )
    attention, reasons = dispatch_stage.attention, dispatch_stage.attention_reasons
    options = dict(n_ctas=2) if implementation == "mosaic_gpu" else {}

    def interpreted(name: str) -> Any:
        return (
            functools.partial(attention(name), interpret=how, **options) if name == implementation else attention(name)
        )

    # Hisa_jax has no switch for this: its users run kernels on devices that have them.
    dispatch_stage.attention = interpreted
    dispatch_stage.attention_reasons = lambda device, problem: reasons(device, problem) | {implementation: None}
    # To compile the interpreter's programs takes longer than to run them.
    jax.config.update("jax_disable_most_optimizations", jax.default_backend() == "cpu")
