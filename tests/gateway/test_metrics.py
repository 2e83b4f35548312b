"""/metrics, read by Prometheus' own parser: aliases equal the originals, numbers as counted."""

from __future__ import annotations

from pathlib import Path

import pytest
from prometheus_client.metrics_core import Metric
from prometheus_client.parser import text_string_to_metric_families
from support.http_servers import BigramServer

from moeserve.core import EngineStats, EngineTiming, ErrorCode, FinishReason
from moeserve.gateway.metrics import VLLM_NAMES, Metrics
from moeserve.gateway.service import AnswerRecord
from moeserve.messages import EngineStatus

#: https://docs.vllm.ai/en/stable/usage/metrics/: what dashboards and autoscalers read
WANTED = {
    "vllm:num_requests_running",
    "vllm:num_requests_waiting",
    "vllm:kv_cache_usage_perc",
    "vllm:gpu_cache_usage_perc",
    "vllm:prefix_cache_queries",
    "vllm:prefix_cache_hits",
    "vllm:num_preemptions",
    "vllm:prompt_tokens",
    "vllm:generation_tokens",
    "vllm:request_success",
    "vllm:time_to_first_token_seconds",
    "vllm:inter_token_latency_seconds",
    "vllm:time_per_output_token_seconds",
    "vllm:request_time_per_output_token_seconds",
    "vllm:e2e_request_latency_seconds",
    "vllm:request_queue_time_seconds",
    "vllm:request_inference_time_seconds",
    "vllm:request_prefill_time_seconds",
    "vllm:request_decode_time_seconds",
    "vllm:request_prompt_tokens",
    "vllm:request_generation_tokens",
}


def scrape(text: str) -> dict[str, Metric]:
    families = list(text_string_to_metric_families(text))
    names = [family.name for family in families]
    assert len(set(names)) == len(names), "a family is declared twice"
    keys = [(s.name, *sorted(s.labels.items())) for f in families for s in f.samples]
    assert len(set(keys)) == len(keys), "a series is there twice"
    return {family.name: family for family in families}


def value(families: dict[str, Metric], name: str, sample: str = "", /, **labels: str) -> float:
    [found] = [
        s.value
        for s in families[name].samples
        if s.name == name + sample and labels.items() <= s.labels.items()
    ]
    return float(found)


STATUS = EngineStatus(
    epoch="e",
    stage="ready",
    stats=EngineStats(
        num_running=3,
        num_waiting=2,
        kv_blocks_used=10,
        kv_blocks_total=40,
        num_preemptions=7,
        prompt_tokens=100,
        cached_prompt_tokens=60,
        generated_tokens=50,
        extra={"recomputed_tokens": 4.0},
    ),
)


def test_the_engines_numbers() -> None:
    families = scrape(Metrics(lambda: STATUS).text().decode())
    assert set(families) >= WANTED
    assert value(families, "vllm:num_requests_running") == 3
    assert value(families, "vllm:num_requests_waiting") == 2
    assert value(families, "vllm:kv_cache_usage_perc") == 0.25
    assert value(families, "vllm:num_preemptions", "_total") == 7
    assert value(families, "vllm:prefix_cache_queries", "_total") == 100
    assert value(families, "vllm:prefix_cache_hits", "_total") == 60
    assert value(families, "vllm:generation_tokens", "_total") == 50
    assert value(families, "moeserve_engine_extra", name="recomputed_tokens") == 4


def test_an_alias_has_the_values_of_its_original() -> None:
    metrics = Metrics(lambda: STATUS)
    for seconds in (0.001, 0.4, 1e6):
        metrics.first_token(seconds)
    families = scrape(metrics.text().decode())
    for name, aliases in VLLM_NAMES.items():
        original = [(s.name.removeprefix(name), s.value) for s in families[name].samples]
        for alias in (f"vllm:{a}" for a in aliases):
            copy = [(s.name.removeprefix(alias), s.value) for s in families[alias].samples]
            assert copy == original
            assert families[alias].type == families[name].type


def test_what_the_service_reports() -> None:
    metrics = Metrics(lambda: STATUS)
    metrics.request_started(12)
    metrics.request_refused(ErrorCode.OVERLOADED)
    metrics.first_token(0.25)
    metrics.token_gap(0.3, 3)
    timing = EngineTiming(queued_s=0.5, prefill_s=0.25, decode_s=2.0)
    record = AnswerRecord(FinishReason.CANCELLED, 5, 0.5, 2.5, 3.0, timing)
    metrics.answer_finished(record)
    metrics.answer_finished(AnswerRecord(FinishReason.STOP, 0, None, None, 1.0, None))
    families = scrape(metrics.text().decode())
    assert value(families, "vllm:time_to_first_token_seconds", "_sum") == 0.25
    assert value(families, "vllm:inter_token_latency_seconds", "_count") == 3
    assert value(families, "vllm:inter_token_latency_seconds", "_sum") == pytest.approx(0.3)
    assert value(families, "vllm:request_time_per_output_token_seconds", "_sum") == 0.5
    assert value(families, "vllm:e2e_request_latency_seconds", "_sum") == 4
    assert value(families, "vllm:request_queue_time_seconds", "_sum") == 0.5
    assert value(families, "vllm:request_inference_time_seconds", "_sum") == 2.25
    assert value(families, "vllm:request_success", "_total", finished_reason="abort") == 1
    assert value(families, "vllm:request_success", "_total", finished_reason="stop") == 1
    refused = value(families, "moeserve_requests_refused", "_total", code="overloaded")
    assert refused == 1


def test_without_an_engine() -> None:
    down = EngineStatus(epoch="", stage="failed", detail="gone")
    families = scrape(Metrics(lambda: down).text().decode())
    assert value(families, "moeserve_engine_up") == 0
    assert "vllm:num_requests_running" not in families


def test_an_engine_that_has_said_no_numbers_yet() -> None:
    just_started = EngineStatus(epoch="e", stage="ready")
    families = scrape(Metrics(lambda: just_started).text().decode())
    assert set(families) >= WANTED
    assert value(families, "vllm:num_requests_running") == 0


def test_over_http(tmp_path: Path) -> None:
    with BigramServer(tmp_path) as server:
        for _ in range(3):
            body = {"prompt": "abcd", "max_tokens": 5, "ignore_eos": True, "n": 2}
            assert server.client.post("/v1/completions", json=body).status_code == 200
        server.client.get("/invented/by/a/client")
        response = server.client.get("/metrics")
        assert response.headers["content-type"].startswith("text/plain")
        families = scrape(response.text)
    assert value(families, "vllm:request_success", "_total", finished_reason="length") == 6
    assert value(families, "vllm:generation_tokens", "_total") == 30
    assert value(families, "vllm:request_prompt_tokens", "_sum") == 12
    assert value(families, "vllm:time_to_first_token_seconds", "_count") == 3
    assert {s.labels["model_name"] for s in families["vllm:request_success"].samples} == {"bigram"}
    kv = {"block_size": "16", "num_gpu_blocks": "64"}
    assert value(families, "vllm:cache_config_info", **kv) == 1
    http = families["moeserve_http_requests"].samples
    counted = {(s.labels["route"], s.labels["status"]): s.value for s in http}
    assert counted[("/v1/completions", "200")] == 3
    assert counted[("none", "404")] == 1
