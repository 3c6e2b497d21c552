"""An engine's passes by the real compiler; run by test_pod_steps.py in a process that writes no listings of kernels.

Those of the sort that takes tokens take minutes.
"""

import dataclasses
import os
from unittest import mock

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import SingleDeviceSharding

from bench.pods.rows import METHOD
from bench.tpu import aot
from bench.tpu.chips import CHIPS
from hisa_jax import dispatch, models
from hisa_jax.models import passes
from hisa_jax.models.cache import row_after_row
from hisa_jax.models.structure import Structure, weights_of

ROWS, PAGES_EACH = 8, 256


def a_decode_step_copies_nothing_of_its_pages():
    """Whose latents of 576 numbers would be turned around twice otherwise."""
    config = models.dsv32()
    kinds = dict(layer_kinds=config.layer_kinds[:1], indexer_kinds=config.indexer_kinds[:1])
    config = dataclasses.replace(config, num_hidden_layers=1, vocab_size=1024, **kinds)
    options = dict(method=METHOD, dtype=jnp.bfloat16)
    model = nnx.eval_shape(lambda: models.from_config(config, rngs=nnx.Rngs(0), **options))
    structure, weights = Structure(model), weights_of(model)
    pages = jax.eval_shape(lambda weights: structure.merge(weights).empty_pages(ROWS * PAGES_EACH), weights)
    where = SingleDeviceSharding(aot.small_mesh("v5e", x=4).devices.flat[0])
    leaves, tree = jax.tree.flatten(pages)
    formats = passes.Formats(tree, tuple(row_after_row(leaf, where) for leaf in leaves))

    def placed(tree):
        return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where), tree)

    arrays = [jnp.zeros(shape, jnp.int32) for shape in ((ROWS, PAGES_EACH), (ROWS,), (ROWS, 1), (ROWS,))]
    lying = [jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=at) for x, at in zip(leaves, formats.leaves, strict=True)]
    operands = placed(weights), jax.tree.unflatten(tree, lying), *placed(arrays)
    device = dispatch.Device(platform="tpu", kind=CHIPS["v5e"].kind)
    with (
        mock.patch.object(dispatch.Device, "default", lambda: device),
        jax.sharding.use_abstract_mesh(aot.abstract_mesh("v5e")),
    ):
        traced = passes.verify.program(formats).trace(*operands, structure=structure, trace=passes.Trace(False, False))
        memory = traced.lower(lowering_platforms=("tpu",)).compile().memory_analysis()
    held = sum(leaf.size * leaf.dtype.itemsize for leaf in leaves)
    assert memory.alias_size_in_bytes >= held and memory.temp_size_in_bytes < 0.1 * held


if __name__ == "__main__":
    aot.prepare()
    os.environ["LIBTPU_INIT_ARGS"] = ""  # read when the compiler is loaded
    a_decode_step_copies_nothing_of_its_pages()
    print("kept: a_decode_step_copies_nothing_of_its_pages")
