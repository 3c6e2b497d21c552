"""What /metrics shows, in a registry of the server's own."""

import time
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from hisa_jax.models.engine import Engine, Report

_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)


class Metrics:
    """Numbers of a server.

    Args:
        engine: whose state is read when they are asked for.
    """

    def __init__(self, engine: Engine) -> None:
        self.registry = CollectorRegistry()
        given: dict[str, Any] = {"registry": self.registry, "namespace": "hisa_jax"}
        self._engine, scheduler = engine, engine.scheduler
        for name, text, read in (
            ("requests_running", "Requests that are read or decode", lambda: len(scheduler.running)),
            ("requests_waiting", "Requests that wait for a row or pages", lambda: len(scheduler.waiting)),
            ("pages_free", "Pages that hold nothing", lambda: scheduler.pool.n_free),
            ("pages", "Pages of each layer", lambda: scheduler.pool.n_pages),
            ("prefixes", "Finished requests whose pages are kept for others", lambda: len(scheduler.donors)),
        ):
            Gauge(name, text, **given).set_function(read)
        self.requests = Counter("requests", "Requests by outcome", ["outcome"], **given)
        self._read = Counter("prompt_tokens", "Prompt tokens that were read", **given)
        self._shared = Counter("shared_tokens", "Prompt tokens that another request had in its pages", **given)
        self.made = Counter("tokens", "New tokens that were handed out", **given)
        self._proposed = Counter("proposals", "Tokens that a draft proposed", **given)
        self._accepted = Counter("proposals_accepted", "Proposals that were right", **given)
        self._faults = Counter("step_faults", "Steps that raised and were done again", **given)
        self._step = Histogram(
            "step_seconds", "From one step to the next while there is work", buckets=_SECONDS, **given
        )
        self.first = Histogram(
            "time_to_first_token_seconds", "From a request to its first token", buckets=_SECONDS, **given
        )
        self.whole = Histogram("request_seconds", "From a request to its end", buckets=_SECONDS, **given)
        self._recall = Gauge(
            "recall",
            "Recall against the flat indexer in a recent request, when it was last asked for",
            ["layer"],
            **given,
        )
        self._last: float | None = None

    def after_step(self, report: Report) -> None:
        """Counts a step."""
        now = time.perf_counter()
        if self._last is not None:
            self._step.observe(now - self._last)
        self._last = None if self._engine.is_idle else now
        self._shared.inc(sum(shared for _, _, shared in report.forks))
        for step in report.steps:
            if step.phase == "decode":
                self._proposed.inc(sum(step.n_new) - len(step.n_new))
                self._accepted.inc(sum(step.n_kept) - len(step.n_kept))
            else:
                self._read.inc(sum(step.n_new))

    def after_fault(self, error: Exception) -> None:
        """Counts a step that raised."""
        self._faults.inc()

    def show_recall(self, by_layer: dict[int, float]) -> None:
        """Shows a measurement."""
        for layer, recall in by_layer.items():
            self._recall.labels(layer=layer).set(recall)

    def text(self) -> bytes:
        """In Prometheus' format."""
        return generate_latest(self.registry)
