"""How messages between an engine and its expert workers are framed."""

from __future__ import annotations

from typing import Final

from moeserve.framing import Wire
from moeserve.worker_messages import FromWorker, ToWorker

WORKER_VERSION: Final = b"MOESERVE-WORKER/1"
#: a job's rows and results are cut into pieces that fit well below
WORKER_MAX_BYTES: Final = 256 << 20


def worker_side_wire() -> Wire:
    return Wire(WORKER_VERSION, ToWorker, WORKER_MAX_BYTES)


def engine_side_wire() -> Wire:
    return Wire(WORKER_VERSION, FromWorker, WORKER_MAX_BYTES)
