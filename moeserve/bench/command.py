"""The `bench` subcommand."""

from __future__ import annotations

import argparse


def add_arguments(parser: argparse.ArgumentParser) -> None:
    from moeserve.bench import cache_command

    actions = parser.add_subparsers(dest="action", metavar="ACTION", required=True)
    text = "replay recorded routing through the cache's policies"
    sub = actions.add_parser("cache", help=text, description=text.capitalize() + ".")
    cache_command.add_arguments(sub)
    sub.set_defaults(run_action=cache_command.run)


def run(args: argparse.Namespace) -> int:
    status: int = args.run_action(args)
    return status
