"""Where sockets may live: private directories for ipc://, loopback for TCP unless CURVE guards it.

Anybody who can connect may generate text, so an endpoint that others can reach is refused, with
the fix in the message, before anything is bound.
"""

from __future__ import annotations

import os
import socket
import stat
from pathlib import Path

from moeserve.core import ConfigError
from moeserve.endpoints import is_loopback, tcp_host

#: sun_path of sockaddr_un holds 108 bytes, the last one NUL
MAX_IPC_PATH_BYTES = 107


def make_private_directory(directory: Path) -> None:
    """Creates the directory (0700, parents too) or checks the one that is there.

    Raises ConfigError where it cannot be made or is not private.
    """
    if os.path.lexists(directory):
        check_private(directory)
        return
    try:
        directory.parent.mkdir(parents=True, exist_ok=True)
        directory.mkdir(mode=0o700)
    except FileExistsError:
        check_private(directory)  # somebody made it meanwhile, or what is above is a file
    except OSError as error:
        raise ConfigError(f"{directory}: cannot be made: {error.strerror}") from error


def check_private(directory: Path) -> None:
    """Raises ConfigError unless it is a real directory of ours that only we can enter."""
    try:
        status = directory.lstat()
    except OSError as error:
        raise ConfigError(f"{directory}: {error.strerror}") from error
    if not stat.S_ISDIR(status.st_mode):
        raise ConfigError(f"{directory} is not a directory (links are not followed)")
    if status.st_uid != os.getuid():
        raise ConfigError(
            f"{directory} belongs to user {status.st_uid}, not to us ({os.getuid()})",
            hint="name another directory",
        )
    if status.st_mode & 0o077:
        mode = stat.S_IMODE(status.st_mode)
        raise ConfigError(
            f"{directory} has mode {mode:04o}: others could reach what is inside",
            hint=f"chmod 700 {directory}",
        )


def check_endpoint(endpoint: str, has_curve: bool) -> None:
    """Refuses an endpoint that others could reach. Makes the directory of an ipc:// endpoint.

    Raises ConfigError: unknown transport, unusable ipc path, a live server at the same path, TCP
    beyond loopback without CURVE.
    """
    transport, separator, address = endpoint.partition("://")
    if separator and transport == "ipc":
        _prepare_ipc(address)
    elif separator and transport == "tcp":
        _check_tcp(endpoint, has_curve)
    else:
        raise ConfigError(
            f"endpoint: {endpoint!r} is neither ipc://PATH nor tcp://HOST:PORT", field="endpoint"
        )


def _prepare_ipc(address: str) -> None:
    path = Path(address)
    if not path.is_absolute():
        # Abstract names (ipc://@x) and wildcards (ipc://*) have no permissions to check.
        raise ConfigError(f"endpoint: ipc path {address!r} is not absolute", field="endpoint")
    size_bytes = len(os.fsencode(address))
    if size_bytes > MAX_IPC_PATH_BYTES:
        raise ConfigError(
            f"endpoint: ipc path of {size_bytes} bytes, the system allows {MAX_IPC_PATH_BYTES}: "
            f"{address}",
            field="endpoint",
            hint="use a shorter directory",
        )
    make_private_directory(path.parent)
    _remove_stale_socket(path)


def _remove_stale_socket(path: Path) -> None:
    """ZeroMQ would silently take the path of a running server: it unlinks before it binds."""
    if not path.exists():
        return
    if not path.is_socket():
        raise ConfigError(f"endpoint: {path} exists and is not a socket", field="endpoint")
    with socket.socket(socket.AF_UNIX) as probe:
        probe.settimeout(1.0)  # a full backlog waits; whoever has one is alive
        try:
            probe.connect(os.fspath(path))
        except ConnectionRefusedError:
            path.unlink()
            return
        except TimeoutError:
            pass
    raise ConfigError(
        f"endpoint: a server already answers at ipc://{path}",
        field="endpoint",
        hint="stop it, or name another endpoint",
    )


def remove_socket_file(endpoint: str) -> None:
    """Removes the file of an ipc endpoint that is still bound: nobody else can have taken it yet.

    ZeroMQ leaves it behind, and other tools would take it for a server.
    """
    if endpoint.startswith("ipc://"):
        Path(endpoint.removeprefix("ipc://")).unlink(missing_ok=True)


def _check_tcp(endpoint: str, has_curve: bool) -> None:
    host = tcp_host(endpoint)
    if not has_curve and not is_loopback(host):
        raise ConfigError(
            f"endpoint: {endpoint} can be reached by others and has no CURVE keys",
            field="endpoint",
            hint="run `moeserve keygen DIR` and serve with --curve-dir DIR, or bind 127.0.0.1",
        )
