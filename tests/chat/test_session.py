"""The conversation behind the chat CLI: commands, files, figures."""

from __future__ import annotations

import io
import json
import socket
from contextlib import closing
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from moeserve.chat.command import talk
from moeserve.chat.session import HELP, Session, Stopwatch, Turn
from moeserve.chat.terminal import PipeReader, Screen
from moeserve.cli import main
from moeserve.core import MoeserveError


def talked() -> Session:
    session = Session(system="be brief")
    session.ask("one?")
    session.answer("1", Turn(0.5, 1.5, 11))
    return session


def test_messages_start_with_the_system_message() -> None:
    assert talked().messages == [
        {"role": "system", "content": "be brief"},
        {"role": "user", "content": "one?"},
        {"role": "assistant", "content": "1"},
    ]


@given(st.lists(st.tuples(st.text(), st.text())), st.one_of(st.none(), st.text(min_size=1)))
def test_saved_conversation_loads_equal(
    tmp_path_factory: pytest.TempPathFactory, turns: list[tuple[str, str]], system: str | None
) -> None:
    # Lone surrogates are no text; /save names them, and they cannot be typed.
    texts = [text for pair in turns for text in pair] + [system or ""]
    if any(0xD800 <= ord(c) <= 0xDFFF for text in texts for c in text):
        return
    session = Session(system=system)
    for question, answer in turns:
        session.ask(question)
        session.answer(answer, Turn(0, 0, 0))
    path = tmp_path_factory.mktemp("chat") / "talk.json"
    session.command(f"/save {path}")
    other = Session(system="something else")
    other.ask("gone after the load")
    other.command(f"/load {path}")
    assert other.messages == session.messages


@pytest.mark.parametrize(
    "content",
    [
        "",
        "not json",
        "[]",
        '{"messages": 3}',
        '{"messages": [{"role": "robot", "content": ""}]}',
        '{"messages": [{"role": "user", "content": 5}]}',
    ],
)
def test_broken_file_is_refused_and_nothing_lost(tmp_path: Path, content: str) -> None:
    path = tmp_path / "talk.json"
    path.write_text(content)
    session = talked()
    with pytest.raises(MoeserveError, match=r"talk\.json"):
        session.command(f"/load {path}")
    assert len(session.messages) == 3


def test_failed_save_keeps_the_earlier_file(tmp_path: Path) -> None:
    with pytest.raises(MoeserveError, match="cannot write"):
        talked().command(f"/save {tmp_path / 'missing' / 'talk.json'}")
    with pytest.raises(MoeserveError, match="file name"):
        talked().command("/save")
    path = tmp_path / "talk.json"
    talked().command(f"/save {path}")
    assert json.loads(path.read_text())["messages"] == talked().messages
    assert list(tmp_path.iterdir()) == [path]


def test_commands() -> None:
    session = talked()
    assert session.command("/help") == HELP
    assert "11 tokens, 10.0 tok/s, first token after 500 ms" in session.command("/stats")
    session.command("/system talk like a pirate")
    assert session.messages == [{"role": "system", "content": "talk like a pirate"}]
    session.ask("?")
    session.command("/reset")
    assert len(session.messages) == 1
    session.command("/system")
    assert session.messages == []
    with pytest.raises(MoeserveError, match="/help lists them"):
        session.command("/dance")
    session.command("/exit")
    assert session.ended


def test_an_address_that_is_none_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    for url in ("foo", "ftp://127.0.0.1", "127.0.0.1:8000", "http://"):
        assert main(["chat", "--url", url]) == 2
        assert f"url: {url!r} is no HTTP address" in capsys.readouterr().err


def test_a_server_that_is_not_there_is_status_1(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with closing(socket.create_server(("127.0.0.1", 0))) as taken:
        port = taken.getsockname()[1]
    assert main(["chat", "--url", f"http://127.0.0.1:{port}"]) == 1
    assert "no answer from" in capsys.readouterr().err


def test_bytes_that_are_no_text_are_refused_before_they_are_sent(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def stream(messages: object, params: object) -> None:
        raise AssertionError("it was sent")

    screen, session = io.StringIO(), talked()
    monkeypatch.setattr("sys.stdin", io.StringIO("\udcff\n"))
    backend: Any = SimpleNamespace(stream=stream)
    talk(backend, session, PipeReader(), Screen(Console(file=screen)), {})
    assert "U+DCFF at character 0" in screen.getvalue()
    assert session.messages == talked().messages


def test_question_without_answer_is_taken_back() -> None:
    session = talked()
    session.ask("two?")
    session.take_back()
    session.take_back()
    assert session.messages == talked().messages


def test_stopwatch_counts_from_the_first_text() -> None:
    times = iter([10.0, 10.25, 12.25])
    watch = Stopwatch(lambda: next(times))
    watch.piece("", None)
    watch.piece("a", 1)
    watch.piece("b", 5)
    turn = watch.turn()
    assert turn == Turn(0.25, 2.25, 5)
    assert turn.tokens_per_s == 2.0
