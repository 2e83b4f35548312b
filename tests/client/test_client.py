"""Both clients against the real front; the engine behind it echoes prompts."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import threading
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path

import pytest
from zmq_support import Stack, echoed, pass_time, running_stack, until

from moeserve import client as client_package
from moeserve.client import (
    AsyncClient,
    Client,
    ClientError,
    ConnectionLost,
    ServerError,
    TimedOut,
    command,
    default_endpoint,
)
from moeserve.config import ZmqConfig
from moeserve.environment import Environment, read_environment
from moeserve.environment import default_endpoint as server_default_endpoint

Body = Callable[[Stack, AsyncClient], Awaitable[None]]


def run(body: Body, directory: Path, config: ZmqConfig | None = None, credit: int = 64) -> None:
    async def main() -> None:
        async with running_stack(directory, config) as stack:
            async with AsyncClient(stack.endpoint, credit=credit) as client:
                await body(stack, client)
            await until(lambda: not stack.engine.has_work)

    asyncio.run(asyncio.wait_for(main(), 200))


class BackgroundStack:
    """A stack on a thread of its own, for tests that block."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._ready = threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._main()))

    async def _main(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._stop = asyncio.Event()
        async with running_stack(self._directory) as self.stack:
            self._ready.set()
            await self._stop.wait()

    def __enter__(self) -> Stack:
        self._thread.start()
        assert self._ready.wait(120)
        return self.stack

    def __exit__(self, *_: object) -> None:
        self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join()


@pytest.fixture
def stack(tmp_path: Path) -> Iterator[Stack]:
    with BackgroundStack(tmp_path) as running:
        yield running


# -- AsyncClient ----------------------------------------------------------------------------------


def test_generate_and_stream(tmp_path: Path) -> None:
    async def body(stack: Stack, client: AsyncClient) -> None:
        result = await client.generate("hello ", max_tokens=8, n=2)
        assert [answer.text for answer in result.answers] == ["hello he"] * 2
        assert result.finish_reason == "length"
        assert (result.usage.prompt_tokens, result.usage.completion_tokens) == (6, 16)
        async with client.stream("abc", max_tokens=6) as stream:
            chunks = [chunk async for chunk in stream]
        assert "".join(chunk.text for chunk in chunks) == "abcabc"
        assert stream.prompt_tokens == 3
        assert stream.usage is not None
        assert stream.usage.completion_tokens == 6
        ids = [token for chunk in chunks for token in chunk.token_ids]
        again = await client.generate(token_ids=ids[:3], max_tokens=6)
        assert list(again.token_ids) == ids
        assert await client.ping() > 0
        assert (await client.server_info()).models == ("echo",)

    run(body, tmp_path)


@pytest.mark.parametrize("credit", [1, 2, 64])
def test_many_requests_at_once_keep_apart(tmp_path: Path, credit: int) -> None:
    async def body(stack: Stack, client: AsyncClient) -> None:
        prompts = [f"canary {number} " for number in range(40)]
        results = await asyncio.gather(*(client.generate(p, max_tokens=60) for p in prompts))
        assert [r.text for r in results] == [echoed(p, 60) for p in prompts]

    run(body, tmp_path, credit=credit)


def test_a_slow_reader_gets_everything(tmp_path: Path) -> None:
    async def body(stack: Stack, client: AsyncClient) -> None:
        async with client.stream("slow ", max_tokens=3000) as stream:
            texts = [(await anext(stream)).text]
            # All is generated and has come to the server; one chunk is read.
            await until(lambda: stack.service.num_running == 0)
            texts += [chunk.text async for chunk in stream]
        assert "".join(texts) == echoed("slow ", 3000)
        assert len(texts) <= 2 + 4  # credit 4, given back in twos

    run(body, tmp_path, credit=4)


def test_errors_carry_code_field_and_hint(tmp_path: Path) -> None:
    async def body(stack: Stack, client: AsyncClient) -> None:
        with pytest.raises(ServerError) as caught:
            await client.generate("a", temprature=1)
        error = caught.value
        assert (error.code, error.field) == ("invalid_request", "temprature")
        assert error.hint is not None
        assert "temperature" in error.hint
        with pytest.raises(ServerError, match="exactly one"):
            await client.generate()
        with pytest.raises(ClientError, match="token_ids"):
            await client.generate(token_ids=[2**40])
        with pytest.raises(ClientError, match=r"token_ids=.*messages="):
            await client.generate([1, 2])  # type: ignore[arg-type]
        with pytest.raises(ClientError, match="cannot be sent"):
            await client.generate("a", stop=object())
        with pytest.raises(ClientError, match=r"U\+DCFF at character 1, half.*must be UTF-8"):
            await client.generate("a\udcff")
        with pytest.raises(ClientError, match="server takes 20000") as caught_size:
            await client.generate("a" * 30_000)
        assert caught_size.value.code == "request_too_large"
        assert (await client.generate("fine", max_tokens=4)).text == "fine"

    run(body, tmp_path, ZmqConfig(max_message_bytes=20_000))


def test_cancel_timeout_and_deadline(tmp_path: Path) -> None:
    async def body(stack: Stack, client: AsyncClient) -> None:
        stream = client.stream("abc", max_tokens=90_000)
        first = await anext(stream)
        await stream.cancel()
        chunks = [first] + [chunk async for chunk in stream]
        assert chunks[-1].finish_reason == "cancelled"
        assert stream.usage is not None

        async with client.stream("abc", max_tokens=90_000) as left:
            await anext(left)
        assert [chunk async for chunk in left] == []
        await until(lambda: not stack.engine.has_work)

        stack.engine.gate.clear()
        late = asyncio.create_task(client.generate("abc", deadline_s=60))
        await until(lambda: stack.engine.has_work)
        pass_time(61)
        result = await late
        assert (result.finish_reason, result.text) == ("deadline", "")
        with pytest.raises(TimedOut):
            await client.generate("abc", timeout_s=0.05)

    run(body, tmp_path)


def test_no_server(tmp_path: Path) -> None:
    async def main() -> None:
        endpoint = f"ipc://{tmp_path}/nobody.sock"
        async with AsyncClient(endpoint, connect_timeout_s=0.1) as client:
            with pytest.raises(TimedOut, match="moeserve serve"):
                await client.generate("a")
            with pytest.raises(TimedOut):
                await client.generate("a", timeout_s=0.01)
        with pytest.raises(ClientError, match="closed"):
            await client.generate("a")
        async with AsyncClient("http://localhost") as client:
            with pytest.raises(ClientError, match="expected ipc"):
                await client.generate("a")

    asyncio.run(asyncio.wait_for(main(), 200))


def test_reconnects_to_a_new_server(tmp_path: Path) -> None:
    async def main() -> None:
        async with running_stack(tmp_path) as first:
            endpoint = first.endpoint
            client = AsyncClient(endpoint)
            first.engine.gate.clear()
            running = asyncio.create_task(client.generate("abc"))
            await until(lambda: first.engine.has_work)
        with pytest.raises((ServerError, ConnectionLost)) as caught:
            await running
        assert caught.value.code == "engine_unavailable"
        async with running_stack(tmp_path, endpoint=endpoint):
            assert (await client.generate("new ", max_tokens=4)).text == "new "
            await client.close()

    asyncio.run(asyncio.wait_for(main(), 200))


def test_a_server_that_lost_the_session_ends_the_requests(tmp_path: Path) -> None:
    async def body(stack: Stack, client: AsyncClient) -> None:
        stack.engine.gate.clear()
        running = asyncio.create_task(client.generate("abc"))
        await until(lambda: stack.engine.has_work)
        (session,) = stack.front._sessions.values()
        stack.front._drop(session, "the test says so")
        with pytest.raises(ConnectionLost):
            await running
        stack.engine.gate.set()
        assert (await client.generate("new ", max_tokens=4)).text == "new "

    run(body, tmp_path, ZmqConfig(heartbeat_s=0.05, peer_timeout_s=100))


def test_a_silent_server_is_noticed(tmp_path: Path) -> None:
    async def body(stack: Stack, client: AsyncClient) -> None:
        stack.engine.gate.clear()
        running = asyncio.create_task(client.generate("abc"))
        await until(lambda: stack.engine.has_work)
        for task in stack.front._tasks:  # neither reads nor beats any more, the socket stays open
            await task.stop()
        with pytest.raises(ConnectionLost, match="silent"):
            await running
        stack.engine.gate.set()  # nobody is left to hear of the cancel

    # Twenty beats: threads of ZeroMQ that have to wait for a core are not silent for so long.
    run(body, tmp_path, ZmqConfig(heartbeat_s=0.05, peer_timeout_s=1))


# -- Client ---------------------------------------------------------------------------------------


def test_sync_client_from_many_threads(stack: Stack) -> None:
    results: dict[int, str] = {}
    with Client(stack.endpoint) as client:

        def ask(number: int) -> None:
            with client.stream(f"thread {number} ", max_tokens=200) as stream:
                results[number] = "".join(chunk.text for chunk in stream)

        threads = [threading.Thread(target=ask, args=(number,)) for number in range(12)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert client.ping() > 0
        assert client.server_info().models == ("echo",)
        assert client.generate("abc", max_tokens=4).text == "abca"
        with pytest.raises(ServerError):
            client.generate("abc", temperature=-1)
    assert results == {n: echoed(f"thread {n} ", 200) for n in range(12)}
    with pytest.raises(ClientError, match="closed"):
        client.generate("a")
    client.close()  # a second time: nothing


def test_sync_stream_closed_early_is_cancelled(stack: Stack) -> None:
    with Client(stack.endpoint) as client:
        stream = client.stream("abc", max_tokens=90_000)
        next(stream)
        stream.close()
        assert list(stream) == []
        other = client.stream("abc", max_tokens=90_000)
        next(other)
        other.cancel()
        assert [chunk.finish_reason for chunk in other][-1] == "cancelled"
        client.generate("abc", max_tokens=2)
        kept = client.stream("abc", max_tokens=90_000)
        next(kept)
    kept.close()
    asyncio.run(until(lambda: not stack.engine.has_work))


@pytest.mark.parametrize("style", ["sync", "async"])
def test_a_program_that_forgets_to_close_ends(stack: Stack, style: str) -> None:
    sync = """
from moeserve.client import Client
client = Client({0!r})
print(next(client.stream("ab", max_tokens=90000)).text[:1])
"""
    coroutine = """
import asyncio
from moeserve.client import AsyncClient
async def main():
    client = AsyncClient({0!r})
    print((await anext(client.stream("ab", max_tokens=90000))).text[:1])
asyncio.run(main())
"""
    code = (sync if style == "sync" else coroutine).format(stack.endpoint)
    done = subprocess.run([sys.executable, "-c", code], timeout=240, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "a\n"), done.stderr


def test_request_command(stack: Stack, capsys: pytest.CaptureFixture[str]) -> None:
    import argparse

    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    args = ["abc ", "--zmq", stack.endpoint, "-n", "8"]
    assert command.run(parser.parse_args(args)) == 0
    shown = capsys.readouterr()
    assert shown.out == "abc abc \n"
    assert "8 tokens" in shown.err
    assert "tok/s" in shown.err
    assert command.run(parser.parse_args([*args, "--temperature", "-1"])) == 2
    assert "temperature" in capsys.readouterr().err


# -- the package ----------------------------------------------------------------------------------


def test_needs_nothing_but_pyzmq_and_msgpack() -> None:
    code = "import sys, moeserve.client; print(sorted({m.split('.')[0] for m in sys.modules}))"
    loaded = subprocess.run(
        [sys.executable, "-c", code], check=True, capture_output=True, text=True
    ).stdout
    assert "'msgpack'" in loaded
    assert "'zmq'" in loaded
    for other in ("torch", "msgspec", "numpy", "tokenizers", "fastapi"):
        assert f"'{other}'" not in loaded
    assert set(client_package.__all__) <= set(dir(client_package))


@pytest.mark.parametrize("variables", [{}, {"XDG_RUNTIME_DIR": "/run/user/7"}])
def test_looks_where_the_server_binds(
    variables: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("XDG_RUNTIME_DIR", raising=False)
    monkeypatch.delenv("MOESERVE_ENDPOINT", raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    environment: Environment = read_environment()
    assert default_endpoint() == server_default_endpoint(environment)
    assert default_endpoint({**os.environ, "MOESERVE_ENDPOINT": "tcp://h:1"}) == "tcp://h:1"
