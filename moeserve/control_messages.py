"""Wire messages that look at a running server and change it, from the client to the engine.

docs/protocol.md describes those of the client wire. Between gateway and engine they travel inside
EngineControl and EngineAnswer.
"""

from __future__ import annotations

from typing import Final, TypeAlias

from moeserve.core import EngineStats
from moeserve.messages import Error, Message

MAX_TIMELINE_STEPS: Final = 1000
MAX_USE_STEPS: Final = 1_000_000

# -- client → gateway → engine --------------------------------------------------------------------


class GetStats(Message, frozen=True, kw_only=True, tag="get_stats"):
    """Answered by Stats."""

    request_id: str


class ResizeCache(
    Message, frozen=True, kw_only=True, tag="resize_cache", forbid_unknown_fields=True
):
    """Answered by CacheResized when it is done."""

    request_id: str
    host_memory_bytes: int


class RecordExpertUse(
    Message, frozen=True, kw_only=True, tag="record_expert_use", forbid_unknown_fields=True
):
    """Answered by ExpertUse after so many steps, or with what there is when it is cancelled."""

    request_id: str
    num_steps: int = 100


class RecordTimeline(
    Message, frozen=True, kw_only=True, tag="record_timeline", forbid_unknown_fields=True
):
    """Answered by TimelineRecorded, as RecordExpertUse."""

    request_id: str
    num_steps: int = 20


# -- engine → gateway → client --------------------------------------------------------------------


class Stats(Message, frozen=True, kw_only=True, tag="stats"):
    """engine: as of now. uptime_s: of the engine process."""

    request_id: str
    model: str
    uptime_s: float
    notes: dict[str, str]
    engine: EngineStats


class ExpertUse(Message, frozen=True, kw_only=True, tag="expert_use"):
    """Frame 2: how many rows chose each expert, int64 little-endian, layer by layer."""

    request_id: str
    num_steps: int
    layers: list[int]
    num_experts: list[int]


class CacheResized(Message, frozen=True, kw_only=True, tag="cache_resized"):
    """What the budget is made of: weights that every token needs, kv, slots of experts.

    kv_bytes: what kv has now. kv_limit_bytes: what it may take, from experts, when it needs it.
    slots_owed: still in use; given up as soon as they are not.
    """

    request_id: str
    host_memory_bytes: int
    weights_bytes: int
    kv_bytes: int
    kv_limit_bytes: int
    slot_bytes: int
    slots_before: int
    slots: int
    slots_owed: int
    num_experts: int


class TimelineRecorded(Message, frozen=True, kw_only=True, tag="timeline"):
    """Frame 2: the Trace Event Format's JSON."""

    request_id: str
    num_steps: int


ControlRequest: TypeAlias = GetStats | ResizeCache | RecordExpertUse | RecordTimeline
ControlReply: TypeAlias = Stats | ExpertUse | CacheResized | TimelineRecorded | Error


# -- gateway ↔ engine -----------------------------------------------------------------------------


class EngineControl(Message, frozen=True, kw_only=True, tag="engine_control"):
    """number: the gateway's own, for the answer."""

    number: int
    request: ControlRequest


class EngineControlEnd(Message, frozen=True, kw_only=True, tag="engine_control_end"):
    """Whatever this request is still at, it shall answer now."""

    number: int


class EngineAnswer(Message, frozen=True, kw_only=True, tag="engine_answer"):
    """The reply's raw frames are those of this message."""

    epoch: str
    number: int
    reply: ControlReply
