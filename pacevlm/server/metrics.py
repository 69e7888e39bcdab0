"""What `/metrics` shows; names are vLLM's with another prefix where they mean the same, so dashboards carry over."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, Counter, Histogram
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.exposition import generate_latest
from prometheus_client.registry import Collector

from pacevlm.errors import PacevlmError
from pacevlm.server.job import Served
from pacevlm.server.protocol import Usage
from pacevlm.server.refusals import describe

if TYPE_CHECKING:
    from pacevlm.server.engine import Engine

PREFIX = "pacevlm:"
# From what a small model's first block takes to what nobody waits for.
_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.015, 0.02, 0.03, 0.04, 0.06, 0.08, 0.12, 0.2, 0.4, 0.8, 1.5, 3, 6, 12, 30, 60)
_RATIOS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0, 1.1, 1.25, 1.5, 2, 4)


class Metrics:
    """Counts and times of one server, in a registry of its own."""

    def __init__(self, engine: Engine) -> None:
        self._registry = CollectorRegistry()
        self._registry.register(_EngineCollector(engine))
        self._ttft = self._histogram("time_to_first_token_seconds", "From a request's first byte to its first token.")
        self._e2e = self._histogram("e2e_request_latency_seconds", "From a request's first byte to its whole answer.")
        self._queue = self._histogram("request_queue_time_seconds", "From a request's first byte to the worker.")
        self._inference = self._histogram("request_inference_time_seconds", "In the worker.")
        self._used = self._histogram("budget_used_ratio", "Measured time as a part of the budget.", buckets=_RATIOS)
        self._success = self._counter("request_success", "Requests that were answered.", "finished_reason")
        self._knobs = self._counter("requests_by_knobs", "Answers by knobs.", "tier", "top_k", "num_blocks")
        self._budgets = self._counter(
            "budgets", "Answers by how the budget was kept: met, late, or infeasible from the start.", "kind", "outcome"
        )
        self._refused = self._counter("requests_refused", "Requests that were not answered.", "reason")
        self._cancelled = self._counter("requests_cancelled", "Requests whose client hung up.")
        self._prompt = self._counter("prompt_tokens", "Tokens of pictures and questions.")
        self._generated = self._counter("generation_tokens", "Tokens of answers.")

    def answered(self, served: Served, tokens: Usage) -> None:
        """Count an answer."""
        answer, times = served.answer, served.answer.times
        queue_s = served.queue_ms / 1e3
        self._ttft.observe(queue_s + times.ttft_ms / 1e3)
        self._e2e.observe(queue_s + times.e2e_ms / 1e3)
        self._queue.observe(queue_s)
        self._inference.observe(times.e2e_ms / 1e3)
        if math.isfinite(answer.budget_ms):
            self._used.observe(answer.measured_ms / answer.budget_ms)
        outcome = "met" if answer.budget_met else "late" if answer.feasible else "infeasible"
        self._budgets.labels(answer.kind, outcome).inc()
        self._success.labels(served.finish_reason).inc()
        self._knobs.labels(answer.knobs.tier, answer.knobs.top_k, answer.knobs.num_blocks).inc()
        self._prompt.inc(tokens.prompt_tokens)
        self._generated.inc(tokens.completion_tokens)

    def refused(self, error: PacevlmError) -> None:
        """Count a request that was not answered."""
        self._refused.labels(describe(error)[1].code or "other").inc()

    def cancelled(self) -> None:
        """Count a request whose client hung up."""
        self._cancelled.inc()

    def text(self) -> bytes:
        """All of it, as Prometheus reads it."""
        return generate_latest(self._registry)

    def _histogram(self, name: str, description: str, buckets: tuple[float, ...] = _SECONDS) -> Histogram:
        return Histogram(PREFIX + name, description, buckets=buckets, registry=self._registry)

    def _counter(self, name: str, description: str, *labels: str) -> Counter:
        return Counter(PREFIX + name, description, labels, registry=self._registry)


class _EngineCollector(Collector):
    """What the engine counts itself, read when somebody asks."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def collect(self) -> Iterator[Metric]:
        """The engine's counts."""
        stats = self._engine.stats()
        for name, value, description in (
            ("num_requests_waiting", stats.waiting, "Requests in the queue."),
            ("num_requests_running", stats.running, "Requests in the worker."),
            ("drift_factor", stats.drift_factor, "How many times slower than profiled the machine is."),
            ("ready", float(self._engine.ready), "1 while requests are answered."),
        ):
            yield GaugeMetricFamily(PREFIX + name, description, value)
        for name, value, description in (
            ("requests_accepted", stats.accepted, "Requests that entered the queue."),
            ("requests_expired", stats.expired, "Accepted requests whose budget was over before they could begin."),
            ("worker_restarts", stats.restarts, "Workers that were started in place of a dead one."),
        ):
            yield CounterMetricFamily(PREFIX + name, description, value)
