"""Peers that read slowly, never, or have gone: credit, full queues, cancelled requests."""

from __future__ import annotations

import asyncio
import math
from pathlib import Path
from typing import Any

import pytest
from support.zmq_bodies import run, still_serves
from zmq_support import RawClient, Stack, echoed, text_of, until

from moeserve.config import ZmqConfig
from moeserve.gateway import zmq_front
from moeserve.gateway.zmq_send import Sent, try_send


def test_credit_holds_chunks_back_and_nothing_is_lost(tmp_path: Path) -> None:
    async def body(stack: Stack) -> None:
        async with RawClient(stack.endpoint) as client:
            await client.hello()
            stack.engine.steps_allowed = 1
            await client.submit("slow", "slow reader ", credit=2, max_tokens=500)
            messages = [await client.receive(), await client.receive()]
            stack.engine.steps_allowed = 1  # a chunk each, however slowly anybody runs
            messages.append(await client.receive())
            assert [m["type"] for m in messages] == ["accepted", "chunk", "chunk"]
            stack.engine.steps_allowed = math.inf
            await until(lambda: stack.service.num_running == 0)  # the engine is through with it
            assert await client.received_before_pong() == []
            await client.send("credit", request_id="slow", chunks=1)
            rest = await client.until_end("slow")
            assert [m["type"] for m in rest] == ["chunk", "done"]
            assert text_of(messages + rest) == echoed("slow reader ", 500)
            assert rest[-1]["usage"]["completion_tokens"] == 500
            await client.send("credit", request_id="slow", chunks=1)  # late: ignored
            await client.send("credit", request_id="slow", chunks=0)
            await still_serves(stack, client)

    run(body, tmp_path)


def lose_patience(stack: Stack) -> None:
    """Five beats from now on; before, those who begin slowly on a busy machine would be dropped."""
    stack.front._max_silent_beats = 5


def one_chunk_per_step(stack: Stack, monkeypatch: pytest.MonkeyPatch) -> list[Sent]:
    """Lets the engine step when a send was tried, until the queue was full once.

    Else a busy machine merges thousands of tokens into few chunks, which fill no queue. Returns
    the outcomes of the sends, as they come.
    """
    outcomes: list[Sent] = []

    def observed(*arguments: Any) -> Sent:
        outcomes.append(try_send(*arguments))
        stack.engine.steps_allowed = math.inf if Sent.FULL in outcomes else 1
        return outcomes[-1]

    monkeypatch.setattr(zmq_front, "try_send", observed)
    return outcomes


def test_a_full_queue_merges_chunks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Unlimited credit, but the client does not read: the server must not queue without bound."""
    monkeypatch.setattr(zmq_front, "SEND_QUEUE_MESSAGES", 4)

    async def body(stack: Stack) -> None:
        async with RawClient(stack.endpoint, rcvhwm=1, rcvbuf=4096) as client:
            await client.hello()
            outcomes = one_chunk_per_step(stack, monkeypatch)
            num_tokens = 20_000
            await client.submit("r", "does not read ", credit=1_000_000, max_tokens=num_tokens)
            await until(lambda: stack.service.num_running == 1)
            await until(lambda: stack.service.num_running == 0, timeout_s=150)
            messages = await client.until_end("r")
            chunks = [m for m in messages if m["type"] == "chunk"]
            assert Sent.FULL in outcomes
            assert len(chunks) < num_tokens // 2
            assert text_of(chunks) == echoed("does not read ", num_tokens)

    run(body, tmp_path, ZmqConfig(peer_timeout_s=100))


def test_a_client_that_never_reads_is_dropped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(zmq_front, "SEND_QUEUE_MESSAGES", 4)

    async def body(stack: Stack) -> None:
        async with RawClient(stack.endpoint, rcvhwm=1, rcvbuf=4096) as client:
            await client.hello()
            one_chunk_per_step(stack, monkeypatch)
            for number in range(8):
                await client.submit(f"r{number}", "x", credit=1_000_000, max_tokens=90_000)

            async def pretend_to_live() -> None:
                while True:
                    await client.send("pong")
                    await asyncio.sleep(0.02)

            alive = asyncio.create_task(pretend_to_live())
            await until(lambda: stack.service.num_running == 8)
            lose_patience(stack)
            await until(lambda: stack.front.num_sessions == 0, timeout_s=150)
            await until(lambda: not stack.engine.has_work)
            alive.cancel()

    run(body, tmp_path, ZmqConfig(heartbeat_s=0.1, peer_timeout_s=1000))


@pytest.mark.parametrize("how", ["disconnects", "falls silent"])
def test_requests_of_a_vanished_client_are_cancelled(tmp_path: Path, how: str) -> None:
    async def body(stack: Stack) -> None:
        client = RawClient(stack.endpoint)
        await client.hello()
        stack.engine.gate.clear()
        for number in range(3):
            await client.submit(f"r{number}", "never read", max_tokens=90_000)
        await until(lambda: stack.engine.scheduler.num_waiting == 3)
        if how == "disconnects":
            client.close()
        else:
            lose_patience(stack)
        await until(lambda: stack.front.num_sessions == 0)
        await until(lambda: not stack.engine.has_work and stack.service.num_running == 0)
        if how != "disconnects":
            client.close()

    run(body, tmp_path, ZmqConfig(heartbeat_s=0.05, peer_timeout_s=1000))
