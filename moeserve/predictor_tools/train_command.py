"""`moeserve predictors train`."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from moeserve.cli_options import add_flags, read_flags
from moeserve.config import BUNDLED_MODEL, ExpertConfig, ModelConfig
from moeserve.core import ConfigError
from moeserve.predictor_tools.model_runs import loaded_model
from moeserve.predictor_tools.training import TrainingPlan, remove_work, train_residual
from moeserve.predictors.residual_weights import PREDICTORS_FILE, ResidualShape
from moeserve.predictors.train_residual import EPOCHS
from moeserve.progress import LoadingBar
from moeserve.text.tokenizer import Tokenizer
from moeserve.text_windows import read_texts, token_windows

#: settings of models and experts that matter to a run over text
RUN_SETTINGS = frozenset(
    (
        "revision",
        "offline",
        "dtype",
        "device",
        "quantize",
        "quantize_group",
        "quantize_zero_points",
        "quantize_head",
        "quantize_activations",
        "context_tokens",
        "cpu_backend",
        "isa",
        "num_threads",
        "pin_threads",
        "spin_us",
    )
)


def add_text_arguments(parser: argparse.ArgumentParser, default_tokens: int) -> None:
    """The model, the text, how much of it, and the settings of the run."""
    parser.add_argument(
        "model",
        nargs="?",
        default=str(BUNDLED_MODEL),
        metavar="MODEL",
        help="directory or hub id (default: the bundled model)",
    )
    parser.add_argument(
        "--text",
        type=Path,
        nargs="+",
        required=True,
        metavar="PATH",
        help="text files, or directories of .txt, .md and .py files",
    )
    parser.add_argument(
        "--tokens",
        type=int,
        default=default_tokens,
        help=f"most tokens of it, taken evenly (default: {default_tokens})",
    )
    parser.add_argument(
        "--window", type=int, default=512, help="tokens that are run together (default: 512)"
    )
    add_flags(parser, ModelConfig, ExpertConfig, only=RUN_SETTINGS)


def check_numbers(args: argparse.Namespace, **least: int) -> None:
    """Raises ConfigError for an argument below its minimum."""
    for name, minimum in least.items():
        value = getattr(args, name)
        if value < minimum:
            raise ConfigError(f"{name}: {value} is below the minimum {minimum}", field=name)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    default = ResidualShape()
    add_text_arguments(parser, default_tokens=1_200_000)
    parser.add_argument(
        "-o",
        "--out",
        type=Path,
        help=f"file to write (default: {PREDICTORS_FILE} beside the model)",
    )
    parser.add_argument(
        "--depth", type=int, default=default.depth, help=f"layers ahead (default: {default.depth})"
    )
    parser.add_argument(
        "--expert-rank",
        type=int,
        default=default.expert_rank,
        help=f"hidden units per expert (default: {default.expert_rank})",
    )
    parser.add_argument(
        "--context-rank",
        type=int,
        default=default.context_rank,
        help=f"hidden units for the rest (default: {default.context_rank})",
    )
    parser.add_argument(
        "--epochs", type=int, default=EPOCHS, help=f"passes over the text (default: {EPOCHS})"
    )
    parser.add_argument(
        "--work-dir", type=Path, help="what is done so far (default: OUT.work, removed at the end)"
    )


def run(args: argparse.Namespace) -> int:
    """Trains, writes the file, says where. Raises ConfigError and ModelError."""
    check_numbers(args, tokens=1, window=2, epochs=1)
    shape = ResidualShape(args.depth, args.expert_rank, args.context_rank)
    texts = read_texts(args.text)
    with LoadingBar() as bar:
        config, experts = read_flags(ModelConfig, args), read_flags(ExpertConfig, args)
        with loaded_model(config, experts, bar) as loaded:
            tokenizer = Tokenizer.load(loaded.path)
            end = loaded.eos_token_ids[0] if loaded.eos_token_ids else None
            window = min(args.window, loaded.context_tokens)
            windows = token_windows(tokenizer, texts, end, window, args.tokens)
            out = args.out or loaded.path / PREDICTORS_FILE
            work_dir = args.work_dir or out.with_name(out.name + ".work")
            plan = TrainingPlan(windows, shape, args.epochs)
            trained = train_residual(loaded, plan, work_dir, bar)
    trained.save(out)
    if args.work_dir is None:
        remove_work(work_dir)
    facts = ", ".join(f"{name} {value}" for name, value in trained.facts.items())
    print(f"{out}: {facts}", file=sys.stderr)
    return 0
