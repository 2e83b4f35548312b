"""What the supervisors of child processes share."""

from __future__ import annotations

import asyncio
import signal
import sys
import time
from collections import deque
from collections.abc import Awaitable, Mapping
from types import MappingProxyType

RESTART_WINDOW_S = 600.0
MAX_BACKOFF_S = 30.0

#: what usually stands behind a signal
SIGNAL_HINTS: Mapping[str, str] = MappingProxyType(
    {
        "SIGKILL": ", perhaps for lack of memory",
        "SIGBUS": ", as when a mapped file of weights is cut short or its disk fails",
    }
)


class Restarts:
    """How long to wait before a process is started again, and how often it may be."""

    def __init__(self, most: int | None, backoff_s: float) -> None:
        """most: within ten minutes; None: there is no limit."""
        self._most = most
        self._backoff_s = backoff_s
        self._times_s: deque[float] = deque()

    def next_pause_s(self) -> float | None:
        """Seconds, longer with every restart; None when there were too many."""
        now_s = time.monotonic()
        while self._times_s and now_s - self._times_s[0] > RESTART_WINDOW_S:
            self._times_s.popleft()
        if self._most is not None and len(self._times_s) >= self._most:
            return None
        self._times_s.append(now_s)
        return float(min(self._backoff_s * 2 ** (len(self._times_s) - 1), MAX_BACKOFF_S))


async def within(wait: Awaitable[object], seconds: float) -> bool:
    """Whether it came to its end in time."""
    try:
        await asyncio.wait_for(wait, seconds)
    except asyncio.TimeoutError:
        return False
    return True


async def forward_log(process: asyncio.subprocess.Process, tail: deque[bytes]) -> None:
    """Passes on what the engine writes, byte for byte, and keeps the last of it."""
    assert process.stdout is not None
    while data := await process.stdout.read(65536):
        sys.stderr.buffer.write(data)
        sys.stderr.buffer.flush()
        tail.append(data[-2000:])


def describe_exit(what: str, returncode: int, tail: deque[bytes]) -> str:
    if returncode < 0:
        name = signal.Signals(-returncode).name
        return f"{what} was ended by {name}{SIGNAL_HINTS.get(name, '')}"
    lines = b"".join(tail).decode(errors="replace").strip().splitlines()
    last = f": {lines[-1]}" if lines else ""
    return f"{what} ended with status {returncode}{last}"
