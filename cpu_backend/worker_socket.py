"""The engine's socket to one expert worker, and what tells how it fares."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import cast

import zmq
from zmq.utils.monitor import parse_monitor_message

from moeserve.cpu_backend.worker_types import LinkSettings
from moeserve.cpu_backend.worker_wire import WORKER_MAX_BYTES

RECONNECT_MS = 100
MONITORED = zmq.EVENT_HANDSHAKE_SUCCEEDED | zmq.EVENT_DISCONNECTED | zmq.EVENT_HANDSHAKE_FAILED_AUTH


@dataclass(frozen=True)
class WorkerSocket:
    """messages: a DEALER that connects by itself. monitor: tells what becomes of the connection."""

    messages: zmq.Socket[bytes]
    monitor: zmq.Socket[bytes]

    @classmethod
    def open(cls, endpoint: str, settings: LinkSettings) -> WorkerSocket:
        context, config = settings.context, settings.config
        socket = context.socket(zmq.DEALER)
        socket.linger = 0
        socket.immediate = True  # nothing queues up for a worker that is not there
        socket.reconnect_ivl = RECONNECT_MS
        socket.reconnect_ivl_max = 20 * RECONNECT_MS
        socket.maxmsgsize = WORKER_MAX_BYTES
        socket.heartbeat_ivl = round(config.worker_heartbeat_s * 1000)
        socket.heartbeat_timeout = round(config.worker_timeout_s * 1000)
        socket.heartbeat_ttl = round(config.worker_timeout_s * 1000)
        socket.handshake_ivl = round(config.worker_timeout_s * 1000)
        socket.ipv6 = endpoint.startswith("tcp://[")
        if (keys := settings.keys) is not None:
            socket.curve_publickey = keys.public
            socket.curve_secretkey = keys.secret
            socket.curve_serverkey = keys.server
        name = f"inproc://worker-{id(socket)}-{time.monotonic_ns()}"
        socket.monitor(name, MONITORED)
        monitor = context.socket(zmq.PAIR)
        monitor.linger = 0
        monitor.rcvhwm = 0  # ZeroMQ's thread would wait for a reader; an idle engine is none
        monitor.connect(name)
        socket.connect(endpoint)
        settings.sockets.update((socket, monitor))
        return cls(socket, monitor)

    def close(self, settings: LinkSettings) -> None:
        settings.sockets.difference_update((self.messages, self.monitor))
        self.messages.disable_monitor()
        self.monitor.close()
        self.messages.close()

    def next_message(self) -> list[bytes] | None:
        return self.messages.recv_multipart(zmq.NOBLOCK) if _readable(self.messages) else None

    def next_event(self) -> int | None:
        """One of MONITORED."""
        if not _readable(self.monitor):
            return None
        return int(parse_monitor_message(self.monitor.recv_multipart(zmq.NOBLOCK))["event"])


def _readable(socket: zmq.Socket[bytes]) -> bool:
    """False for a socket that was closed because the worker was refused."""
    return not socket.closed and bool(cast(int, socket.get(zmq.EVENTS)) & zmq.POLLIN)
