"""A model, a text and a recipe small enough to train in seconds."""

import dataclasses

import numpy as np

import hisa_jax as hj
from hisa_jax.models.training.recipe import Recipe, Stage, byte_config
from hisa_jax.models.training.text import Corpus, Source

LAYERS = 2
CONFIG = dataclasses.replace(
    byte_config(256), hidden_size=32, intermediate_size=48, num_hidden_layers=LAYERS, layer_kinds=("dense",) * LAYERS,
    indexer_kinds=("full",) * LAYERS, num_attention_heads=2, q_lora_rank=16, kv_lora_rank=16, qk_nope_head_dim=8,
    qk_rope_head_dim=8, v_head_dim=16, index_n_heads=2, index_head_dim=16, index_topk=16,
)  # fmt: skip
HISA = hj.Hisa(topk=16, block_size=8, block_topk=4)
LIGHTHOUSE = hj.Lighthouse(levels=3, pool=2, topk=16, tile=8)


def corpus() -> Corpus:
    text = np.frombuffer(b"\0the quick brown fox jumps over the lazy dog, twice a day\n" * 100, np.uint8)
    source = Source("tiny", 1, text.size, 1, text.size, {})
    return Corpus(text, text, ("tiny/a",), ("tiny/b",), (source,))


def stage(attention: str, trained: str, **changes) -> Stage:
    settings = dict(
        name=f"{attention} {trained}", attention=attention, trained=trained, context=128, rows=4, accumulate=2, steps=3,
        learning_rate=1e-2, end_rate=1e-3, rise=1, synthetic_share=0.5,
    )  # fmt: skip
    return Stage(**(settings | changes))


def recipe(*stages: Stage) -> Recipe:
    stages = stages or (stage("dense", "model"), stage("dense", "indexer"), stage("sparse", "all"))
    return Recipe(config=CONFIG, stages=stages)
