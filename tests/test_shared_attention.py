"""Attention that devices share: in parts on one device, and on emulated ones by tests/shared_attention.py. 4 s."""

import functools
import os
import subprocess
import sys

import jax.numpy as jnp
import numpy as np
import pytest

from hisa_jax.sharded.attention import attend_in_parts, part_of
from hisa_jax.xla import attention as xla
from tests import oracle


def test_a_part_is_a_little_more_than_an_equal_share_in_whole_tiles():
    shares = {(2048, 1): None, (2048, 2): 1280, (2048, 4): 640, (2048, 8): 384, (2048, 16): 256, (100, 4): None}
    assert {case: part_of(*case) for case in shares} == shares


@pytest.mark.parametrize("n_own", [0, 30, 128, 129, 300])
def test_parts_of_any_number_are_all_of_them(n_own):
    """Lists in any order with holes and a token twice; the longest has so many entries, another none."""
    rng, T, K, S = np.random.default_rng(n_own), 3, 300, 401
    indices = np.full((1, T, K), -1, np.int32)
    for t, n in enumerate((n_own, n_own // 2, 0)):
        indices[0, t, rng.permutation(K)[:n]] = rng.integers(0, S, n)
    indices[0, 2, 7] = S  # outside
    q, kv = (rng.normal(size=shape).astype(np.float32) for shape in ((1, T, 2, 24), (1, S, 24)))
    forward = functools.partial(xla.forward, scale=0.2, value_dim=16)
    out, lse = attend_in_parts(forward, 128, *map(jnp.asarray, (q, kv, indices)))
    wanted, wanted_lse = oracle.sparse_mla(q, kv, indices, 16, 0.2)
    np.testing.assert_allclose(out, wanted, rtol=2e-5, atol=2e-5)
    np.testing.assert_allclose(lse, wanted_lse, rtol=2e-5, atol=2e-5)


PROMISES = {
    "xla": (
        "pages_by_any_distribution",
        "pages_in_8_bits",
        "latents_in_one_piece_and_their_gradients",
        "a_device_reads_its_share_of_the_latents",
    ),
    "triton": ("pages_by_any_distribution", "latents_in_one_piece"),
    "mosaic_tpu": ("pages_spread_evenly",),
}


@pytest.mark.slow
@pytest.mark.exhaustive
@pytest.mark.parametrize("implementation", PROMISES)
def test_four_devices_attend_as_one(implementation):
    command = [sys.executable, "-m", "tests.shared_attention", implementation, *PROMISES[implementation]]
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=1800, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("kept:") == len(PROMISES[implementation])
