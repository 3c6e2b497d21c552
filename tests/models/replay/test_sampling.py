"""Rollouts of tokens that were drawn: each request's own, by proposals too, and replayed as those of the likeliest."""

import numpy as np
import pytest

from hisa_jax import models
from tests.models import serving

from . import rollouts

pytestmark = pytest.mark.exhaustive


def test_drawn_tokens_are_recorded_and_replayed_by_generate_and_engine_alike():
    """At unlike temperatures and seeds; log-probabilities are the model's, whatever the temperature."""
    how = [models.Sampling(max_tokens=8, temperature=1.5, seed=seed, top_k=20, ignore_eos=True) for seed in (1, 2, 3)]
    options = dict(chunk=serving.CHUNK, return_selections=True)
    made = models.generate(serving.model(), rollouts.PROMPTS, sampling=how, **options)
    alone = made.rollout
    assert made.tokens != serving.alone(rollouts.PROMPTS, stop_ids=())
    whole = [[*prompt, *tokens] for prompt, tokens in zip(rollouts.PROMPTS, made.tokens, strict=True)]

    def draft(tokens, n):
        right = next(row for row in whole if tokens == row[: len(tokens)])
        drafted = [token if at % 4 else (token + 1) % serving.VOCABULARY for at, token in enumerate(right)]
        return drafted[len(tokens) : len(tokens) + n]

    engine = serving.engine(draft=draft, return_selections=True)
    pairs = zip(rollouts.PROMPTS, how, strict=True)
    ids, found = [engine.submit(prompt, sampling=one) for prompt, one in pairs], {}
    while not engine.is_idle:
        found |= engine.step().rollouts
    rollouts.assert_same(models.pack_rollouts([found[id] for id in ids]), alone)
    out = rollouts.run(alone)
    assert np.abs(np.asarray(out.logprobs) - alone.logprobs)[alone.is_made].max() < 2e-5


def test_a_stop_text_ends_the_record_too():
    class Letters:
        """Each token is a letter."""

        def encode(self, text):
            return [ord(letter) - 65 for letter in text]

        def decode(self, ids):
            return "".join(chr(65 + id) for id in ids)

    ((*tokens,), *_) = models.generate(serving.model(), rollouts.PROMPTS, 8, stop_ids=(), chunk=6).tokens
    stop = Letters().decode(tokens[3:5])
    how = models.Sampling(max_tokens=8, stop=(stop,), ignore_eos=True)
    made = models.generate(
        serving.model(), rollouts.PROMPTS, sampling=how, tokenizer=Letters(), chunk=6, return_selections=True
    )
    assert made.tokens[0] == tokens[:5] and made.rollout.is_made.sum() == sum(map(len, made.tokens))
    made.rollout.check(serving.model().config)
    out = rollouts.run(made.rollout)
    assert np.abs(np.asarray(out.logprobs) - made.rollout.logprobs)[made.rollout.is_made].max() < 2e-5
