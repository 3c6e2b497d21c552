"""Timing."""

import jax.numpy as jnp
import pytest

from bench import timing


def test_calls_take_turns_and_the_first_round_is_not_timed():
    calls, rounds = [], []
    timings = timing.interleaved(
        {name: lambda name=name: calls.append(name) for name in "ab"}, 3, after_round=rounds.append
    )
    assert calls == list("abababab")
    assert rounds == [0, 1, 2, 3]
    assert [len(timings[name].samples_ms) for name in "ab"] == [3, 3]


def test_short_calls_are_repeated_until_they_have_taken_long_enough():
    timings = timing.interleaved({"short": lambda: None}, 1, least_s=0.001)
    assert len(timings["short"].samples_ms) > 1
    assert sum(timings["short"].samples_ms) >= 1


def test_a_ratio_is_taken_within_rounds():
    # The machine was half as fast in the second round: medians apart would give 20 / 30.
    own, base = timing.Timing(samples_ms=(10.0, 20.0, 30.0)), timing.Timing(samples_ms=(20.0, 40.0, 30.0))
    assert own.ratio_to(base) == 0.5
    assert (own.median_ms, own.spread_ms) == (20.0, 10.0)


def test_once_returns_the_result_and_milliseconds():
    result, ms = timing.once(lambda: jnp.ones(3).sum())
    assert float(result) == pytest.approx(3.0)
    assert ms > 0
