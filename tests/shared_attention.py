"""`sparse_mla` and `sparse_mla_paged` where 4 emulated devices share the tokens, against one; run by
test_shared_attention.py: `python -m tests.shared_attention IMPLEMENTATION PROMISE ...`.

The number of devices is fixed when JAX starts, so it cannot be set for one test among others.
"""

import functools
import importlib
import os
import re
import sys
import time

# While one device is interpreted the others wait for it in an exchange.
os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_cpu_collective_call_terminate_timeout_seconds=900"

import jax

jax.config.update("jax_num_cpu_devices", 4)
jax.config.update("jax_disable_most_optimizations", True)

import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402
from jax.experimental.pallas import tpu as pltpu  # noqa: E402

import hisa_jax as hj  # noqa: E402
from hisa_jax import dispatch_stage  # noqa: E402
from hisa_jax.page_pool import PagePool  # noqa: E402
from tests.collectives import collectives  # noqa: E402

DEVICES, PAGE, K, S = 4, 16, 517, 1284  # a device attends to 256 entries at a time
T, N, LATENT, VALUE = 5, 16, 128, 64
INTERPRET = {"triton": True, "mosaic_tpu": pltpu.InterpretParams(uninitialized_memory="nan")}
OVER = dict(mesh=jax.make_mesh((DEVICES,), ("context",)), context_axis="context")
OPTIONS = dict(scale=0.1, value_dim=VALUE, return_lse=True)


def interpreted(name):
    """An implementation where no device is asked for."""
    if name != "xla":
        forward = importlib.import_module(f"hisa_jax.kernels_pallas.{name}.sparse_mla").sparse_mla
        run = functools.partial(forward, interpret=INTERPRET[name])
        dispatch_stage.attention = lambda _: run
        dispatch_stage.attention_reasons = lambda device, problem: {name: None, "xla": None}


def lists(owner):
    """Spread evenly, of one device alone (more than it takes at a time), of all but one, of nothing, of one token.

    Args:
        owner: [S], whose each token is.
    """
    rng, found = np.random.default_rng(0), np.full((T, K), -1, np.int32)
    for t, pool in enumerate((owner >= 0, owner == 1, owner != 2, owner < 0, np.arange(S) == 3)):
        tokens = rng.permutation(np.flatnonzero(pool))[: K - 1]
        found[t, rng.permutation(K)[: len(tokens)]] = tokens  # holes anywhere
    found[4, :2] = 3  # a token that stands there more than once
    return jnp.asarray(found)


IN_PAGES, IN_RUNS = np.arange(S) // PAGE % DEVICES, np.arange(S) // (S // DEVICES)


def inputs(dtype):
    rng = np.random.default_rng(1)
    return [jnp.asarray(rng.normal(size=shape), dtype) for shape in ((T, N, LATENT), (S, LATENT))]


def near(got, wanted, dtype="float32"):
    tolerance = dict(rtol=2e-5, atol=2e-5) if dtype == "float32" else dict(rtol=3e-2, atol=3e-2)
    for x, y in zip(got, wanted, strict=True):
        np.testing.assert_allclose(np.asarray(x, np.float32), np.asarray(y, np.float32), **tolerance)


def paged(dtype, latent_dtype):
    """Two requests, of which one has no query, in pages of the devices in turn, and the arrays of a call."""
    q, kv = inputs(dtype)
    pool = PagePool(DEVICES * 22, PAGE, n_devices=DEVICES, stripe=PAGE)
    for r, length in enumerate((S, 20)):
        pool.add(r)
        pool.extend(r, length)
    tables = jnp.asarray(pool.table(range(2), 84))
    cache = hj.init_cache(pool.n_pages, PAGE, D=0, latent_dim=LATENT, latent_dtype=latent_dtype, latent_value_dim=VALUE)
    if latent_dtype != dtype:
        kv = hj.quantize_latents(kv, value_dim=VALUE)
    k, new, before = jnp.zeros((S, 0), jnp.bfloat16), jnp.array([0, S, S]), jnp.array([0, 0])
    cache = hj.append(cache, k, tables, new, before, latents=kv)
    return q, cache, tables, jnp.array([0, T, T], jnp.int32)


def attend_to_pages(implementation, indices, dtype, latent_dtype=None):
    """On four devices and, by XLA, on one; and the program, compiled and before."""
    q, cache, *where = paged(dtype, latent_dtype or dtype)
    run = jax.jit(functools.partial(hj.sparse_mla_paged, implementation=implementation, **OVER, **OPTIONS))
    lowered = run.lower(q, cache, indices, *where)
    compiled = lowered.compile()
    wanted = hj.sparse_mla_paged(q, cache, indices, *where, implementation="xla", **OPTIONS)
    return compiled(q, cache, indices, *where), wanted, compiled, lowered


def pages_by_any_distribution(implementation):
    dtype = "float32" if implementation == "xla" else "bfloat16"
    got, wanted, compiled, _ = attend_to_pages(implementation, lists(IN_PAGES), dtype)
    near(got, wanted, dtype)
    assert not np.asarray(got[0][3]).any() and np.isneginf(got[1][3]).all()
    found = collectives(compiled)
    assert {kind for kind, *_ in found} == {"all-reduce"}, found
    assert sum(n for *_, n in found) == N * (VALUE + 2) * T, found


def pages_in_8_bits(implementation):
    got, wanted, *_ = attend_to_pages(implementation, lists(IN_PAGES), "bfloat16", "float8_e4m3fn")
    near(got, wanted, "bfloat16")


def pages_spread_evenly(implementation):
    """No device has more than it takes at a time: TPU kernels that are interpreted wait for those of all devices."""
    got, wanted, *_ = attend_to_pages(implementation, lists(IN_PAGES).at[1].set(-1).at[2].set(-1), "bfloat16")
    near(got, wanted, "bfloat16")


def latents_in_one_piece(implementation):
    dtype = "float32" if implementation == "xla" else "bfloat16"
    q, kv = inputs(dtype)
    arrays = q[None], kv[None], lists(IN_RUNS)[None]
    wanted = hj.sparse_mla(*arrays, implementation="xla", **OPTIONS)
    run = jax.jit(functools.partial(hj.sparse_mla, implementation=implementation, **OVER, **OPTIONS))
    near(run(*arrays), wanted, dtype)


def latents_in_one_piece_and_their_gradients(implementation):
    latents_in_one_piece(implementation)
    q, kv = inputs("float32")
    indices = lists(IN_RUNS)[None]

    def loss(q, kv, **over):
        out, lse = hj.sparse_mla(q, kv, indices, **over, **OPTIONS)
        return jnp.sum(out**2) + jnp.sum(jnp.where(jnp.isfinite(lse), lse, 0))

    slopes = [jax.jit(jax.grad(functools.partial(loss, **x), (0, 1)))(q[None], kv[None]) for x in ({}, OVER)]
    near(slopes[1], slopes[0])


def a_device_reads_its_share_of_the_latents(implementation):
    """Of all gathered rows of latents none is of a whole list."""
    *_, lowered = attend_to_pages(implementation, lists(IN_PAGES), "float32")
    gathered = re.findall(rf'"stablehlo.gather".*-> tensor<([0-9x]+)x{LATENT}xf32>', lowered.as_text())
    widths = {int(shape.split("x")[-1]) for shape in gathered}
    assert widths == {256}, widths


if __name__ == "__main__":
    interpreted(sys.argv[1])
    for promise in sys.argv[2:]:
        start = time.perf_counter()
        globals()[promise](sys.argv[1])
        print(f"kept: {promise} ({time.perf_counter() - start:.1f} s)", flush=True)
