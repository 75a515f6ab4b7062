"""What Prometheus reads, under vLLM's names with our prefix."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

if TYPE_CHECKING:
    from outrider.llm import LLM

PREFIX = "outrider:"
FIRST_TOKEN_BUCKETS = (0.005, 0.01, 0.02, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0)
TOKEN_BUCKETS = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5)
REQUEST_BUCKETS = (0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0, 600.0, 1800.0)


class Metrics:
    """Counts what requests go through; what the engine counts itself is read when it is asked for."""

    def __init__(self, llm: LLM, model_name: str) -> None:
        self.registry = CollectorRegistry()
        names, values = ("model_name",), (model_name,)

        def histogram(name: str, help: str, buckets: Sequence[float]) -> Histogram:
            return Histogram(f"{PREFIX}{name}", help, names, buckets=buckets, registry=self.registry).labels(*values)

        def counter(name: str, help: str) -> Counter:
            return Counter(f"{PREFIX}{name}", help, names, registry=self.registry).labels(*values)

        self._first_token = histogram(
            "time_to_first_token_seconds", "From a request's arrival to its first token.", FIRST_TOKEN_BUCKETS
        )
        self._between_tokens = histogram(
            "inter_token_latency_seconds",
            "Between tokens: a step's time shared by the tokens that it brought a request.",
            TOKEN_BUCKETS,
        )
        self._request = histogram(
            "e2e_request_latency_seconds", "From a request's arrival to its end.", REQUEST_BUCKETS
        )
        self._prompt_tokens = counter("prompt_tokens", "Tokens of prompts that were accepted.")
        self._generation_tokens = counter("generation_tokens", "Tokens generated.")
        self._finished = Counter(
            f"{PREFIX}request_success",
            "Choices that ended, by how.",
            (*names, "finished_reason"),
            registry=self.registry,
        )
        self._model_name = model_name
        for reason in ("stop", "length", "abort", "error"):
            self._finished.labels(model_name, reason)
        self.registry.register(_EngineCollector(llm, model_name))

    def count_prompts(self, num_tokens: Iterable[int]) -> None:
        self._prompt_tokens.inc(sum(num_tokens))

    def count_tokens(self, num_tokens: int, seconds: float, *, first: bool) -> None:
        """Tokens that a step brought a choice, and the time since its last ones, or since its request's arrival."""
        self._generation_tokens.inc(num_tokens)
        if first:
            self._first_token.observe(seconds)
        else:
            for _ in range(num_tokens):
                self._between_tokens.observe(seconds / num_tokens)

    def count_finished(self, reason: str, seconds: float) -> None:
        """A choice, or a whole request that was aborted or failed, `seconds` after its arrival."""
        self._finished.labels(self._model_name, reason).inc()
        self._request.observe(seconds)

    def exposition(self) -> bytes:
        """Everything in Prometheus' text format."""
        return generate_latest(self.registry)


class _EngineCollector(Collector):
    """Reads single numbers of the engine, from another thread than its own: each is whole, if not all of one step."""

    def __init__(self, llm: LLM, model_name: str) -> None:
        self._llm = llm
        self._model_name = model_name

    def collect(self) -> Iterator[Metric]:
        engine, labels = self._llm.engine, [self._model_name]
        stats, scheduler, pool = engine.stats, engine.scheduler, engine.cache.pool
        gauges = {
            "num_requests_running": ("Choices in the running batch.", len(scheduler.running)),
            "num_requests_waiting": ("Choices that wait for a place in it.", len(scheduler.waiting)),
            "kv_cache_usage_perc": ("Share of the cache's blocks in use; 1 is all.", pool.num_used / pool.num_blocks),
        }
        counters = {
            "spec_decode_num_drafts": ("Proposals with at least one draft token.", stats.num_drafts),
            "spec_decode_num_draft_tokens": ("Draft tokens verified.", stats.num_draft_tokens),
            "spec_decode_num_accepted_tokens": ("Draft tokens accepted.", stats.num_accepted_tokens),
            "engine_steps": ("Forwards of the model.", stats.num_steps),
        }
        for name, (help, value) in gauges.items():
            gauge = GaugeMetricFamily(f"{PREFIX}{name}", help, labels=["model_name"])
            gauge.add_metric(labels, value)
            yield gauge
        for name, (help, value) in counters.items():
            counter = CounterMetricFamily(f"{PREFIX}{name}", help, labels=["model_name"])
            counter.add_metric(labels, value)
            yield counter
        per_position = CounterMetricFamily(
            f"{PREFIX}spec_decode_num_accepted_tokens_per_pos",
            "Draft tokens accepted, by depth in the tree (0: right below the root).",
            labels=["model_name", "position"],
        )
        for depth, count in enumerate(list(stats.accepted_at_depth)):
            per_position.add_metric([*labels, str(depth)], count)
        yield per_position
        config = self._llm.config
        info = GaugeMetricFamily(
            f"{PREFIX}engine_info", "How the model runs; always 1.", labels=["model_name", *_INFO_LABELS]
        )
        info.add_metric([*labels, config.decoding.method, config.verification, config.exactness, config.weights], 1)
        yield info


_INFO_LABELS = ("decoding", "verification", "exactness", "weights")
