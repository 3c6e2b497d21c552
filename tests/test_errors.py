"""Bad input raises at trace time and names the call, the argument, what was given and what is wanted."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import hisa_jax as hj

pytestmark = pytest.mark.check

F32, I32 = jnp.float32, jnp.int32
DSA = hj.Dsa(topk=4)


def arrays(**changed):
    """A valid call of `select` with some arguments replaced."""
    call = dict(q=jnp.ones((2, 3, 4, 16)), k=jnp.ones((2, 40, 16)), w=jnp.ones((2, 3, 4)), method=DSA)
    return {**call, **changed}


def packed(**changed):
    """A valid call of `select_packed` with some arguments replaced."""
    call = dict(q=jnp.ones((3, 4, 16)), k=jnp.ones((40, 16)), w=jnp.ones((3, 4)), method=DSA)
    offsets = dict(cu_seqlens_q=jnp.array([0, 1, 3]), cu_seqlens_k=jnp.array([0, 20, 40]))
    return {**call, **offsets, **changed}


def mla(**changed):
    """A valid call of `sparse_mla` with some arguments replaced."""
    call = dict(q=jnp.ones((2, 3, 4, 24)), kv=jnp.ones((2, 40, 24)), indices=jnp.zeros((2, 3, 5), I32))
    return {**call, "scale": 0.1, "value_dim": 16, **changed}


def mla_on_a_mesh(**changed):
    """A valid call of `sparse_mla` on a mesh with some arguments replaced."""
    return {**mla(mesh=jax.make_mesh((1,), ("context",)), context_axis="context"), **changed}


def mla_paged(**changed):
    """A valid call of `sparse_mla_paged` with some arguments replaced."""
    cache = hj.init_cache(4, 16, 0, F32, latent_dim=24, latent_dtype=F32)
    call = dict(q=jnp.ones((3, 4, 24)), cache=cache, indices=jnp.zeros((3, 5), I32), scale=0.1, value_dim=16)
    return {**call, "block_tables": jnp.zeros((2, 1), I32), "cu_seqlens_q": jnp.array([0, 1, 3]), **changed}


def mla_paged_on_a_mesh(**changed):
    """A valid call of `sparse_mla_paged` on a mesh with some arguments replaced."""
    return {**mla_paged(mesh=jax.make_mesh((1,), ("context",)), context_axis="context"), **changed}


KEYS = hj.quantize_keys(jnp.ones((2, 40, 16)))
SELECT_SHAPES = [
    (dict(q=jnp.ones((2, 3, 16))), "q is [2, 3, 16], wanted [B, T, H, D]"),
    (
        dict(k=jnp.ones((2, 40, 32))),
        "k is [2, 40, 32], wanted [2, S, 16]: its first and last axes must equal q's B and D (q is [2, 3, 4, 16])",
    ),
    (
        dict(k=jnp.ones((1, 40, 16))),
        "k is [1, 40, 16], wanted [2, S, 16]: its first and last axes must equal q's B and D (q is [2, 3, 4, 16])",
    ),
    (
        dict(w=jnp.ones((2, 3, 5))),
        "w is [2, 3, 5], wanted [2, 3, 4]: one weight a query and head (q is [2, 3, 4, 16])",
    ),
    (
        dict(k=hj.QuantizedKeys(KEYS.values, jnp.ones((2, 39)))),
        "k.scales is [2, 39], wanted [2, 40]: one scale a key",
    ),
    (dict(lengths=jnp.ones((3,), I32)), "lengths is [3], wanted [2]: one length a sequence"),
    (dict(query_positions=jnp.ones((2, 4), I32)), "query_positions is [2, 4], wanted [2, 3]: one position a query"),
    (
        dict(k=jnp.ones((2, 2, 16))),
        "q has T = 3 queries but k has only S = 2 keys: by default the queries are the last T of the S tokens; "
        "give query_positions",
    ),
    (
        dict(return_blocks=True),
        "return_blocks=True with Dsa(topk=4): the flat indexer keeps no blocks",
    ),
    (dict(implementation="cuda"), "implementation='cuda', wanted one of auto, mosaic_gpu, triton, mosaic_tpu, xla"),
]
SELECT_TYPES = [
    (
        dict(q=jnp.ones((2, 3, 4, 16), jnp.float16)),
        "q is float16, wanted bfloat16, float32, float8_e4m3fn or int8: float32 holds float16 exactly",
    ),
    (dict(k=np.ones((2, 40, 16))), "k is float64, wanted bfloat16, float32, float8_e4m3fn or int8"),
    (dict(k=[[1.0]]), "k is list, wanted an array of bfloat16, float32, float8_e4m3fn or int8"),
    (
        dict(k=hj.QuantizedKeys(jnp.ones((2, 40, 16)), jnp.ones((2, 40)))),
        "k.values is float32, wanted float8_e4m3fn or int8",
    ),
    (dict(k=hj.QuantizedKeys(KEYS.values, jnp.ones((2, 40), jnp.bfloat16))), "k.scales is bfloat16, wanted float32"),
    (dict(w=jnp.ones((2, 3, 4), jnp.bfloat16)), "w is bfloat16, wanted float32"),
    (dict(lengths=jnp.ones((2,))), "lengths is float32, wanted int32"),
    (dict(lengths=[40, 40]), "lengths is list, wanted an array of int32: jnp.array(lengths, jnp.int32)"),
    (dict(query_positions=jnp.ones((2, 3))), "query_positions is float32, wanted int32"),
    (dict(method="hisa"), "method is 'hisa', wanted a Hisa, Dsa, BlockSparse or Scan"),
]
PACKED_SHAPES = [
    (dict(q=jnp.ones((1, 3, 4, 16))), "q is [1, 3, 4, 16], wanted [T, H, D]"),
    (dict(k=jnp.ones((40, 8))), "k is [40, 8], wanted [N, 16]: its last axis must equal q's D (q is [3, 4, 16])"),
    (dict(w=jnp.ones((3,))), "w is [3], wanted [3, 4]: one weight a query and head (q is [3, 4, 16])"),
    (dict(cu_seqlens_q=jnp.zeros((1, 3), I32)), "cu_seqlens_q is [1, 3], wanted [R + 1]"),
    (
        dict(cu_seqlens_k=jnp.array([0, 40])),
        "cu_seqlens_k is [2], wanted [3]: as many sequences as cu_seqlens_q has",
    ),
    (
        dict(cu_seqlens_q=jnp.zeros((0,), I32), cu_seqlens_k=jnp.zeros((0,), I32)),
        "cu_seqlens_q is [0], wanted [R + 1]: it starts with a 0",
    ),
    (
        dict(k=hj.QuantizedKeys(KEYS.values[0], jnp.ones((41,)))),
        "k.scales is [41], wanted [40]: one scale a key",
    ),
]
MLA_SHAPES = [
    (dict(q=jnp.ones((2, 3, 24))), "q is [2, 3, 24], wanted [B, T, N, Dk]"),
    (
        dict(kv=jnp.ones((2, 40, 16))),
        "kv is [2, 40, 16], wanted [2, S, 24]: its first and last axes must equal q's B and Dk (q is [2, 3, 4, 24])",
    ),
    (
        dict(indices=jnp.zeros((2, 4, 5), I32)),
        "indices is [2, 4, 5], wanted [2, 3, K]: one list a query (q is [2, 3, 4, 24])",
    ),
    (dict(value_dim=25), "value_dim=25, wanted 1 to Dk = 24"),
    (dict(value_dim=0), "value_dim=0, wanted 1 to Dk = 24"),
    (dict(sink=jnp.ones((3,))), "sink is [3], wanted [4]: one logit a head (q is [2, 3, 4, 24])"),
    (dict(scale=float("nan")), "scale=nan, wanted a finite float32 number"),
    (dict(scale=-1e39), "scale=-1e+39, wanted a finite float32 number"),
]
MLA_TYPES = [
    (dict(q=jnp.ones((2, 3, 4, 24), jnp.int8)), "q is int8, wanted bfloat16 or float32"),
    (dict(kv=jnp.ones((2, 40, 24), jnp.bfloat16)), "kv is bfloat16, wanted float32"),
    (dict(indices=jnp.zeros((2, 3, 5))), "indices is float32, wanted int32"),
    (dict(sink=jnp.ones((4,), jnp.bfloat16)), "sink is bfloat16, wanted float32"),
    (dict(scale=True), "scale is bool, wanted a number known at trace time"),
    (dict(scale="1"), "scale is str, wanted a number known at trace time"),
    (dict(value_dim=16.0), "value_dim is float, wanted a whole number"),
    (dict(value_dim=True), "value_dim is bool, wanted a whole number"),
]
OF_BATCHES = [  # what `sparse_mla` is refused over a mesh, too
    (
        ValueError,
        dict(indices=jnp.zeros((2, 4, 5), I32)),
        "indices is [2, 4, 5], wanted [2, 3, K]: one list a query (q",
    ),
    (TypeError, dict(indices=jnp.zeros((2, 3, 5))), "indices is float32, wanted int32"),
    (TypeError, dict(sink=jnp.ones((4,), jnp.bfloat16)), "sink is bfloat16, wanted float32"),
    (ValueError, dict(scale=float("inf")), "scale=inf, wanted a finite float32 number"),
    (TypeError, dict(value_dim=16.0), "value_dim is float, wanted a whole number"),
]
OF_PAGES = [
    (ValueError, dict(q=jnp.ones((3, 4, 16))), "q is [3, 4, 16], wanted [T, N, 24]: its last axis must equal that of"),
    (TypeError, dict(q=jnp.ones((3, 4, 24), jnp.int8)), "q is int8, wanted bfloat16 or float32"),
    (TypeError, dict(q=jnp.ones((3, 4, 24), jnp.bfloat16)), "cache.latents is float32, wanted bfloat16"),
    (ValueError, dict(indices=jnp.zeros((4, 5), I32)), "indices is [4, 5], wanted [3, K]: one list a query (q is [3"),
    (TypeError, dict(indices=jnp.zeros((3, 5))), "indices is float32, wanted int32"),
    (TypeError, dict(block_tables=jnp.zeros((2, 1))), "block_tables is float32, wanted int32"),
    (
        TypeError,
        dict(block_tables=[[0], [0]]),
        "block_tables is list, wanted an array of int32: jnp.array(block_tables, jnp.int32)",
    ),
    (ValueError, dict(block_tables=jnp.zeros((2,), I32)), "block_tables is [2], wanted [R, P]"),
    (TypeError, dict(cu_seqlens_q=jnp.ones((3,), bool)), "cu_seqlens_q is bool, wanted int32"),
    (TypeError, dict(cu_seqlens_q=jnp.ones((3,))), "cu_seqlens_q is float32, wanted int32"),
    (ValueError, dict(cu_seqlens_q=jnp.zeros((2,), I32)), "cu_seqlens_q is [2], wanted [3]: a start for each request"),
    (ValueError, dict(sink=jnp.ones((3,))), "sink is [3], wanted [4]: one logit a head (q is [3, 4, 24])"),
    (ValueError, dict(scale=float("nan")), "scale=nan, wanted a finite float32 number"),
    (ValueError, dict(value_dim=25), "value_dim=25, wanted 1 to Dk = 24"),
]
MLA_FORMS = [
    *[(hj.sparse_mla, mla_on_a_mesh, *case) for case in OF_BATCHES],
    *[(hj.sparse_mla_paged, mla_paged, *case) for case in OF_PAGES],
    *[(hj.sparse_mla_paged, mla_paged_on_a_mesh, *case) for case in OF_PAGES],
]
CASES = [
    *[(hj.select, arrays, ValueError, *case) for case in SELECT_SHAPES],
    *[(hj.select, arrays, TypeError, *case) for case in SELECT_TYPES],
    *[(hj.select_packed, packed, ValueError, *case) for case in PACKED_SHAPES],
    (hj.select_packed, packed, TypeError, dict(cu_seqlens_q=jnp.ones((3,))), "cu_seqlens_q is float32, wanted int32"),
    *[(hj.sparse_mla, mla, ValueError, *case) for case in MLA_SHAPES],
    *[(hj.sparse_mla, mla, TypeError, *case) for case in MLA_TYPES],
]


@pytest.mark.parametrize(
    ("function", "valid", "error", "changed", "message"), CASES, ids=[f"{c[0].__name__}: {c[4][:50]}" for c in CASES]
)
def test_a_bad_argument_is_named_with_what_is_wanted(function, valid, error, changed, message):
    with pytest.raises(error, match=f"^{re.escape(f'{function.__name__}: {message}')}$"):
        function(**valid(**changed))


def test_bad_arguments_raise_while_tracing():
    traced = jax.jit(lambda q, k, w: hj.select(q, k, w, DSA))
    with pytest.raises(ValueError, match="^select: k is"):
        traced(jnp.ones((2, 3, 4, 16)), jnp.ones((2, 40, 32)), jnp.ones((2, 3, 4)))


def test_quantising_names_its_bad_arguments():
    for call, message in [
        (
            lambda: hj.quantize_keys(jnp.ones((3, 4)), jnp.float16),
            "quantize_keys: dtype is float16, wanted one of float8_e4m3fn, int8",
        ),
        (lambda: hj.quantize_keys(jnp.ones((3, 4), jnp.int8)), "quantize_keys: k is int8, wanted bfloat16 or float32"),
        (
            lambda: hj.quantize_queries(jnp.ones((3, 4)), jnp.ones(3, I32)),
            "quantize_queries: w is int32, wanted float32",
        ),
    ]:
        with pytest.raises(TypeError, match=f"^{re.escape(message)}$"):
            call()
    for call, message in [
        (
            lambda: hj.quantize_keys(jnp.ones((3, 4)), scale="e8m0"),
            "quantize_keys: scale='e8m0', wanted 'float32' or 'ue8m0'",
        ),
        (
            lambda: hj.quantize_queries(jnp.ones((2, 3, 4)), jnp.ones((2, 4))),
            "quantize_queries: w is [2, 4], wanted [2, 3]: q without its last axis",
        ),
    ]:
        with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
            call()


def test_comparing_names_its_bad_arguments():
    one = hj.select(**arrays())
    two = hj.select(**arrays(q=jnp.ones((2, 2, 4, 16)), w=jnp.ones((2, 2, 4))))
    with pytest.raises(
        ValueError, match=re.escape("compare: selection.count is [2, 2], wanted [2, 3]: that of the reference")
    ):
        hj.compare(two, one)
    with pytest.raises(TypeError, match="compare: reference is ArrayImpl, wanted a Selection"):
        hj.compare(one, one.indices)


def test_tiles_that_cannot_be_say_what_is_wanted():
    with pytest.raises(ValueError, match=re.escape("Tiles(queries=0): must be at least 1")):
        hj.Tiles(queries=0)
    with pytest.raises(ValueError, match=re.escape("Tiles(keys=100): must be a positive multiple of 128")):
        hj.Tiles(keys=100)


@pytest.mark.parametrize(
    ("function", "valid", "error", "changed", "message"),
    MLA_FORMS,
    ids=[f"{c[0].__name__}: {c[4][:50]}" for c in MLA_FORMS],
)
def test_pages_and_meshes_check_as_one_piece_does(function, valid, error, changed, message):
    with pytest.raises(error, match=f"^{re.escape(f'{function.__name__}: {message}')}"):
        function(**valid(**changed))
