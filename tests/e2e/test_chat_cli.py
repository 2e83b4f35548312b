"""`moeserve chat` at a real pseudo-terminal and through pipes, against a model and a server."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pexpect
import pytest
from server_process import Server, running_server

CHAT = [sys.executable, "-m", "moeserve.cli", "chat"]
FIGURES = r"\d+ tokens, [\d.]+ tok/s, first token after \d+ ms"
PATIENCE_S = 150


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with running_server() as server:
        yield server


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    """History goes to a directory of the test; the terminal is plain."""
    return {**os.environ, "XDG_DATA_HOME": str(tmp_path), "TERM": "dumb", "NO_COLOR": "1"}


def piped(lines: str, environment: dict[str, str], *flags: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*CHAT, *flags], input=lines, env=environment, capture_output=True, text=True,
        timeout=240, check=False,
    )  # fmt: skip


def test_a_person_at_a_terminal(tmp_path: Path, environment: dict[str, str]) -> None:
    chat = pexpect.spawn(
        CHAT[0], [*CHAT[1:], "--num-threads", "1"], env=environment, timeout=PATIENCE_S,
        encoding="utf-8", dimensions=(40, 200),
    )  # fmt: skip
    chat.expect("/help lists the commands")
    chat.expect("> ")
    chat.send("Write a short story\\\r about a dog.\r")  # two lines, sent by the second Enter
    chat.expect(FIGURES)
    chat.expect("> ")
    chat.send("/nonsense\r")
    chat.expect("no command /nonsense")
    chat.send("/stats\r")
    chat.expect(f"1 answers.*last: {FIGURES}")
    chat.expect("> ")
    saved = tmp_path / "talk.json"
    chat.send(f"/save {saved}\r")
    chat.expect("saved to")
    chat.send("/exit\r")
    chat.expect(pexpect.EOF)
    chat.close()
    assert chat.exitstatus == 0
    question, answer = json.loads(saved.read_text())["messages"]
    assert question == {"role": "user", "content": "Write a short story\n about a dog."}
    assert answer["role"] == "assistant"
    assert answer["content"].strip()
    assert "about a dog" in (tmp_path / "moeserve" / "chat_history").read_text()


def test_interrupt_stops_the_answer_and_not_the_program(environment: dict[str, str]) -> None:
    chat = pexpect.spawn(
        CHAT[0], [*CHAT[1:], "--num-threads", "1"], env=environment, timeout=PATIENCE_S,
        encoding="utf-8", dimensions=(40, 200),
    )  # fmt: skip
    chat.expect("> ")
    chat.send("Continue this scene from Shakespeare:\r")
    chat.expect(r"\n[A-Za-z, :']{4}")  # the first words of the answer
    chat.kill(signal.SIGINT)
    chat.expect(r"tok/s.*\(stopped\)|tok/s")
    chat.expect("> ")
    chat.send("/stats\r")
    chat.expect("1 answers")
    # The prompt shows a moment before the terminal is raw; a Ctrl-D in between is lost.
    for _ in range(PATIENCE_S):
        chat.sendcontrol("d")
        if chat.expect([pexpect.EOF, pexpect.TIMEOUT], timeout=1) == 0:
            break
    chat.close()
    assert chat.exitstatus == 0


@pytest.mark.parametrize("where", ["url", "zmq", "in process"])
def test_lines_from_a_pipe(
    where: str, server: Server, tmp_path: Path, environment: dict[str, str]
) -> None:
    flags = {"url": ("--url", server.http), "zmq": ("--zmq", server.zmq)}.get(where, ())
    saved = tmp_path / "talk.json"
    lines = f"/system be brief\nhello\nagain\\\nand again\n/save {saved}\n/stats\n"
    done = piped(lines, environment, "--max-tokens", "12", "--temperature", "0", *flags)
    assert done.returncode == 0, done.stderr
    assert len(re.findall(FIGURES, done.stdout)) == 3  # two answers, and the last one in /stats
    messages = json.loads(saved.read_text())["messages"]
    assert [m["role"] for m in messages] == ["system", "user", "assistant", "user", "assistant"]
    assert messages[3]["content"] == "again\nand again"
    # Greedy answers are the same wherever the model runs.
    expected = piped(lines, environment, "--max-tokens", "12", "--temperature", "0")
    assert expected.returncode == 0
    assert json.loads(saved.read_text())["messages"] == messages


def test_wrong_places_are_named(server: Server, environment: dict[str, str]) -> None:
    for flags, status, message in (
        (("--url", "http://127.0.0.1:9"), 1, "is `moeserve serve` running there?"),
        (("--url", server.http, "some-model"), 2, "leave MODEL or --url/--zmq out"),
        (("/no/such/model",), 2, "/no/such/model"),
    ):
        done = piped("hello\n", environment, *flags)
        assert done.returncode == status
        assert message in done.stderr
        assert "Traceback" not in done.stderr
    done = piped("hello\n/exit\n", environment, "--url", server.http, "--top-p", "7")
    assert done.returncode == 0  # a refused question does not end the conversation
    assert "top_p" in done.stdout
