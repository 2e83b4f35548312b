"""The link and the engine's channel over a real socket, engines coming and going."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest
from zmq_support import EngineThread, private_directory, until

from moeserve.core import (
    EngineDelta,
    EngineRequest,
    ErrorCode,
    FinishReason,
    RequestError,
    SamplingParams,
)
from moeserve.gateway.zmq_link import ZmqEngineLink
from moeserve.messages import EngineStatus

Body = Callable[[ZmqEngineLink, EngineThread], Awaitable[None]]


def request(name: str, max_tokens: int = 10, **params: object) -> EngineRequest:
    return EngineRequest(
        request_id=name,
        token_ids=[1, 2, 3],
        params=SamplingParams(max_tokens=max_tokens, **params),  # type: ignore[arg-type]
    )


def run(body: Body, directory: Path) -> None:
    async def main() -> None:
        sockets = private_directory(directory / "sockets")
        endpoint = f"ipc://{sockets}/engine.sock"
        link = ZmqEngineLink(endpoint, heartbeat_s=0.1, max_silence_beats=10_000)
        await link.start()
        thread = EngineThread(link.endpoint)
        thread.start()
        try:
            await ready(link)
            await body(link, thread)
        finally:
            thread.stop()
            await link.stop()
            assert not list(sockets.iterdir())

    asyncio.run(asyncio.wait_for(main(), 200))


async def ready(link: ZmqEngineLink, other_than: str = "") -> EngineStatus:
    return await link.wait_for(lambda s: s.stage == "ready" and s.epoch != other_than)


async def collect(stream: object) -> list[EngineDelta]:
    return [delta async for delta in stream]  # type: ignore[attr-defined]


def test_a_reader_that_was_away_gets_one_delta(tmp_path: Path) -> None:
    async def body(link: ZmqEngineLink, thread: EngineThread) -> None:
        stream = link.submit(request("r", max_tokens=1000))
        await until(lambda: "r" not in link._streams)  # the last delta has arrived
        (delta,) = await collect(stream)
        assert delta.token_ids == [1, 2, 3] * 333 + [1]
        assert delta.finish_reason is FinishReason.LENGTH
        assert delta.timing is not None

    run(body, tmp_path)


def test_deltas_in_order_for_many_requests(tmp_path: Path) -> None:
    async def body(link: ZmqEngineLink, thread: EngineThread) -> None:
        streams = [link.submit(request(f"r{number}", number)) for number in range(1, 60)]
        answers = await asyncio.gather(*map(collect, streams))
        for number, deltas in enumerate(answers, start=1):
            tokens = [token for delta in deltas for token in delta.token_ids]
            assert tokens == ([1, 2, 3] * 20)[:number]
            assert [d.finish_reason for d in deltas[:-1]] == [None] * (len(deltas) - 1)

    run(body, tmp_path)


def test_abort_ends_the_stream_with_its_reason(tmp_path: Path) -> None:
    async def body(link: ZmqEngineLink, thread: EngineThread) -> None:
        stream = link.submit(request("r", max_tokens=90_000))
        link.abort("r", FinishReason.STOP)
        link.abort("unknown")
        deltas = await collect(stream)
        assert deltas[-1].finish_reason is FinishReason.STOP

    run(body, tmp_path)


def test_a_refusal_by_the_engine_is_the_last_delta(tmp_path: Path) -> None:
    async def body(link: ZmqEngineLink, thread: EngineThread) -> None:
        (delta,) = await collect(link.submit(request("r", max_tokens=200_000)))
        assert delta.finish_reason is FinishReason.ERROR
        assert delta.error_code is ErrorCode.CONTEXT_LENGTH

    run(body, tmp_path)


def test_an_idle_engine_checks_itself_once_and_sleeps(tmp_path: Path) -> None:
    async def body(link: ZmqEngineLink, thread: EngineThread) -> None:
        await collect(link.submit(request("r")))
        await until(lambda: thread.engine.integrity_checks >= 1)
        checks = thread.engine.integrity_checks
        await collect(link.submit(request("s", max_tokens=1)))
        # One check after the request; a loop that spins would have made thousands.
        await until(lambda: thread.engine.integrity_checks > checks)
        assert thread.engine.integrity_checks <= checks + 2

    run(body, tmp_path)


def assert_failed(deltas: list[EngineDelta]) -> None:
    assert deltas[-1].finish_reason is FinishReason.ERROR
    assert deltas[-1].error_code is ErrorCode.UNAVAILABLE


def test_a_new_engine_ends_the_streams_of_the_old_one(tmp_path: Path) -> None:
    async def body(link: ZmqEngineLink, thread: EngineThread) -> None:
        thread.engine.gate.clear()
        old = link.status
        stream = link.submit(request("r"))
        second = EngineThread(link.endpoint)
        second.start()
        try:
            await ready(link, other_than=old.epoch)
            assert_failed(await collect(stream))
            link._take_status(old)  # read late from the old pipe
            assert link.status.epoch != old.epoch
            deltas = await collect(link.submit(request("r", max_tokens=5)))
            assert deltas[-1].finish_reason is FinishReason.LENGTH
        finally:
            second.stop()

    run(body, tmp_path)


def test_a_stopping_engine_ends_its_streams(tmp_path: Path) -> None:
    async def body(link: ZmqEngineLink, thread: EngineThread) -> None:
        thread.engine.gate.clear()
        stream = link.submit(request("r"))
        thread.channel.set_stage("failed", "step 7 broke")
        deltas = await collect(stream)
        assert_failed(deltas)
        assert "step 7 broke" in str(deltas[-1].error)
        with pytest.raises(RequestError, match="step 7 broke") as caught:
            link.submit(request("s"))
        assert caught.value.code is ErrorCode.UNAVAILABLE

    run(body, tmp_path)


def test_silence_is_noticed(tmp_path: Path) -> None:
    async def body(link: ZmqEngineLink, thread: EngineThread) -> None:
        assert not link.silent.is_set()
        thread.channel._closing.set()  # the channel's thread ends, as if it hung
        thread.channel._wake()
        link.max_silence_beats = 8  # not before: a thread that waits for a core is not silent
        await asyncio.wait_for(link.silent.wait(), 120)
        link.mark_down("loading", "restarting")
        assert not link.silent.is_set()
        with pytest.raises(RequestError, match="restarting"):
            link.submit(request("r"))

    run(body, tmp_path)


def test_heartbeats_and_progress_go_on_during_a_long_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def body(link: ZmqEngineLink, thread: EngineThread) -> None:
        release, entered = threading.Event(), threading.Event()

        def long_step() -> list[EngineDelta]:
            entered.set()
            assert release.wait(120)
            return thread.engine.abort("r")

        monkeypatch.setattr(thread.engine, "step", long_step)
        stream = link.submit(request("r"))
        await until(entered.is_set)
        num_beats = 0

        def counted(status: EngineStatus) -> None:
            nonlocal num_beats
            num_beats += 1
            take_status(status)
            assert link._silent_beats == 0  # each beat begins the count anew

        take_status = link._take_status
        monkeypatch.setattr(link, "_take_status", counted)
        await until(lambda: num_beats > 10)
        thread.channel.set_stage("loading", "weights", 0.5)
        status = await link.wait_for(lambda s: s.stage == "loading")
        assert (status.detail, status.progress) == ("weights", 0.5)
        release.set()
        assert (await collect(stream))[-1].finish_reason is FinishReason.CANCELLED

    run(body, tmp_path)


def test_garbage_from_an_engine_is_survived(tmp_path: Path) -> None:
    from zmq_support import RawClient

    async def body(link: ZmqEngineLink, thread: EngineThread) -> None:
        async with RawClient(link.endpoint) as bad:
            epoch = link.status.epoch
            await bad.socket.send_multipart([b"x"])
            await bad.send("engine_status", epoch="forged", stage="ready")  # not its routing id
            deltas = await collect(link.submit(request("r", max_tokens=5)))
            assert deltas[-1].finish_reason is FinishReason.LENGTH
            assert link.status.epoch == epoch

    run(body, tmp_path)
