"""Starts the engine process, watches it, restarts it within limits, and stops it."""

from __future__ import annotations

import asyncio
import logging
import os
import sys
from collections import deque
from collections.abc import Callable
from dataclasses import replace
from typing import TypeAlias

import msgspec

from moeserve.config import EngineConfig, GatewayConfig
from moeserve.core import ErrorCode, MoeserveError
from moeserve.gateway.child_process import Restarts, describe_exit, forward_log, within
from moeserve.gateway.zmq_link import ZmqEngineLink
from moeserve.messages import EngineStatus

#: as moeserve.engine.process.EXIT_REFUSED; the gateway imports no engine code
EXIT_REFUSED = 3

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
        self._restarts = Restarts(config.max_engine_restarts, backoff_s)
        self._has_served = False
        self._stop_grace_s = stop_grace_s
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
            pause_s = None if final else self._restarts.next_pause_s()
            if pause_s is None:
                limit = self._config.max_engine_restarts
                extra = "" if final else f" (restarted {limit} times within ten minutes already)"
                self._link.mark_down("failed", reason + extra)
                return
            self._link.mark_down("loading", f"restarting: {reason}")
            if await within(self._stopping.wait(), pause_s):
                return

    async def _run_once(self) -> tuple[str, bool]:
        """Runs one engine process to its end: why it ended, and whether that is final."""
        try:
            process = await self._spawn()
        except OSError as error:  # no memory, no process ids, no file descriptors
            return f"the engine process cannot be started: {error}", False
        self._process = process
        tail = deque[bytes](maxlen=20)
        forward = asyncio.create_task(forward_log(process, tail))
        waits = [
            asyncio.create_task(wait)
            for wait in (process.wait(), self._link.silent.wait(), self._stopping.wait())
        ]
        await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
        self._has_served |= self._link.status.stage == "ready"
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
            if await within(process.wait(), self._stop_grace_s):
                return
        process.terminate()
        if not await within(process.wait(), self._stop_grace_s):
            log.warning("engine: pid %d ignores SIGTERM and is killed", process.pid)
            process.kill()

    def _why(self, returncode: int, tail: deque[bytes]) -> str:
        """What the engine said of its end, else what its exit status says."""
        status = self._link.status
        return (
            status.detail
            if status.stage == "failed"
            else describe_exit("the engine process", returncode, tail)
        )

    def _engine_config(self) -> EngineConfig:
        """What served once is served again, with the workers that there are."""
        config = self._config.engine
        if not self._has_served:
            return config
        return replace(config, experts=replace(config.experts, worker_absent="go_on"))

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
        process.stdin.write(msgspec.json.encode(self._engine_config()))
        process.stdin.close()
        log.info("engine: started pid %d", process.pid)
        return process
