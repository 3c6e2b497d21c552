"""`kept_scores` writes some scores twice, by other threads: a barrier of Triton's must stand between.

The first loop stores the scores of means that pages keep, the second those of means from sums where a kept one is of
other pages. Nothing in the kernel orders the two. The second has a product of what its threads have computed: Triton
puts that into shared memory, and then a barrier. The PTX says so where the `triton` wheel is at hand; no GPU is needed.
"""

import importlib.util
import json
import os
import re
import subprocess
import sys
from unittest import mock

import jax
import jax.numpy as jnp
import pytest
from jax._src.pallas.triton import lowering

import hisa_jax as hj
from hisa_jax.kernels_pallas import triton
from hisa_jax.kernels_pallas.triton import kept_means
from hisa_jax.layout import Call
from tests.gpu.test_lowering import BF16, E4M3, lower

pytestmark = pytest.mark.filterwarnings("ignore:The Pallas Triton backend is deprecated:DeprecationWarning")
NAME = "hisa_kept_scores"
_COMPILE = """import json, sys
import triton
from triton.backends.compiler import GPUTarget
kernel = triton.compile(sys.argv[1], target=GPUTarget("cuda", 90, 32), options=json.loads(sys.argv[2]))
print(kernel.asm["ptx"])
"""
CASES = {"one_tile": (1, 64, E4M3), "large_tile": (32, 64, E4M3), "tiles_in_turn": (128, 16, BF16)}


def lowered(R, page_size, dtype):
    """Triton's IR of the kernel, for one query of each of R requests of 128K in blocks of several pages."""
    P, i32 = 131072 // page_size, jnp.int32
    cache = jax.eval_shape(lambda: hj.init_cache(R * P, page_size, 128, dtype, block_size=128))
    leaves, structure = jax.tree.flatten(cache)
    texts, lower_one = {}, lowering.lower_jaxpr_to_triton_module

    def kept(jaxpr, *args, **options):
        result = lower_one(jaxpr, *args, **options)
        text = result.module.operation.get_asm(enable_debug_info=False)
        texts[re.search(r"tt\.func public @(\w+)", text)[1]] = text
        return result

    def step(q, w, visible, table, offsets, *leaves):
        cache = jax.tree.unflatten(structure, leaves)
        return triton.select_hisa(
            Call(q=q, w=w, visible=visible, query_offsets=offsets, table=table, cache=cache), hj.Hisa()
        )

    of_queries = ((R, 64, 128), dtype), ((R, 64), jnp.float32), ((R,), i32)
    jax.clear_caches()  # a kernel that was lowered before is not lowered again
    with mock.patch.object(lowering, "lower_jaxpr_to_triton_module", kept):
        lower(step, *of_queries, ((R, P), i32), ((R + 1,), i32), *((x.shape, x.dtype) for x in leaves))
    return texts[NAME]


@pytest.fixture(params=CASES, scope="module")
def case(request):
    R, page_size, dtype = CASES[request.param]
    return lowered(R, page_size, dtype), kept_means.heuristic(R, 1024)


def before_second_store(text, store, at_a_branch):
    """What runs before the second store in any case: the lines after the last one at which paths part or meet."""
    lines = text.splitlines()
    stores = [i for i, line in enumerate(lines) if re.search(store, line)]
    assert len(stores) == 3, "kept, from sums, and where nothing is"
    first = max(i for i, line in enumerate(lines[: stores[1]]) if re.search(at_a_branch, line))
    assert first >= stores[0], "both stores are on one path"
    return lines[first : stores[1]]


def has_barrier(ptx):
    return any("bar.sync" in line for line in before_second_store(ptx, r"st\.global\.b32", r"^\$L\w+:|\bbra\b"))


@pytest.mark.parametrize("n", [0, 1])
def test_a_barrier_that_some_threads_pass_by_is_none(n):
    barriers = ["bar.sync 0;" if i == n else "" for i in range(2)]
    loop = "st.global.b32 [a], x;\n$L0:\n{}\n@p bra $L1;\n{}\nst.global.b32 [a], y;\n$L1:\nst.global.b32 [b], z;"
    assert has_barrier(loop.format(*barriers)) == (n == 1)


@pytest.mark.gate("tiles_in_turn")
def test_what_is_written_again_comes_from_a_product(case):
    text, _ = case
    lines = "\n".join(before_second_store(text, r"tt\.store", r"scf\.(for|if)"))
    product = re.search(r"tt\.dot (%\w+), (%\w+),", lines)
    assert product is not None
    # Of what is computed: what is loaded could go straight to shared memory.
    assert not re.search(rf"{product[2]} = tt\.load", lines)


@pytest.mark.exhaustive  # 8 s a case, where Triton is there
@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs the triton wheel")
def test_a_barrier_stands_before_what_is_written_again(case, tmp_path):
    text, config = case
    (tmp_path / "kernel.ttir").write_text(text)
    options = json.dumps(dict(num_warps=config.num_warps, num_stages=config.num_stages))
    command = [sys.executable, "-c", _COMPILE, str(tmp_path / "kernel.ttir"), options]
    environment = {**os.environ, "TRITON_CACHE_DIR": str(tmp_path)}
    ptx = subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout
    assert has_barrier(ptx)
