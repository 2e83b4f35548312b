"""The `moeserve` command. A subcommand's room is imported only when that subcommand is named."""

from __future__ import annotations

import argparse
import difflib
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import import_module

from moeserve.core import MoeserveError


@dataclass(frozen=True)
class Command:
    """One subcommand: its help line, its flags, what it does. run returns the exit status."""

    help: str
    add_arguments: Callable[[argparse.ArgumentParser], None]
    run: Callable[[argparse.Namespace], int]


def _serve_arguments(parser: argparse.ArgumentParser) -> None:
    from moeserve.cli_options import ENGINE_SETTINGS, add_flags
    from moeserve.config import GatewayConfig, HttpConfig, ZmqConfig
    from moeserve.planner.auto import add_arguments as add_auto_arguments

    _model_argument(parser)
    add_flags(parser, HttpConfig, ZmqConfig, GatewayConfig, *ENGINE_SETTINGS)
    add_auto_arguments(parser)


def _serve(args: argparse.Namespace) -> int:
    import asyncio
    from dataclasses import replace

    from moeserve.cli_options import gateway_config
    from moeserve.environment import read_environment
    from moeserve.gateway.server import run_gateway
    from moeserve.planner.auto import expected_traffic, tune

    config = gateway_config(args, read_environment().api_key)
    traffic = expected_traffic(args)
    if traffic is not None:
        tuned = tune(config.engine, traffic, args.given)
        for line in tuned.words:
            print(f"auto: {line}", file=sys.stderr)
        config = replace(config, engine=tuned.engine)
    return asyncio.run(run_gateway(config))


def _generate_arguments(parser: argparse.ArgumentParser) -> None:
    from moeserve.cli_options import ENGINE_SETTINGS, add_flags, add_sampling_flags

    _model_argument(parser)
    parser.add_argument("-p", "--prompt", help="text to continue; - reads standard input")
    parser.add_argument("--chat", action="store_true", help="treat the prompt as a user's message")
    add_sampling_flags(parser)
    add_flags(parser, *ENGINE_SETTINGS)


def _generate(args: argparse.Namespace) -> int:
    from moeserve.cli_options import engine_config, sampling_params
    from moeserve.llm import LLM
    from moeserve.progress import LoadingBar

    if args.prompt is None:
        raise MoeserveError(
            "prompt: missing", field="prompt", hint="give -p TEXT, or -p - for stdin"
        )
    prompt = sys.stdin.read() if args.prompt == "-" else args.prompt
    with LoadingBar() as bar:
        llm = LLM.from_config(engine_config(args), bar)
    with llm:
        request = [{"role": "user", "content": prompt}] if args.chat else prompt
        for event in llm.stream(request, sampling_params(args)):
            sys.stdout.write(event.text)
            sys.stdout.flush()
    sys.stdout.write("\n")
    return 0


def _pack_arguments(parser: argparse.ArgumentParser) -> None:
    from moeserve.cli_options import PACK_SETTINGS, add_flags
    from moeserve.config import ExpertConfig, ModelConfig

    parser.add_argument("model", metavar="MODEL", help="directory or hub id")
    parser.add_argument("out", metavar="OUT", help="directory to write; it must not exist")
    add_flags(parser, ModelConfig, ExpertConfig, only=PACK_SETTINGS)


def _pack(args: argparse.Namespace) -> int:
    from pathlib import Path

    from moeserve.cli_options import read_flags
    from moeserve.config import ModelConfig
    from moeserve.models.pack import pack_model
    from moeserve.progress import LoadingBar

    with LoadingBar() as bar:
        report = pack_model(read_flags(ModelConfig, args), Path(args.out), args.num_threads, bar)
    print(f"{report.path}: {report.num_bytes / 2**20:.0f} MiB of weights")
    for name, note in report.notes.items():
        print(f"{name}: {note}")
    return 0


def _keygen_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("directory", help="where to write the keys; what is there stays")
    parser.add_argument(
        "--client", default="client", metavar="NAME", help="client to make a key pair for"
    )


def _keygen(args: argparse.Namespace) -> int:
    from pathlib import Path

    from moeserve.gateway.curve import write_keys

    for path in write_keys(Path(args.directory), args.client):
        print(path)
    return 0


def _room(help: str, module: str) -> Command:
    """A command with a module of its own, which has `add_arguments` and `run`."""
    return Command(
        help,
        lambda parser: import_module(module).add_arguments(parser),
        lambda args: int(import_module(module).run(args)),
    )


def _model_argument(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "model", nargs="?", metavar="MODEL", help="directory or hub id (default: the bundled model)"
    )


COMMANDS = {
    "serve": Command("serve a model over HTTP and ZeroMQ", _serve_arguments, _serve),
    "generate": Command("continue one prompt and exit", _generate_arguments, _generate),
    "chat": _room("talk to a model, here or on a server", "moeserve.chat.command"),
    "request": _room("send one prompt to a server over ZeroMQ", "moeserve.client.command"),
    "ctl": _room("look at a running server, or change it", "moeserve.ctl.command"),
    "doctor": _room("what this machine has and what is in the way", "moeserve.doctor.command"),
    "calibrate": _room("measure this machine for the layer scheduler", "moeserve.planner.command"),
    "plan": _room(
        "whether a model fits a machine, and how fast it will be", "moeserve.planner.plan_command"
    ),
    "predictors": _room(
        "train and evaluate predictors of experts", "moeserve.predictor_tools.command"
    ),
    "trace": _room("record which experts a model takes", "moeserve.predictor_tools.trace_command"),
    "bench": _room("replay recorded routing or traffic", "moeserve.bench.command"),
    "pack": Command("write a model in the form that loads at once", _pack_arguments, _pack),
    "convert": _room("turn a dense model into experts", "moeserve.convert.command"),
    "eval": _room("perplexity of a text", "moeserve.evaluate.command"),
    "worker": _room("compute a part of a model's experts", "moeserve.worker.command"),
    "keygen": Command("make CURVE keys for ZeroMQ over TCP", _keygen_arguments, _keygen),
}


class _VersionAction(argparse.Action):
    """Reads the version only when it is asked for."""

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> None:
        from moeserve import __version__

        print(f"moeserve {__version__}")
        parser.exit()


def _parser(command: str | None) -> tuple[argparse.ArgumentParser, argparse.ArgumentParser]:
    """A parser that knows all subcommands by name and the flags of the one that is named, and that
    one's own."""
    parser = argparse.ArgumentParser(
        prog="moeserve", description="Serve Mixture-of-Experts language models."
    )
    parser.add_argument(
        "--version", action=_VersionAction, nargs=0, help="print the version and exit"
    )
    named = parser
    choices = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name, entry in COMMANDS.items():
        sub = choices.add_parser(name, help=entry.help, description=entry.help.capitalize() + ".")
        if name == command:
            entry.add_arguments(sub)
            named = sub
    return parser, named


class _Given(argparse.Namespace):
    """Seems to have every value, so that a parser adds no defaults."""

    def __getattr__(self, name: str) -> None:
        if name.startswith("_"):
            raise AttributeError(name)


def _given(parser: argparse.ArgumentParser, arguments: list[str]) -> frozenset[str]:
    """Names of what the user gave, also where it is the default; a positional one in any case."""
    return frozenset(vars(parser.parse_known_args(arguments, _Given())[0]))


def _no_argument(command: str, word: str, parser: argparse.ArgumentParser) -> MoeserveError:
    flags = set(re.findall(r"--[a-z][a-z-]*", parser.format_help()))
    close = difflib.get_close_matches(word.partition("=")[0], flags, n=3)
    hint = f"did you mean {' or '.join(close)}?" if close else f"moeserve {command} --help"
    return MoeserveError(f"{command}: {word!r} is no argument of it", hint=hint)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one subcommand. Status: 0 done, 1 no server answers, 2 wrong input, 130 interrupted."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    command = next((word for word in arguments if not word.startswith("-")), None)
    if command is not None and command not in COMMANDS and arguments[0] == command:
        close = difflib.get_close_matches(command, COMMANDS, n=1)
        hint = f"; did you mean {close[0]}?" if close else f"; there are {', '.join(COMMANDS)}"
        print(f"moeserve: no command {command!r}{hint}", file=sys.stderr)
        return 2
    try:
        parser, named = _parser(command)
        args, unknown = parser.parse_known_args(arguments)
        if unknown:
            raise _no_argument(args.command, unknown[0], named)
        args.given = _given(named, arguments[arguments.index(args.command) + 1 :])
        return COMMANDS[args.command].run(args)
    except MoeserveError as error:
        print(f"moeserve: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main())
