"""Starts a real `moeserve serve` process and stops it; for scripts and end-to-end tests."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx

START_TIMEOUT_S = 120
STOP_TIMEOUT_S = 40


@dataclass(frozen=True)
class Server:
    """A server that answered /health with 200."""

    process: subprocess.Popen[bytes]
    http: str  # http://127.0.0.1:PORT
    zmq: str  # ipc:// endpoint


@contextmanager
def running_server(*flags: str, model: Path | str | None = None) -> Iterator[Server]:
    """A server on a free loopback port and an ipc socket of its own, stopped by SIGTERM after."""
    with tempfile.TemporaryDirectory(prefix="moeserve-") as directory:
        runtime = Path(directory)
        command = [sys.executable, "-m", "moeserve.cli", "serve", *([str(model)] if model else [])]
        process = subprocess.Popen([*command, "--port", "0", "--runtime-dir", str(runtime), *flags])
        try:
            yield _wait_until_ready(process, runtime)
        finally:
            stop(process)


def _wait_until_ready(process: subprocess.Popen[bytes], runtime: Path) -> Server:
    addresses = runtime / "server.json"
    deadline_s = time.monotonic() + START_TIMEOUT_S
    while time.monotonic() < deadline_s:
        if process.poll() is not None:
            raise RuntimeError(f"the server ended with status {process.returncode}")
        if addresses.exists():
            where = json.loads(addresses.read_text())
            if httpx.get(f"{where['http']}/health", trust_env=False, timeout=30).status_code == 200:
                return Server(process, where["http"], where["zmq"])
        time.sleep(0.1)
    raise RuntimeError(f"the server was not ready after {START_TIMEOUT_S} s")


def stop(process: subprocess.Popen[bytes]) -> int:
    """Asks the server to drain and end; kills it only when it does not. The exit status."""
    if process.poll() is None:
        process.send_signal(signal.SIGTERM)
    try:
        return process.wait(timeout=STOP_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
        print(f"the server did not stop within {STOP_TIMEOUT_S} s: killed", file=sys.stderr)
        raise
