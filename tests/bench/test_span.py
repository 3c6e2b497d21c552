"""Spans of calls, by events as a profiler gives them."""

from bench.gpu.span import _APART_S, Event, calls_of


def test_events_apart_are_of_different_calls_and_those_of_a_call_may_overlap():
    first = [Event(0, 5e4, "a"), Event(1e4, 2e4, "b"), Event(3e5, 4e5, "c")]
    later = first[-1].end + 0.6e9 * _APART_S
    second = [Event(later, later + 1e5, "a")]
    assert calls_of(first + second) == [first, second]
