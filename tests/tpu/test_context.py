"""Keys sharded over devices, by the kernels: tests/tpu/context_parallel.py on emulated ones, and the compiler."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from bench.tpu import aot
from hisa_jax.kernels_pallas.mosaic_tpu.merge import merge
from hisa_jax.sharded import exchange
from hisa_jax.sharded.select_kernels import merge_of_any_order
from tests import emulated


@pytest.mark.exhaustive  # test_pods.py compiles it, tests/test_context.py has the promises by XLA
@pytest.mark.slow
def test_a_selection_over_two_devices_keeps_the_contract():
    emulated.assert_kept("tests.tpu.context_parallel", n=2)


@pytest.mark.exhaustive  # 14 s of CPU
@pytest.mark.slow
def test_candidates_of_four_devices_are_merged_on_a_v7x():
    """32 queries a device, as a chunk of 512 has: XLA made a reshape of their tiles that this chip does not have."""
    if reason := aot.why_not():
        pytest.skip(reason)
    mesh, spec = aot.small_mesh("v7x", data=2, context=4), PartitionSpec(("data", "context"))

    def by_kernel(sort_keys, positions, k):
        positions, sort_keys = merge(sort_keys, positions, k)
        return sort_keys, positions

    def best(sort_keys, positions):
        found = (exchange.to_owner(x * 3, -1, "context", 4) for x in (sort_keys, positions))
        return tuple(exchange.from_owners(x, "context", 128) for x in merge_of_any_order(by_kernel, *found, 2048))

    candidates = jax.ShapeDtypeStruct((8 * 128, 2048), jnp.int32, sharding=NamedSharding(mesh, spec))
    sharded = jax.shard_map(best, mesh=mesh, in_specs=spec, out_specs=spec, check_vma=False)
    text = aot.compile_sharded("v7x", sharded, mesh, candidates, candidates).compiled.as_text()
    assert "hisa_merge" in text and "all-to-all" in text
