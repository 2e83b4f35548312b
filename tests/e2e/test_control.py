"""A running server with experts on disk: looked at, and changed while it generates."""

from __future__ import annotations

import array
import asyncio
import json
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families
from server_process import Server, running_server
from zmq_support import RawClient

from moeserve.client import AsyncClient, Client, Result, ServerError
from moeserve.client.control import Control, Reply
from moeserve.config import BUNDLED_MODEL, ModelConfig
from moeserve.models.pack import pack_model

SLOTS = 30
PROMPT = "Once upon a time"
MIB = 1 << 20


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    packed = tmp_path_factory.mktemp("packed") / "tiny"
    path = pack_model(ModelConfig(model=str(BUNDLED_MODEL), quantize="int4"), packed).path
    flags = ("--host-slots", str(SLOTS), "--num-blocks", "64", "--num-threads", "1")
    with running_server(*flags, "--predictor", "markov", model=path) as server:
        yield server


@pytest.fixture
def client(server: Server) -> Iterator[Client]:
    with Client(server.zmq) as client:
        yield client


def ctl(server: Server, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "moeserve.cli", "ctl", *arguments, "--zmq", server.zmq]
    return subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)


def settings(num_tokens: int) -> dict[str, Any]:
    return {"max_tokens": num_tokens, "temperature": 0, "ignore_eos": True}


def test_less_than_two_experts_is_refused_and_changes_nothing(client: Client) -> None:
    control = Control(client)
    slots = control.stats()["engine"]["experts"]["caches"][0]["num_slots"]
    with pytest.raises(ServerError, match=r"2 experts .*: at least \d+") as refused:
        control.resize_cache(1 * MIB)
    assert refused.value.field == "host_memory_bytes"
    assert refused.value.code == "invalid_request"
    for wrong in (0, -1):
        with pytest.raises(ServerError, match="host_memory"):
            control.resize_cache(wrong)
    assert control.stats()["engine"]["experts"]["caches"][0]["num_slots"] == slots


def test_statistics_are_those_of_metrics(server: Server, client: Client) -> None:
    client.generate(PROMPT, **settings(20))
    stats = json.loads(ctl(server, "stats", "--json").stdout)
    experts = stats["engine"]["experts"]
    [cache], [link] = experts["caches"], experts["links"]
    steps = stats["engine"]["num_steps"]
    assert len(cache["hits"]) == len(experts["layers"])
    for hits, late, misses in zip(cache["hits"], cache["late"], cache["misses"], strict=True):
        assert hits + late + misses >= 4 * steps  # four experts per token, one token at least
    assert sum(link["demand_bytes"]) > 0
    assert sum(link["stall_s"]) > 0
    assert min(experts["cpu_busy_s"]) > 0
    num_begun = sum(cache["prefetches_begun"])
    assert sum(cache["prefetches_useful"]) + sum(cache["prefetches_wasted"]) <= num_begun
    found: dict[tuple[str, str], float] = {}

    def caught_up() -> bool:  # metrics come with the heartbeat
        for family in text_string_to_metric_families(
            httpx.get(f"{server.http}/metrics", timeout=120).text
        ):
            for sample in family.samples:
                if "layer" in sample.labels:
                    found[(sample.name, sample.labels["layer"])] = sample.value
        return found.get(("moeserve_expert_cache_hits_total", "0")) == cache["hits"][0]

    while not caught_up():
        assert server.process.poll() is None
    for place, layer in enumerate(experts["layers"]):
        misses = found[("moeserve_expert_cache_misses_total", str(layer))]
        assert misses == cache["misses"][place]
    text = ctl(server, "stats").stdout
    assert f"{cache['num_used']} of {cache['num_slots']} slots used" in text


async def record_while_it_answers(
    endpoint: str, kind: str, num_steps: int, num_tokens: int
) -> tuple[Reply, Result]:
    """A recording that begins before an answer of so many tokens."""
    async with AsyncClient(endpoint) as client:
        recording = asyncio.create_task(client.control(kind, num_steps=num_steps))
        await client.control("get_stats")  # taken after it: messages keep their order
        answer = await client.generate(PROMPT, **settings(num_tokens))
        return await recording, answer


def test_a_timeline_shows_every_part_of_a_step(server: Server) -> None:
    num_steps = 6
    reply, _ = asyncio.run(record_while_it_answers(server.zmq, "record_timeline", num_steps, 9))
    assert reply.header["num_steps"] == num_steps
    content = json.loads(reply.raw[0])
    spans = [event for event in content["traceEvents"] if event["ph"] == "X"]
    named = {name: [e for e in spans if e["name"] == name] for name in {e["name"] for e in spans}}
    assert len(named["step"]) == num_steps
    layers = set(range(6))
    for name in ("attention", "router", "place", "acquire", "predict and prefetch", "feed forward"):
        assert {e["args"]["layer"] for e in named[name]} == layers, name
        assert len(named[name]) == num_steps * len(layers)
    assert len(named["head and sampler"]) == num_steps
    assert {e["args"]["layer"] for e in named["experts"]} == layers
    assert {e["cat"] for e in named["read"]} <= {"demand", "prefetch"}
    threads = {
        e["tid"]: e["args"]["name"] for e in content["traceEvents"] if e["name"] == "thread_name"
    }
    assert all(threads[e["tid"]].startswith("expert-transfer-") for e in named["read"])
    check_nesting(spans)
    begun = {step["ts"]: step["ts"] + step["dur"] for step in named["step"]}
    for part in named["feed forward"]:
        ends = [end for start, end in begun.items() if start <= part["ts"]]
        assert part["ts"] + part["dur"] <= max(ends) + 0.01


def check_nesting(spans: list[dict[str, Any]]) -> None:
    """Spans of one track lie inside each other or beside, which Perfetto wants; times are rounded
    to nanoseconds."""
    tracks: dict[int, list[dict[str, Any]]] = {}
    for span in spans:
        tracks.setdefault(span["tid"], []).append(span)
    for track in tracks.values():
        open_ends: list[float] = []
        for span in sorted(track, key=lambda s: (s["ts"], -s["dur"])):
            while open_ends and open_ends[-1] <= span["ts"] + 0.0015:
                open_ends.pop()
            end = span["ts"] + span["dur"]
            assert not open_ends or end <= open_ends[-1] + 0.0015, span
            open_ends.append(end)


def test_use_of_experts_is_counted_by_rows(server: Server) -> None:
    num_tokens = 7
    reply, answer = asyncio.run(
        record_while_it_answers(server.zmq, "record_expert_use", num_tokens, num_tokens)
    )
    counts = array.array("q", reply.raw[0])
    assert reply.header["layers"] == list(range(6))
    assert reply.header["num_experts"] == [16] * 6
    # The prompt may have been reused in part; the last token is chosen and not run.
    rows = answer.usage.prompt_tokens - answer.usage.cached_tokens + num_tokens - 1
    for layer in range(6):
        assert sum(counts[16 * layer : 16 * (layer + 1)]) == 4 * rows


def test_a_cancelled_recording_answers_with_what_there_is(server: Server) -> None:
    async def run() -> tuple[dict[str, Any], dict[str, Any]]:
        async with RawClient(server.zmq) as client:
            await client.hello()
            await client.send("record_timeline", request_id="t", num_steps=1000)
            await client.send("record_timeline", request_id="u", num_steps=1)
            refused = await client.receive()
            await client.submit("r", "a", max_tokens=3, ignore_eos=True)
            await client.until_end("r")
            await client.send("cancel", request_id="t")
            return refused, await client.receive()

    refused, reply = asyncio.run(run())
    assert (refused["request_id"], refused["code"]) == ("u", "overloaded")
    assert (reply["type"], reply["request_id"], reply["num_steps"]) == ("timeline", "t", 3)


def test_a_client_that_goes_away_leaves_no_recording(server: Server) -> None:
    async def run() -> Reply:
        async with RawClient(server.zmq) as client:
            await client.hello()
            await client.send("record_timeline", request_id="t", num_steps=1000)
            await client.received_before_pong()
        async with AsyncClient(server.zmq) as client:
            while True:
                recording = asyncio.create_task(client.control("record_timeline", num_steps=1))
                while not recording.done():  # a generation may be over before the recording begins
                    await client.generate(PROMPT, **settings(1))
                [outcome] = await asyncio.gather(recording, return_exceptions=True)
                if isinstance(outcome, Reply):
                    return outcome
                assert isinstance(outcome, ServerError), outcome
                assert outcome.code == "overloaded"  # until the server has noticed

    assert asyncio.run(run()).header["num_steps"] == 1


def test_resizing_while_it_generates_changes_no_token(client: Client) -> None:
    """Kv of a long prompt has most of the memory, experts the rest. From here on the server has a
    budget instead of a number of slots."""
    control = Control(client)
    prompt = " ".join([PROMPT] * 140)
    expected = client.generate(prompt, **settings(80))
    assert expected.usage.prompt_tokens > 500
    before = control.stats()["engine"]["experts"]["caches"][0]
    fixed = control.resize_cache(64 * MIB)
    assert fixed.slots_before == before["num_slots"]
    assert fixed.slots == fixed.num_experts, "64 MiB hold all of the bundled model"
    assert fixed.kv_bytes == fixed.kv_limit_bytes, "and all of the kv"
    other_bytes = fixed.weights_bytes + fixed.kv_limit_bytes
    tokens: list[int] = []
    sizes = [2, 50, 3, fixed.num_experts, 17]
    found: list[int] = []
    with client.stream(prompt, **settings(80)) as stream:
        for number, chunk in enumerate(stream):
            tokens += chunk.token_ids
            if number % 5 == 0:
                slots = sizes[number // 5 % len(sizes)]
                done = control.resize_cache(other_bytes + slots * fixed.slot_bytes)
                left_bytes = done.host_memory_bytes - done.weights_bytes - done.kv_bytes
                assert left_bytes >= slots * done.slot_bytes, "all kv would leave room for so many"
                assert done.slots == min(left_bytes // done.slot_bytes, done.num_experts)
                found.append(done.slots)
    assert tuple(tokens) == expected.token_ids
    assert min(found) < fixed.num_experts
    division = control.stats()["engine"]["memory"]
    parts = ("weights_bytes", "kv_bytes", "experts_bytes")
    assert sum(division[part] for part in parts) <= division["budget_bytes"]


@contextmanager
def steps_go_on(server: Server) -> Iterator[None]:
    """Somebody generates until the context is left, however long that takes."""

    def generate() -> None:
        with Client(server.zmq) as client:
            while not over.is_set():
                client.generate(PROMPT, **settings(50))

    over = threading.Event()
    thread = threading.Thread(target=generate)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def test_the_commands(server: Server, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    picture, timeline = tmp_path / "use.png", tmp_path / "steps.json"
    with steps_go_on(server):
        done = ctl(server, "heatmap", "-o", str(picture), "--steps", "3")
        assert done.returncode == 0, done.stderr
        done = ctl(server, "timeline", "-o", str(timeline), "--steps", "2")
        assert done.returncode == 0, done.stderr
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert json.loads(timeline.read_text())["traceEvents"]
    done = ctl(server, "cache", "--host-memory", "64MiB")
    assert "96 of 96 experts have room in memory" in done.stdout
    assert "memory: of 64.0 MiB" in ctl(server, "stats").stdout.replace(",", "")
    end_s = time.monotonic() + 120  # it comes with a heartbeat, although nobody generates
    limit = 'moeserve_host_memory_bytes{part="kv_limit"}'
    while limit not in httpx.get(f"{server.http}/metrics", timeout=120).text:
        assert time.monotonic() < end_s
        time.sleep(0.05)
    refused = ctl(server, "cache", "--host-memory", "1MiB")
    assert refused.returncode == 2
    assert "2 experts" in refused.stderr
    for action in ("heatmap", "timeline"):
        refused = ctl(server, action, "-o", str(tmp_path / "no" / "x.png"))
        assert refused.returncode == 2
        assert "no directory" in refused.stderr


def test_without_a_server(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "moeserve.cli", "ctl", "stats", "--connect-timeout", "0.2"]
    nowhere = ["--zmq", f"ipc://{tmp_path / 'nobody.sock'}"]
    done = subprocess.run([*command, *nowhere], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "moeserve serve" in done.stderr
