"""`moeserve worker`: one shard of a packed model's experts, computed for engines over ZeroMQ."""

from __future__ import annotations

import argparse
import logging
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
import zmq
from zmq.auth.thread import ThreadAuthenticator

from moeserve.cli_options import WORKER_SETTINGS, add_flags, read_flags
from moeserve.config import ExpertConfig, ModelConfig
from moeserve.core import ConfigError
from moeserve.cpu_backend.machine import allowed_cores, numa_nodes
from moeserve.cpu_backend.native_runtime import NativeRuntime
from moeserve.cpu_backend.shards import Shard
from moeserve.cpu_backend.worker import ExpertWorker
from moeserve.cpu_backend.worker_wire import WORKER_MAX_BYTES
from moeserve.environment import read_environment
from moeserve.gateway.curve import ZAP_DOMAIN, ServerKeys, load_server_keys
from moeserve.gateway.zmq_endpoint import check_endpoint, remove_socket_file
from moeserve.models.shard import load_shard
from moeserve.parent_process import end_with_parent

#: an engine that is gone is noticed by its heartbeats
HEARTBEAT_MS = 2000
HEARTBEAT_TIMEOUT_MS = 10_000

logger = logging.getLogger(__name__)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help="directory written by `moeserve pack`")
    group = parser.add_argument_group("Worker")
    group.add_argument(
        "--endpoint", required=True, help="where to listen: ipc:///PATH or tcp://HOST:PORT"
    )
    group.add_argument(
        "--shard",
        required=True,
        help="the experts to hold, of every layer: I/N for those whose number leaves I when divided"
        " by N, or A-B for those from A to B",
    )
    group.add_argument(
        "--standby",
        action="store_true",
        help="only to be asked while no other worker holds the same experts",
    )
    group.add_argument(
        "--mapped",
        action="store_true",
        help="use the experts where they lie in the page cache instead of a copy in own memory",
    )
    group.add_argument("--node", type=int, help="run on the cores of this NUMA node alone")
    group.add_argument(
        "--curve-dir",
        type=Path,
        metavar="DIR",
        help="directory made by `moeserve keygen`; needed for TCP beyond loopback",
    )
    # of a server that starts its workers itself
    group.add_argument("--parent-pid", type=int, help=argparse.SUPPRESS)
    add_flags(parser, ModelConfig, ExpertConfig, only=WORKER_SETTINGS)


def run(args: argparse.Namespace) -> int:
    """Serves until SIGTERM or Ctrl-C."""
    level = read_environment().log_level.upper()
    logging.basicConfig(level=level, format="%(asctime)s worker %(levelname)s %(message)s")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    if args.parent_pid is not None:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the server's to handle
        end_with_parent(args.parent_pid)
    shard = Shard.parse(args.shard)
    check_endpoint(args.endpoint, has_curve=args.curve_dir is not None)
    keys = None if args.curve_dir is None else load_server_keys(args.curve_dir)
    if args.node is not None:
        stay_on_node(args.node)
    threads = read_flags(ExpertConfig, args)
    native = NativeRuntime(threads.num_threads, threads.isa, threads.pin_threads, threads.spin_us)
    torch.set_num_threads(1)
    held = load_shard(read_flags(ModelConfig, args), shard, native, args.mapped)
    logger.info("kernels: %s", native.reason)
    with listening(args.endpoint, keys) as socket:
        endpoint = socket.get_string(zmq.LAST_ENDPOINT).rstrip("\0")
        print(f"worker: shard {shard} of {args.model} at {endpoint}", flush=True)
        ExpertWorker(held, native, args.standby).serve(socket)
    return 0


def stay_on_node(node: int) -> None:
    """Before memory is used or threads are started, so that both are the node's."""
    nodes = numa_nodes()
    cores = set(nodes.get(node, ())).intersection(allowed_cores())
    if not cores:
        known = ", ".join(map(str, nodes)) or "none"
        raise ConfigError(
            f"node: {node} has no cores that may be used here; there are the nodes {known}",
            field="node",
        )
    os.sched_setaffinity(0, cores)


@contextmanager
def listening(endpoint: str, keys: ServerKeys | None) -> Iterator[zmq.Socket[bytes]]:
    """A bound ROUTER. Raises ConfigError where the endpoint cannot be bound."""
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    authenticator = None
    try:
        socket = context.socket(zmq.ROUTER)
        socket.linger = 0
        socket.router_mandatory = True  # an engine that is gone is an error, not a silent drop
        socket.maxmsgsize = WORKER_MAX_BYTES
        socket.heartbeat_ivl = HEARTBEAT_MS
        socket.heartbeat_timeout = HEARTBEAT_TIMEOUT_MS
        socket.ipv6 = endpoint.startswith("tcp://[")
        if keys is not None:
            authenticator = ThreadAuthenticator(context, log=logging.getLogger("zmq.auth"))
            authenticator.start()
            authenticator.configure_curve_callback(ZAP_DOMAIN.decode(), KnownEngines(keys))
            socket.curve_secretkey = keys.secret
            socket.curve_publickey = keys.public
            socket.curve_server = True
            socket.zap_domain = ZAP_DOMAIN
        try:
            socket.bind(endpoint)
        except zmq.ZMQError as error:
            raise ConfigError(
                f"endpoint: cannot bind {endpoint}: {error.strerror}", field="endpoint"
            ) from error
        yield socket
        socket.close()
    finally:
        remove_socket_file(endpoint)
        if authenticator is not None:
            authenticator.stop()
        context.destroy(linger=0)


class KnownEngines:
    """Asked about the key of everybody who connects."""

    def __init__(self, keys: ServerKeys) -> None:
        self._keys = keys

    def callback(self, domain: str, key: bytes) -> bool:
        """key: z85."""
        known = key in self._keys.clients
        if not known:
            logger.warning("refused an engine with the unknown public key %s", key.decode())
        return known
