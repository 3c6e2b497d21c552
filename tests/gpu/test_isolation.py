"""What a query does not see never changes a bit of its result, on the kernels of GPUs and in the one that writes pages.

Interpreted, Triton's kernels take 2 to 10 s a case and Mosaic's 10 to 40: the gate has a batch and pages.
"""

import functools

import jax
import pytest

import hisa_jax as hj
from hisa_jax.kernels_pallas.triton import append as append_stage
from tests import isolation
from tests.gpu.test_select import implementation  # noqa: F401

pytestmark = [
    pytest.mark.filterwarnings("ignore:The Pallas Triton backend is deprecated:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning"),  # the interpreter's, of infinity
]
METHODS = {
    "dsa": hj.Dsa(topk=40),
    "hisa": hj.Hisa(topk=40, block_size=32, block_topk=4, keep_last=2),
    "hisa_two_pages_a_block": hj.Hisa(topk=40, block_size=64, block_topk=3),
    "block_sparse": hj.BlockSparse(topk=128, block_size=32),
}


def each(*cases, gate):
    """Cases (method, dtype) by every implementation; of those interpreted the gate has the ones named."""
    all_of_them = [
        pytest.param(
            name,
            *case,
            marks=pytest.mark.gpu
            if not name.endswith("_interpreted")
            else ()
            if (name, *case) in gate
            else pytest.mark.exhaustive,
        )
        for name in ("triton_interpreted", "mosaic_gpu_interpreted", "mosaic_gpu", "triton")
        for case in cases
    ]
    return pytest.mark.parametrize(("implementation", "method", "dtype"), all_of_them, indirect=["implementation"])


@each(
    ("dsa", "bfloat16"),
    ("hisa", "float8_e4m3fn"),
    ("hisa", "bfloat16"),
    ("block_sparse", "float8_e4m3fn"),
    gate=[("triton_interpreted", "hisa", "float8_e4m3fn")],
)
def test_in_a_batch(implementation, method, dtype):  # noqa: F811
    select = functools.partial(hj.select, implementation=implementation)
    for first_unseen in (261, 101):
        isolation.assert_isolated(
            isolation.batch(select, METHODS[method], dtype, first_unseen=first_unseen), METHODS[method]
        )


@each(
    ("dsa", "float8_e4m3fn"),
    ("hisa", "bfloat16"),
    ("block_sparse", "bfloat16"),
    gate=[],
)
def test_in_a_packed_batch(implementation, method, dtype):  # noqa: F811
    select = functools.partial(hj.select_packed, implementation=implementation)
    isolation.assert_isolated(isolation.packed(select, METHODS[method], dtype), METHODS[method])


@pytest.mark.parametrize(
    "n_queries",
    [
        pytest.param((4, 9, 1, 2), id="prefill_and_decode"),
        pytest.param((1, 1, 1, 1), id="decode", marks=pytest.mark.exhaustive),
    ],
)
@each(
    ("dsa", "float8_e4m3fn"),
    ("hisa", "float8_e4m3fn"),
    ("hisa", "bfloat16"),
    ("hisa_two_pages_a_block", "float8_e4m3fn"),
    ("block_sparse", "float8_e4m3fn"),
    gate=[("triton_interpreted", "hisa_two_pages_a_block", "float8_e4m3fn")],
)
def test_in_pages(implementation, method, dtype, n_queries):  # noqa: F811
    select = functools.partial(hj.select_paged, implementation=implementation)
    call = isolation.paged(select, METHODS[method], dtype, page_size=32, n_queries=n_queries)
    isolation.assert_isolated(call, METHODS[method])


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["bfloat16", "float8_e4m3fn"])
@pytest.mark.parametrize("method", [hj.Hisa(), hj.Dsa(), hj.Scan()], ids=["hisa", "dsa", "scan"])
@pytest.mark.parametrize("name", ["mosaic_gpu", "triton"])
def test_at_the_sizes_of_a_real_model(name, method, dtype):
    """64 heads of 128 features, contexts of 128K tokens and less, requests in pages of 64."""
    if jax.default_backend() != "gpu" or hj.implementations()[name]:
        pytest.skip(hj.implementations()[name] or "needs an NVIDIA GPU")

    def select(*arguments, return_blocks, **options):
        return_blocks = return_blocks and not isinstance(method, hj.Scan)  # of which kernels give none
        return hj.select_paged(*arguments, implementation=name, return_blocks=return_blocks, **options)

    for n_queries in ([1, 1, 1, 1], [300, 150, 1, 8]):
        call = isolation.paged(
            select, method, dtype, page_size=64, n_queries=n_queries, lengths=[131072, 20000, 9000, 700], H=64, D=128
        )
        isolation.assert_isolated(call, method)


@pytest.mark.parametrize("append", ["interpreted", pytest.param("triton", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("dtype", [pytest.param("bfloat16", marks=pytest.mark.exhaustive), "float8_e4m3fn"])
def test_nan_stays_in_the_page_it_was_written_to_and_goes_with_its_token(append, dtype):
    def interpreted(cache, k, *requests, latents):
        values, scales = (k.values, k.scales) if isinstance(k, hj.QuantizedKeys) else (k, None)
        return append_stage.append(cache, (values, scales, latents), *requests, interpret=True)

    if append != "interpreted" and jax.default_backend() != "gpu":
        pytest.skip("needs an NVIDIA GPU")
    write = interpreted if append == "interpreted" else functools.partial(hj.append, implementation=append)
    isolation.assert_nan_stays_in_its_page(write, dtype)
    isolation.assert_removed_nan_leaves_no_trace(write, dtype)
