"""`select_sharded` on 8 emulated devices against one; run by test_context.py in a process of its own.

The number of devices is fixed when JAX starts, so it cannot be set for one test among others.
"""

import re

import jax

jax.config.update("jax_num_cpu_devices", 8)

import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402

import hisa_jax as hj  # noqa: E402
from tests import draw  # noqa: E402

METHODS = {
    "dsa": hj.Dsa(topk=24),
    "hisa": hj.Hisa(topk=24, block_size=16, block_topk=5),
    "hisa_more_forced": hj.Hisa(topk=24, block_size=16, block_topk=6, keep_first=2, keep_last=3),
    "all_blocks_kept": hj.Hisa(topk=24, block_size=16, block_topk=32),
    "block_sparse": hj.BlockSparse(topk=64, block_size=16),
}
B, T, S, H, D = 2, 11, 512, 4, 32


def mesh(data, context):
    return jax.make_mesh((data, context), ("data", "context"), devices=jax.devices()[: data * context])


def inputs(dtype):
    q, k, w = draw.inputs(B, T, S, H, D, dtype="bfloat16" if dtype == "float8_e4m3fn" else dtype)
    keys = draw.quantized(k, dtype, "float32") if dtype == "float8_e4m3fn" else jnp.asarray(k)
    return jnp.asarray(q), keys, jnp.asarray(w)


def check(method, data, context, dtype="float32", **options):
    arrays = inputs(dtype)
    options = dict(return_scores=True, return_blocks=method.has_blocks) | options
    wanted = hj.select(*arrays, method, implementation="xla", **options)
    got = hj.select_sharded(
        *arrays, method, mesh=mesh(data, context), context_axis="context", data_axis="data", **options
    )
    jax.tree.map(np.testing.assert_array_equal, got, wanted)


def same_bits_for_every_method_and_mesh():
    for method in METHODS.values():
        for data, context in ((1, 8), (2, 4), (1, 1)):
            check(method, data, context)


def same_bits_without_scores_and_for_every_dtype():
    for dtype in ("bfloat16", "float8_e4m3fn"):
        check(METHODS["hisa"], 2, 4, dtype)
        check(METHODS["block_sparse"], 1, 8, dtype, return_scores=False)


def same_bits_for_lengths_that_end_on_any_device():
    positions = jnp.asarray(np.stack([np.arange(-1, 10) * 50, np.arange(11) * 7]).astype(np.int32))
    for lengths in ([512, 65], [1, 0], [63, 64]):
        for method in METHODS.values():
            check(method, 1, 8, lengths=jnp.array(lengths, jnp.int32), query_positions=positions)


def only_candidates_are_exchanged():
    """What a query costs between devices: m block scores and ids, topk token scores and ids, of each device."""
    method, devices = METHODS["hisa"], 8
    q, k, w = inputs("bfloat16")
    run = jax.jit(
        lambda *x: hj.select_sharded(
            *x, method, mesh=mesh(1, devices), context_axis="context", tiles=hj.Tiles(queries=11)
        )
    )
    text = run.lower(q, k, w).compile().as_text()
    gathered = re.findall(r"= \(?([a-z0-9]+)\[([0-9,]*)\][^=]*? all-gather", text)
    assert gathered and not re.search(r"(all-to-all|collective-permute|reduce-scatter)\(", text)
    per_query = 0
    for dtype, shape in gathered:
        assert dtype == "s32", (dtype, shape)
        per_query += 4 * np.prod(list(map(int, shape.split(",")))) // 11
    assert per_query <= 8 * devices * (min(method.block_topk, S // devices // 16) + method.topk), per_query
    print(f"{per_query} bytes a query")


if __name__ == "__main__":
    for promise in (
        same_bits_for_every_method_and_mesh,
        same_bits_without_scores_and_for_every_dtype,
        same_bits_for_lengths_that_end_on_any_device,
        only_candidates_are_exchanged,
    ):
        promise()
        print("kept:", promise.__name__, flush=True)
