"""Renders chat templates in a process of its own. Run by chat_template.py, never imported by it.

A chat template is a program that came with the model, and jinja's sandbox limits what it may
touch, not what it may cost: `{{ 'a' * 10**10 }}`, a filter that pads to a billion columns or a
loop in a loop run inside one call of the interpreter, where no deadline in the same process can
stop them. Here the kernel does: memory and CPU time have hard limits, and the parent kills the
process when the wall clock is up.

stdin is a socket. Every message, both ways, is a length (8 bytes, big-endian) and JSON. The first
holds the templates and the limits; each further one asks for one rendering, or with null for
variables, whether the template compiles.
"""

from __future__ import annotations

import json
import resource
import socket
import sys
import time
from collections.abc import Callable
from datetime import datetime
from functools import partial
from typing import Any


def receive(connection: socket.socket, deadline_s: float | None = None) -> Any:
    """The next message; None when the other side is gone.

    Raises TimeoutError when time.monotonic() reaches deadline_s first.
    """
    header = _receive_exactly(connection, 8, deadline_s)
    if header is None:
        return None
    body = _receive_exactly(connection, int.from_bytes(header, "big"), deadline_s)
    return None if body is None else json.loads(body)


def _receive_exactly(
    connection: socket.socket, size: int, deadline_s: float | None
) -> bytes | None:
    received = bytearray()
    while len(received) < size:
        if deadline_s is not None:
            connection.settimeout(max(deadline_s - time.monotonic(), 1e-6))
        part = connection.recv(min(size - len(received), 1 << 20))
        if not part:
            return None
        received += part
    return bytes(received)


def send(connection: socket.socket, body: bytes) -> None:
    """body: a message as JSON."""
    connection.sendall(len(body).to_bytes(8, "big") + body)


def limit_cpu(seconds: int) -> None:
    """Lets the process use so much more CPU time; the kernel ends it after that.

    Set before each rendering, so that it ends even when the parent died and cannot kill it.
    """
    usage = resource.getrusage(resource.RUSAGE_SELF)
    used = int(usage.ru_utime + usage.ru_stime)
    resource.setrlimit(resource.RLIMIT_CPU, (used + seconds + 1, resource.RLIM_INFINITY))


def build_environment() -> Any:
    """The environment that Hugging Face chat templates are written for."""
    from jinja2 import TemplateError, nodes
    from jinja2.exceptions import SecurityError
    from jinja2.ext import Extension, loopcontrols
    from jinja2.parser import Parser
    from jinja2.sandbox import ImmutableSandboxedEnvironment
    from jinja2.utils import Namespace

    class GenerationTag(Extension):
        """`{% generation %}` marks the assistant's words for training; here it changes nothing."""

        tags = {"generation"}  # noqa: RUF012 - jinja declares it as an instance attribute

        def parse(self, parser: Parser) -> nodes.Node:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return nodes.Scope(body, lineno=line)

    class SafeNamespace(Namespace):
        """Refuses names that begin with an underscore: they would reach the object's own."""

        def __init__(*args: Any, **kwargs: Any) -> None:
            self, args = args[0], args[1:]
            names = dict(*args, **kwargs)
            for name in names:
                _check_name(name)
            Namespace.__init__(self, names)

        def __setitem__(self, name: str, value: Any) -> None:
            _check_name(name)
            super().__setitem__(name, value)

    def _check_name(name: object) -> None:
        if str(name).startswith("_"):
            raise SecurityError(f"a template may not set {name!r} on a namespace")

    def raise_exception(message: str) -> None:
        raise TemplateError(message)

    def tojson(
        value: Any,
        ensure_ascii: bool = False,
        indent: int | None = None,
        separators: tuple[str, str] | None = None,
        sort_keys: bool = False,
    ) -> str:
        # jinja's own filter escapes HTML, which no model was trained on.
        return json.dumps(
            value,
            ensure_ascii=ensure_ascii,
            indent=indent,
            separators=separators,
            sort_keys=sort_keys,
        )

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[GenerationTag, loopcontrols]
    )
    environment.filters["tojson"] = tojson
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = lambda style: datetime.now().strftime(style)
    environment.globals["namespace"] = SafeNamespace
    return environment


def guarded(action: Callable[[], str], max_chars: int) -> dict[str, str]:
    """Does one thing with a template and says how it went: `text`, or `kind` and `error`."""
    from jinja2 import TemplateError, TemplateSyntaxError

    try:
        text = action()
    except TemplateSyntaxError as error:
        return {"kind": "syntax", "error": f"line {error.lineno}: {error.message}"}
    except (MemoryError, RecursionError, OverflowError) as error:
        return {"kind": "limit", "error": str(error) or type(error).__name__}
    except TemplateError as error:
        return {"kind": "refused", "error": str(error.message or type(error).__name__)[:2000]}
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        return {"kind": "failed", "error": f"{type(error).__name__}: {error}"[:2000]}
    if len(text) > max_chars:
        return {"kind": "limit", "error": f"{len(text)} characters, at most {max_chars}"}
    return {"text": text}


def main() -> None:
    connection = socket.socket(fileno=0)
    setup = receive(connection)
    if setup is None:
        return
    # -I starts Python with nothing of the caller's on its path; jinja2 is where the parent has it.
    sys.path[:] = setup["sys_path"]
    environment = build_environment()
    memory = int(setup["max_memory_bytes"])
    resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    seconds = int(setup["max_seconds"])
    sources: dict[str, str] = setup["templates"]
    compiled: dict[str, Any] = {}

    def render(name: str, variables: dict[str, Any] | None) -> str:
        if name not in compiled:
            compiled[name] = environment.from_string(sources[name])
        return "" if variables is None else str(compiled[name].render(variables))

    send(connection, b'{"text": ""}')  # ready; from here on the parent counts the time
    while (request := receive(connection)) is not None:
        limit_cpu(seconds)
        action = partial(render, request["template"], request["variables"])
        answer = guarded(action, int(setup["max_output_chars"]))
        send(connection, json.dumps(answer).encode())


if __name__ == "__main__":
    main()
