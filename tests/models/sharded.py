"""The models on 8 emulated devices against the golden numbers; run by test_sharding.py in a process of its own.

The number of devices is fixed when JAX starts, so it cannot be set for one test among others.
"""

import dataclasses
import json
import sys
import tempfile

import jax

jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_disable_most_optimizations", True)

import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402
from flax import nnx  # noqa: E402

import hisa_jax as hj  # noqa: E402
from hisa_jax import models  # noqa: E402
from hisa_jax.models import memory, moe  # noqa: E402
from hisa_jax.models.check import measures, reading  # noqa: E402
from hisa_jax.models.stacked import Stacked  # noqa: E402
from tests.models import golden  # noqa: E402

run = jax.jit(lambda model, tokens, mask=None: model(tokens, mask=mask))


def per_device_share(model):
    """Share of the bytes of all parameters that one device holds."""
    leaves = jax.tree.leaves(nnx.state(model))
    held = sum(x.addressable_shards[0].data.nbytes for x in leaves)
    return held / sum(x.nbytes for x in leaves)


def logits_on(case, mesh, method=None):
    model = models.from_pretrained(golden.FOLDER / case, method, mesh=mesh)
    tokens = golden.ids(case)
    # Both rows twice: a batch that the data axis divides.
    return model, run(model, jnp.concatenate([tokens, tokens]))[: len(tokens)]


def tensor_and_data_parallel(case="dsv32"):
    """dsv32 has 4 heads, so model=4 splits them; glm5 has 5, which stay whole. The 8 experts lie one on a device."""
    model, logits = logits_on(case, models.make_mesh(data=2, model=4))
    golden.assert_close(logits, golden.numbers(case)["logits"], golden.LOGITS, case)
    assert per_device_share(model) < (0.6 if case == "dsv32" else 0.75), per_device_share(model)
    gate = model.layers[1].mlp.gate[...]
    assert {shard.data.shape for shard in gate.addressable_shards} == {(1, *gate.shape[1:])}
    heads = model.layers[0].attention.q_b[...].sharding.spec
    assert heads == jax.P(None, "model" if case == "dsv32" else None, None), heads


def tensor_and_data_parallel_where_heads_stay_whole():
    tensor_and_data_parallel("glm5")


def explicit_mesh_of_one_axis(axis="model"):
    """What jax.make_mesh makes is taken, too, and an axis that is not there splits nothing; nor five heads in two."""
    model, logits = logits_on("glm5", jax.make_mesh((2,), (axis,), devices=jax.devices()[:2]))
    golden.assert_close(logits, golden.numbers("glm5")["logits"], golden.LOGITS, axis)
    assert model.layers[0].attention.q_b[...].sharding.spec == jax.P(None, None, None)


def explicit_mesh_of_the_batch():
    explicit_mesh_of_one_axis("data")


def quantised_keys_and_hisa():
    """QuantizedKeys pass the mesh as a whole; the selection is that of one device."""
    config = dataclasses.replace(
        models.read_config(golden.FOLDER / "dsv32"), index_key_dtype="int8", index_hadamard=True
    )
    method, tokens = hj.Hisa(topk=8, block_size=4, block_topk=3), golden.ids("dsv32")
    for mesh in (None, models.make_mesh(data=2, model=4)):
        model = models.from_pretrained(golden.FOLDER / "dsv32", method, mesh=mesh, config=config)
        logits = run(model, tokens)
        want = logits if mesh is None else want  # noqa: F821
    golden.assert_close(logits, want, golden.LOGITS)


def generation():
    """Chunks, padding, caches and decoding on the mesh."""
    numbers = golden.numbers("dsv32")
    want, length = numbers["greedy.ids"][0].tolist(), int(numbers["greedy.prompt_length"])
    model = models.from_pretrained(golden.FOLDER / "dsv32", mesh=models.make_mesh(data=2, model=4))
    result = models.generate(model, [want[:length], want[:5]], len(want) - length, chunk=8)
    assert result.tokens[0] == want[length:]
    cache = model.empty_cache(2, 8)
    assert {shard.data.shape[0] for shard in cache.layers[0].latents.addressable_shards} == {1}
    np.testing.assert_array_equal(cache.block_tables, [[0], [0]])


def replayed_rollouts():
    """Rollouts made on the mesh, and what their replay there gives, gradients among it, are one device's."""
    ids, found = golden.numbers("dsv32")["greedy.ids"][0].tolist(), []
    for mesh in (None, models.make_mesh(data=2, model=4)):
        model = models.from_pretrained(golden.FOLDER / "dsv32", hj.Hisa(topk=8, block_size=4, block_topk=3), mesh=mesh)
        made = models.generate(model, [ids[:20], ids[:5], ids[:3]], 4, chunk=8, return_selections=True).rollout
        # Three sequences in two rows, one for each part of the mesh.
        rollout = models.pack_rollouts([made], length=24, rows=2)
        graph, state = nnx.split(model.with_method(None))

        def loss(state, r, graph=graph):
            out = models.training_forward(nnx.merge(graph, state), r.tokens, selections=r, compare=True)
            return jnp.sum(out.kl) - jnp.sum(out.logprobs * r.is_made), out

        gradient, out = jax.jit(jax.grad(loss, has_aux=True))(state, rollout)
        report = models.replay_report(rollout, out)
        assert report.logprob_change < 1e-4 and report.choice_share < 0.5 and report.experts == (1, 1), report
        found.append((rollout, out.kl, out.same_selections, gradient))

    def assert_close(one, other):
        scale = max(1.0, float(np.abs(one).max(initial=0)))
        np.testing.assert_allclose(np.asarray(one, np.float64), other, atol=1e-4 * scale)

    jax.tree.map(assert_close, *found)


def the_self_check():
    """The same figures where heads and experts are split."""
    found = []
    for mesh in (None, models.make_mesh(data=1, model=4)):
        model = models.from_pretrained(golden.FOLDER / "dsv32", mesh=mesh)
        positions = reading.sampled_positions(40, 12)
        (seen, *_) = reading.read(model, golden.ids("dsv32")[0].tolist(), positions, 24, lambda n: None)
        methods = measures.methods_to_check(8, 4)
        found.append((measures.measure(seen, methods, 1.0), measures.scan_ranks(seen, methods["flat"])))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4), *found)


def save_here_restore_there():
    """A model saved on one mesh comes back on another one, and random weights are made where they lie."""
    config = models.read_config(golden.FOLDER / "dsv32")
    model = models.from_config(config, rngs=nnx.Rngs(0), mesh=models.make_mesh(data=2, model=4))
    assert per_device_share(model) < 0.6
    with tempfile.TemporaryDirectory() as folder:
        models.save(model, folder)
        for mesh in (None, models.make_mesh(model=8)):
            restored = models.restore(folder, mesh=mesh)
            jax.tree.map(np.testing.assert_array_equal, nnx.state(model), nnx.state(restored))
    gate = restored.layers[1].mlp.gate[...]
    assert {shard.data.shape for shard in gate.addressable_shards} == {(1, *gate.shape[1:])}


def stacked_layers_whose_pages_and_weights_devices_share():
    """Weights over context, too; few tokens, which every expert multiplies all, and many, which are sorted."""
    ids, want = golden.ids("dsv32"), golden.numbers("dsv32")["logits"]
    model = models.from_pretrained(golden.FOLDER / "dsv32", mesh=models.make_mesh(data=2, model=2, context=2))
    assert per_device_share(model) < 0.5, per_device_share(model)
    for few in (256, 0):
        moe._FEW = few
        stacked = Stacked(model)
        out = jax.jit(type(stacked).run)(stacked, ids, cache=stacked.empty_cache(*ids.shape))
        golden.assert_close(out.logits, want, golden.LOGITS, few)


def many_tokens_read_gathered_pages(bits=0):
    """What devices share the pages of is read as on one device; with 8 bits by HISA, and then step by step."""
    config = models.read_config(golden.FOLDER / "dsv32")
    tokens, method, mesh = golden.ids("dsv32"), None, models.make_mesh(context=2)
    if bits:
        config = dataclasses.replace(config, index_key_dtype="int8", index_hadamard=True)
        method, mesh = hj.Hisa(topk=8, block_size=4, block_topk=3), models.make_mesh(data=2, context=2)
    rule, asked = memory.is_gathered, []

    def watched(*arguments):
        asked.append((arguments[-1], rule(*arguments)))
        return asked[-1][1]

    def logits_on(mesh, n_steps):
        model = models.from_pretrained(golden.FOLDER / "dsv32", method, mesh=mesh, config=config)
        step, cache, logits = jax.jit(type(model).run), model.empty_cache(*tokens.shape), []
        for new in jnp.split(tokens, [tokens.shape[1] - n for n in range(n_steps, 0, -1)], axis=1):
            out = step(model, new, cache=cache)
            logits, cache = [*logits, out.logits], out.cache
        return jnp.concatenate(logits, axis=1)

    memory.is_gathered = watched
    found = logits_on(mesh, n_steps=2 if bits else 0)
    memory.is_gathered = rule
    assert {*asked} == ({(tokens.shape[1] - 2, True), (1, False)} if bits else {(tokens.shape[1], True)}), asked
    want = logits_on(None, n_steps=0) if bits else golden.numbers("dsv32")["logits"]
    golden.assert_close(found, want, golden.LOGITS)


def many_tokens_of_8_bits_read_gathered_pages_and_few_read_them_where_they_lie():
    many_tokens_read_gathered_pages(bits=8)


if __name__ == "__main__":
    for name in json.loads(sys.argv[1]):
        globals()[name]()
        print("passed", name, flush=True)
