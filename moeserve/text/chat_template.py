"""Chat templates: a conversation to the text that the model was trained on.

Compiling and rendering happen in a process of its own (template_renderer.py says why); this side
starts it, talks to it, ends it when it takes too long, and turns what went wrong into errors that
say whose fault it was.
"""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from moeserve.core import ErrorCode, ModelError, RequestError
from moeserve.environment import bare_environment
from moeserve.text import template_renderer
from moeserve.text.checks import read_json

STANDARD_ROLES = ("system", "developer", "user", "assistant", "tool", "function")
STARTUP_SECONDS = 30.0
# Marks the place where an open last message ends; found again in the rendered text.
OPEN_END = "\ue0f0moeserve-open-end\ue0f1"


@dataclass(frozen=True, kw_only=True)
class TemplateLimits:
    """What one rendering may cost. Beyond it the request is refused and the process ended."""

    max_template_chars: int = 1 << 20
    max_output_chars: int = 8 << 20
    max_seconds: float = 2.0
    max_memory_bytes: int = 512 << 20
    #: how long a rendering may wait for those before it
    max_wait_seconds: float = 10.0


class ChatTemplate:
    """The chat templates of one model. Safe to use from several threads; they take turns."""

    def __init__(
        self,
        templates: Mapping[str, str],
        special_tokens: Mapping[str, str],
        limits: TemplateLimits | None = None,
    ) -> None:
        """templates: jinja source by name; "default" is always there, "tool_use" may be.

        Raises ModelError for a template that is too long.
        """
        self._limits = limits or TemplateLimits()
        for name, source in templates.items():
            if len(source) > self._limits.max_template_chars:
                raise ModelError(
                    f"chat template {name!r}: {len(source)} characters, "
                    f"at most {self._limits.max_template_chars}"
                )
        self._templates = dict(templates)
        self._special_tokens = dict(special_tokens)
        self._lock = threading.Lock()
        self._renderer: _Renderer | None = None

    @classmethod
    def load(
        cls,
        path: str | Path,
        special_tokens: Mapping[str, str],
        limits: TemplateLimits | None = None,
    ) -> ChatTemplate | None:
        """The templates of a model directory; None if the model has none.

        Looks into chat_template.jinja and additional_chat_templates/*.jinja, then into
        tokenizer_config.json. Raises ModelError naming the file, also for a template that does not
        compile: every chat would fail on it.
        """
        found = _read_templates(Path(path))
        if not found:
            return None
        sources = {name: source for name, (source, _) in found.items()}
        template = cls(sources, special_tokens, limits)
        for name, (_, file) in found.items():
            # Its CPU time is limited as always; how busy the machine is must not fail a model.
            answer = template._ask(_encode({"template": name, "variables": None}), STARTUP_SECONDS)
            if "error" in answer:
                template.close()
                text = f"{file}: chat template {name!r} does not compile: {answer['error']}"
                raise ModelError(text)
        return template

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        variables: Mapping[str, Any] | None = None,
    ) -> str:
        """The text of a conversation.

        messages: mappings with `role` and `content`, and whatever else the template knows.
        continue_final_message: the text ends with the content of the last message, left open.
        variables: more names for the template; `tools` chooses the template "tool_use".
        Raises RequestError: the template refused or failed, or went over a limit.
        """
        chat = [{k: v for k, v in message.items() if v is not None} for message in messages]
        self._check_roles(chat)
        if continue_final_message:
            _mark_open_end(chat)
            add_generation_prompt = False
        name = "tool_use" if (variables or {}).get("tools") else "default"
        request = {
            "template": name if name in self._templates else "default",
            "variables": {
                "tools": None,
                "documents": None,
                **self._special_tokens,
                **(variables or {}),
                "messages": chat,
                "add_generation_prompt": add_generation_prompt,
            },
        }
        text = _text_of(self._ask(_encode(request), self._limits.max_seconds))
        return _cut_open_end(text) if continue_final_message else text

    def close(self) -> None:
        """Ends the renderer; the next rendering starts another."""
        with self._lock:
            self._drop_renderer()

    def _check_roles(self, chat: list[dict[str, Any]]) -> None:
        for index, message in enumerate(chat):
            role = message.get("role")
            if role in STANDARD_ROLES or self._mentions(role):
                continue
            raise RequestError(
                f"messages[{index}].role: {role!r} is not known to this model's chat template; "
                f"known roles: {', '.join(STANDARD_ROLES)}",
                field=f"messages[{index}].role",
            )

    def _mentions(self, role: object) -> bool:
        """A model may know roles of its own; then its template names them in quotes."""
        return any(
            f"{quote}{role}{quote}" in source
            for source in self._templates.values()
            for quote in "'\""
        )

    def _ask(self, request: bytes, seconds: float) -> dict[str, str]:
        if not self._lock.acquire(timeout=self._limits.max_wait_seconds):
            raise RequestError(
                f"chat template: {self._limits.max_wait_seconds} s passed before its turn came",
                code=ErrorCode.OVERLOADED,
            )
        try:
            if self._renderer is None:
                self._renderer = _Renderer(self._templates, self._limits)
            try:
                return self._renderer.ask(request, seconds)
            except TimeoutError:
                self._drop_renderer()
                error = f"{seconds} s passed"
            except (ConnectionError, EOFError):
                self._drop_renderer()
                error = "it used more CPU time, memory or stack than it may"
            return {"kind": "limit", "error": error}
        finally:
            self._lock.release()

    def _drop_renderer(self) -> None:
        if self._renderer is not None:
            self._renderer.end()
            self._renderer = None


class _Renderer:
    """The process that renders, and the socket to it."""

    def __init__(self, templates: Mapping[str, str], limits: TemplateLimits) -> None:
        ours, theirs = socket.socketpair()
        with theirs:
            # A session of its own: Ctrl-C in the terminal is for us, not for it.
            process = subprocess.Popen(
                [sys.executable, "-I", template_renderer.__file__],
                stdin=theirs.fileno(),
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                env=bare_environment(),
                start_new_session=True,
            )
        self.pid = process.pid
        self._connection = ours
        # Also ends the process when nobody holds this object any more, and at exit.
        self.end = weakref.finalize(self, _end_process, process, ours)
        setup = {"sys_path": sys.path, "templates": dict(templates), **asdict(limits)}
        try:
            self.ask(json.dumps(setup).encode(), STARTUP_SECONDS)
        except (TimeoutError, ConnectionError, EOFError) as error:
            self.end()
            raise RequestError(
                f"the process that renders chat templates did not start: {error!r}",
                code=ErrorCode.INTERNAL,
            ) from error

    def ask(self, request: bytes, seconds: float) -> dict[str, str]:
        """Raises TimeoutError, or ConnectionError or EOFError when the process has ended."""
        deadline = time.monotonic() + seconds
        self._connection.settimeout(seconds)
        template_renderer.send(self._connection, request)
        answer: dict[str, str] | None = template_renderer.receive(self._connection, deadline)
        if answer is None:
            raise EOFError
        return answer


def _end_process(process: subprocess.Popen[bytes], connection: socket.socket) -> None:
    connection.close()
    process.kill()
    process.wait()


def _encode(request: dict[str, Any]) -> bytes:
    """As JSON. Raises RequestError for what JSON cannot hold, such as a msgpack client's bytes."""
    try:
        return json.dumps(request).encode()
    except (TypeError, ValueError, RecursionError) as error:
        raise RequestError(
            f"messages: they or the template variables are not plain JSON data: {error}",
            field="messages",
        ) from error


def _text_of(answer: dict[str, str]) -> str:
    """The rendered text, or the error that its absence means."""
    if "text" in answer:
        return answer["text"]
    error = answer["error"]
    match answer["kind"]:
        case "syntax":
            raise RequestError(
                f"the chat template of this model is broken: {error}", code=ErrorCode.INTERNAL
            )
        case "limit":
            raise RequestError(
                f"messages: the chat template went over its limit: {error}", field="messages"
            )
        case "refused":
            raise RequestError(
                f"messages: the chat template refuses them: {error}", field="messages"
            )
        case _:
            raise RequestError(
                f"messages: the chat template failed on them: {error}", field="messages"
            )


def _mark_open_end(chat: list[dict[str, Any]]) -> None:
    content = chat[-1].get("content")
    if not isinstance(content, str):
        raise RequestError(
            "continue_final_message: the last message has no text to continue",
            field="continue_final_message",
        )
    chat[-1] = {**chat[-1], "content": content + OPEN_END}


def _cut_open_end(text: str) -> str:
    before, mark, _ = text.rpartition(OPEN_END)
    if not mark:
        raise RequestError(
            "continue_final_message: this model's chat template leaves out the last message",
            field="continue_final_message",
        )
    return before


def _read_templates(path: Path) -> dict[str, tuple[str, Path]]:
    """Source and file of every template, by name."""
    config = path / "tokenizer_config.json"
    declared = read_json(config).get("chat_template") if config.is_file() else None
    templates: dict[str, tuple[str, Path]] = {}
    match declared:
        case None:
            pass
        case str():
            templates["default"] = (declared, config)
        case [*entries] if all(
            isinstance(e, dict) and {"name", "template"} <= e.keys() for e in entries
        ):
            templates.update({str(e["name"]): (str(e["template"]), config) for e in entries})
        case _:
            raise ModelError(f"{config}: chat_template is neither text nor a list of them")
    main = path / "chat_template.jinja"
    files = {file.stem: file for file in (path / "additional_chat_templates").glob("*.jinja")}
    if main.is_file():
        files["default"] = main
    try:
        found = {name: (file.read_text(encoding="utf-8"), file) for name, file in files.items()}
    except (OSError, UnicodeDecodeError) as error:
        raise ModelError(f"{path}: a chat template cannot be read: {error}") from error
    templates = found or templates  # files replace what the config says, as a set
    if templates and "default" not in templates:
        raise ModelError(f"{path}: chat templates {', '.join(templates)}, but none named default")
    return templates
