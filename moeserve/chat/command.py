"""`moeserve chat`: picks the backend, runs the loop."""

from __future__ import annotations

import argparse
import sys
from contextlib import closing
from typing import Any

from moeserve.chat.backends import Backend, HttpBackend, LocalBackend, ZmqBackend
from moeserve.chat.session import Session, Stopwatch
from moeserve.chat.terminal import LineReader, Screen, line_reader
from moeserve.cli_options import (
    ENGINE_SETTINGS,
    add_flags,
    add_sampling_flags,
    engine_config,
    sampling_params,
)
from moeserve.core import ErrorCode, MoeserveError
from moeserve.environment import Environment, read_environment
from moeserve.text.checks import check_text


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "model", nargs="?", metavar="MODEL", help="directory or hub id (default: the bundled model)"
    )
    server = parser.add_mutually_exclusive_group()
    server.add_argument("--url", help="OpenAI HTTP API of a server, such as http://127.0.0.1:8000")
    server.add_argument("--zmq", metavar="ENDPOINT", help="ZeroMQ endpoint of a server")
    parser.add_argument("--api-key", help="bearer token for --url (default: MOESERVE_API_KEY)")
    parser.add_argument("--curve-dir", help="keys made by `moeserve keygen`, for --zmq over TCP")
    parser.add_argument("--system", help="system message to start with")
    add_sampling_flags(parser)
    add_flags(parser, *ENGINE_SETTINGS)


def run(args: argparse.Namespace) -> int:
    """Talks until /exit or the end of input. Exit status 1 where no server answers."""
    environment = read_environment()
    screen = Screen()
    try:
        source = _backend(args, environment)
    except MoeserveError as error:
        if error.code is not ErrorCode.UNAVAILABLE:
            raise
        print(f"moeserve: {error}", file=sys.stderr)
        return 1
    with closing(source) as backend:
        screen.remark(f"{backend.name}: /help lists the commands, /exit leaves")
        reader = line_reader(environment.data_home / "chat_history")
        talk(backend, Session(system=args.system), reader, screen, sampling_params(args))
    return 0


def _backend(args: argparse.Namespace, environment: Environment) -> Backend:
    if (args.url or args.zmq) and args.model:
        raise MoeserveError(
            f"model: {args.model} cannot be loaded on a server",
            hint="leave MODEL or --url/--zmq out",
        )
    if args.url:
        return HttpBackend(args.url, args.api_key or environment.api_key)
    if args.zmq:
        return ZmqBackend(args.zmq, args.curve_dir)
    return LocalBackend(engine_config(args))


def talk(
    backend: Backend, session: Session, reader: LineReader, screen: Screen, params: dict[str, Any]
) -> None:
    """The loop: a line is a command or a question."""
    while not session.ended:
        line = reader.read()
        if line is None:
            return
        if not line.strip():
            continue
        try:
            if line.startswith("/"):
                screen.remark(session.command(line))
            else:
                _answer(backend, session, line, screen, params)
        except MoeserveError as error:
            session.take_back()
            screen.error(str(error))


def _answer(
    backend: Backend, session: Session, line: str, screen: Screen, params: dict[str, Any]
) -> None:
    session.ask(check_text(line, "message"))
    watch = Stopwatch()
    pieces: list[str] = []
    interrupted = ""
    try:
        with closing(backend.stream(session.messages, params)) as stream:
            for piece in stream:
                watch.piece(piece.text, piece.num_tokens)
                pieces.append(piece.text)
                screen.answer(piece.text)
    except KeyboardInterrupt:  # stops the answer, not the program; what was said stays said
        interrupted = " (stopped)"
    turn = watch.turn()
    session.answer("".join(pieces), turn)
    screen.end_answer()
    screen.remark(f"{turn}{interrupted}")
