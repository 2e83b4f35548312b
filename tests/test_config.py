"""Settings: what is not implemented is refused by name, and flags mirror the fields."""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path

import pytest

from moeserve.cli_options import (
    ENGINE_SETTINGS,
    add_flags,
    engine_config,
    gateway_config,
    parse_bytes,
)
from moeserve.config import (
    EngineConfig,
    ExpertConfig,
    GatewayConfig,
    HttpConfig,
    KvConfig,
    ModelConfig,
    SchedulerConfig,
    ZmqConfig,
)
from moeserve.core import ConfigError


@pytest.mark.parametrize(
    ("cls", "field", "value"),
    [
        (ModelConfig, "dtype", "int3"),
        (ModelConfig, "device", "tpu"),
        (ModelConfig, "device", "cuda:x"),
        (ModelConfig, "context_tokens", 0),
        (KvConfig, "block_tokens", 0),
        (KvConfig, "kv_bytes", 0),
        (KvConfig, "num_blocks", -1),
        (SchedulerConfig, "admission", "hopeful"),
        (SchedulerConfig, "max_batch_tokens", 0),
        (ExpertConfig, "cpu_backend", "ipex2"),
        (ExpertConfig, "predictor", "markov"),
        (ExpertConfig, "policy", "lru"),
        (ExpertConfig, "prefetch_depth", 3),
        (ExpertConfig, "min_host_slots", 5),
        (ExpertConfig, "layer_floor", 3),
        (ExpertConfig, "layer_floor", -1),
        (ExpertConfig, "worker_curve_dir", Path("keys")),
        (ExpertConfig, "num_threads", 0),
        (ExpertConfig, "spin_us", -1),
        (ExpertConfig, "stall_spin_us", -1),
        (HttpConfig, "port", 70_000),
        (HttpConfig, "max_body_bytes", 0),
        (HttpConfig, "allowed_hosts", ("fine.example", "http://name")),
        (HttpConfig, "allowed_hosts", ("name:8000",)),
        (HttpConfig, "allowed_hosts", ("",)),
        (ZmqConfig, "heartbeat_s", 0.0),
        (ZmqConfig, "heartbeat_s", float("nan")),
        (ZmqConfig, "peer_timeout_s", 1.0),
        (ZmqConfig, "max_message_bytes", 10),
        (ZmqConfig, "max_in_flight", 0),
        (GatewayConfig, "drain_s", -1.0),
        (GatewayConfig, "max_engine_restarts", -1),
    ],
)
def test_bad_value_is_refused_by_name(cls: type, field: str, value: object) -> None:
    with pytest.raises(ConfigError, match=field) as caught:
        cls(**{field: value})
    refused = value[-1] if isinstance(value, tuple) else value
    assert str(refused) in str(caught.value)


def test_contradiction_is_refused() -> None:
    with pytest.raises(ConfigError, match="contradict"):
        KvConfig(kv_bytes=1 << 20, num_blocks=4)


def parse(*flags: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    parser.add_argument("model", nargs="?")
    add_flags(parser, HttpConfig, ZmqConfig, GatewayConfig, *ENGINE_SETTINGS)
    return parser.parse_args(flags)


def test_no_flags_give_the_defaults() -> None:
    assert engine_config(parse()) == EngineConfig()
    assert gateway_config(parse(), api_key=None) == GatewayConfig()


def test_flags_reach_their_fields() -> None:
    args = parse(
        "some/model", "--dtype", "bfloat16", "--check-weights", "--no-prefix-reuse",
        "--kv-bytes", "1.5GiB", "--max-running", "3", "--admission", "aggressive",
        "--num-threads", "2", "--host", "::1", "--port", "0", "--zmq", "tcp://127.0.0.1:5555",
        "--curve-dir", "/keys", "--drain-s", "0.5", "--allowed-host", "a.example",
        "--allowed-host", "b",
    )  # fmt: skip
    config = gateway_config(args, api_key="from the environment")
    engine = config.engine
    assert (engine.model.model, engine.model.dtype) == ("some/model", "bfloat16")
    assert engine.model.check_weights
    assert not engine.kv.prefix_reuse
    assert engine.kv.kv_bytes == 3 << 29
    assert (engine.scheduler.max_running, engine.scheduler.admission) == (3, "aggressive")
    assert engine.experts.num_threads == 2
    assert (config.http.host, config.http.port) == ("::1", 0)
    assert config.http.api_key == "from the environment"
    assert config.http.allowed_hosts == ("a.example", "b")
    assert config.zmq.endpoint == "tcp://127.0.0.1:5555"
    assert config.zmq.curve_dir == Path("/keys")
    assert config.drain_s == 0.5


def test_every_setting_has_a_help_text() -> None:
    for cls in (*ENGINE_SETTINGS, HttpConfig, ZmqConfig):
        for field in dataclasses.fields(cls):
            assert field.metadata["help"], f"{cls.__name__}.{field.name}"


@pytest.mark.parametrize(
    ("text", "expected"),
    [("4096", 4096), ("6GiB", 6 << 30), ("512 MB", 512 * 10**6), ("1.5KiB", 1536), ("2g", None),
     ("-1", None), ("", None), ("GiB", None)],
)  # fmt: skip
def test_sizes(text: str, expected: int | None) -> None:
    if expected is None:
        with pytest.raises(argparse.ArgumentTypeError, match="write 6GiB"):
            parse_bytes(text)
    else:
        assert parse_bytes(text) == expected
