"""Spans of calls, by events as a profiler gives them."""

from bench.gpu.span import Event, calls_of


def test_events_apart_are_of_different_calls_and_those_of_a_call_may_overlap():
    first = [Event(0, 5e4, "a"), Event(1e4, 2e4, "b"), Event(3e5, 4e5, "c")]
    second = [Event(1.5e6, 1.6e6, "a")]
    assert calls_of(first + second) == [first, second]
