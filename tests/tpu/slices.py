"""What a slice must do, by checks that run on its devices, and as a program on 8 emulated ones."""

import dataclasses
import time

import jax

if __name__ == "__main__":
    jax.config.update("jax_num_cpu_devices", 8)

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.experimental import multihost_utils

import hisa_jax as hj
from hisa_jax import models
from hisa_jax.models.stacked import Stacked

ALL = hj.Hisa(
    topk=512, block_size=64, block_topk=8
)  # of up to 512 tokens it keeps all: nothing is close to a threshold
FEW = hj.Hisa(topk=128, block_size=64, block_topk=4)


def config():
    """Four layers of shapes that kernels take, and otherwise small."""
    return dataclasses.replace(
        models.dsv32(), vocab_size=512, hidden_size=256, intermediate_size=512, moe_intermediate_size=128,
        num_hidden_layers=4, num_attention_heads=32, q_lora_rank=128, kv_lora_rank=128, qk_nope_head_dim=64,
        v_head_dim=64, index_n_heads=16, n_routed_experts=16, n_group=1, topk_group=1, num_experts_per_tok=4,
        layer_kinds=("dense", "sparse", "sparse", "sparse"), indexer_kinds=("full",) * 4,
    )  # fmt: skip


def mesh():
    """All devices: two groups of them, pages over half of each, heads over the others."""
    n = jax.device_count()
    context = 2 if n % 4 == 0 else 1
    data = 2 if n % 2 == 0 else 1
    return models.make_mesh(data=data, model=min(n // (data * context), 2), context=context)


def logits_of(method, on, ids, stacked=False):
    """[B, T, V] on all hosts, by a model on a mesh or, None, on a device of this host."""
    model = models.from_config(config(), rngs=nnx.Rngs(0), method=method, dtype=jnp.bfloat16, mesh=on)
    model = Stacked(model) if stacked else model
    out = jax.jit(type(model).run)(model, ids, cache=model.empty_cache(*ids.shape)).logits
    return np.asarray(out if on is None else multihost_utils.process_allgather(out, tiled=True))


def ids():
    return jnp.asarray(np.random.default_rng(0).integers(0, 512, (4, 512)), jnp.int32)


def a_mesh_of_all_devices_gives_what_one_gives():
    """Layer by layer and stacked; sums of bfloat16 go in another order, and a rounding may exchange an expert."""
    with jax.default_device(jax.local_devices()[0]):
        want = logits_of(ALL, None, ids())
    for stacked in (False, True):
        got = logits_of(ALL, mesh(), ids(), stacked)
        error = np.sqrt(np.mean((got - want) ** 2)) / want.std()
        print(f"the root of the mean squared difference is {error:.4f} standard deviations of the logits")
        assert error < 0.1


def a_selection_on_the_mesh_leads_to_the_same_tokens():
    """Where few tokens are chosen a rounding may exchange one for another: nearly all likeliest tokens are the same."""
    with jax.default_device(jax.local_devices()[0]):
        want = logits_of(FEW, None, ids())
    same = np.mean(np.argmax(logits_of(FEW, mesh(), ids()), -1) == np.argmax(want, -1))
    print(f"{100 * same:.1f} % of the likeliest tokens are the same")
    assert same > 0.9


def an_engine_serves_on_all_devices():
    """Twice as many requests as rows, some of which begin alike: all end, and no page is lost."""
    model = models.from_config(config(), rngs=nnx.Rngs(0), method=FEW, dtype=jnp.bfloat16, mesh=mesh())
    engine = models.Engine(model, n_pages=128, rows=2, max_length=512, chunk=128)
    prompts = np.random.default_rng(1).integers(0, 512, (4, 300)).tolist()
    numbers = [engine.submit(prompt[:length], 8) for prompt in prompts for length in (200, 300)]
    finished, start = {}, time.perf_counter()
    while not engine.is_idle:
        finished |= engine.step().finished
    print(f"{len(numbers)} requests in {time.perf_counter() - start:.1f} s, compiling included")
    assert set(finished) == set(numbers) and all(len(tokens) == 8 for tokens in finished.values())
    engine.release()
    engine.pool.check()


def layers_at_real_widths_run():
    """Two layers of DeepSeek-V3.2 with 8-bit weights decode; on emulated devices narrow ones."""
    is_real = jax.default_backend() == "tpu"
    wide = dataclasses.replace(
        models.dsv32() if is_real else config(), num_hidden_layers=2, layer_kinds=("sparse",) * 2,
        indexer_kinds=("full",) * 2,
    )  # fmt: skip
    model = models.from_config(
        wide, rngs=nnx.Rngs(0), method=FEW, dtype=jnp.bfloat16, weight_dtype="float8_e4m3fn", mesh=mesh()
    )
    stacked = Stacked(model)
    del model
    step = jax.jit(type(stacked).run, static_argnames=("phase",))
    cache, times = stacked.empty_cache(4, 512), []
    for tokens in (ids()[:, :256], ids()[:, 256:257], ids()[:, 257:258]):
        start = time.perf_counter()
        out = step(stacked, tokens, cache=cache, phase="decode")
        assert bool(jnp.isfinite(out.logits).all())
        cache = out.cache
        times.append(time.perf_counter() - start)
    print(f"a decoding step of two layers: {1e3 * times[-1]:.1f} ms with the host's part")


CHECKS = {
    check.__name__: check
    for check in (
        a_mesh_of_all_devices_gives_what_one_gives, a_selection_on_the_mesh_leads_to_the_same_tokens,
        an_engine_serves_on_all_devices, layers_at_real_widths_run,
    )
}  # fmt: skip

if __name__ == "__main__":
    for name, check in CHECKS.items():
        check()
        print("passed", name, flush=True)
