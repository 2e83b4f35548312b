"""A load of concurrent streams with random cancels against a real server, and what must hold.

    python scripts/soak.py [--seconds 120] [--streams 64] [--model DIR]

Starts `moeserve serve` in processes of its own. First every canary prompt is answered alone,
greedily; then `--streams` workers ask them again without pause, half over ZeroMQ and half over
HTTP, and cancel about one request in four at a random moment. It must hold that

- every answer is, token by token, what that prompt gave alone, and a cancelled one a prefix of it
  (so no stream ever receives another's tokens);
- every request that was not cancelled completes;
- afterwards nothing runs, waits or holds a kv block;
- the memory of gateway and engine is flat: what each gained in the second half of the load is at
  most `--slack` of what it had at half time. The kv pool is kept small (`--num-blocks`), because
  its pages only count as memory once they were written: a large one fills up for minutes.

Prints a report and, last, one JSON line. Exit status 1 when anything did not hold.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import platform
import random
import sys
import time
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any

import httpx
import psutil
from server_process import Server, running_server

from moeserve.client import AsyncClient, ClientError

CANARIES = (
    "Once upon a time, there was a little girl named",
    "ROMEO:\nBut, soft! what light",
    "def read_lines(path):\n    ",
    "The dog saw a big red",
    "KING HENRY:\nOnce more",
    "class Queue:\n    def __init__(self",
    "One day, a boy and his mother went to the",
    "import os\nimport sys\n\n",
    "First Citizen:\nBefore we proceed",
    "    for name in sorted(",
    "Lily wanted to share her toys but",
    "JULIET:\nO Romeo, Romeo! wherefore",
)
MAX_TOKENS = 96
CANCEL_RATE = 0.25
EARLY_CANCEL_S = 0.3
IDLE_TIMEOUT_S = 30.0
NUM_SAMPLES = 8  # of memory; the fifth is half time


@dataclass(frozen=True)
class Canary:
    """A prompt and its whole greedy answer when nothing else ran."""

    prompt: str
    text: str


@dataclass
class Tally:
    """What happened. violations: anything that must not."""

    outcomes: Counter[str] = field(default_factory=Counter)
    violations: list[str] = field(default_factory=list)
    num_chars: int = 0

    def violation(self, text: str) -> None:
        self.outcomes["violations"] += 1
        if len(self.violations) < 20:
            self.violations.append(text)


# -- the two ways to ask --------------------------------------------------------------------------


async def zmq_pieces(client: AsyncClient, prompt: str, max_tokens: int) -> AsyncIterator[str]:
    async with client.stream(prompt, max_tokens=max_tokens, temperature=0) as stream:
        async for chunk in stream:
            yield chunk.text


async def http_pieces(http: httpx.AsyncClient, prompt: str, max_tokens: int) -> AsyncIterator[str]:
    body = {"prompt": prompt, "max_tokens": max_tokens, "temperature": 0, "stream": True}
    async with http.stream("POST", "/v1/completions", json=body) as answer:
        answer.raise_for_status()
        done = False
        async for line in answer.aiter_lines():
            if line == "data: [DONE]":
                done = True
            elif line.startswith("data: "):
                event = json.loads(line.removeprefix("data: "))
                for choice in event.get("choices", ()):
                    yield choice["text"]
        if not done:
            raise httpx.RemoteProtocolError("the stream ended without [DONE]")


# -- the load -------------------------------------------------------------------------------------


async def answer_alone(client: AsyncClient, prompts: Sequence[str]) -> list[Canary]:
    """One after the other: what each prompt gives when nothing else runs."""
    results = []
    for prompt in prompts:
        result = await client.generate(prompt, max_tokens=MAX_TOKENS, temperature=0)
        results.append(Canary(prompt, result.text))
    return results


async def ask_once(
    how: str, pieces: AsyncIterator[str], canary: Canary, cancel_after: int | None, tally: Tally
) -> None:
    """One request, read to its end or to `cancel_after` pieces; every piece is compared."""
    text, num_pieces = "", 0
    async with aclosing(pieces) as stream:  # type: ignore[type-var]
        async for piece in stream:
            text += piece
            num_pieces += 1
            tally.num_chars += len(piece)
            if not canary.text.startswith(text):
                tally.violation(f"{how}: {canary.prompt!r} gave {text!r}, alone {canary.text!r}")
                return
            if num_pieces == cancel_after:
                tally.outcomes[f"{how} cancelled in the stream"] += 1
                return
    tally.outcomes[f"{how} completed"] += 1
    if text != canary.text:
        tally.violation(f"{how}: {canary.prompt!r} ended at {text!r}, alone {canary.text!r}")


async def worker(
    number: int, server: Server, canaries: list[Canary], end_s: float, seed: int, tally: Tally
) -> None:
    """Asks until the time is up; every other worker over HTTP."""
    rng = random.Random(seed * 1000 + number)
    how = "zmq" if number % 2 == 0 else "http"
    async with (
        AsyncClient(server.zmq, credit=rng.choice((1, 4, 64))) as client,
        httpx.AsyncClient(base_url=server.http, timeout=120, trust_env=False) as http,
    ):
        while time.monotonic() < end_s:
            canary = rng.choice(canaries)
            dice = rng.random()
            cancel_after = rng.randrange(1, 30) if dice < CANCEL_RATE / 2 else None
            # The other half of the cancels comes early: while it waits or its prompt is computed.
            early_s = (
                rng.random() * EARLY_CANCEL_S if CANCEL_RATE / 2 < dice < CANCEL_RATE else None
            )
            pieces = (
                zmq_pieces(client, canary.prompt, MAX_TOKENS)
                if how == "zmq"
                else http_pieces(http, canary.prompt, MAX_TOKENS)
            )
            asked = ask_once(how, pieces, canary, cancel_after, tally)
            try:
                await asyncio.wait_for(asked, early_s)
            except asyncio.TimeoutError:
                tally.outcomes[f"{how} cancelled early"] += 1
            except (ClientError, httpx.HTTPError) as error:
                tally.violation(f"{how}: {canary.prompt!r} failed: {error!r}")


# -- the server from outside ----------------------------------------------------------------------


def processes(server: Server) -> dict[str, psutil.Process]:
    gateway = psutil.Process(server.process.pid)
    for child in gateway.children():
        if "moeserve.engine.process" in child.cmdline():
            return {"gateway": gateway, "engine": child}
    raise RuntimeError("the gateway has no engine process")


def rss_mib(server: Server) -> dict[str, float]:
    return {name: p.memory_info().rss / 2**20 for name, p in processes(server).items()}


async def gauges(server: Server) -> dict[str, float]:
    """The gauges of /metrics that must be 0 when idle."""
    async with httpx.AsyncClient(timeout=120, trust_env=False) as http:
        text = (await http.get(f"{server.http}/metrics")).text
    names = ("moeserve_kv_blocks_used", "moeserve_requests_running", "moeserve_requests_waiting")
    pairs = (line.split() for line in text.splitlines() if line.startswith(names))
    found = {name: float(value) for name, value in pairs}
    missing = set(names) - set(found)
    if missing:
        raise RuntimeError(f"/metrics does not show {', '.join(sorted(missing))}")
    return found


async def check_idle(server: Server, tally: Tally) -> dict[str, float]:
    """Waits until nothing runs or is held; a violation when that does not come about."""
    end_s = time.monotonic() + IDLE_TIMEOUT_S
    while any((seen := await gauges(server)).values()) and time.monotonic() < end_s:
        await asyncio.sleep(0.2)
    if any(seen.values()):
        tally.violation(f"not idle {IDLE_TIMEOUT_S:g} s after the load: {seen}")
    return seen


async def soak(server: Server, args: argparse.Namespace) -> dict[str, Any]:
    tally = Tally()
    async with AsyncClient(server.zmq) as client:
        canaries = await answer_alone(client, CANARIES)
    started_s = time.monotonic()
    end_s = started_s + args.seconds
    print(f"soak: {args.streams} streams for {args.seconds:g} s, seed {args.seed}", flush=True)
    workers = [
        asyncio.create_task(worker(n, server, canaries, end_s, args.seed, tally))
        for n in range(args.streams)
    ]
    samples = [rss_mib(server)]
    for _ in range(NUM_SAMPLES):
        await asyncio.sleep(args.seconds / NUM_SAMPLES)
        samples.append(rss_mib(server))
    half = samples[NUM_SAMPLES // 2]
    results = await asyncio.gather(*workers, return_exceptions=True)
    elapsed_s = time.monotonic() - started_s
    idle = await check_idle(server, tally)
    end = rss_mib(server)
    for result in results:
        if isinstance(result, BaseException):
            tally.violation(f"a worker gave up: {result!r}")
    for name in half:
        if end[name] > half[name] * (1 + args.slack):
            tally.violation(
                f"{name}: {half[name]:.0f} MiB at half time, {end[name]:.0f} at the end"
            )
    async with AsyncClient(server.zmq) as client:
        if await answer_alone(client, CANARIES) != canaries:
            tally.violation("after the load the canaries' answers differ from those before")
    return {
        "benchmark": "soak",
        "ok": not tally.violations,
        "violations": tally.violations,
        "outcomes": dict(tally.outcomes),
        "streams": args.streams,
        "seconds": round(elapsed_s, 1),
        "seed": args.seed,
        "characters_per_s": round(tally.num_chars / elapsed_s),
        "rss_mib": {name: [round(s[name], 1) for s in (*samples, end)] for name in half},
        "idle": idle,
        "machine": f"{platform.machine()}, {psutil.cpu_count()} cores",
    }


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Load a server and check every answer.")
    parser.add_argument("--seconds", type=float, default=120.0)
    parser.add_argument("--streams", type=int, default=64)
    parser.add_argument("--model", help="directory or hub id (default: the bundled model)")
    parser.add_argument("--num-blocks", type=int, default=512, help="of the server's kv pool")
    parser.add_argument(
        "--num-threads", type=int, default=1, help="of the engine; the bundled model needs no more"
    )
    parser.add_argument("--seed", type=int, default=None)
    parser.add_argument("--slack", type=float, default=0.1, help="memory growth allowed")
    args = parser.parse_args(arguments)
    if args.seed is None:
        args.seed = random.SystemRandom().randrange(2**31)
    return args


def main(arguments: Sequence[str] | None = None) -> int:
    args = parse(arguments)
    flags = ("--num-blocks", str(args.num_blocks), "--num-threads", str(args.num_threads))
    with running_server(*flags, model=args.model) as server:
        report = asyncio.run(soak(server, args))
    for outcome, count in sorted(report["outcomes"].items()):
        print(f"  {outcome:<28} {count}")
    for name, mib in report["rss_mib"].items():
        print(f"  {name} memory over time, MiB: {' '.join(f'{value:.0f}' for value in mib)}")
    for violation in report["violations"]:
        print(f"  VIOLATION {violation}")
    print(json.dumps(report))
    return 0 if report["ok"] else 1


if __name__ == "__main__":
    sys.exit(main())
