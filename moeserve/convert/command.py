"""`moeserve convert`."""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict
from pathlib import Path

from moeserve.cli_options import add_flags, read_flags
from moeserve.config import ModelConfig
from moeserve.convert.settings import METHODS, ROUTERS, ConvertSettings
from moeserve.core import ConfigError
from moeserve.progress import LoadingBar

MODEL_SETTINGS = frozenset(("revision", "offline"))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    default = ConvertSettings()
    add = parser.add_argument
    add("model", metavar="DENSE", help="directory or hub id: llama, mistral, qwen2 or qwen3")
    add("out", metavar="OUT", type=Path,
        help="directory to write; a conversion that was cut off there goes on")  # fmt: skip
    add("--text", type=Path, nargs="+", required=True, metavar="PATH",
        help="calibration text: files, or directories of .txt, .md and .py files")  # fmt: skip
    add("--method", choices=METHODS, default=default.method, help="(default: %(default)s)")
    add("--router", choices=ROUTERS, default=default.router, help="(default: %(default)s)")
    add("--experts", type=int, default=default.experts,
        help="equal parts of every FFN, shared ones included (default: %(default)s)")  # fmt: skip
    add("--active", type=int, default=default.active,
        help="parts that work on a token, shared ones included (default: %(default)s)")  # fmt: skip
    add("--shared-share", default=str(default.shared_share), metavar="SHARE",
        help="of the parts, always on; auto: by each layer's activations "
        "(default: %(default)s)")  # fmt: skip
    add("--refit", action=argparse.BooleanOptionalAction, default=default.refit,
        help="fit the second product to what is left (default: %(default)s)")  # fmt: skip
    add("--pregate", action="store_true",
        help="train a block that foresees the experts of all layers from the tokens, for "
        "--predictor pregate")  # fmt: skip
    add("--tune-minutes", type=float, metavar="N",
        help="distil the dense model's outputs into router and experts for so long")  # fmt: skip
    add("--tune-steps", type=int, metavar="N",
        help="instead of minutes, a number of steps: the same bits again")  # fmt: skip
    add("--tokens", type=int, default=default.max_tokens,
        help="most tokens of the text, taken evenly (default: %(default)s)")  # fmt: skip
    add("--window", type=int, default=default.window_tokens,
        help="tokens that are run together (default: %(default)s)")  # fmt: skip
    add("--num-threads", type=int, help="of torch (default: one per core)")
    add("--seed", type=int, default=default.seed, help="(default: %(default)s)")
    add("--json", action="store_true", help="print the report as JSON")
    add_flags(parser, ModelConfig, only=MODEL_SETTINGS)


def run(args: argparse.Namespace) -> int:
    """Converts, says what came of it. Raises ConfigError and ModelError."""
    import torch

    from moeserve.convert.run import convert

    settings = ConvertSettings(
        method=args.method,
        router=args.router,
        experts=args.experts,
        active=args.active,
        shared_share=_share(args.shared_share),
        refit=args.refit,
        pregate=args.pregate,
        tune_minutes=args.tune_minutes,
        tune_steps=args.tune_steps,
        max_tokens=args.tokens,
        window_tokens=args.window,
        seed=args.seed,
    )
    if args.num_threads is not None:
        if args.num_threads < 1:
            raise ConfigError(f"num_threads: {args.num_threads}; 1 or more", field="num_threads")
        torch.set_num_threads(args.num_threads)
    with LoadingBar() as bar, torch.inference_mode():
        made = convert(read_flags(ModelConfig, args), args.out, args.text, settings, bar)
    for note in made.notes:
        print(f"warning: {note}", file=sys.stderr)
    if args.json:
        print(json.dumps(asdict(made)))
        return 0
    quality = made.quality
    print(
        f"{args.out}: {made.num_bytes / 2**20:.0f} MiB in {made.seconds:.0f} s; perplexity "
        f"{quality.perplexity:.3f}, dense {quality.dense_perplexity:.3f} "
        f"({quality.perplexity / quality.dense_perplexity:.3f} ×); "
        f"router agreement {quality.agreement:.3f}"
    )
    if made.tuning is not None:
        tuning = made.tuning
        print(
            f"tuned for {tuning.seconds / 60:.1f} min, {tuning.num_steps} steps, best at "
            f"{tuning.best_step}; perplexity before {tuning.untuned_perplexity:.3f}"
        )
    if made.pregate_recall:
        mean = sum(made.pregate_recall) / len(made.pregate_recall)
        print(f"pregate names {mean:.3f} of the experts that tokens choose")
    print("README.md there has the figures of each layer", file=sys.stderr)
    return 0


def _share(text: str) -> float | None:
    if text == "auto":
        return None
    try:
        return float(text)
    except ValueError as error:
        raise ConfigError(
            f"shared_share: {text!r} is neither auto nor a number", field="shared_share"
        ) from error
