"""`select_sharded` by the TPU kernels, interpreted on 4 emulated devices, against `select`; run by test_context.py.

The number of devices is fixed when JAX starts, so it cannot be set for one test among others.
"""

import functools

import jax

jax.config.update("jax_num_cpu_devices", 4)

import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402
from jax.experimental.pallas import tpu as pltpu  # noqa: E402

import hisa_jax as hj  # noqa: E402
from hisa_jax import context_kernels, dispatch  # noqa: E402
from tests import draw, oracle  # noqa: E402

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
        context_kernels.select,
        lambda: dispatch.backend("mosaic_tpu"),
        interpret=pltpu.InterpretParams(uninitialized_memory="nan"),
    )
    known = dispatch.IMPLEMENTATIONS["mosaic_tpu"]
    return dispatch.dataclasses.replace(known, why_not=lambda device, problem: None, select_sharded=run)


def check(name, data, context, T, S, tolerance, **options):
    method, B = METHODS[name], 2
    arrays = draw.few_scores(B, T, S, H, D)
    q, k, w = (*(draw.cast(x, "bfloat16") for x in arrays[:2]), arrays[2])
    reference = oracle.select(q, k, w, method, **options)
    mesh = jax.make_mesh((data, context), ("data", "context"), devices=jax.devices()[: data * context])
    got = hj.select_sharded(
        *map(jnp.asarray, (q, k, w)), method, mesh=mesh, context_axis="context", data_axis="data",
        implementation="mosaic_tpu", return_scores=True, return_blocks=method.has_blocks,
        **jax.tree.map(jnp.asarray, options),
    )  # fmt: skip
    oracle.assert_same_selection(got.indices, got.count, reference, tolerance, scores=got.scores, blocks=got.blocks)


def prefill_and_decode_over_two_devices_and_two_of_data():
    lengths = np.array([512, 201], np.int32)
    positions = np.array(
        [[-1, 0, 64, 100, 300, 509, 510, 511, 511], [3, 63, 127, 128, 129, 190, 198, 199, 200]], np.int32
    )
    check("hisa", 2, 2, 9, 512, 1e-2, query_positions=positions, lengths=lengths)
    check("hisa", 1, 4, 1, 512, 1e-2, lengths=lengths)


if __name__ == "__main__":
    dispatch.IMPLEMENTATIONS["mosaic_tpu"] = interpreted()
    for promise in (prefill_and_decode_over_two_devices_and_two_of_data,):
        promise()
        print("kept:", promise.__name__, flush=True)
