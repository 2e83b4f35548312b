"""A conversation: its turns, its commands, its file. No terminal in here."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from moeserve.core import MoeserveError

ROLES = ("system", "user", "assistant")
SAVE_VERSION = 1

HELP = """\
/system TEXT   set the system message (empty: remove it) and start over
/reset         forget the conversation, keep the system message
/save FILE     write the conversation to FILE (JSON)
/load FILE     go on with a saved conversation
/stats         figures of this conversation
/help          this text
/exit          leave (Ctrl-D does, too)
Enter sends, Alt-Enter or a backslash at the end of the line goes on to the next line.
Ctrl-C stops an answer; at the prompt it clears the line."""


@dataclass(frozen=True)
class Turn:
    """Figures of one answer, in seconds and tokens."""

    ttft_s: float
    total_s: float
    num_tokens: int

    @property
    def tokens_per_s(self) -> float:
        """Decode speed: tokens after the first over the time after the first."""
        after_first_s = self.total_s - self.ttft_s
        return (self.num_tokens - 1) / after_first_s if after_first_s > 0 else 0.0

    def __str__(self) -> str:
        return (
            f"{self.num_tokens} tokens, {self.tokens_per_s:.1f} tok/s, "
            f"first token after {self.ttft_s * 1000:.0f} ms"
        )


class Stopwatch:
    """Measures one answer: start it, tell it of each piece, ask for the Turn."""

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self._clock = clock
        self._started_s = clock()
        self._first_s: float | None = None
        self._num_pieces = 0
        self._num_tokens: int | None = None

    def piece(self, text: str, num_tokens: int | None) -> None:
        if self._first_s is None and (text or num_tokens):
            self._first_s = self._clock()
        self._num_pieces += bool(text)
        if num_tokens is not None:
            self._num_tokens = num_tokens

    def turn(self) -> Turn:
        """Tokens are those the source counted; pieces of text where it did not say (cancelled)."""
        now_s = self._clock()
        first_s = now_s if self._first_s is None else self._first_s
        tokens = self._num_pieces if self._num_tokens is None else self._num_tokens
        return Turn(first_s - self._started_s, now_s - self._started_s, tokens)


@dataclass
class Session:
    """The messages so far and what the commands do to them."""

    system: str | None = None
    turns: list[dict[str, str]] = field(default_factory=list)  # role, content
    figures: list[Turn] = field(default_factory=list)
    ended: bool = False

    @property
    def messages(self) -> list[dict[str, str]]:
        start = [{"role": "system", "content": self.system}] if self.system else []
        return start + self.turns

    def ask(self, text: str) -> None:
        self.turns.append({"role": "user", "content": text})

    def answer(self, text: str, turn: Turn) -> None:
        self.turns.append({"role": "assistant", "content": text})
        self.figures.append(turn)

    def take_back(self) -> None:
        """Forgets a question that got no answer."""
        if self.turns and self.turns[-1]["role"] == "user":
            self.turns.pop()

    def command(self, line: str) -> str:
        """Runs `/name argument`; returns what to show. Raises MoeserveError naming the fix."""
        name, _, argument = line[1:].partition(" ")
        argument = argument.strip()
        if name in ("exit", "quit"):
            self.ended = True
            return ""
        actions: dict[str, Callable[[str], str]] = {
            "help": lambda _: HELP,
            "system": self._set_system,
            "reset": self._reset,
            "save": self._save,
            "load": self._load,
            "stats": self._stats,
        }
        if name not in actions:
            raise MoeserveError(f"no command /{name}", hint="/help lists them")
        return actions[name](argument)

    def _set_system(self, text: str) -> str:
        self.system = text or None
        self._reset("")
        return "system message set, conversation reset" if text else "system message removed"

    def _reset(self, _: str) -> str:
        self.turns.clear()
        self.figures.clear()
        return "conversation reset"

    def _save(self, argument: str) -> str:
        path = _path(argument)
        content = {"version": SAVE_VERSION, "messages": self.messages}
        temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
        try:
            # Through a temporary file: a full disk must not cost the earlier version.
            temporary.write_text(json.dumps(content, ensure_ascii=False, indent=1), "utf-8")
            temporary.replace(path)
        except OSError as error:
            temporary.unlink(missing_ok=True)
            raise MoeserveError(f"cannot write {path}: {error.strerror}") from error
        return f"saved to {path}"

    def _load(self, argument: str) -> str:
        path = _path(argument)
        try:
            content = json.loads(path.read_text("utf-8"))
        except OSError as error:
            raise MoeserveError(f"cannot read {path}: {error.strerror}") from error
        except ValueError as error:
            raise MoeserveError(f"{path} is no saved conversation: {error}") from error
        self._take(content, path)
        return f"{len(self.turns)} messages from {path}"

    def _take(self, content: object, path: Path) -> None:
        messages = content.get("messages") if isinstance(content, dict) else None
        if not isinstance(messages, list) or not all(
            isinstance(m, dict) and m.get("role") in ROLES and isinstance(m.get("content"), str)
            for m in messages
        ):
            raise MoeserveError(
                f"{path} is no saved conversation",
                hint='expected {"messages": [{"role": …, "content": …}]}',
            )
        self._reset("")
        turns = [{"role": m["role"], "content": m["content"]} for m in messages]
        self.system = turns.pop(0)["content"] if turns and turns[0]["role"] == "system" else None
        self.turns.extend(turns)

    def _stats(self, _: str) -> str:
        if not self.figures:
            return "no answer yet"
        tokens = sum(turn.num_tokens for turn in self.figures)
        decode_s = sum(turn.total_s - turn.ttft_s for turn in self.figures)
        speed = (tokens - len(self.figures)) / decode_s if decode_s > 0 else 0.0
        return (
            f"{len(self.figures)} answers, {tokens} tokens, {speed:.1f} tok/s\n"
            f"last: {self.figures[-1]}"
        )


def _path(argument: str) -> Path:
    if not argument:
        raise MoeserveError("a file name is missing", hint="such as /save talk.json")
    return Path(argument).expanduser()
