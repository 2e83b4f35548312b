"""The subcommands of `moeserve ctl`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import msgspec

from moeserve.cli_options import check_output, parse_bytes, write_output
from moeserve.client.control import CacheResized, Control
from moeserve.client.sync import Client
from moeserve.client.types import ClientError
from moeserve.core import ConfigError
from moeserve.ctl.heatmap import Use, check_picture, plot_use, read_use
from moeserve.ctl.report import describe, size


def add_arguments(parser: argparse.ArgumentParser) -> None:
    actions = parser.add_subparsers(dest="action", metavar="ACTION", required=True)
    stats = actions.add_parser("stats", help="what the engine has done so far")
    stats.add_argument("--json", action="store_true", help="print JSON")
    stats.set_defaults(run_ctl=_stats)
    cache = actions.add_parser("cache", help="give experts more or less memory")
    cache.add_argument(
        "--host-memory",
        type=parse_bytes,
        required=True,
        metavar="BYTES",
        help="for all weights and kv together, as in `moeserve serve`: 6GiB",
    )
    cache.add_argument("--json", action="store_true", help="print JSON")
    cache.set_defaults(run_ctl=_cache)
    heatmap = actions.add_parser("heatmap", help="a picture of which experts are used")
    _add_out(heatmap, "picture to write: .png, .svg or .pdf")
    heatmap.add_argument(
        "--trace", type=Path, metavar="NPZ", help="of recorded routing; no server is asked"
    )
    _add_steps(heatmap, 100)
    heatmap.set_defaults(run_ctl=_heatmap)
    timeline = actions.add_parser("timeline", help="what runs when, for https://ui.perfetto.dev")
    _add_out(timeline, "JSON file to write")
    _add_steps(timeline, 20)
    timeline.set_defaults(run_ctl=_timeline)
    for action in (stats, cache, heatmap, timeline):
        _add_server(action)


def _add_out(parser: argparse.ArgumentParser, text: str) -> None:
    parser.add_argument("-o", "--out", type=Path, required=True, metavar="FILE", help=text)


def _add_steps(parser: argparse.ArgumentParser, default: int) -> None:
    parser.add_argument(
        "--steps",
        type=int,
        default=default,
        help="how many steps of the engine to wait for (%(default)s)",
    )


def _add_server(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("Server")
    group.add_argument(
        "--zmq",
        metavar="ENDPOINT",
        help="ipc://PATH or tcp://HOST:PORT (default: MOESERVE_ENDPOINT, else your own server)",
    )
    group.add_argument("--curve-dir", metavar="DIR", help="CURVE keys made by `moeserve keygen`")
    group.add_argument(
        "--curve-client", default="client", metavar="NAME", help="whose keys to use there"
    )
    group.add_argument(
        "--connect-timeout",
        type=float,
        default=10.0,
        metavar="SECONDS",
        help="how long to wait for a server (%(default)s)",
    )


def run(args: argparse.Namespace) -> int:
    """Exit status: 0 done, 1 no server or a broken connection, 2 refused, 130 interrupted."""
    try:
        args.run_ctl(args)
    except ClientError as error:
        print(f"moeserve: {error}", file=sys.stderr)
        return 1 if error.code in ("engine_unavailable", "deadline_exceeded") else 2
    return 0


@contextmanager
def _server(args: argparse.Namespace) -> Iterator[Control]:
    with Client(
        args.zmq,
        curve_dir=args.curve_dir,
        curve_client=args.curve_client,
        connect_timeout_s=args.connect_timeout,
    ) as client:
        yield Control(client)


def _stats(args: argparse.Namespace) -> None:
    with _server(args) as server:
        stats = server.stats()
    print(_json(stats) if args.json else describe(stats))


def _cache(args: argparse.Namespace) -> None:
    with _server(args) as server:
        done = server.resize_cache(args.host_memory)
    print(_json(done) if args.json else _describe_memory(done))


def _describe_memory(done: CacheResized) -> str:
    experts_bytes = done.slots * done.slot_bytes
    lines = [
        f"{done.slots} of {done.num_experts} experts have room in memory,"
        f" before it were {done.slots_before}",
        f"of {size(done.host_memory_bytes)}: weights of every token {size(done.weights_bytes)},"
        f" kv {size(done.kv_bytes)} now and {size(done.kv_limit_bytes)} at most,"
        f" experts {size(experts_bytes)}",
    ]
    if done.slots_owed:
        lines.append(f"{done.slots_owed} slots more are in use and go when they are released")
    return "\n".join(lines)


def _heatmap(args: argparse.Namespace) -> None:
    check_picture(args.out)
    if args.trace is not None:
        use = read_use(args.trace)
    else:
        with _server(args) as server:
            recorded = server.expert_use(args.steps)
        use = Use(f"{recorded.num_steps} steps", recorded.counts)
    if not use.counts:
        raise ConfigError("heatmap: the model has no MoE layer", field="model")
    plot_use(use, args.out)
    print(f"{args.out}: {use.title}", file=sys.stderr)


def _timeline(args: argparse.Namespace) -> None:
    check_output("out", args.out)
    with _server(args) as server:
        recorded = server.timeline(args.steps)
    write_output("out", args.out, recorded)
    print(f"{args.out}: open it at https://ui.perfetto.dev", file=sys.stderr)


def _json(value: object) -> str:
    return msgspec.json.format(msgspec.json.encode(value)).decode()
