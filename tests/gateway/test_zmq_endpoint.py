"""Who can reach a socket, and CURVE keys over real sockets."""

from __future__ import annotations

import asyncio
import os
import socket
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest
from zmq_support import RawClient, private_directory, running_stack, until

from moeserve.client import AsyncClient, ClientError, TimedOut
from moeserve.config import ZmqConfig
from moeserve.core import ConfigError
from moeserve.gateway.curve import load_server_keys, write_keys
from moeserve.gateway.zmq_endpoint import check_endpoint, make_private_directory


@pytest.fixture
def loose_umask() -> Iterator[None]:
    old = os.umask(0)
    yield
    os.umask(old)


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


@pytest.mark.usefixtures("loose_umask")
def test_directories_are_made_private(tmp_path: Path) -> None:
    check_endpoint(f"ipc://{tmp_path}/a/b/x.sock", has_curve=False)
    assert mode(tmp_path / "a" / "b") == 0o700
    make_private_directory(tmp_path / "a" / "b")  # a second time it is only checked


def test_directories_that_cannot_be_made_are_named(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.touch()
    with pytest.raises(ConfigError, match="file/keys: "):
        make_private_directory(file / "keys")
    with pytest.raises(ConfigError, match=r"/proc/none/keys: cannot be made: "):
        make_private_directory(Path("/proc/none/keys"))


def test_directories_of_others_are_refused(tmp_path: Path) -> None:
    for bits in (0o755, 0o710, 0o701, 0o777):
        (tmp_path / "open").mkdir(exist_ok=True)
        (tmp_path / "open").chmod(bits)
        with pytest.raises(ConfigError, match="chmod 700"):
            check_endpoint(f"ipc://{tmp_path}/open/x.sock", has_curve=False)
    private_directory(tmp_path / "real")
    (tmp_path / "link").symlink_to(tmp_path / "real")
    with pytest.raises(ConfigError, match="not a directory"):
        check_endpoint(f"ipc://{tmp_path}/link/x.sock", has_curve=False)
    if os.getuid() == 0:
        private_directory(tmp_path / "theirs")
        os.chown(tmp_path / "theirs", 12345, -1)
        with pytest.raises(ConfigError, match="belongs to user 12345"):
            check_endpoint(f"ipc://{tmp_path}/theirs/x.sock", has_curve=False)


@pytest.mark.parametrize(
    "endpoint",
    [
        *(
            "",
            "x",
            "http://localhost:1",
            "inproc://x",
            "ipc://@abstract",
            "ipc://*",
            "ipc://x.sock",
        ),
        *("ipc://", "tcp://", "tcp://localhost", "tcp://::1:5", f"ipc:///tmp/{'x' * 120}/y"),
    ],
)
def test_endpoints_that_are_none(endpoint: str) -> None:
    with pytest.raises(ConfigError, match="endpoint"):
        check_endpoint(endpoint, has_curve=True)


def test_a_stale_socket_is_removed_and_a_live_one_is_not(tmp_path: Path) -> None:
    path = private_directory(tmp_path / "run") / "x.sock"
    endpoint = f"ipc://{path}"
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(path))
        server.listen()
        with pytest.raises(ConfigError, match="already answers"):
            check_endpoint(endpoint, has_curve=False)
        assert path.exists()
    check_endpoint(endpoint, has_curve=False)
    assert not path.exists()
    path.write_text("precious")
    with pytest.raises(ConfigError, match="not a socket"):
        check_endpoint(endpoint, has_curve=False)
    assert path.read_text() == "precious"


def test_a_second_server_at_the_same_place_is_refused(tmp_path: Path) -> None:
    async def main() -> None:
        async with running_stack(tmp_path) as stack:
            with pytest.raises(ConfigError, match="already answers"):
                async with running_stack(tmp_path / "second", endpoint=stack.endpoint):
                    pass
            async with AsyncClient(stack.endpoint) as client:
                assert (await client.generate("abc", max_tokens=3)).text == "abc"

    (tmp_path / "second").mkdir()
    asyncio.run(asyncio.wait_for(main(), 200))


@pytest.mark.parametrize("host", ["0.0.0.0", "*", "[::]", "192.0.2.1", "example.com", "eth0"])
def test_tcp_beyond_loopback_needs_curve(host: str) -> None:
    with pytest.raises(ConfigError, match="moeserve keygen"):
        check_endpoint(f"tcp://{host}:5555", has_curve=False)
    check_endpoint(f"tcp://{host}:5555", has_curve=True)


@pytest.mark.parametrize("host", ["127.0.0.1", "127.1.2.3", "localhost", "[::1]"])
def test_tcp_on_loopback_needs_no_curve(host: str) -> None:
    check_endpoint(f"tcp://{host}:*", has_curve=False)


def test_keys_are_private_and_never_overwritten(tmp_path: Path) -> None:
    directory = tmp_path / "keys"
    written = write_keys(directory)
    assert {path.name for path in written} == {
        *("server.key", "server.key_secret", "client.key", "client.key_secret"),
    }
    assert {mode(path) for path in written} == {0o600}
    assert mode(directory) == 0o700
    before = {path: path.read_bytes() for path in written}
    with pytest.raises(ConfigError, match="never overwritten"):
        write_keys(directory)
    second = write_keys(directory, client="second")  # same server, one more client
    assert {path.name for path in second} == {"second.key", "second.key_secret"}
    assert {path: path.read_bytes() for path in written} == before
    keys = load_server_keys(directory)
    assert len(keys.clients) == 2
    assert keys.public not in keys.clients
    for name in ("../x", "server", "", "a b"):
        with pytest.raises(ConfigError, match="client"):
            write_keys(directory, client=name)


def test_key_directories_that_do_not_serve(tmp_path: Path) -> None:
    directory = tmp_path / "keys"
    with pytest.raises(ConfigError):
        load_server_keys(directory)
    write_keys(directory)
    for path in (directory / "authorized_clients").iterdir():
        path.unlink()
    with pytest.raises(ConfigError, match="no client may connect"):
        load_server_keys(directory)
    (directory / "server.key_secret").write_text("nonsense")
    with pytest.raises(ConfigError, match="curve_dir"):
        load_server_keys(directory)
    directory.chmod(0o755)
    with pytest.raises(ConfigError, match="chmod 700"):
        load_server_keys(directory)


def test_curve_lets_known_clients_in_and_nobody_else(tmp_path: Path) -> None:
    keys, strangers = tmp_path / "keys", tmp_path / "strangers"
    write_keys(keys)
    write_keys(strangers)

    async def main() -> None:
        config = ZmqConfig(curve_dir=keys, heartbeat_s=0.05)
        async with running_stack(tmp_path, config, "tcp://127.0.0.1:*") as stack:
            assert not stack.endpoint.endswith("*")
            async with AsyncClient(stack.endpoint, curve_dir=keys) as client:
                assert (await client.generate("abc", max_tokens=3)).text == "abc"
            await until(lambda: stack.front.num_sessions == 0)  # nobody else's is mistaken for it

            # The right server key, but a client pair the server does not know.
            (strangers / "server.key").write_bytes((keys / "server.key").read_bytes())
            async with AsyncClient(stack.endpoint, curve_dir=strangers) as client:
                with pytest.raises(ClientError) as caught:
                    await client.generate("abc")
                assert caught.value.code == "unauthorized"

            # No keys at all.
            async with AsyncClient(stack.endpoint, connect_timeout_s=0.5) as client:
                with pytest.raises((TimedOut, ClientError)):
                    await client.generate("abc")
            async with RawClient(stack.endpoint) as raw:
                await raw.send("hello")
                with pytest.raises(asyncio.TimeoutError):
                    await asyncio.wait_for(raw.socket.recv_multipart(), 0.5)
            assert stack.front.num_sessions == 0

    asyncio.run(asyncio.wait_for(main(), 200))


def test_a_client_with_the_wrong_server_key_does_not_talk(tmp_path: Path) -> None:
    keys, other = tmp_path / "keys", tmp_path / "other"
    write_keys(keys)
    write_keys(other)
    (keys / "server.key").write_bytes((other / "server.key").read_bytes())

    async def main() -> None:
        config = ZmqConfig(curve_dir=keys)
        async with running_stack(tmp_path, config, "tcp://127.0.0.1:*") as stack:
            async with AsyncClient(stack.endpoint, curve_dir=keys, connect_timeout_s=0.5) as client:
                with pytest.raises(ClientError):
                    await client.generate("abc")
            assert stack.front.num_sessions == 0

    asyncio.run(asyncio.wait_for(main(), 200))
    with pytest.raises(ClientError, match="curve_dir"):
        AsyncClient("tcp://127.0.0.1:1", curve_dir=tmp_path)
