"""Control requests at the ZeroMQ front: who may send them, and what ends them."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
from zmq_support import RawClient, private_directory, running_stack, until

from moeserve.client import AsyncClient, ServerError
from moeserve.config import ZmqConfig
from moeserve.gateway.curve import write_keys


def test_statistics_over_ipc(tmp_path: Path) -> None:
    async def run() -> None:
        async with running_stack(tmp_path) as stack, AsyncClient(stack.endpoint) as client:
            await client.generate("abc", max_tokens=4)
            header, raw = await client.control("get_stats")
            assert header["model"] == "echo"
            assert header["engine"]["generated_tokens"] == 4
            assert header["engine"]["experts"] is None
            assert raw == []

    asyncio.run(run())


@pytest.mark.parametrize(
    ("kind", "fields"),
    [
        ("get_stats", {}),
        ("resize_cache", {"host_memory_bytes": 1}),
        ("record_expert_use", {"num_steps": 1}),
        ("record_timeline", {"num_steps": 1}),
    ],
)
def test_not_over_tcp_without_keys(kind: str, fields: dict[str, int], tmp_path: Path) -> None:
    async def run() -> None:
        async with (
            running_stack(tmp_path, endpoint="tcp://127.0.0.1:*") as stack,
            RawClient(stack.endpoint) as client,
        ):
            await client.send(kind, request_id="c", **fields)
            stranger = await client.receive()
            assert (stranger["code"], stranger["request_id"]) == ("protocol_error", "c")
            await client.hello()
            await client.send(kind, request_id="c", **fields)
            refused = await client.receive()
            assert (refused["code"], refused["request_id"]) == ("unauthorized", "c")
            assert "--curve-dir" in refused["hint"]

    asyncio.run(run())


def test_over_tcp_with_keys(tmp_path: Path) -> None:
    keys = private_directory(tmp_path / "keys")
    write_keys(keys)

    async def run() -> None:
        config = ZmqConfig(curve_dir=keys)
        async with (
            running_stack(tmp_path, config, "tcp://127.0.0.1:*") as stack,
            AsyncClient(stack.endpoint, curve_dir=keys) as client,
        ):
            header, _ = await client.control("get_stats")
            assert header["model"] == "echo"

    asyncio.run(run())


def test_bad_fields_are_refused_by_name(tmp_path: Path) -> None:
    async def run() -> None:
        async with running_stack(tmp_path) as stack, RawClient(stack.endpoint) as client:
            await client.hello()
            for kind, fields, word in (
                ("resize_cache", {"host_memory_bytes": "6GiB"}, "host_memory_bytes"),
                ("resize_cache", {}, "host_memory_bytes"),
                ("resize_cache", {"host_memory_bytes": 1, "slots": 3}, "slots"),
                ("record_timeline", {"num_steps": 0}, "num_steps"),
                ("record_timeline", {"num_steps": 1001}, "1 to 1000"),
                ("record_expert_use", {"num_steps": 1.5}, "num_steps"),
            ):
                await client.send(kind, request_id="c", **fields)
                refused = await client.receive()
                assert refused["type"] == "error", refused
                assert refused["request_id"] == "c"
                assert word in refused["message"]
            await client.send("get_stats", request_id="")
            assert (await client.receive())["field"] == "request_id"

    asyncio.run(run())


def test_an_engine_that_goes_ends_it(tmp_path: Path) -> None:
    async def run() -> None:
        async with running_stack(tmp_path) as stack, AsyncClient(stack.endpoint) as client:
            stack.engine.gate.clear()
            await client.server_info()
            async with client.stream("abc", max_tokens=4) as stream:
                reading = asyncio.create_task(stream.next_or_none())
                await until(lambda: stack.engine.has_work)
                call = asyncio.create_task(client.control("get_stats"))
                await call  # between two steps, though none is done
                stack.link.mark_down("failed", "it is gone")
                with pytest.raises(ServerError, match="gone"):
                    await reading
            with pytest.raises(ServerError, match="not ready") as refused:
                await client.control("get_stats")
            assert refused.value.code == "engine_unavailable"

    asyncio.run(run())
