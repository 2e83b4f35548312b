"""The engine process: `python -m moeserve.engine.process ENDPOINT < config.json`.

The gateway's supervisor starts it. Standard input holds an EngineConfig as JSON; ENDPOINT is where
the gateway listens. Logs go to standard error. It ends with the gateway, however that one ends.
"""

from __future__ import annotations

import argparse
import contextlib
import logging
import queue
import signal
import sys
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING

import msgspec

from moeserve.config import EngineConfig
from moeserve.control_messages import EngineControl, EngineControlEnd
from moeserve.core import EngineDelta, ErrorCode, FinishReason, MoeserveError, RequestError
from moeserve.engine.channel import Command, EngineChannel
from moeserve.environment import tune_native_libraries
from moeserve.messages import EngineAbort, EngineShutdown, EngineSubmit
from moeserve.parent_process import end_with_parent
from moeserve.text.checks import check_tokenizer_file

if TYPE_CHECKING:
    from moeserve.engine.engine import Engine

#: exit status when what was asked for can not be served, however often it is tried
EXIT_REFUSED = 3

#: how often and for how long it is tried to read what could not be read
RETRY_EVERY_S = 1.0
RETRY_FOR_S = 0.05

log = logging.getLogger(__name__)


def main(arguments: list[str] | None = None) -> int:
    options = _parse(arguments)
    logging.basicConfig(
        level=options.log_level.upper(), format="%(asctime)s engine %(levelname)s %(message)s"
    )
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the gateway's to handle
    # Where the kernel knows no such thing, the channel's count of silent heartbeats ends us, later.
    end_with_parent(options.parent_pid)
    config = msgspec.json.decode(sys.stdin.buffer.read(), type=EngineConfig)
    channel = EngineChannel(options.endpoint, options.heartbeat_s, options.max_silence_beats)
    channel.start()
    try:
        return _load_and_serve(config, channel)
    except MoeserveError as error:
        log.error("%s", error)
        channel.set_stage("failed", str(error))
        return EXIT_REFUSED
    except Exception as error:
        channel.set_stage("failed", f"{type(error).__name__}: {error}")
        raise
    finally:
        channel.close()


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="moeserve.engine.process")
    parser.add_argument("endpoint")
    parser.add_argument("--parent-pid", type=int, required=True)
    parser.add_argument("--heartbeat-s", type=float, default=1.0)
    parser.add_argument("--max-silence-beats", type=int, default=30)
    parser.add_argument("--log-level", default="info")
    return parser.parse_args(arguments)


def _load_and_serve(config: EngineConfig, channel: EngineChannel) -> int:
    channel.set_stage("loading", "starting")
    tune_native_libraries()
    # Imported here: torch takes seconds, and heartbeats already tell that something is going on.
    from moeserve.engine.engine import Engine

    engine = Engine.from_config(
        config,
        lambda stage, part: channel.set_stage("loading", stage, part),
        check_tokenizer_file,  # which the gateway will want
    )
    # From here SIGTERM ends the loop between two steps; before, it ends the process at once.
    signal.signal(signal.SIGTERM, lambda *_: channel.commands.put(EngineShutdown()))
    channel.set_stage("ready", progress=1.0, info=engine.info)
    serve(engine, channel)
    channel.set_stage("stopping")
    engine.close()
    return 0


def serve(engine: Engine, channel: EngineChannel) -> None:
    """Takes commands, steps, sends what the steps gave, until a shutdown. Sleeps when idle."""
    from moeserve.engine.controls import Controls

    controls = Controls(engine, channel)
    trouble = Trouble(engine, channel)
    while True:
        patience_s = trouble.look()
        for command in _take(channel.commands, not engine.has_work, patience_s):
            if isinstance(command, EngineShutdown):
                return
            if isinstance(command, EngineControl | EngineControlEnd):
                controls.take(command)
                channel.send([], engine.stats())  # who looks next may be the only one for long
                continue
            channel.send(_apply(engine, command), engine.stats())
        if engine.has_work:
            channel.send(engine.step(), engine.stats())
            controls.step_done()
        if not engine.has_work:
            engine.check_integrity()


class Trouble:
    """Tells the gateway when experts cannot be read, and when they can be again: it is looked for
    that also when nobody asks, because who sends requests may wait for it."""

    def __init__(self, engine: Engine, channel: EngineChannel) -> None:
        self._engine = engine
        self._channel = channel
        self._told = ""
        self._due_s = 0.0

    def look(self) -> float | None:
        """Seconds until it should be looked again; None: when a step was run."""
        if self._engine.trouble and time.monotonic() >= self._due_s:
            self._engine.retry_failed_reads(RETRY_FOR_S)
            self._due_s = time.monotonic() + RETRY_EVERY_S
        trouble = self._engine.trouble or ""
        if trouble != self._told:
            self._channel.set_trouble(trouble)
            self._told = trouble
        return max(0.0, self._due_s - time.monotonic()) if trouble else None


def _take(
    commands: queue.SimpleQueue[Command], block: bool, patience_s: float | None
) -> Iterator[Command]:
    """All waiting commands; with `block`, at least one, if it comes within that time."""
    if block:
        with contextlib.suppress(queue.Empty):
            yield commands.get(timeout=patience_s)
    while not commands.empty():  # this thread is the only one that takes
        yield commands.get()


def _apply(engine: Engine, command: EngineSubmit | EngineAbort) -> list[EngineDelta]:
    if isinstance(command, EngineAbort):
        return engine.abort(command.request_id, command.reason)
    try:
        engine.add(command.request)
    except RequestError as error:
        return [_refusal(command.request.request_id, error)]
    return []


def _refusal(request_id: str, error: RequestError) -> EngineDelta:
    return EngineDelta(
        request_id=request_id,
        finish_reason=FinishReason.ERROR,
        error=str(error),
        error_code=ErrorCode(error.code),
    )


if __name__ == "__main__":
    sys.exit(main())
