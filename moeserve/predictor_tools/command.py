"""The `predictors` subcommand: train, eval."""

from __future__ import annotations

import argparse


def add_arguments(parser: argparse.ArgumentParser) -> None:
    from moeserve.predictor_tools import eval_command, train_command

    actions = parser.add_subparsers(dest="action", metavar="ACTION", required=True)
    for name, module, text in (
        ("train", train_command, "train gate_residual for a model on a text"),
        ("eval", eval_command, "how well predictors foresee a model's routing of a text"),
    ):
        sub = actions.add_parser(name, help=text, description=text.capitalize() + ".")
        module.add_arguments(sub)
        sub.set_defaults(run_action=module.run)


def run(args: argparse.Namespace) -> int:
    status: int = args.run_action(args)
    return status
