"""Prometheus metrics. Names follow vLLM's where they mean the same, so that its dashboards can be adapted."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, Metric, generate_latest
from prometheus_client.core import CounterMetricFamily
from prometheus_client.registry import Collector

from onekernel.scheduler import Scheduler

if TYPE_CHECKING:
    from onekernel.server.service import Answer

TTFT_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
TOKEN_S = (0.0002, 0.0003, 0.0004, 0.0005, 0.00075, 0.001, 0.002, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 1)
REQUEST_S = (0.01, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300)


class Metrics:
    """Of one server; a registry of its own, so that several servers can live in one process."""

    def __init__(self, scheduler: Scheduler, joules: Callable[[], float] | None = None) -> None:
        """Args:
        joules: what the device has taken so far; None: nothing tells.
        """
        self._registry = registry = CollectorRegistry()

        def counter(name: str, text: str, labels: Iterable[str] = ()) -> Counter:
            return Counter(f"onekernel_{name}", text, labels, registry=registry)

        def histogram(name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
            return Histogram(f"onekernel_{name}", text, buckets=buckets, registry=registry)

        self._ended = counter("requests_total", "Answers by how they ended", ["reason"])
        self._refused = counter("requests_refused_total", "Requests that were not taken on")
        self._prompt = counter("prompt_tokens_total", "Tokens of prompts")
        self._cached = counter("prompt_tokens_cached_total", "Tokens of prompts that were found in the prefix cache")
        self._generated = counter("generation_tokens_total", "Tokens of answers")
        self._ttft = histogram("time_to_first_token_seconds", "From request to first token", TTFT_S)
        self._token = histogram("time_per_output_token_seconds", "Mean time between tokens of an answer", TOKEN_S)
        self._queue = histogram("request_queue_seconds", "Time in the queue", TTFT_S)
        self._whole = histogram("request_seconds", "From request to the end of the answer", REQUEST_S)
        for name, text, value in (
            ("requests_waiting", "Requests in the queue", lambda: scheduler.waiting),
            ("requests_running", "Requests that share the engine", lambda: scheduler.running),
            ("requests_parked", "Of these, those that wait for memory", lambda: scheduler.parked),
            ("prefix_cache_entries", "Snapshots in the prefix cache", lambda: len(scheduler.cache)),
            ("prefix_cache_bytes", "Bytes of these snapshots", lambda: scheduler.cache.used),
        ):
            Gauge(f"onekernel_{name}", text, registry=registry).set_function(value)
        if joules is not None:
            registry.register(_Energy(joules))

    def refused(self) -> None:
        self._refused.inc()

    def observe(self, answer: Answer) -> None:
        """An answer has ended, or its reader has left."""
        ticket = answer.ticket
        self._ended.labels(ticket.finish_reason or "cancelled").inc()
        self._prompt.inc(answer.prompt_tokens)
        self._cached.inc(answer.cached_tokens)
        self._generated.inc(answer.completion_tokens)
        if ticket.started_at is not None:
            self._queue.observe(ticket.started_at - ticket.submitted_at)
        if ticket.first_at is not None:
            self._ttft.observe(ticket.first_at - ticket.submitted_at)
        if ticket.first_at is not None and ticket.ended_at is not None and answer.completion_tokens > 1:
            self._token.observe((ticket.ended_at - ticket.first_at) / (answer.completion_tokens - 1))
        self._whole.observe((ticket.ended_at or time.perf_counter()) - ticket.submitted_at)

    def text(self) -> bytes:
        """All of them in Prometheus' text format."""
        return generate_latest(self._registry)


class _Energy(Collector):
    """A counter that is read when it is asked for."""

    def __init__(self, joules: Callable[[], float]) -> None:
        self._joules = joules

    def collect(self) -> Iterable[Metric]:
        yield CounterMetricFamily(
            "onekernel_energy_joules", "Energy of the device since the server started", value=self._joules()
        )
