"""The `bench` subcommand."""

from __future__ import annotations

import argparse


def add_arguments(parser: argparse.ArgumentParser) -> None:
    from moeserve.bench import cache_command, serve_command

    actions = parser.add_subparsers(dest="action", metavar="ACTION", required=True)
    text = "replay recorded routing through the cache's policies"
    sub = actions.add_parser("cache", help=text, description=text.capitalize() + ".")
    cache_command.add_arguments(sub)
    sub.set_defaults(run_action=cache_command.run)
    text = "replay recorded traffic against a running server"
    sub = actions.add_parser("serve", help=text, description=text.capitalize() + ".")
    serve_command.add_arguments(sub)
    sub.set_defaults(run_action=serve_command.run)


def run(args: argparse.Namespace) -> int:
    status: int = args.run_action(args)
    return status
