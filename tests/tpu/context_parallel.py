"""`select` on a mesh by the TPU kernels, interpreted on 4 emulated devices, against the oracle; run by test_context.py.
With `--slow`: every method, and meshes of four devices, in about ten minutes.

The number of devices is fixed when JAX starts, so it cannot be set for one test among others.
"""

import dataclasses
import functools
import sys

import jax

jax.config.update("jax_num_cpu_devices", 4)
jax.config.update("jax_disable_most_optimizations", True)  # what is interpreted is compiled first, which takes longest

import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402
from jax.experimental.pallas import tpu as pltpu  # noqa: E402

import hisa_jax as hj  # noqa: E402
from hisa_jax import dispatch  # noqa: E402
from hisa_jax.sharded import select_kernels  # noqa: E402
from tests import draw, isolation, oracle  # noqa: E402

METHODS = {
    "dsa": hj.Dsa(topk=40),
    "hisa": hj.Hisa(topk=40, block_size=64, block_topk=3),
    "more_forced": hj.Hisa(topk=150, block_size=64, block_topk=4, keep_first=2, keep_last=2),
    "all_blocks_kept": hj.Hisa(topk=40, block_size=64, block_topk=16),
    "block_sparse": hj.BlockSparse(topk=256, block_size=64),
}
H, D = 16, 64


def interpreted():
    """The kernels where no device is asked for."""
    run = functools.partial(
        select_kernels.select_shard,
        lambda: dispatch.backend("mosaic_tpu"),
        interpret=pltpu.InterpretParams(uninitialized_memory="nan"),
    )
    known = dispatch.IMPLEMENTATIONS["mosaic_tpu"]
    return dataclasses.replace(known, why_not=lambda device, problem: None, select_shard=run)


def check(name, data, context, B, T, **options):
    method, S = METHODS[name], 512
    q, k, w = draw.few_scores(B, T, S, H, D)
    q, k = draw.cast(q, "bfloat16"), draw.cast(k, "bfloat16")
    reference = oracle.select(q, k, w, method, **options)
    mesh = jax.make_mesh((data, context), ("data", "context"), devices=jax.devices()[: data * context])
    got = hj.select(
        *map(jnp.asarray, (q, k, w)), method, mesh=mesh, context_axis="context", data_axis="data",
        implementation="mosaic_tpu", return_scores=True, return_blocks=method.has_blocks,
        **jax.tree.map(jnp.asarray, options),
    )  # fmt: skip
    # The mean of a partly filled block is not exact.
    tolerance = 0.0 if name == "dsa" else 1e-2
    oracle.assert_same_selection(got.indices, got.count, reference, tolerance, scores=got.scores, blocks=got.blocks)


def prefill_of_a_ragged_sequence_over_two_devices():
    positions = np.array([[-1, 0, 64, 255, 256, 300, 498, 499]], np.int32)
    check("hisa", 1, 2, 1, 8, query_positions=positions, lengths=np.array([500], np.int32))


def decode_of_two_sequences_over_two_devices():
    check("hisa", 1, 2, 2, 1, lengths=np.array([512, 201], np.int32))


def prefill_over_data_and_context():
    lengths = np.array([512, 201], np.int32)
    ends = [[-1, 0, 64, 100, 300, 509, 510, 511, 511], [3, 63, 127, 128, 129, 190, 198, 199, 200]]
    for name in METHODS:
        check(name, 2, 2, 2, 9, query_positions=np.array(ends, np.int32), lengths=lengths)


def decode_over_four_devices():
    for name in METHODS:
        check(name, 1, 4, 1, 1, lengths=np.array([500], np.int32))


def what_other_devices_hold_leaves_no_trace():
    mesh = jax.make_mesh((1, 2), ("data", "context"), devices=jax.devices()[:2])
    over = dict(mesh=mesh, context_axis="context", data_axis="data", implementation="mosaic_tpu")
    for name, dtype in (("hisa", "bfloat16"), ("dsa", "int8")):
        run = jax.jit(
            functools.partial(hj.select, **over), static_argnames=("method", "return_scores", "return_blocks")
        )
        isolation.assert_isolated(isolation.batch(run, METHODS[name], dtype, S=512), METHODS[name])


QUICK = prefill_of_a_ragged_sequence_over_two_devices, decode_of_two_sequences_over_two_devices
SLOW = prefill_over_data_and_context, decode_over_four_devices, what_other_devices_hold_leaves_no_trace

if __name__ == "__main__":
    dispatch.IMPLEMENTATIONS["mosaic_tpu"] = interpreted()
    for promise in SLOW if "--slow" in sys.argv else QUICK:
        promise()
        print("kept:", promise.__name__, flush=True)
