"""Expert workers for tests: in a thread of this process, or as processes of their own."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import zmq

from moeserve.config import ModelConfig
from moeserve.cpu_backend.native_runtime import NativeRuntime
from moeserve.cpu_backend.shards import Shard
from moeserve.cpu_backend.worker import ExpertWorker
from moeserve.cpu_backend.worker_wire import worker_side_wire
from moeserve.models.shard import load_shard
from moeserve.worker_messages import WorkerHello, WorkerJob, WorkerWelcome

ROOT = Path(__file__).resolve().parents[2]


@contextmanager
def worker_thread(
    model: Path, endpoint: str, shard: str, standby: bool = False, isa: str = "auto"
) -> Iterator[str]:
    """Gives the endpoint, in which a port of * is a real one."""
    native = NativeRuntime(1, isa)
    held = load_shard(ModelConfig(model=str(model)), Shard.parse(shard), native, mapped=True)
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    socket = context.socket(zmq.ROUTER)
    socket.linger = 0
    socket.router_mandatory = True
    socket.bind(endpoint)
    bound = socket.get_string(zmq.LAST_ENDPOINT).rstrip("\0")

    def serve() -> None:
        ExpertWorker(held, native, standby).serve(socket)
        socket.close()

    thread = threading.Thread(target=serve, name=f"worker {shard}")
    thread.start()
    try:
        yield bound
    finally:
        context.term()
        thread.join()


@dataclass
class WorkerProcess:
    process: subprocess.Popen[str]
    endpoint: str

    def send_signal(self, number: signal.Signals) -> None:
        self.process.send_signal(number)


@contextmanager
def worker_process(model: Path, endpoint: str, *flags: str) -> Iterator[WorkerProcess]:
    """`moeserve worker`, once it listens. It is killed in the end, if it still runs."""
    command = [sys.executable, "-m", "moeserve.cli", "worker", str(model)]
    command += ["--endpoint", endpoint, "--num-threads", "1", *flags]
    process = subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, text=True, env={**os.environ}
    )
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        assert line.startswith("worker: "), f"{line!r}, exit status {process.wait()}"
        yield WorkerProcess(process, line.rsplit(" ", 1)[1].strip())
    finally:
        process.kill()  # also one that is stopped
        process.wait()
        if process.stdout is not None:
            process.stdout.close()


Reply = Callable[[WorkerJob], Sequence[bytes] | None]


@contextmanager
def fake_worker(endpoint: str, shard: str, reply: Reply) -> Iterator[list[WorkerJob]]:
    """Welcomes every engine, whatever it has, and answers jobs with the frames that `reply` gives,
    with None not at all. Gives the list of jobs that it got."""
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    socket = context.socket(zmq.ROUTER)
    socket.linger = 0
    socket.bind(endpoint)
    wire, jobs = worker_side_wire(), []

    def serve() -> None:
        try:
            while True:
                sender, *frames = socket.recv_multipart()
                message, _ = wire.decode(frames)
                answer: Sequence[bytes] | None
                if isinstance(message, WorkerHello):
                    answer = wire.encode(
                        WorkerWelcome(
                            epoch="fake",
                            identity=message.identity,
                            shard=shard,
                            standby=False,
                            shared=False,
                        )
                    )
                else:
                    jobs.append(message)
                    answer = reply(message)
                if answer is not None:
                    socket.send_multipart([sender, *answer])
        except zmq.ContextTerminated:
            socket.close()

    thread = threading.Thread(target=serve, name="fake worker")
    thread.start()
    try:
        yield jobs
    finally:
        context.term()
        thread.join()
