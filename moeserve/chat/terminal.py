"""The terminal side: reading lines, showing text."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Protocol

from prompt_toolkit import PromptSession
from prompt_toolkit.completion import WordCompleter
from prompt_toolkit.history import FileHistory
from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent
from rich.console import Console
from rich.text import Text

COMMANDS = ["/system ", "/reset", "/save ", "/load ", "/stats", "/help", "/exit"]


class LineReader(Protocol):
    def read(self) -> str | None:
        """The next message, several lines joined; None at the end of input."""
        ...


class PromptReader:
    """Line editing with history for a person at a terminal."""

    def __init__(self, history: Path) -> None:
        history.parent.mkdir(parents=True, exist_ok=True)
        history.touch(mode=0o600, exist_ok=True)
        self._session: PromptSession[str] = PromptSession(
            history=FileHistory(str(history)),
            completer=WordCompleter(COMMANDS, sentence=True),
            complete_while_typing=False,
            key_bindings=_keys(),
            multiline=True,
            prompt_continuation="… ",
        )

    def read(self) -> str | None:
        while True:
            try:
                return self._session.prompt("> ")
            except KeyboardInterrupt:  # clears the line, does not end the program
                continue
            except EOFError:
                return None


def _keys() -> KeyBindings:
    """Enter sends (or goes on after a backslash), Alt-Enter makes a new line."""
    keys = KeyBindings()

    @keys.add("enter")
    def _(event: KeyPressEvent) -> None:
        buffer = event.current_buffer
        if buffer.document.text_before_cursor.endswith("\\"):
            buffer.delete_before_cursor()
            buffer.insert_text("\n")
        else:
            buffer.validate_and_handle()

    @keys.add("escape", "enter")
    def _(event: KeyPressEvent) -> None:
        event.current_buffer.insert_text("\n")

    return keys


class PipeReader:
    """Lines from a pipe or a file: one message per line, a backslash at the end goes on."""

    def read(self) -> str | None:
        lines: list[str] = []
        for line in sys.stdin:
            lines.append(line.rstrip("\n"))
            if not lines[-1].endswith("\\"):
                break
            lines[-1] = lines[-1][:-1]
        return "\n".join(lines) if lines else None


def line_reader(history: Path) -> LineReader:
    return PromptReader(history) if sys.stdin.isatty() else PipeReader()


class Screen:
    """Shows answers as they come, and remarks around them."""

    def __init__(self, console: Console | None = None) -> None:
        self._console = console or Console(highlight=False)

    def answer(self, text: str) -> None:
        # A model must not move the cursor, change colours or set the title: no control characters.
        clean = "".join(c for c in text if c in "\n\t" or c.isprintable())
        self._console.out(clean, end="", highlight=False)

    def end_answer(self) -> None:
        self._console.print()

    def remark(self, text: str) -> None:
        self._console.print(Text(text, style="dim"))

    def error(self, text: str) -> None:
        self._console.print(Text(text, style="red"))
