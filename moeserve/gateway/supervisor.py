"""Starts the engine process, watches it, restarts it within limits, and stops it."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import sys
import time
from collections import deque
from collections.abc import Awaitable, Callable, Mapping
from types import MappingProxyType
from typing import TypeAlias

import msgspec

from moeserve.config import GatewayConfig
from moeserve.core import ErrorCode, MoeserveError
from moeserve.gateway.zmq_link import ZmqEngineLink
from moeserve.messages import EngineStatus

#: as moeserve.engine.process.EXIT_REFUSED; the gateway imports no engine code
EXIT_REFUSED = 3
RESTART_WINDOW_S = 600.0
MAX_BACKOFF_S = 30.0

#: what usually stands behind a signal
SIGNAL_HINTS: Mapping[str, str] = MappingProxyType(
    {
        "SIGKILL": ", perhaps for lack of memory",
        "SIGBUS": ", as when a mapped file of weights is cut short or its disk fails",
    }
)

Progress: TypeAlias = Callable[[str, float], None]

log = logging.getLogger(__name__)


class EngineSupervisor:
    """Keeps one engine process running behind a link.

    What /health shows is the link's status: stage `loading` with the progress, `ready`, `failed`
    with the reason, `stopping`. A refusal by the engine itself (a wrong setting, a broken model) is
    final; a crash or silence is followed by a restart after a growing pause, at most
    `max_engine_restarts` times within ten minutes.
    """

    def __init__(
        self,
        config: GatewayConfig,
        link: ZmqEngineLink,
        log_level: str = "info",
        backoff_s: float = 0.5,
        stop_grace_s: float = 5.0,
    ) -> None:
        self._config = config
        self._link = link
        self._log_level = log_level
        self._backoff_s = backoff_s
        self._stop_grace_s = stop_grace_s
        self._restarts_s: deque[float] = deque()
        self._stopping = asyncio.Event()
        self._process: asyncio.subprocess.Process | None = None
        self._watch: asyncio.Task[None] | None = None

    @property
    def pid(self) -> int | None:
        """Process id of the engine; None while there is none."""
        return None if self._process is None else self._process.pid

    async def start(self) -> None:
        """Starts the engine process; returns before it has loaded."""
        self._link.mark_down("loading", "starting the engine process")
        self._watch = asyncio.create_task(self._keep_running(), name="engine-supervisor")

    async def wait_ready(self, progress: Progress | None = None) -> EngineStatus:
        """The status once the engine serves. Raises MoeserveError when it has failed for good.

        progress: called with (what is being done, 0..1) whenever the engine says so.
        """

        def over(status: EngineStatus) -> bool:
            if progress is not None:
                progress(status.detail, status.progress)
            return status.stage == "ready" or self._given_up(status)

        status = await self._link.wait_for(over)
        if status.stage != "ready":
            raise MoeserveError(status.detail, code=ErrorCode.UNAVAILABLE)
        return status

    async def wait_failed(self) -> str:
        """Returns the reason when the engine has failed for good."""
        return (await self._link.wait_for(self._given_up)).detail

    async def stop(self) -> None:
        """Asks the engine to end, then tells it (SIGTERM), then kills that process."""
        self._stopping.set()
        if self._watch is not None:
            await self._watch
        self._link.mark_down("stopping", "the server stops")

    def kill(self) -> None:
        """Ends the engine process now; `stop` is still needed after it."""
        if self._process is not None and self._process.returncode is None:
            self._process.kill()

    @staticmethod
    def _given_up(status: EngineStatus) -> bool:
        return status.stage in ("failed", "stopping") and not status.epoch

    async def _keep_running(self) -> None:
        while True:
            reason, final = await self._run_once()
            if self._stopping.is_set():
                return
            log.error("engine: %s", reason)
            pause_s = None if final else self._next_pause_s()
            if pause_s is None:
                limit = self._config.max_engine_restarts
                extra = "" if final else f" (restarted {limit} times within ten minutes already)"
                self._link.mark_down("failed", reason + extra)
                return
            self._link.mark_down("loading", f"restarting: {reason}")
            if await _within(self._stopping.wait(), pause_s):
                return

    def _next_pause_s(self) -> float | None:
        """Seconds to wait before the next start; None when there were too many."""
        now_s = time.monotonic()
        while self._restarts_s and now_s - self._restarts_s[0] > RESTART_WINDOW_S:
            self._restarts_s.popleft()
        if len(self._restarts_s) >= self._config.max_engine_restarts:
            return None
        self._restarts_s.append(now_s)
        return float(min(self._backoff_s * 2 ** (len(self._restarts_s) - 1), MAX_BACKOFF_S))

    async def _run_once(self) -> tuple[str, bool]:
        """Runs one engine process to its end: why it ended, and whether that is final."""
        try:
            process = await self._spawn()
        except OSError as error:  # no memory, no process ids, no file descriptors
            return f"the engine process cannot be started: {error}", False
        self._process = process
        tail = deque[bytes](maxlen=20)
        forward = asyncio.create_task(_forward_log(process, tail))
        waits = [
            asyncio.create_task(wait)
            for wait in (process.wait(), self._link.silent.wait(), self._stopping.wait())
        ]
        await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
        for task in waits:
            task.cancel()
        killed = self._link.silent.is_set() and process.returncode is None
        if killed:
            process.kill()
        elif process.returncode is None:
            await self._end(process)
        await process.wait()
        await forward
        self._process = None
        if killed:
            beats = self._link.max_silence_beats
            return f"pid {process.pid} was silent for {beats} heartbeats and was killed", False
        return self._why(process.returncode or 0, tail), process.returncode == EXIT_REFUSED

    async def _end(self, process: asyncio.subprocess.Process) -> None:
        if self._link.status.stage == "ready":  # while it loads it reads no messages
            self._link.ask_to_stop()
            if await _within(process.wait(), self._stop_grace_s):
                return
        process.terminate()
        if not await _within(process.wait(), self._stop_grace_s):
            log.warning("engine: pid %d ignores SIGTERM and is killed", process.pid)
            process.kill()

    def _why(self, returncode: int, tail: deque[bytes]) -> str:
        """What the engine said of its end, else what its exit status says."""
        status = self._link.status
        return status.detail if status.stage == "failed" else _describe_exit(returncode, tail)

    async def _spawn(self) -> asyncio.subprocess.Process:
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "moeserve.engine.process", self._link.endpoint),
            *("--parent-pid", str(os.getpid())),
            *("--heartbeat-s", str(self._link.heartbeat_s)),
            *("--max-silence-beats", str(self._link.max_silence_beats)),
            *("--log-level", self._log_level),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
        )
        assert process.stdin is not None
        process.stdin.write(msgspec.json.encode(self._config.engine))
        process.stdin.close()
        log.info("engine: started pid %d", process.pid)
        return process


async def _within(wait: Awaitable[object], seconds: float) -> bool:
    """Whether it came to its end in time."""
    try:
        await asyncio.wait_for(wait, seconds)
    except asyncio.TimeoutError:
        return False
    return True


async def _forward_log(process: asyncio.subprocess.Process, tail: deque[bytes]) -> None:
    """Passes on what the engine writes, byte for byte, and keeps the last of it."""
    assert process.stdout is not None
    while data := await process.stdout.read(65536):
        sys.stderr.buffer.write(data)
        sys.stderr.buffer.flush()
        tail.append(data[-2000:])


def _describe_exit(returncode: int, tail: deque[bytes]) -> str:
    if returncode < 0:
        name = signal.Signals(-returncode).name
        return f"the engine process was ended by {name}{SIGNAL_HINTS.get(name, '')}"
    lines = b"".join(tail).decode(errors="replace").strip().splitlines()
    last = f": {lines[-1]}" if lines else ""
    return f"the engine process ended with status {returncode}{last}"
