"""GET /metrics: what Prometheus reads. Each application has a registry of its own."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    ProcessCollector,
    disable_created_metrics,
)
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.exposition import choose_encoder
from prometheus_client.registry import Collector

from llorch import __version__
from llorch.core.llm import LLM
from llorch.core.stats import EngineStats

# a second series for each counter and histogram, which says what llorch_uptime_seconds does
disable_created_metrics()  # type: ignore[no-untyped-call]

# accepted = ended + cancelled + failed, once none runs; rejected: refused, or left, before it was accepted
OUTCOMES = ("ended", "cancelled", "failed", "rejected")
REJECTIONS = ("INVALID_REQUEST", "JOB_EXISTS", "QUEUE_FULL", "WORKER_UNHEALTHY", "CANCELLED")  # those to expect

# seconds; from a cached prompt on an accelerator to a long one on a busy CPU
FIRST_TOKEN_BUCKETS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0)
QUEUE_BUCKETS = (0.001, 0.01, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0)
REQUEST_BUCKETS = (0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0, 600.0)
INTER_TOKEN_BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.2, 0.5, 1.0, 2.5)


class Metrics:
    """Counters and histograms of one worker; the engine's own numbers are read when they are asked for."""

    def __init__(self, stats: Callable[[], EngineStats]) -> None:
        self._registry = CollectorRegistry()
        self._started = time.monotonic()
        self.accepted = Counter(
            "llorch_requests_accepted", "Requests accepted into the queue.", registry=self._registry
        )
        self._outcomes = Counter("llorch_requests", "Requests by outcome.", ["outcome"], registry=self._registry)
        for outcome in OUTCOMES:
            self._outcomes.labels(outcome)  # a series that is absent until its first event breaks rate()
        self._rejected = Counter(
            "llorch_requests_rejected", "Requests rejected, by error code.", ["code"], registry=self._registry
        )
        for code in REJECTIONS:
            self._rejected.labels(code)
        self._answers = Counter(
            "llorch_http_requests", "Answers by route and status.", ["route", "status"], registry=self._registry
        )
        self.first_token = self._histogram(
            "llorch_time_to_first_token_seconds",
            "From acceptance into the queue to the first text.",
            FIRST_TOKEN_BUCKETS,
        )
        self.inter_token = self._histogram(
            "llorch_inter_token_seconds", "Between two token events of a request.", INTER_TOKEN_BUCKETS
        )
        self.queued = self._histogram(
            "llorch_queue_seconds", "From acceptance into the queue to the first step.", QUEUE_BUCKETS
        )
        self.ended = self._histogram(
            "llorch_request_seconds",
            "From acceptance into the queue to the end, of requests that ended.",
            REQUEST_BUCKETS,
        )
        self._registry.register(_EngineCollector(stats, lambda: self.uptime))
        ProcessCollector(registry=self._registry)

    def _histogram(self, name: str, text: str, buckets: Sequence[float]) -> Histogram:
        return Histogram(name, text, buckets=buckets, registry=self._registry)

    @property
    def uptime(self) -> float:
        """Seconds since the worker began."""
        return time.monotonic() - self._started

    def count(self, outcome: str) -> None:
        self._outcomes.labels(outcome).inc()

    def reject(self, code: str) -> None:
        """Counts a request that ends before it is accepted, by why."""
        self.count("rejected")
        self._rejected.labels(code).inc()

    def answered(self, route: str, status: int) -> None:
        """Counts an answer. `route` is a template, or "other": a path of the client's would be a series of its own."""
        self._answers.labels(route, status).inc()

    def built(self, llm: LLM) -> None:
        """Says what is served, once it is loaded."""
        labels = {"version": __version__, "model": llm.config.name, "provider": llm.provider_name}
        Gauge("llorch_build_info", "What is served: always 1.", list(labels), registry=self._registry).labels(
            **labels
        ).set(1)

    def render(self, accept: str) -> tuple[bytes, str]:
        """The exposition and its content type, in the format that an Accept header asks for."""
        encoder, content_type = choose_encoder(accept)
        return encoder(self._registry), content_type


class _EngineCollector(Collector):
    def __init__(self, stats: Callable[[], EngineStats], uptime: Callable[[], float]) -> None:
        self._stats, self._uptime = stats, uptime

    def collect(self) -> Iterable[Metric]:
        stats = self._stats()
        yield CounterMetricFamily("llorch_tokens_generated", "Tokens generated.", stats.tokens_generated)
        yield CounterMetricFamily("llorch_prompt_tokens", "Prompt tokens of requests that ran.", stats.prompt_tokens)
        yield CounterMetricFamily("llorch_engine_steps", "Steps of the engine.", stats.steps)
        yield CounterMetricFamily(
            "llorch_engine_shared_steps", "Steps that held tokens of two or more requests.", stats.shared_steps
        )
        yield CounterMetricFamily(
            "llorch_prefix_cache_hit_tokens",
            "Tokens that were in the cache already when a request began, or went on after a preemption.",
            stats.prefix_hit_tokens,
        )
        yield CounterMetricFamily(
            "llorch_prefix_cache_evictions", "Blocks whose contents were given up for room.", stats.evictions
        )
        yield CounterMetricFamily(
            "llorch_preemptions", "Times that a request gave up its blocks, to be computed again.", stats.preemptions
        )
        yield CounterMetricFamily(
            "llorch_engine_failures", "Failures that cost all requests in flight.", stats.failures
        )
        yield GaugeMetricFamily("llorch_queue_depth", "Requests that wait.", stats.waiting)
        yield GaugeMetricFamily("llorch_running_requests", "Requests that run.", stats.running)
        yield GaugeMetricFamily("llorch_kv_blocks_used", "Blocks of the KV cache in use.", stats.kv_blocks_used)
        yield GaugeMetricFamily("llorch_kv_blocks_total", "Blocks of the KV cache.", stats.kv_blocks_total)
        yield GaugeMetricFamily(
            "llorch_kv_blocks_kept", "Free blocks that hold what a later request may share.", stats.kv_blocks_kept
        )
        yield GaugeMetricFamily("llorch_vram_bytes", "Bytes of weights and cache on the device.", stats.device_bytes)
        yield GaugeMetricFamily("llorch_uptime_seconds", "Seconds since the worker began.", self._uptime())
