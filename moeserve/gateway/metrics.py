"""What /metrics shows: this server's own metrics, and the same numbers under vLLM's names.

Dashboards and autoscalers written for vLLM (https://docs.vllm.ai/en/stable/usage/metrics/) work
unchanged. An alias is a copy made while the metrics are read, so nothing is counted twice.

Numbers about the engine come from its last heartbeat and start again from zero with a restarted
engine; Prometheus takes a counter that falls for a restart.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from types import MappingProxyType
from typing import Final

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, InfoMetricFamily
from prometheus_client.exposition import CONTENT_TYPE_LATEST
from prometheus_client.metrics_core import Metric
from prometheus_client.samples import Sample

from moeserve import __version__
from moeserve.core import EngineStats, ErrorCode, FinishReason, ModelInfo
from moeserve.gateway.expert_metrics import expert_metrics, memory_metrics, page_metrics
from moeserve.gateway.service import AnswerRecord
from moeserve.messages import EngineStatus, Timing, Usage

CONTENT_TYPE: Final = CONTENT_TYPE_LATEST

#: seconds; requests last from milliseconds (tiny models) to minutes
LATENCY_BUCKETS: Final = (
    *(0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5),
    *(1.0, 2.5, 5.0, 10.0, 20.0, 40.0, 80.0, 160.0, 320.0, 640.0),
)
TOKEN_BUCKETS: Final = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1e3, 2e3, 5e3, 1e4, 2e4, 5e4, 1e5, 2e5)

#: own name -> vLLM's names for the same quantity, both without `_total`
VLLM_NAMES: Final[Mapping[str, tuple[str, ...]]] = MappingProxyType(
    {
        "moeserve_requests_running": ("num_requests_running",),
        "moeserve_requests_waiting": ("num_requests_waiting",),
        # the second name of each pair is the one that vLLM itself replaced by the first
        "moeserve_kv_usage_ratio": ("kv_cache_usage_perc", "gpu_cache_usage_perc"),
        "moeserve_prefix_query_tokens": ("prefix_cache_queries", "gpu_prefix_cache_queries"),
        "moeserve_prefix_hit_tokens": ("prefix_cache_hits", "gpu_prefix_cache_hits"),
        "moeserve_inter_token_seconds": (
            "inter_token_latency_seconds",
            "time_per_output_token_seconds",
        ),
        "moeserve_preemptions": ("num_preemptions",),
        "moeserve_prompt_tokens": ("prompt_tokens",),
        "moeserve_generated_tokens": ("generation_tokens",),
        "moeserve_requests_finished": ("request_success",),
        "moeserve_time_to_first_token_seconds": ("time_to_first_token_seconds",),
        "moeserve_request_seconds": ("e2e_request_latency_seconds",),
        "moeserve_request_seconds_per_output_token": ("request_time_per_output_token_seconds",),
        "moeserve_request_queued_seconds": ("request_queue_time_seconds",),
        "moeserve_request_prefill_seconds": ("request_prefill_time_seconds",),
        "moeserve_request_decode_seconds": ("request_decode_time_seconds",),
        "moeserve_request_inference_seconds": ("request_inference_time_seconds",),
        "moeserve_request_prompt_tokens": ("request_prompt_tokens",),
        "moeserve_request_generated_tokens": ("request_generation_tokens",),
    }
)


class Metrics:
    """Counts and durations of the gateway, joined with the engine's at each scrape."""

    def __init__(self, status: Callable[[], EngineStatus]) -> None:
        """status: the engine's last word about itself."""
        own = CollectorRegistry()
        self.http_requests = Counter(
            "moeserve_http_requests",
            "HTTP responses by route, method and status.",
            ("route", "method", "status"),
            registry=own,
        )
        self._finished = Counter(
            "moeserve_requests_finished",
            "Answers that ended, by reason.",
            ("finished_reason",),
            registry=own,
        )
        for reason in FinishReason:
            self._finished.labels(reason.value)  # shown as 0 before the first

        self._refused = Counter(
            "moeserve_requests_refused",
            "Requests refused before they ran, by error code.",
            ("code",),
            registry=own,
        )

        def seconds(name: str, text: str) -> Histogram:
            return Histogram(f"moeserve_{name}", text, buckets=LATENCY_BUCKETS, registry=own)

        def tokens(name: str, text: str) -> Histogram:
            return Histogram(f"moeserve_{name}", text, buckets=TOKEN_BUCKETS, registry=own)

        self._first_token = seconds("time_to_first_token_seconds", "From receipt to first token.")
        self._inter_token = seconds("inter_token_seconds", "Between tokens, as they reach us.")
        self._total = seconds("request_seconds", "From receipt to the end of the answer.")
        self._per_token = seconds(
            "request_seconds_per_output_token", "Mean time per token after the first, per answer."
        )
        self._queued = seconds("request_queued_seconds", "Waiting in the engine.")
        self._prefill = seconds("request_prefill_seconds", "Computing the prompt.")
        self._decode = seconds("request_decode_seconds", "Generating.")
        self._inference = seconds("request_inference_seconds", "Prefill and decode together.")
        self._prompt_tokens = tokens("request_prompt_tokens", "Tokens of the prompt, per request.")
        self._generated_tokens = tokens("request_generated_tokens", "Tokens, per answer.")
        self._exposed = CollectorRegistry()
        self._exposed.register(_Exposition(own, status))

    # -- ServiceObserver -------------------------------------------------------------------------

    def request_started(self, prompt_tokens: int) -> None:
        self._prompt_tokens.observe(prompt_tokens)

    def request_refused(self, code: ErrorCode) -> None:
        self._refused.labels(code.value).inc()

    def first_token(self, seconds: float) -> None:
        self._first_token.observe(seconds)

    def token_gap(self, seconds: float, tokens: int) -> None:
        for _ in range(tokens):  # several tokens may come in one message
            self._inter_token.observe(seconds / tokens)

    def answer_finished(self, record: AnswerRecord) -> None:
        self._finished.labels(record.reason.value).inc()
        self._total.observe(record.total_s)
        self._generated_tokens.observe(record.num_tokens)
        first_s, last_s = record.first_token_s, record.last_token_s
        if first_s is not None and last_s is not None and record.num_tokens > 1:
            self._per_token.observe((last_s - first_s) / (record.num_tokens - 1))
        if (engine := record.engine) is not None:
            self._queued.observe(engine.queued_s)
            self._prefill.observe(engine.prefill_s)
            self._decode.observe(engine.decode_s)
            self._inference.observe(engine.prefill_s + engine.decode_s)

    def request_finished(self, usage: Usage, timing: Timing) -> None:
        """Nothing: what it says was counted per answer."""

    # --------------------------------------------------------------------------------------------

    def text(self) -> bytes:
        """The exposition in Prometheus' text format."""
        return generate_latest(self._exposed)


class _Exposition:
    """A collector: the gateway's metrics, the engine's, and the aliases of both."""

    def __init__(self, own: CollectorRegistry, status: Callable[[], EngineStatus]) -> None:
        self._own = own
        self._status = status
        self._model_name = ""

    def describe(self) -> Iterable[Metric]:
        return ()  # the registry would otherwise collect once to learn the names

    def collect(self) -> Iterable[Metric]:
        status = self._status()
        if status.info is not None:  # remembered: series keep their label while an engine restarts
            self._model_name = status.info.name
        for metric in (*self._own.collect(), *engine_metrics(status)):
            yield _without_created(metric)
            for name in VLLM_NAMES.get(metric.name, ()):
                yield _alias(metric, f"vllm:{name}", self._model_name)
        if status.info is not None:
            yield _cache_config(status.info)


def _cache_config(info: ModelInfo) -> Metric:
    """vLLM's name for the size of the kv pool, which load balancers read."""
    labels = {
        "block_size": str(info.block_tokens),
        "num_gpu_blocks": str(info.kv_blocks),
        "engine": "0",
    }
    config = GaugeMetricFamily("vllm:cache_config_info", "The kv pool.", labels=list(labels))
    config.add_metric(list(labels.values()), 1.0)
    return config


def _without_created(metric: Metric) -> Metric:
    """Less the creation times, which double the size and which few read."""
    metric.samples = [s for s in metric.samples if not s.name.endswith("_created")]
    return metric


def _alias(metric: Metric, name: str, model_name: str) -> Metric:
    """A copy under another name, with the labels that vLLM's metrics have."""
    alias = Metric(name, metric.documentation, metric.type)
    for sample in metric.samples:
        labels = {"model_name": model_name, "engine": "0", **sample.labels}
        if labels.get("finished_reason") == FinishReason.CANCELLED.value:
            labels["finished_reason"] = "abort"
        renamed = name + sample.name.removeprefix(metric.name)
        alias.samples.append(Sample(renamed, labels, sample.value))
    return alias


def engine_metrics(status: EngineStatus) -> list[Metric]:
    """The engine's gauges and counters; without an engine just that it is not up."""
    up = GaugeMetricFamily("moeserve_engine_up", "1 when the engine serves.")
    up.add_metric([], float(status.stage == "ready"))
    build = InfoMetricFamily("moeserve_build", "This server.", value={"version": __version__})
    result: list[Metric] = [up, build]
    if (info := status.info) is not None:
        labels = {
            "name": info.name,
            "model_type": info.model_type,
            "dtype": info.dtype,
            "device": info.device,
            "context_tokens": str(info.context_tokens),
            "num_experts": str(info.num_experts),
            "block_tokens": str(info.block_tokens),
        }
        result.append(InfoMetricFamily("moeserve_model", "The model served.", value=labels))
    stats = status.stats
    if stats is None and status.stage == "ready":
        stats = EngineStats()  # it has just started; the next heartbeat brings numbers
    if stats is not None:
        result += _stats_metrics(stats)
    return result


def _stats_metrics(stats: EngineStats) -> list[Metric]:
    usage = stats.kv_blocks_used / stats.kv_blocks_total if stats.kv_blocks_total else 0.0
    gauges = {
        "requests_running": (stats.num_running, "Sequences in the running batch."),
        "requests_waiting": (stats.num_waiting, "Sequences waiting for admission."),
        "kv_usage_ratio": (usage, "Used share of the kv blocks, 0 to 1."),
        "kv_blocks_used": (stats.kv_blocks_used, "Kv blocks that sequences hold."),
        "kv_blocks": (stats.kv_blocks_total, "Kv blocks in all."),
        "kv_bytes": (stats.kv_bytes, "Memory of the kv blocks that may be used now."),
        "prefix_cached_blocks": (stats.prefix_cached_blocks, "Free blocks kept for reuse."),
    }
    counters = {
        "prompt_tokens": (stats.prompt_tokens, "Prompt tokens of admitted requests."),
        "prefix_query_tokens": (stats.prompt_tokens, "Prompt tokens looked up for reuse."),
        "prefix_hit_tokens": (stats.cached_prompt_tokens, "Prompt tokens whose kv was reused."),
        "generated_tokens": (stats.generated_tokens, "Tokens generated."),
        "preemptions": (stats.num_preemptions, "Sequences put back to be computed again."),
        "engine_requests_finished": (stats.requests_finished, "Sequences that ended."),
        "engine_steps": (stats.num_steps, "Steps of the engine."),
        "engine_step_seconds": (stats.step_s, "Time spent in steps."),
    }
    result: list[Metric] = [
        GaugeMetricFamily(f"moeserve_{name}", text, value=value)
        for name, (value, text) in gauges.items()
    ]
    result += [
        CounterMetricFamily(f"moeserve_{name}", text, value=value)
        for name, (value, text) in counters.items()
    ]
    if stats.extra:
        extra = GaugeMetricFamily("moeserve_engine_extra", "More of the engine.", labels=["name"])
        for name, value in sorted(stats.extra.items()):
            extra.add_metric([name], value)
        result.append(extra)
    if stats.memory is not None:
        result += memory_metrics(stats.memory)
    if stats.pages is not None:
        result += page_metrics(stats.pages)
    if stats.experts is not None:
        result += expert_metrics(stats.experts)
    return result
