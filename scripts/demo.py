"""Starts a server with the bundled model, asks it over ZeroMQ and over HTTP, stops it.

    make demo        or        python scripts/demo.py

Both answers stream to the terminal, followed by tokens/s. The server listens on a free loopback
port and an ipc socket in a directory of its own, so it meets no other server.
"""

from __future__ import annotations

import json
import sys
import time

import httpx
from server_process import running_server

from moeserve.client import Client

PROMPTS = {
    "zmq": "Once upon a time, there was a little dog named",
    "http": "ROMEO:\nO, ",
}
SAMPLING = {"max_tokens": 96, "temperature": 0.7, "seed": 7}


def main() -> int:
    with running_server() as server:
        print(f"server ready: {server.http} and {server.zmq}\n")
        ask_over_zmq(server.zmq)
        ask_over_http(server.http)
    print(f"server stopped, exit status {server.process.returncode}")
    return server.process.returncode


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


if __name__ == "__main__":
    sys.exit(main())
