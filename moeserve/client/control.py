"""Looking at a running server and changing it; what `moeserve ctl` is made of."""

from __future__ import annotations

import array
import asyncio
import sys
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

from moeserve.client import wire
from moeserve.client.types import ClientError, ServerError


class Reply(NamedTuple):
    header: wire.Header
    raw: list[bytes]


class ControlCall:
    """One control request that waits for its answer, in one event loop."""

    def __init__(self, request_id: str) -> None:
        self.request_id = request_id
        self.answer: asyncio.Future[Reply] = asyncio.get_running_loop().create_future()

    def take(self, header: wire.Header, raw: list[bytes]) -> None:
        if header["type"] == "error":
            self.fail(
                ServerError(
                    header["message"],
                    code=header["code"],
                    field=header.get("field"),
                    hint=header.get("hint"),
                )
            )
        elif not self.answer.done():
            self.answer.set_result(Reply(header, raw))

    def fail(self, error: ClientError) -> None:
        if not self.answer.done():
            self.answer.set_exception(error)


class CanControl(Protocol):
    """A Client."""

    def control(self, kind: str, **fields: Any) -> Reply: ...


@dataclass(frozen=True)
class CacheResized:
    """What the budget of the host's memory is made of now.

    weights_bytes: weights that every token needs. kv_bytes: what kv has now; it takes up to
    kv_limit_bytes, from experts, when it needs them. slots: experts that have room in the rest.
    slots_owed: slots still in use beyond that; they are given up when they are not.
    """

    host_memory_bytes: int
    weights_bytes: int
    kv_bytes: int
    kv_limit_bytes: int
    slot_bytes: int
    slots_before: int
    slots: int
    slots_owed: int
    num_experts: int


@dataclass(frozen=True)
class ExpertUse:
    """counts: rows that chose each expert, by MoE layer (its index in the model)."""

    num_steps: int
    counts: dict[int, list[int]]


class Control:
    """The control requests, over a Client. Each raises ServerError where it is refused."""

    def __init__(self, client: CanControl) -> None:
        self._client = client

    def stats(self) -> dict[str, Any]:
        """The fields of `stats` in docs/protocol.md."""
        header = self._client.control("get_stats").header
        return {name: header[name] for name in ("model", "uptime_s", "notes", "engine")}

    def resize_cache(self, host_memory_bytes: int) -> CacheResized:
        """Changes the memory for weights, kv and experts together."""
        header = self._client.control("resize_cache", host_memory_bytes=host_memory_bytes).header
        return CacheResized(**{name: header[name] for name in CacheResized.__dataclass_fields__})

    def expert_use(self, num_steps: int) -> ExpertUse:
        """Which experts the next steps choose; waits for them."""
        header, raw = self._client.control("record_expert_use", num_steps=num_steps)
        counts = array.array("q", raw[0])
        if sys.byteorder == "big":
            counts.byteswap()
        by_layer, start = {}, 0
        for layer, size in zip(header["layers"], header["num_experts"], strict=True):
            by_layer[layer] = counts[start : start + size].tolist()
            start += size
        return ExpertUse(header["num_steps"], by_layer)

    def timeline(self, num_steps: int) -> bytes:
        """What the next steps do, as JSON for Perfetto; waits for them."""
        return self._client.control("record_timeline", num_steps=num_steps).raw[0]
