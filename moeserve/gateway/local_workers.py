"""Expert workers on this machine that the server starts, watches and starts again.

Worker I of N holds shard I/N of every layer's experts and listens in the server's own directory.
Where the machine has several NUMA nodes, workers take turns at them, each on its node's cores.
"""

from __future__ import annotations

import asyncio
import logging
import os
import sys
from collections import deque
from dataclasses import dataclass, replace
from pathlib import Path

from moeserve.cli_options import WORKER_SETTINGS, flags_of
from moeserve.config import EngineConfig, GatewayConfig
from moeserve.cpu_backend.machine import allowed_cores, numa_nodes
from moeserve.gateway.child_process import Restarts, describe_exit, forward_log, within

#: what a command exits with that was asked for something it cannot do
EXIT_WRONG_INPUT = 2

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Place:
    """Where a worker runs. node: None where the machine has one."""

    node: int | None
    num_threads: int


def places(count: int, cores: list[int], nodes: dict[int, list[int]]) -> list[Place]:
    """For so many workers: every core has a worker's thread, and no two where that can be.

    cores: that may be used. nodes: the cores of each.
    """
    able = {node: len(set(own).intersection(cores)) for node, own in nodes.items()}
    able = {node: num_cores for node, num_cores in able.items() if num_cores}
    if len(able) < 2:
        return [Place(None, max(1, len(cores) // count))] * count
    turns = [list(able)[worker % len(able)] for worker in range(count)]
    return [Place(node, max(1, able[node] // turns.count(node))) for node in turns]


class LocalWorkers:
    """Keeps `local_workers` processes running. A crash is followed by a restart after a growing
    pause, without end: the engine does their work meanwhile. A refusal (a model that is not packed)
    is final."""

    def __init__(
        self,
        config: GatewayConfig,
        directory: Path,
        backoff_s: float = 0.5,
        stop_grace_s: float = 5.0,
    ) -> None:
        self._config = config
        self._backoff_s = backoff_s
        self._stop_grace_s = stop_grace_s
        count = config.local_workers
        self.endpoints = tuple(f"ipc://{directory / f'worker-{i}.sock'}" for i in range(count))
        self._stopping = asyncio.Event()
        self._refused: asyncio.Future[str] | None = None
        self._watches: list[asyncio.Task[None]] = []

    def served_to(self, config: EngineConfig) -> EngineConfig:
        """The engine's config with these workers."""
        workers = config.experts.workers + self.endpoints
        return replace(config, experts=replace(config.experts, workers=workers))

    def start(self) -> None:
        """Returns before they have loaded."""
        self._refused = asyncio.get_running_loop().create_future()
        count = len(self.endpoints)
        if count:
            own = places(count, allowed_cores(), numa_nodes())
            self._watches = [
                asyncio.create_task(self._keep_running(i, place), name=f"local worker {i}")
                for i, place in enumerate(own)
            ]

    async def wait_refused(self) -> str:
        """Returns the reason when one of them cannot be had at all."""
        assert self._refused is not None, "wait after start"
        return await asyncio.shield(self._refused)

    async def stop(self) -> None:
        """Tells them to end (SIGTERM), and kills who does not."""
        self._stopping.set()
        await asyncio.gather(*self._watches)

    async def _keep_running(self, worker: int, place: Place) -> None:
        name = f"local worker {worker}/{len(self.endpoints)}"
        restarts = Restarts(None, self._backoff_s)
        while True:
            try:
                returncode, reason = await self._run_once(name, self._command(worker, place))
            except OSError as error:  # no memory, no process ids, no file descriptors
                returncode, reason = 1, f"{name} cannot be started: {error}"
            if self._stopping.is_set():
                return
            log.error("%s", reason)
            if returncode == EXIT_WRONG_INPUT:
                assert self._refused is not None
                if not self._refused.done():
                    self._refused.set_result(reason)
                return
            pause_s = restarts.next_pause_s()
            assert pause_s is not None, "there is no limit"
            if await within(self._stopping.wait(), pause_s):
                return

    async def _run_once(self, name: str, command: list[str]) -> tuple[int, str]:
        """Runs one process to its end: its exit status, and what is to be said of it."""
        process = await asyncio.create_subprocess_exec(
            *command,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
        )
        log.info("%s: started pid %d", name, process.pid)
        tail = deque[bytes](maxlen=20)
        forward = asyncio.create_task(forward_log(process, tail))
        ended = asyncio.create_task(process.wait())
        stopping = asyncio.create_task(self._stopping.wait())
        await asyncio.wait({ended, stopping}, return_when=asyncio.FIRST_COMPLETED)
        stopping.cancel()
        if process.returncode is None:
            process.terminate()
            if not await within(asyncio.shield(ended), self._stop_grace_s):
                log.warning("%s: pid %d ignores SIGTERM and is killed", name, process.pid)
                process.kill()
        returncode = await ended
        await forward
        return returncode, describe_exit(f"{name}, pid {process.pid},", returncode, tail)

    def _command(self, worker: int, place: Place) -> list[str]:
        config = self._config
        num_threads = config.local_worker_threads or place.num_threads
        experts = replace(config.engine.experts, num_threads=num_threads)
        return [
            *(sys.executable, "-m", "moeserve.cli", "worker", config.engine.model.model),
            *("--endpoint", self.endpoints[worker]),
            *("--shard", f"{worker}/{len(self.endpoints)}"),
            *("--parent-pid", str(os.getpid())),
            *(("--node", str(place.node)) if place.node is not None else ()),
            *flags_of(config.engine.model, WORKER_SETTINGS),
            *flags_of(experts, WORKER_SETTINGS),
        ]
