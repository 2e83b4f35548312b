"""Starts a server with the bundled model, asks it over ZeroMQ and over HTTP, stops it.

    make demo        or        python scripts/demo.py

Both answers stream to the terminal, followed by tokens/s. The server listens on a free loopback
port and an ipc socket in a directory of its own, so it meets no other server.
"""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import httpx

from moeserve.client import Client

START_TIMEOUT_S = 120
PROMPTS = {
    "zmq": "Once upon a time, there was a little dog named",
    "http": "ROMEO:\nO, ",
}
SAMPLING = {"max_tokens": 96, "temperature": 0.7, "seed": 7}


def main() -> int:
    with tempfile.TemporaryDirectory(prefix="moeserve-demo-") as directory:
        runtime = Path(directory)
        server = start_server(runtime)
        try:
            url, endpoint = wait_until_ready(server, runtime)
            print(f"server ready: {url} and {endpoint}\n")
            ask_over_zmq(endpoint)
            ask_over_http(url)
        finally:
            status = stop_server(server)
    print(f"server stopped, exit status {status}")
    return status


def start_server(runtime: Path) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "moeserve.cli", "serve", "--port", "0"]
    return subprocess.Popen([*command, "--runtime-dir", str(runtime)])


def wait_until_ready(server: subprocess.Popen[bytes], runtime: Path) -> tuple[str, str]:
    """The HTTP address and the ZeroMQ endpoint, once /health says ready."""
    address = runtime / "server.json"
    deadline_s = time.monotonic() + START_TIMEOUT_S
    while time.monotonic() < deadline_s:
        if server.poll() is not None:
            raise SystemExit(f"the server ended with status {server.returncode}")
        if address.exists():
            where = json.loads(address.read_text())
            if httpx.get(f"{where['http']}/health").status_code == 200:
                return where["http"], where["zmq"]
        time.sleep(0.1)
    raise SystemExit(f"the server was not ready after {START_TIMEOUT_S} s")


def ask_over_zmq(endpoint: str) -> None:
    print(f"--- ZeroMQ ---\n{PROMPTS['zmq']}", end="", flush=True)
    watch = Watch()
    with Client(endpoint) as client:
        for chunk in client.stream(PROMPTS["zmq"], **SAMPLING):
            watch.tokens(len(chunk.token_ids))
            print(chunk.text, end="", flush=True)
    watch.report()


def ask_over_http(url: str) -> None:
    print(f"--- HTTP ---\n{PROMPTS['http']}", end="", flush=True)
    body = {"prompt": PROMPTS["http"], "stream": True, **SAMPLING}
    body["stream_options"] = {"include_usage": True}
    watch = Watch()
    with httpx.stream("POST", f"{url}/v1/completions", json=body, timeout=60) as answer:
        answer.raise_for_status()
        for line in answer.iter_lines():
            if not line.startswith("data: ") or line == "data: [DONE]":
                continue
            event = json.loads(line[6:])
            for choice in event["choices"]:
                watch.tokens(0)
                print(choice["text"], end="", flush=True)
            if event.get("usage"):
                watch.tokens(event["usage"]["completion_tokens"])
    watch.report()


class Watch:
    """Time to the first token, and tokens/s from there on."""

    def __init__(self) -> None:
        self.started_s = time.perf_counter()
        self.first_s: float | None = None
        self.num_tokens = 0

    def tokens(self, count: int) -> None:
        if self.first_s is None:
            self.first_s = time.perf_counter()
        self.num_tokens += count

    def report(self) -> None:
        now_s = time.perf_counter()
        first_s = self.first_s or now_s
        speed = max(self.num_tokens - 1, 0) / (now_s - first_s) if now_s > first_s else 0.0
        print(
            f"\n[{self.num_tokens} tokens, {speed:.1f} tok/s, first after "
            f"{(first_s - self.started_s) * 1000:.0f} ms]\n"
        )


def stop_server(server: subprocess.Popen[bytes]) -> int:
    """Asks the server to drain and end; only a server that does not is killed."""
    server.send_signal(signal.SIGTERM)
    try:
        return server.wait(timeout=30)
    except subprocess.TimeoutExpired:
        server.kill()
        server.wait()
        print("the server did not stop within 30 s and was killed", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
