"""`select`, `select_packed` and `sparse_mla` on kernels keep the contract: on a GPU, and interpreted without one."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu

import hisa_jax as hj
from hisa_jax import dispatch
from hisa_jax.kernels_pallas import mosaic_gpu
from hisa_jax.pallas import Kernels
from tests import draw, oracle

pytestmark = pytest.mark.filterwarnings("ignore:The Pallas Triton backend is deprecated:DeprecationWarning")
METHODS = {
    "dsa": hj.Dsa(topk=50),
    "hisa": hj.Hisa(topk=50, block_size=32, block_topk=5),
    "hisa_more_forced": hj.Hisa(topk=50, block_size=32, block_topk=6, keep_first=2, keep_last=3),
    "block_sparse": hj.BlockSparse(topk=160, block_size=32),
}
CASES = {
    "prefill": (draw.Shape(1, 5, 700, 16, 64), "bfloat16"),
    "decode": (draw.Shape(3, 1, 600, 32, 128), "float8_e4m3fn"),
    "ragged_tail": (draw.Shape(2, 3, 333, 16, 64), "bfloat16"),
    "all_blocks_kept": (draw.Shape(1, 4, 150, 16, 64), "float8_e4m3fn"),
}
# Hopper adds e4m3 products with about 14 bits; block means carry 8 bits. Small whole numbers are exact in both.
TOLERANCE = 2e-2


on_gpu = [pytest.param(name, marks=pytest.mark.gpu) for name in ("mosaic_gpu", "triton")]
INTERPRET = {"triton": True, "mosaic_gpu": plgpu.InterpretGPUParams()}


def in_the_gate(*cases):
    """Of the cases of interpreted Triton; on a GPU all run."""
    return pytest.mark.gate(*(f"triton_interpreted-{case}" for case in cases))


def with_mosaic_interpreted(method, *exhaustive, in_triton):
    """Mosaic's interpreter takes many seconds a call: of the tests whose rows are hardest it has a few cases.

    `method` is the one of them in the gate; None: what it would show, the next test shows there.
    """
    gpu = [pytest.param(name, method, marks=pytest.mark.gpu) for name in ("mosaic_gpu", "triton") for method in METHODS]
    triton = [
        pytest.param("triton_interpreted", name, marks=() if name in in_triton else pytest.mark.exhaustive)
        for name in METHODS
    ]
    marks = ({method: pytest.mark.slow} if method else {}) | dict.fromkeys(exhaustive, pytest.mark.exhaustive)
    mosaic = [pytest.param("mosaic_gpu_interpreted", name, marks=mark) for name, mark in marks.items()]
    return pytest.mark.parametrize(("implementation", "method"), [*gpu, *triton, *mosaic], indirect=["implementation"])


@pytest.fixture(params=[*on_gpu, "triton_interpreted"])
def implementation(request, monkeypatch):
    """The implementations of GPUs where there is one; interpreted everywhere."""
    name = request.param
    if name.endswith("_interpreted"):
        backend = name.removesuffix("_interpreted")
        monkeypatch.setattr(mosaic_gpu.stages, "n_sms", lambda: 3)
        kernels = Kernels(lambda: dispatch.backend(backend), interpret=INTERPRET[backend])
        able = dispatch.Implementation(
            why_not=lambda device, problem: None,
            select=kernels.select,
        )
        monkeypatch.setitem(dispatch.IMPLEMENTATIONS, name, able)
    elif hj.implementations()[name]:
        pytest.skip(hj.implementations()[name])
    return name


def few_scores(shape, dtype, seed=0):
    """Whole numbers: scores are exact in every format, and most of them tie with many others."""
    q, k, w = draw.few_scores(*shape, seed=seed)
    return draw.cast(q, dtype), draw.cast(k, dtype), w


def select(implementation, q, k, w, method, **options):
    options = dict(return_scores=True, return_blocks=method.has_blocks) | options
    q, k, w = jax.tree.map(jnp.asarray, (q, k, w))
    return hj.select(q, k, w, method, implementation=implementation, **options)


def assert_agrees(got, reference, tolerance):
    oracle.assert_same_selection(got.indices, got.count, reference, tolerance, scores=got.scores, blocks=got.blocks)


@pytest.mark.slow
@in_the_gate(
    "prefill-hisa", "decode-block_sparse", "ragged_tail-dsa", "ragged_tail-hisa_more_forced", "all_blocks_kept-hisa",
)  # fmt: skip
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("case", CASES)
def test_selects_what_the_oracle_selects(implementation, case, method):
    # Sums over blocks of 32 are exact, so the oracle's choice is the only right one, except that a tail's mean is not.
    shape, dtype = CASES[case]
    q, k, w = few_scores(shape, dtype)
    tolerance = 0.0 if shape.S % 32 == 0 or method == "dsa" else 1e-2
    assert_agrees(select(implementation, q, k, w, METHODS[method]), oracle.select(q, k, w, METHODS[method]), tolerance)


@pytest.mark.slow
@in_the_gate("dsa", "hisa")
@pytest.mark.parametrize("method", METHODS)
def test_keys_may_be_quantized(implementation, method):
    q, k, w = draw.inputs(2, 4, 400, 16, 64)
    q = draw.cast(q, "float8_e4m3fn")
    for scale in ("float32", "ue8m0"):
        keys = draw.quantized(k, "float8_e4m3fn", scale)
        got = select(implementation, q, keys, w, METHODS[method], return_scores=False)
        assert_agrees(got, oracle.select(q, keys, w, METHODS[method]), TOLERANCE)


@with_mosaic_interpreted(None, "hisa_more_forced", "dsa", in_triton=("dsa", "hisa_more_forced"))
def test_positions_and_lengths_limit_what_is_visible(implementation, method):
    q, k, w = few_scores(draw.Shape(2, 6, 333, 16, 64), "bfloat16")
    k[0, 101:] = np.nan
    positions = np.array([[-1, 0, 31, 32, 100, 400], [7, 160, 161, -1, 331, 332]], np.int32)
    options = dict(query_positions=positions, lengths=np.array([101, 333], np.int32))
    got = select(implementation, q, k, w, METHODS[method], **jax.tree.map(jnp.asarray, options))
    assert_agrees(got, oracle.select(q, k, w, METHODS[method], **options), 1e-2)


@with_mosaic_interpreted(None, "hisa", "block_sparse", in_triton=("hisa", "block_sparse"))
def test_a_packed_batch_gives_what_the_oracle_gives(implementation, method):
    q, k, w = (x[0] for x in few_scores(draw.Shape(1, 12, 800, 16, 64), "float8_e4m3fn"))
    cu_q, cu_k = np.array([0, 3, 3, 4, 9], np.int32), np.array([0, 300, 340, 349, 722], np.int32)
    options = dict(return_scores=True, return_blocks=METHODS[method].has_blocks)
    arrays = map(jnp.asarray, (q, k, w, cu_q, cu_k))
    got = hj.select_packed(*arrays, METHODS[method], implementation=implementation, **options)
    assert_agrees(got, oracle.select_packed(q, k, w, cu_q, cu_k, METHODS[method]), 1e-2)


@pytest.mark.slow
@in_the_gate("dsa", "hisa_more_forced")
@pytest.mark.parametrize("method", METHODS)
def test_nan_keys_and_weights_decide_nothing_else(implementation, method):
    q, k, w = few_scores(draw.Shape(1, 3, 320, 16, 64), "bfloat16")
    k[0, [3, 300]] = np.nan
    w[0, 1] = np.nan
    assert_agrees(select(implementation, q, k, w, METHODS[method]), oracle.select(q, k, w, METHODS[method]), 1e-2)


@pytest.mark.slow
@pytest.mark.parametrize(
    "implementation",
    [*on_gpu, "triton_interpreted", pytest.param("mosaic_gpu_interpreted", marks=pytest.mark.exhaustive)],
    indirect=True,
)
def test_up_to_all_kept_blocks_the_selection_is_the_flat_one_bit_for_bit(implementation):
    q, k, w = draw.inputs(1, 8, 500, 16, 64, dtype="bfloat16")
    positions = jnp.asarray(np.linspace(0, 159, 8).astype(np.int32)[None])
    hisa, dsa = (
        select(implementation, q, k, w, METHODS[name], query_positions=positions, return_blocks=False)
        for name in ("hisa", "dsa")
    )
    np.testing.assert_array_equal(hisa.indices, dsa.indices)


@pytest.mark.parametrize("shape", [(0, 3, 50), (2, 0, 50), (2, 3, 0)], ids=["no_sequence", "no_query", "no_key"])
def test_empty_batches_give_empty_selections(implementation, shape):
    """Half a second each: no kernel runs."""
    (q, k, w), (B, T, _) = draw.inputs(*shape, 16, 64, dtype="bfloat16"), shape
    for method in (*METHODS.values(), hj.Scan(topk=50)):
        got = select(implementation, q, k, w, method, query_positions=jnp.zeros((B, T), jnp.int32), return_blocks=False)
        assert got.indices.shape == (B, T, method.topk) and (got.indices == -1).all()
        assert got.count.shape == (B, T) and not got.count.any()


@pytest.mark.slow
def test_it_runs_under_jit_and_vmap(implementation):
    q, k, w = (x[:, None] for x in few_scores(draw.Shape(2, 3, 320, 16, 64), "bfloat16"))
    run = functools.partial(select, implementation, method=METHODS["hisa"], return_scores=False)
    one_by_one = [run(q[b], k[b], w[b]).indices for b in range(2)]
    jitted = [jax.jit(run)(q[b], k[b], w[b]).indices for b in range(2)]
    np.testing.assert_array_equal(one_by_one, jitted)


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["mosaic_gpu", "triton"])
def test_what_cannot_run_is_refused_with_the_reason(name):
    if hj.implementations()[name]:
        pytest.skip(hj.implementations()[name])
    q, k, w = map(jnp.asarray, draw.inputs(1, 2, 64, 16, 64))
    for q_dtype, k_dtype, reason in (
        (jnp.float32, jnp.float32, "bfloat16"),
        (jnp.bfloat16, jnp.float8_e4m3fn, "one dtype"),
    ):
        with pytest.raises(ValueError, match=f'implementation="{name}" cannot run here: needs .*{reason}'):
            hj.select(q.astype(q_dtype), k.astype(k_dtype), w, METHODS["dsa"], implementation=name)


@pytest.mark.gpu
def test_a_gpu_can_run_the_kernels():
    if jax.default_backend() != "gpu":
        pytest.skip("needs an NVIDIA GPU")
    q, k, _ = map(jnp.asarray, draw.inputs(1, 2, 640, 16, 64, dtype="bfloat16"))
    usable = [name for name, reason in hj.implementations(q, k, METHODS["hisa"]).items() if reason is None]
    assert usable[0] in ("mosaic_gpu", "triton")


@pytest.mark.gpu
@pytest.mark.parametrize("implementation", ["triton", "mosaic_gpu"])
def test_gradients_of_the_sparse_attention_are_those_of_xla(implementation):
    if jax.default_backend() != "gpu":
        pytest.skip("needs an NVIDIA GPU")
    rng = np.random.default_rng(0)
    q, kv = (jnp.asarray(rng.normal(size=shape), jnp.bfloat16) for shape in ((1, 3, 64, 576), (1, 300, 576)))
    indices = jnp.asarray(np.sort(rng.permutation(300)[:192]).astype(np.int32))[None, None] * jnp.ones((1, 3, 1), int)

    def loss(q, kv, implementation):
        out = hj.sparse_mla(q, kv, indices.astype(jnp.int32), scale=576**-0.5, implementation=implementation)
        return jnp.sum(out.astype(jnp.float32) ** 2)

    got, wanted = (jax.grad(loss, argnums=(0, 1))(q, kv, name) for name in (implementation, "xla"))
    for x, y in zip(got, wanted, strict=True):
        x, y = np.asarray(x, np.float32), np.asarray(y, np.float32)
        assert np.linalg.norm(x - y) < 2e-2 * np.linalg.norm(y)
