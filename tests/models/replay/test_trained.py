"""What replay is worth in a trained model: the figures of docs/replay.md. A minute of CPU a case.

`pytest -s -m exhaustive tests/models/replay/test_trained.py` prints them.
"""

import dataclasses
import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import hisa_jax as hj
from hisa_jax import models

ROOT = Path(__file__).parents[3]
FOLDER = ROOT / "models/bytes"

pytestmark = pytest.mark.exhaustive


def server(name):
    """The model as rollouts are made by it; the trainer is the one called plain."""
    config = models.read_config(FOLDER)
    method = hj.Hisa(topk=256, block_size=32, block_topk=32) if name == "HISA" else None
    dtype = jnp.bfloat16 if name == "bfloat16" else jnp.float32
    if name == "int8 index keys":
        config = dataclasses.replace(config, index_key_dtype="int8")
    if name == "e4m3 index keys":
        config = dataclasses.replace(config, index_key_dtype="float8_e4m3fn", index_hadamard=True)
    return models.from_pretrained(FOLDER, method, config=config, dtype=dtype)


@functools.cache
def programs():
    graph, state = nnx.split(server("plain"))

    def run(state, r, **options):
        return models.training_forward(nnx.merge(graph, state), r.tokens, **options)

    replay = jax.jit(lambda state, r: run(state, r, selections=r, compare=True))
    own = jax.jit(lambda state, r: run(state, r, targets=r.targets))
    return state, replay, own


@pytest.mark.parametrize(
    ("name", "with_replay"),
    [("plain", 1e-4), ("HISA", 1e-4), ("int8 index keys", 1e-4), ("e4m3 index keys", 1e-4), ("bfloat16", 0.2)],
)
def test_logprobs_are_the_rollouts_up_to_rounding(name, with_replay):
    text = (ROOT / "LICENSE").read_bytes()  # a text that nobody edits
    prompts = [list(text[:1500]), list(text[5000:6200])]
    options = dict(chunk=512, stop_ids=(), return_selections=True)
    r = models.generate(server(name), prompts, 48, **options).rollout
    state, replay, own = programs()
    report = models.replay_report(r, replay(state, r))
    without = np.abs(np.asarray(own(state, r).logprobs) - r.logprobs)[r.is_made].max()
    print(f"| {name} | {report.choice_share:.2f} | {report.logprob_change:.1e} | {without:.1e} |")
    assert report.logprob_change < with_replay
    if name == "plain":
        assert report.selection_share > 0.999 and without < with_replay
    elif name != "bfloat16":
        assert report.choice_share < 0.9 and without > 1e-3
