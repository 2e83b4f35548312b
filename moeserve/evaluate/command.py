"""`moeserve eval ppl`."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from pathlib import Path

from moeserve.cli_options import ENGINE_SETTINGS, add_flags, engine_config
from moeserve.config import BUNDLED_MODEL
from moeserve.core import ConfigError
from moeserve.progress import LoadingBar


def add_arguments(parser: argparse.ArgumentParser) -> None:
    actions = parser.add_subparsers(dest="action", metavar="ACTION", required=True)
    text = "perplexity of a text, dense models and Mixture-of-Experts alike"
    sub = actions.add_parser("ppl", help=text, description=text.capitalize() + ".")
    add = sub.add_argument
    add("model", nargs="?", default=str(BUNDLED_MODEL), metavar="MODEL",
        help="directory or hub id (default: the bundled model)")  # fmt: skip
    add("--text", type=Path, nargs="+", required=True, metavar="PATH",
        help="text files, or directories of .txt, .md and .py files")  # fmt: skip
    add("--window", type=int, default=512,
        help="tokens that are scored together, each window by itself (default: 512)")  # fmt: skip
    add("--tokens", type=int, help="most tokens, taken evenly (default: all)")
    add("--json", action="store_true", help="print the result as JSON")
    add_flags(sub, *ENGINE_SETTINGS)


def run(args: argparse.Namespace) -> int:
    """Raises ConfigError, ModelError, RequestError."""
    if args.window < 2:
        raise ConfigError(f"window: {args.window} is below the minimum 2", field="window")
    if args.tokens is not None and args.tokens < args.window:
        raise ConfigError(
            f"tokens: {args.tokens} is less than one window of {args.window}", field="tokens"
        )
    from moeserve.evaluate.perplexity import measure_perplexity
    from moeserve.llm import LLM
    from moeserve.text_windows import read_texts, token_windows

    texts = read_texts(args.text)
    with LoadingBar() as bar, LLM.from_config(engine_config(args), bar) as llm:
        ends = llm.info.eos_token_ids
        window = min(args.window, llm.info.context_tokens)
        end = ends[0] if ends else None
        windows = token_windows(llm.tokenizer, texts, end, window, args.tokens)
        found = measure_perplexity(llm, windows, bar)
    if args.json:
        print(json.dumps({"model": args.model, **asdict(found)}))
    else:
        print(
            f"perplexity {found.perplexity:.4f} ({found.nats:.5f} nats per token, "
            f"{found.num_tokens} tokens in windows of {found.window_tokens})"
        )
    return 0
