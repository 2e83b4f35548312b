"""Runs the body of a test against a whole ZeroMQ stack."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path

from zmq_support import RawClient, Stack, echoed, running_stack, text_of

from moeserve.config import ZmqConfig

Body = Callable[[Stack], Awaitable[None]]


def run(body: Body, directory: Path, config: ZmqConfig | None = None) -> None:
    async def main() -> None:
        async with running_stack(directory, config) as stack:
            await body(stack)

    asyncio.run(asyncio.wait_for(main(), 200))


async def still_serves(stack: Stack, client: RawClient, request_id: str = "after") -> None:
    await client.submit(request_id, "alive ", max_tokens=12)
    messages = await client.until_end(request_id)
    assert messages[-1]["type"] == "done"
    assert text_of(messages) == echoed("alive ", 12)
