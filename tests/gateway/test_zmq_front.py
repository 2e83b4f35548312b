"""The ZeroMQ front over real sockets, spoken to message by message."""

from __future__ import annotations

from pathlib import Path

import pytest
from support.zmq_bodies import run, still_serves
from zmq_support import RawClient, Stack, echoed, pass_time, text_of, until

from moeserve.config import ZmqConfig
from moeserve.gateway import lasting_task


def test_session_and_one_request(tmp_path: Path) -> None:
    async def body(stack: Stack) -> None:
        async with RawClient(stack.endpoint) as client:
            await client.send("ping", number=3)
            assert await client.receive() == {"type": "pong", "number": 3, "known": False}
            welcome = await client.hello()
            assert welcome["models"] == ["echo"]
            assert welcome["max_in_flight"] == 256
            await client.send("ping", number=4)
            assert await client.receive() == {"type": "pong", "number": 4, "known": True}
            await client.submit("r", "abc", max_tokens=7)
            accepted, *chunks, done = await client.until_end("r")
            assert accepted == {"type": "accepted", "request_id": "r", "prompt_tokens": 3}
            assert "".join(chunk["text"] for chunk in chunks) == "abcabca"
            assert chunks[-1]["finish_reason"] == "length"
            assert done["usage"] == {
                "prompt_tokens": 3,
                "completion_tokens": 7,
                "cached_tokens": 0,
            }
            timing = done["timing"]
            assert 0 <= timing["ttft_ms"] <= timing["total_ms"]

    run(body, tmp_path)


def test_several_answers_and_a_stop_string(tmp_path: Path) -> None:
    async def body(stack: Stack) -> None:
        async with RawClient(stack.endpoint) as client:
            await client.hello()
            await client.submit("r", "one two ", max_tokens=50, n=3, stop=["two one"])
            messages = await client.until_end("r")
            for index in range(3):
                mine = [m for m in messages if m.get("index") == index]
                assert text_of(mine) == "one "
                assert mine[-1]["finish_reason"] == "stop"
                assert mine[-1]["stop"] == "two one"

    run(body, tmp_path)


def test_token_ids_in_a_raw_frame(tmp_path: Path) -> None:
    async def body(stack: Stack) -> None:
        async with RawClient(stack.endpoint) as client:
            await client.hello()
            frame = b"\x41\0\0\0\x42\0\0\0"
            params = {"max_tokens": 3}
            await client.send("submit", frame, request_id="r", token_frame=True, params=params)
            messages = await client.until_end("r")
            chunks = [m for m in messages if m["type"] == "chunk"]
            assert [token for chunk in chunks for token in chunk["token_ids"]] == [65, 66, 65]

    run(body, tmp_path)


def test_cancel(tmp_path: Path) -> None:
    async def body(stack: Stack) -> None:
        async with RawClient(stack.endpoint) as client:
            await client.hello()
            await client.submit("r", "abc", credit=1, max_tokens=90_000, n=2)
            await until(lambda: stack.engine.has_work)
            await client.send("cancel", request_id="r")
            messages = await client.until_end("r")
            assert messages[-1]["type"] == "done"
            last = {m["index"]: m for m in messages if m["type"] == "chunk"}
            assert {m["finish_reason"] for m in last.values()} == {"cancelled"}
            assert set(last) == {0, 1}
            await until(lambda: not stack.engine.has_work)
            await client.send("cancel", request_id="r")  # too late, and of an unknown one: ignored
            await client.send("cancel", request_id="unknown")
            await still_serves(stack, client, "r")  # the id is free again

    run(body, tmp_path)


def test_deadline(tmp_path: Path) -> None:
    async def body(stack: Stack) -> None:
        stack.engine.gate.clear()  # it would never end by itself
        async with RawClient(stack.endpoint) as client:
            await client.hello()
            await client.send("submit", request_id="r", prompt="abc", deadline_ms=60_000)
            await until(lambda: stack.engine.has_work)
            pass_time(61)
            messages = await client.until_end("r")
            assert [m.get("finish_reason") for m in messages] == [None, "deadline", None]

    run(body, tmp_path)


def test_duplicate_ids_and_the_in_flight_limit(tmp_path: Path) -> None:
    async def body(stack: Stack) -> None:
        stack.engine.gate.clear()
        async with RawClient(stack.endpoint) as client, RawClient(stack.endpoint) as other:
            await client.hello()
            await other.hello()
            await client.submit("same", "mine ", max_tokens=10)
            await client.submit("same", "again ", max_tokens=10)
            await other.submit("same", "theirs ", max_tokens=10)  # another client: another request
            for number in range(3):
                await client.submit(f"r{number}", "more ", max_tokens=5)
            errors = [m for m in await client.received_before_pong() if m["type"] == "error"]
            assert [(e["request_id"], e["code"]) for e in errors] == [
                *[("same", "invalid_request"), ("r2", "overloaded")]
            ]
            stack.engine.gate.set()
            assert text_of(await client.until_end("same")) == echoed("mine ", 10)
            assert text_of(await other.until_end("same")) == echoed("theirs ", 10)

    run(body, tmp_path, ZmqConfig(max_in_flight=3, peer_timeout_s=1000))


def test_stop_tells_the_clients(tmp_path: Path) -> None:
    async def body(stack: Stack) -> None:
        stack.engine.gate.clear()
        async with RawClient(stack.endpoint) as client:
            await client.hello()
            await client.submit("r", "abc")
            assert (await client.receive())["type"] == "accepted"
            assert not await stack.front.drain(0.01)
            await stack.front.stop()
            error = await client.receive()
            assert (error["request_id"], error["code"]) == ("r", "engine_unavailable")
            await until(lambda: not stack.engine.has_work)

    run(body, tmp_path)


def test_a_defect_does_not_leave_the_front_deaf(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(lasting_task, "RESTART_S", 0.01)

    async def body(stack: Stack) -> None:
        async with RawClient(stack.endpoint) as client:
            await client.hello()
            with monkeypatch.context() as broken:
                broken.setattr(stack.front, "_take", None)
                await client.send("ping")
                await until(lambda: "starts again" in caplog.text)
            await still_serves(stack, client)

    run(body, tmp_path)
