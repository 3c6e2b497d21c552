"""A tiny model to serve with, requests that share prefixes, and what each must get: its tokens by `generate`."""

import functools

import jax
import numpy as np
from flax import nnx

import hisa_jax as hj
from hisa_jax import models
from hisa_jax.models.engine import Engine, lookup

VOCABULARY, CHUNK, N_NEW = 61, 6, 8
STOPS = (36, 56)
HISA = hj.Hisa(topk=8, block_size=4, block_topk=3)
SCAN = hj.Scan(topk=8, candidates=12, exact_heads=1, unit=2, sketch="int4")


def deleted():
    """An array of the device whose buffer was given away."""
    array = jax.numpy.arange(3)
    array.delete()
    return array


# (prompt, new tokens, stop ids) that `submit` refuses, and the beginning of what it says.
BAD_REQUESTS = (
    ([-1, 5], 4, r"prompt\[0\] is -1, wanted an int from 0 to 60"),
    ([5, 61], 4, r"prompt\[1\] is 61, wanted"),
    ([2**40], 4, r"prompt\[0\] is 1099511627776, wanted"),
    ([10**5000], 4, r"prompt\[0\] is a int, wanted"),
    ([1.5, 2.0], 4, r"prompt\[0\] is 1\.5, wanted"),
    ([float("nan")], 4, r"prompt\[0\] is nan, wanted"),
    ([True], 4, r"prompt\[0\] is True, wanted"),
    ([np.True_], 4, r"prompt\[0\] is np\.True_, wanted"),
    ([None], 4, r"prompt\[0\] is None, wanted"),
    ([[1]], 4, r"prompt\[0\] is \[1\], wanted"),
    ("text", 4, "prompt is 'text', wanted a sequence of ints"),
    (None, 4, "prompt is None, wanted a sequence"),
    (7, 4, "prompt is 7, wanted a sequence"),
    ({1, 2}, 4, r"prompt is \{1, 2\}, wanted a sequence"),
    (iter([1]), 4, "prompt is <list_iterato"),
    ([], 4, "prompt is empty, wanted at least one token"),
    (np.zeros(0, int), 4, "prompt is empty"),
    (np.ones(2), 4, r"prompt is float64 \[2\], wanted \[n\] integers"),
    (np.ones(2, bool), 4, r"prompt is bool \[2\], wanted"),
    (np.ones((2, 2), int), 4, r"prompt is int64 \[2, 2\], wanted"),
    (np.array([3, -1]), 4, r"prompt\[1\] is -1, wanted"),
    (deleted(), 4, "prompt is <ArrayImpl instance"),
    (jax.random.split(jax.random.key(0)), 4, "prompt is Array"),
    ([1], 0, "max_new_tokens=0, wanted an int of at least 1"),
    ([1], -3, "max_new_tokens=-3, wanted"),
    ([1], True, "max_new_tokens=True, wanted"),
    ([1], 2.0, r"max_new_tokens=2\.0, wanted"),
    ([1], None, "max_new_tokens=None, wanted"),
    ([1], "4", "max_new_tokens='4', wanted"),
    ([1], 4, 5, "stop_ids is 5, wanted a sequence of ints"),
    ([1], 4, "a", "stop_ids is 'a', wanted"),
    ([1], 4, [61], r"stop_ids\[0\] is 61, wanted"),
    ([1], 4, [2, -1], r"stop_ids\[1\] is -1, wanted"),
    ([1], 4, [1.0], r"stop_ids\[0\] is 1\.0, wanted"),
)


def by_phase(layer, phase):
    """Flat for the last chunk of a prompt, as README advises, and another size where tokens are made."""
    if phase == "last_prefill":
        return hj.Dsa(topk=6)
    return hj.Hisa(topk=6, block_size=4, block_topk=3 if phase == "prefill" else 2)


@functools.cache
def model(method=HISA, kinds=("dense", "sparse"), mesh=None):
    """Layers that select, those called sparse with experts; weights large enough that tokens differ, on any mesh."""
    config = models.Config(
        model_type="glm_moe_dsa", vocab_size=VOCABULARY, hidden_size=32, intermediate_size=32,
        moe_intermediate_size=16, num_hidden_layers=len(kinds), num_attention_heads=2, q_lora_rank=16, kv_lora_rank=16,
        qk_nope_head_dim=8, qk_rope_head_dim=8, v_head_dim=8, index_n_heads=2, index_head_dim=16, index_topk=8,
        n_routed_experts=4, n_shared_experts=1, num_experts_per_tok=2, n_group=1, topk_group=1,
        routed_scaling_factor=1.0, rms_norm_eps=1e-6, rope_theta=100.0, max_position_embeddings=96,
        layer_kinds=kinds, indexer_kinds=("full",) * len(kinds), eos_token_ids=STOPS,
    )  # fmt: skip
    made = models.from_config(config, rngs=nnx.Rngs(3), method=method, mesh=mesh)
    graph, state = nnx.split(made)
    return nnx.merge(graph, jax.tree.map(lambda x: x * 8 if x.ndim > 1 else x, state))


def requests(n, seed, longest=40):
    """Prompts that begin with one of three prefixes, cut anywhere."""
    rng = np.random.default_rng(seed)
    prefixes = rng.integers(0, VOCABULARY, (3, longest))
    shared, own = rng.integers(0, longest - 6, n), rng.integers(1, 7, n)
    return [
        [*prefixes[rng.integers(3), :first].tolist(), *rng.integers(0, VOCABULARY, last).tolist()]
        for first, last in zip(shared, own, strict=True)
    ]


@functools.cache
def alone(prompts, method=HISA, stop_ids=None, kinds=("dense", "sparse")):
    """Tokens of each of these (tuples) by `generate`, without an engine and without shared pages."""
    return models.generate(model(method, kinds), prompts, N_NEW, chunk=CHUNK, stop_ids=stop_ids).tokens


def engine(made=None, draft=lookup, **options):
    """Few pages, so that requests wait for each other's and get them; one size, so that programs compile once."""
    sizes = dict(n_pages=24, rows=4, max_length=64, chunk=CHUNK, n_draft=2 if draft else 0)
    return Engine(model() if made is None else made, **sizes | options, draft=draft)


def one_by_one(prompts, samplings, tokenizer=None):
    """Tokens of each prompt on an engine that has no other request, by the programs that engines have here."""
    made = engine(tokenizer=tokenizer)
    ids = []
    for prompt, sampling in zip(prompts, samplings, strict=True):
        id = made.submit(prompt, sampling=sampling)
        ids.append(finish(made)[0][id])
        made.release()
    return ids


def finish(engine, tokens=None):
    """Steps to the end, the bookkeeping checked after each; tokens and reasons by request."""
    tokens, failed = {} if tokens is None else tokens, {}
    for _ in range(10_000):
        if engine.is_idle:
            return tokens, failed
        report = engine.step()
        engine.pool.check()
        tokens |= report.finished
        failed |= report.failed
    raise AssertionError("not idle after 10,000 steps")
