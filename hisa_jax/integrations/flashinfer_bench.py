"""FlashInfer-Bench: an entry for its definition dsa_topk_indexer_fp8_h64_d128_topk2048_ps64, the decoding of a batch.

    page of the cache, int8     [ key 0 .. key 63, 128 bytes each, e4m3 | scale 0 .. scale 63, float32 ]
    id in the result            page in the cache * 64 + offset in the page; -1 after the chosen

The shape that it declares, [pages, 64, 1, 132], says nothing of that: bytes of a key and its scale are not adjacent.
Each request's pages are gathered to keys in one piece, so a page may be of several requests, at any places.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax

import hisa_jax as hj
from hisa_jax import checks
from hisa_jax.check_select import check_plain

DEFINITION = "dsa_topk_indexer_fp8_h64_d128_topk2048_ps64"
_FLAT = hj.Dsa(topk=2048)
_MAIN = """import hisa_jax as hj
from hisa_jax.integrations.flashinfer_bench import entry

run = entry(hj.{method})
"""


@functools.partial(jax.jit, static_argnames=("method", "implementation"))
def dsa_topk_indexer(
    q_index_fp8: Array,
    k_index_cache_fp8: Array,
    weights: Array,
    seq_lens: Array,
    block_table: Array,
    *,
    method: hj.Method = _FLAT,
    implementation: str = "auto",
) -> Array:
    """Chooses tokens for the newest query of each request, on JAX arrays.

    Args:
        q_index_fp8: [B, H, D] float8_e4m3fn index queries, one a request.
        k_index_cache_fp8: [num_pages, page_size, 1, D + 4] int8 or uint8, see the head of this module.
        weights: [B, H] float32, every scale factor in them.
        seq_lens: [B] int32, tokens of each request.
        block_table: [B, P] int32, the pages of each request in order. Entries past its last token are ignored.
        method: `Dsa`, `Hisa`, `Scan` or `BlockSparse`; its topk is 2048 in the definition.
        implementation: as for `select`.

    Returns: [B, topk] int32, ids in the order of their tokens, then -1. A request whose table lacks a page of its
        tokens, or that is longer than its table, gets none; `hj.checked` makes that an error.
    Raises: TypeError, ValueError: arguments that are not these.
    Example:
        >>> q, pages = jnp.ones((1, 4, 32), jnp.float8_e4m3fn), jnp.ones((3, 8, 1, 36), jnp.int8)
        >>> batch = jnp.ones((1, 4)), jnp.array([11]), jnp.array([[2, 0]])
        >>> dsa_topk_indexer(q, pages, *batch, method=hj.Dsa(topk=12)).tolist()
        [[16, 17, 18, 19, 20, 21, 22, 23, 0, 1, 2, -1]]
    """
    call = "dsa_topk_indexer"
    check_plain(call, method)
    checks.dtype(call, "q_index_fp8", q_index_fp8, ("float8_e4m3fn",))
    checks.shape(call, "q_index_fp8", q_index_fp8, ("B", "H", "D"))
    B, H, D = q_index_fp8.shape
    checks.dtype(call, "k_index_cache_fp8", k_index_cache_fp8, ("int8", "uint8"))
    wanted = ("num_pages", "page_size", 1, D + 4)
    checks.shape(call, "k_index_cache_fp8", k_index_cache_fp8, wanted, f"D = {D} bytes and 4 of a scale for each key")
    checks.dtype(call, "weights", weights, ("float32",))
    checks.shape(call, "weights", weights, (B, H), "one weight a query and head")
    checks.int32(call, "seq_lens", seq_lens, (B,), "one length a request")
    checks.int32(call, "block_table", block_table, (B, "P"), "a row a request")
    (n, size), P = k_index_cache_fp8.shape[:2], block_table.shape[1]
    if 0 in (B, n, size, P):
        return jnp.full((B, method.topk), -1, jnp.int32)

    is_page = (block_table >= 0) & (block_table < n)
    is_needed = jnp.arange(P, dtype=jnp.int32)[None, :] * size < seq_lens[:, None]
    has_pages = jnp.all(is_page | ~is_needed, axis=1) & (seq_lens >= 0) & (seq_lens <= P * size)
    checks.value(
        has_pages,
        f"{call}: block_table lacks pages of requests {{bad}}, wanted for each of seq_lens' tokens, up to {P * size}, "
        f"one from 0 to {n - 1}",
        bad=~has_pages,
    )
    table = jnp.where(is_page, block_table, 0)
    pages = k_index_cache_fp8.reshape(n, size * (D + 4))[table]
    values = lax.bitcast_convert_type(pages[..., : size * D].reshape(B, P * size, D), jnp.float8_e4m3fn)
    scales = lax.bitcast_convert_type(pages[..., size * D :].reshape(B, P * size, 4), jnp.float32)
    positions = hj.select(
        q_index_fp8[:, None],
        hj.QuantizedKeys(values, scales),
        weights[:, None],
        method,
        lengths=jnp.where(has_pages, seq_lens, 0),
        implementation=implementation,
    ).indices[:, 0]
    ids = jnp.take_along_axis(table, jnp.maximum(positions, 0) // size, axis=1) * size + positions % size
    return jnp.where(positions < 0, -1, ids)


def entry(method: hj.Method = _FLAT) -> Callable[..., Any]:
    """Makes what the benchmark calls, on PyTorch's tensors: `run` of a solution.

    Args:
        method: as for `dsa_topk_indexer`.

    Returns: a function of the definition's five inputs, CUDA or CPU tensors, that returns `topk_indices` [B, topk], a
        tensor on the same device. Contiguous tensors on a GPU are not copied. The first call of a shape compiles.
    Raises: TypeError: no method; ModuleNotFoundError: no PyTorch.
    """
    check_plain("entry", method)
    try:
        import torch
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("entry: the package torch is missing: pip install torch", name="torch") from error

    @functools.partial(jax.jit, static_argnames="implementation")
    def from_bytes(q: Array, *others: Array, implementation: str) -> Array:
        q = lax.bitcast_convert_type(q, jnp.float8_e4m3fn)
        return dsa_topk_indexer(q, *others, method=method, implementation=implementation)

    def run(q_index_fp8: Any, k_index_cache_fp8: Any, weights: Any, seq_lens: Any, block_table: Any) -> Any:
        """The definition's `run`."""
        # As bytes: not every version of either package exchanges 8-bit floats.
        given = q_index_fp8.view(torch.uint8), k_index_cache_fp8, weights, seq_lens, block_table
        # "auto" would take the kernels of the process' GPU.
        implementation = "xla" if q_index_fp8.device.type == "cpu" else "auto"
        arrays = (jax.dlpack.from_dlpack(x.contiguous()) for x in given)
        return torch.from_dlpack(from_bytes(*arrays, implementation=implementation))

    return run


def solution(method: hj.Method = _FLAT, author: str = "hisa_jax") -> dict[str, Any]:
    """The solution as FlashInfer-Bench stores one: write it as JSON into its data set's folder `solutions`.

    Args:
        method: as for `dsa_topk_indexer`, of topk = 2048 and without functions of one's own.
        author: whose name it bears.

    Returns: what `flashinfer_bench.Solution` takes; its main.py imports this package, which must be installed there.
    Raises: TypeError: no method. ValueError: another topk, functions of one's own.
    """
    check_plain("solution", method)
    if method.topk != _FLAT.topk:
        raise ValueError(f"solution: method is {method}, wanted topk = {_FLAT.topk}, as the definition has it")
    if not isinstance(method, hj.Scan) and method.given():
        raise ValueError(f"solution: method is {method}, wanted one without functions, which JSON does not hold")
    fields = {field.name: field.default for field in dataclasses.fields(method)}
    others = [f"{name}_{value}" for name in fields if (value := getattr(method, name)) != fields[name]]
    return {
        "name": "_".join(["hisa_jax", type(method).__name__.lower(), *others]),
        "definition": DEFINITION,
        "author": author,
        "spec": {
            "language": "python",
            "target_hardware": ["cuda", "cpu"],
            "entry_point": "main.py::run",
            "dependencies": ["hisa_jax"],
            "destination_passing_style": False,
        },
        "sources": [{"path": "main.py", "content": _MAIN.format(method=method)}],
    }
