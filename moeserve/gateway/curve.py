"""CURVE keys: making them, loading them, and letting only known clients in.

A key directory, mode 0700, holds files in ZeroMQ's certificate format (ZPL, RFC 4/ZPL), all 0600:

    server.key_secret          the server's pair; stays on the server
    server.key                 the server's public key; every client needs a copy
    client.key_secret          a client's pair; move it to the client
    authorized_clients/*.key   public keys of the clients that may connect (read at start)

CURVE itself is ZMTP's CurveZMQ (RFC 26/CURVEZMQ); clients are checked through ZAP (RFC 27/ZAP).
"""

from __future__ import annotations

import logging
import os
import re
from dataclasses import dataclass
from pathlib import Path

import zmq
import zmq.asyncio
from zmq.auth import load_certificate
from zmq.auth.asyncio import AsyncioAuthenticator

from moeserve.core import ConfigError
from moeserve.gateway.zmq_endpoint import check_private, make_private_directory

ZAP_DOMAIN = b"moeserve"
AUTHORIZED = "authorized_clients"

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class ServerKeys:
    """z85 texts of 40 bytes each. clients: public keys that may connect."""

    public: bytes
    secret: bytes
    clients: frozenset[bytes]


def write_keys(directory: Path, client: str = "client") -> list[Path]:
    """Makes a server's pair (unless there is one) and the pair of a client; returns the new files.

    Raises ConfigError when the client's keys exist: keys are never overwritten.
    """
    if not re.fullmatch(r"[A-Za-z0-9_-]{1,64}", client) or client == "server":
        raise ConfigError(
            f"client: {client!r} is not a name of letters, digits, '-' and '_' other than 'server'",
            field="client",
        )
    make_private_directory(directory)
    make_private_directory(directory / AUTHORIZED)
    secret_file = directory / f"{client}.key_secret"
    public_file = directory / AUTHORIZED / f"{client}.key"
    for path in (secret_file, public_file):
        if path.exists():
            raise ConfigError(
                f"{path} exists and keys are never overwritten",
                hint="name another client with --client NAME, or another directory",
            )
    written = []
    if not (directory / "server.key_secret").exists():
        written += _write_pair(directory / "server.key", directory / "server.key_secret")
    return written + _write_pair(public_file, secret_file)


def load_server_keys(directory: Path) -> ServerKeys:
    """The server's pair and the clients it lets in. Raises ConfigError with the fix."""
    check_private(directory)
    public, secret = _load(directory / "server.key_secret")
    if secret is None:
        raise ConfigError(f"{directory / 'server.key_secret'}: holds no secret key")
    clients = frozenset(_load(path)[0] for path in (directory / AUTHORIZED).glob("*.key"))
    if not clients:
        raise ConfigError(
            f"{directory / AUTHORIZED}: no client may connect, for it holds no *.key",
            hint=f"moeserve keygen {directory} --client NAME",
        )
    return ServerKeys(public, secret, clients)


class ClientGate:
    """Answers ZAP for the sockets of one context: known client keys only."""

    def __init__(self, context: zmq.asyncio.Context, keys: ServerKeys) -> None:
        self._keys = keys
        self._authenticator = AsyncioAuthenticator(context, log=logging.getLogger("zmq.auth"))
        self._authenticator.configure_curve_callback(ZAP_DOMAIN.decode(), self)

    def start(self) -> None:
        """Call before any socket of the context binds."""
        self._authenticator.start()

    def stop(self) -> None:
        self._authenticator.stop()

    def secure(self, socket: zmq.asyncio.Socket) -> None:
        """Makes the socket speak CURVE as the server and ask this gate about every client."""
        socket.curve_secretkey = self._keys.secret
        socket.curve_publickey = self._keys.public
        socket.curve_server = True
        socket.zap_domain = ZAP_DOMAIN

    def callback(self, domain: str, key: bytes) -> bool:
        """Called by the authenticator with the client's public key (z85)."""
        known = key in self._keys.clients
        if not known:
            log.warning("zmq: refused a client with the unknown public key %s", key.decode())
        return known


def _write_pair(public_file: Path, secret_file: Path) -> list[Path]:
    public, secret = (key.decode() for key in zmq.curve_keypair())
    _write(public_file, f'curve\n    public-key = "{public}"\n')
    text = f'# secret: give this file to nobody\ncurve\n    public-key = "{public}"\n'
    _write(secret_file, f'{text}    secret-key = "{secret}"\n')
    return [public_file, secret_file]


def _write(path: Path, text: str) -> None:
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with open(descriptor, "w", encoding="ascii") as file:
        file.write(text)


def _load(path: Path) -> tuple[bytes, bytes | None]:
    try:
        public, secret = load_certificate(path)
    except (OSError, ValueError) as error:
        hint = f"make keys with: moeserve keygen {path.parent}"
        raise ConfigError(f"curve_dir: {error}", field="curve_dir", hint=hint) from error
    for key in (public, secret):
        if key is not None and len(key) != 40:
            raise ConfigError(f"{path}: a key has {len(key)} characters, not 40", field="curve_dir")
    return public, secret
