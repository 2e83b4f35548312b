"""`moeserve request "prompt"`: one prompt to a running server, streamed to the terminal."""

from __future__ import annotations

import argparse
import sys
import time
from typing import Any

from moeserve.client.sync import Client, Stream
from moeserve.client.types import ClientError

SAMPLING = ("max_tokens", "temperature", "top_k", "top_p", "min_p", "repetition_penalty", "seed")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("prompt", help="text to continue; - reads standard input")
    parser.add_argument(
        "--zmq",
        metavar="ENDPOINT",
        help="ipc://PATH or tcp://HOST:PORT (default: MOESERVE_ENDPOINT, else your own server)",
    )
    parser.add_argument("--curve-dir", metavar="DIR", help="CURVE keys made by `moeserve keygen`")
    parser.add_argument(
        "--curve-client", default="client", metavar="NAME", help="whose keys to use there"
    )
    parser.add_argument("--model", help="name of the model (default: whichever is served)")
    parser.add_argument("--chat", action="store_true", help="treat the prompt as a user's message")
    parser.add_argument("--timeout", type=float, metavar="SECONDS", help="give up after that long")
    parser.add_argument("--deadline", type=float, metavar="SECONDS", help="the server ends then")
    sampling = parser.add_argument_group("Sampling")
    sampling.add_argument("-n", "--max-tokens", type=int, help="most tokens to generate")
    sampling.add_argument("--temperature", type=float, help="0: greedy")
    sampling.add_argument("--top-k", type=int)
    sampling.add_argument("--top-p", type=float)
    sampling.add_argument("--min-p", type=float)
    sampling.add_argument("--repetition-penalty", type=float)
    sampling.add_argument("--seed", type=int)
    sampling.add_argument("--stop", action="append", help="stop string; may be given again")


def run(args: argparse.Namespace) -> int:
    """Exit status: 0 done, 1 no server or a broken connection, 2 refused, 130 interrupted."""
    try:
        with (
            Client(args.zmq, curve_dir=args.curve_dir, curve_client=args.curve_client) as client,
            client.stream(**_request(args)) as stream,
        ):
            _print_stream(stream)
    except ClientError as error:
        print(f"moeserve: {error}", file=sys.stderr)
        return 1 if error.code in ("engine_unavailable", "deadline_exceeded") else 2
    except KeyboardInterrupt:
        return 130
    return 0


def _request(args: argparse.Namespace) -> dict[str, Any]:
    prompt = sys.stdin.read() if args.prompt == "-" else args.prompt
    what = {"messages": [{"role": "user", "content": prompt}]} if args.chat else {"prompt": prompt}
    params = {name: getattr(args, name) for name in (*SAMPLING, "stop", "model")}
    return {
        **what,
        **{name: value for name, value in params.items() if value is not None},
        "timeout_s": args.timeout,
        "deadline_s": args.deadline,
    }


def _print_stream(stream: Stream) -> None:
    """The text to standard output, one line of figures to standard error."""
    started_s = time.perf_counter()
    first_s: float | None = None
    for chunk in stream:
        if first_s is None and chunk.token_ids:
            first_s = time.perf_counter()
        sys.stdout.write(chunk.text)
        sys.stdout.flush()
    sys.stdout.write("\n")
    sys.stdout.flush()
    ended_s = time.perf_counter()
    num_tokens = stream.usage.completion_tokens if stream.usage is not None else 0
    line = f"[{num_tokens} tokens"
    if first_s is not None:
        if num_tokens > 1:
            line += f", {(num_tokens - 1) / (ended_s - first_s):.1f} tok/s"
        line += f", first after {(first_s - started_s) * 1000:.0f} ms"
    print(line + "]", file=sys.stderr)
