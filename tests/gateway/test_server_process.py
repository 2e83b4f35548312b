"""The server as a process: addresses, readiness, draining, the second signal, refusals."""

from __future__ import annotations

import json
import os
import shutil
import signal
import stat
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from server_process import Server, running_server

from moeserve.config import BUNDLED_MODEL
from moeserve.core import ModelError
from moeserve.llm import LLM
from moeserve.models.packed_model import MANIFEST

LONG = {"prompt": "Once upon a time", "ignore_eos": True, "stream": True}


def serve(*flags: str) -> subprocess.CompletedProcess[str]:
    """Runs a server that is expected to end by itself."""
    command = [sys.executable, "-m", "moeserve.cli", "serve", *flags]
    return subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)


@pytest.fixture
def server() -> Iterator[Server]:
    with running_server("--drain-s", "240", "--num-threads", "1") as server:
        yield server


def wait_for(server: Server, status: str) -> None:
    while (got := httpx.get(f"{server.http}/health", timeout=120).json()["status"]) != status:
        assert got == "ready", got


def engine_of(server: Server) -> int:
    """The process id of its only child."""
    children = Path(f"/proc/{server.process.pid}/task/{server.process.pid}/children")
    [engine] = [int(pid) for pid in children.read_text().split()]
    return engine


class Reader(threading.Thread):
    """Reads one long stream, whose first event stops the engine: so it is in the middle for as
    long as a test needs, however fast the one runs and however slowly the other."""

    def __init__(self, server: Server) -> None:
        super().__init__(daemon=True)
        self._server = server
        self.engine = engine_of(server)
        self.started = threading.Event()
        self.lines: list[str] = []

    def run(self) -> None:
        url = f"{self._server.http}/v1/completions"
        # Four answers up to the end of the context: none has ended before the stop.
        body = {**LONG, "max_tokens": 900, "n": 4}
        with httpx.stream("POST", url, json=body, timeout=240) as response:
            for line in filter(None, response.iter_lines()):
                self.lines.append(line)
                if not self.started.is_set():
                    os.kill(self.engine, signal.SIGSTOP)
                    self.started.set()


def started_reader(server: Server) -> Reader:
    reader = Reader(server)
    reader.start()
    assert reader.started.wait(240)
    return reader


def test_drains_on_the_first_signal(server: Server) -> None:
    reader = started_reader(server)
    server.process.send_signal(signal.SIGTERM)
    wait_for(server, "draining")
    refused = httpx.post(f"{server.http}/v1/completions", json={"prompt": "a"}, timeout=120)
    assert refused.status_code == 503
    os.kill(reader.engine, signal.SIGCONT)
    reader.join(240)
    assert reader.lines[-1] == "data: [DONE]"
    assert sum('"finish_reason":"length"' in line for line in reader.lines) == 4
    assert server.process.wait(240) == 0


def test_ends_at_once_on_the_second_signal(server: Server) -> None:
    reader = started_reader(server)
    server.process.send_signal(signal.SIGTERM)
    wait_for(server, "draining")
    server.process.send_signal(signal.SIGTERM)
    assert server.process.wait(240) == 0
    reader.join(240)
    assert "event: error" in reader.lines
    assert "shutting down" in reader.lines[-1]


def test_addresses_and_ready_line(tmp_path: Path) -> None:
    runtime = tmp_path / "run"
    command = [sys.executable, "-m", "moeserve.cli", "serve", "--port", "0", "--api-key", "k"]
    with subprocess.Popen(
        [*command, "--runtime-dir", str(runtime)], stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        listening = process.stdout.readline()
        addresses = json.loads((runtime / "server.json").read_text())
        assert addresses["http"] in listening
        assert addresses["zmq"] in listening
        assert addresses["pid"] == process.pid
        assert stat.S_IMODE(runtime.stat().st_mode) == 0o700
        assert httpx.get(f"{addresses['http']}/health", timeout=120).json()["status"] in (
            "loading",
            "ready",
        )
        assert "ready" in process.stdout.readline()
        assert httpx.get(f"{addresses['http']}/health", timeout=120).status_code == 200
        assert httpx.get(f"{addresses['http']}/v1/models", timeout=120).status_code == 401
        second = serve("--port", "0", "--runtime-dir", str(runtime))
        assert second.returncode == 2
        assert "already" in second.stderr
        assert (runtime / "server.json").exists(), "the second server removed the first one's file"
        taken = serve("--port", addresses["http"].rsplit(":", 1)[1])
        assert taken.returncode == 2
        assert "--port" in taken.stderr
        process.send_signal(signal.SIGINT)
        assert process.wait(240) == 0
    assert not (runtime / "server.json").exists()


def test_a_signal_while_loading_ends_the_server(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "moeserve.cli", "serve", "--port", "0"]
    with subprocess.Popen(
        [*command, "--runtime-dir", str(tmp_path / "run")], stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert "loading" in process.stdout.readline()
        process.send_signal(signal.SIGTERM)
        assert process.wait(240) == 0


def test_a_model_that_does_not_load_ends_the_server(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "perceptron"}')
    ended = serve(str(tmp_path), "--port", "0", "--runtime-dir", str(tmp_path / "run"))
    assert ended.returncode == 2
    assert "perceptron" in ended.stderr


@pytest.mark.parametrize(
    ("packed", "share", "message", "hint"),
    [
        (False, 0, "not found", "save_pretrained"),
        (True, 0, "not found", "save_pretrained"),
        (False, 0.9, "is not a tokenizer", "download the file again"),
    ],
)
def test_a_model_without_a_tokenizer_ends_the_server_before_its_weights_are_read(
    packed: bool, share: float, message: str, hint: str, tmp_path: Path
) -> None:
    """Which are not there: who looks for them first names them. share: of tokenizer.json that was
    copied."""
    shutil.copy(BUNDLED_MODEL / "config.json", tmp_path)
    if packed:
        (tmp_path / MANIFEST).write_text("{}")
    if share:
        whole = (BUNDLED_MODEL / "tokenizer.json").read_bytes()
        (tmp_path / "tokenizer.json").write_bytes(whole[: int(share * len(whole))])
    ended = serve(str(tmp_path), "--port", "0", "--runtime-dir", str(tmp_path / "run"))
    assert ended.returncode == 2
    assert f"{tmp_path / 'tokenizer.json'}: {message}" in ended.stderr
    assert hint in ended.stderr
    with pytest.raises(ModelError, match=rf"tokenizer\.json: {message}"):
        LLM(str(tmp_path))


def test_an_engine_that_is_killed_comes_back(server: Server) -> None:
    body = {"prompt": "a", "max_tokens": 2, "temperature": 0}
    before = httpx.post(f"{server.http}/v1/completions", json=body, timeout=120).json()["choices"]
    reader = started_reader(server)
    os.kill(reader.engine, signal.SIGKILL)
    reader.join(240)
    assert "event: error" in reader.lines
    while httpx.get(f"{server.http}/health", timeout=120).status_code != 200:
        assert server.process.poll() is None
    after = httpx.post(f"{server.http}/v1/completions", json=body, timeout=120).json()["choices"]
    assert after == before
