"""Where the server is, and the keys to it.

This package works without the rest of moeserve, so it looks at the environment itself; the names
and the default are those of `moeserve serve`.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from zmq.auth import load_certificate

from moeserve.client.types import ClientError


def default_endpoint(environ: Mapping[str, str] = os.environ) -> str:
    """MOESERVE_ENDPOINT, else the ipc socket of this user's own server."""
    if named := environ.get("MOESERVE_ENDPOINT"):
        return named
    runtime = Path(environ.get("XDG_RUNTIME_DIR") or tempfile.gettempdir())
    return f"ipc://{runtime / f'moeserve-{os.getuid()}' / 'client.sock'}"


@dataclass(frozen=True)
class CurveKeys:
    """z85 keys of 40 characters: this client's pair and the server's public key."""

    public: bytes
    secret: bytes
    server: bytes


def load_keys(directory: str | os.PathLike[str], client: str = "client") -> CurveKeys:
    """Reads CLIENT.key_secret and server.key, as `moeserve keygen` wrote them.

    Raises ClientError naming the missing file.
    """
    folder = Path(directory)
    try:
        public, secret = load_certificate(folder / f"{client}.key_secret")
        server, _ = load_certificate(folder / "server.key")
    except (OSError, ValueError) as error:
        raise ClientError(
            f"curve_dir: {error}",
            code="invalid_request",
            field="curve_dir",
            hint="copy CLIENT.key_secret and server.key from the server's `moeserve keygen`",
        ) from error
    if secret is None:
        raise ClientError(
            f"curve_dir: {folder / f'{client}.key_secret'} holds no secret key",
            code="invalid_request",
            field="curve_dir",
        )
    return CurveKeys(public, secret, server)
