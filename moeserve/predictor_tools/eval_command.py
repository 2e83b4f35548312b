"""`moeserve predictors eval`."""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from moeserve.cli_options import read_flags
from moeserve.config import ExpertConfig, ModelConfig
from moeserve.core import ConfigError
from moeserve.experts.native_predictors import native_implementations
from moeserve.models.gates import model_gates
from moeserve.models.packed_model import config_sha256
from moeserve.models.registry import LoadedModel
from moeserve.predictor_tools.evaluation import (
    PredictorReport,
    evaluate,
    expert_bytes_of,
    measure_costs,
)
from moeserve.predictor_tools.model_runs import loaded_model
from moeserve.predictor_tools.plots import check_plot, plot_recall
from moeserve.predictor_tools.train_command import add_text_arguments, check_numbers
from moeserve.predictor_tools.training import record_states
from moeserve.predictors.base import Predictor
from moeserve.predictors.evaluate import BEFORE
from moeserve.predictors.registry import PLAIN, PREDICTORS, TRAINED_FILES, make_predictor
from moeserve.progress import LoadingBar
from moeserve.text.tokenizer import Tokenizer
from moeserve.text_windows import read_texts, token_windows

COST_ROWS = (1, 16)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_text_arguments(parser, default_tokens=16_384)
    names = [name for name in PREDICTORS if name != "none"]
    parser.add_argument(
        "--predictor",
        dest="predictors",
        action="append",
        choices=names,
        help="repeatable (default: all, gate_residual and pregate where they have been trained)",
    )
    parser.add_argument(
        "--file",
        type=Path,
        help="what the one that --predictor names was trained to, else gate_residual (default: "
        f"{' and '.join(TRAINED_FILES.values())} beside the model)",
    )
    parser.add_argument("--depth", type=int, default=2, help="layers ahead (default: 2)")
    parser.add_argument(
        "--streams", type=int, default=1, help="windows decoded side by side (default: 1)"
    )
    parser.add_argument(
        "--threshold", type=float, default=0.5, help="probability to prefetch from (default: 0.5)"
    )
    parser.add_argument("--no-cost", action="store_true", help="measure no times")
    parser.add_argument(
        "--json", action="store_true", help="print one JSON object; the tables go to stderr"
    )
    parser.add_argument("--plot", type=Path, metavar="FILE", help="recall by layer, as a picture")


def run(args: argparse.Namespace) -> int:
    """Prints the tables. Raises ConfigError and ModelError."""
    _check(args)
    texts = read_texts(args.text)
    config, experts = read_flags(ModelConfig, args), read_flags(ExpertConfig, args)
    with (
        LoadingBar() as bar,
        tempfile.TemporaryDirectory(prefix="moeserve-eval-") as folder,
        loaded_model(config, experts, bar) as loaded,
    ):
        report, results = _evaluate_all(args, loaded, texts, Path(folder), bar)
    console = Console(stderr=args.json)
    for result in results:
        _print(console, result)
    _print_costs(console, results)
    if args.plot is not None:
        plot_recall(results, args.plot)
    if args.json:
        print(json.dumps(report))
    return 0


def _check(args: argparse.Namespace) -> None:
    if args.plot is not None:
        check_plot(args.plot)
    trained = [name for name in args.predictors or () if name in TRAINED_FILES]
    if args.file is not None and len(trained) > 1:
        raise ConfigError(
            f"file: {args.file} cannot be for {' and for '.join(trained)}",
            field="file",
            hint="evaluate them one after the other",
        )
    check_numbers(args, tokens=1, window=2, depth=1, streams=1)
    if not 0 < args.threshold < 1:
        raise ConfigError(
            f"threshold: {args.threshold}; allowed: between 0 and 1", field="threshold"
        )


def _evaluate_all(
    args: argparse.Namespace,
    loaded: LoadedModel,
    texts: Sequence[str],
    folder: Path,
    bar: Callable[[str, float], None],
) -> tuple[dict[str, Any], list[PredictorReport]]:
    gates = model_gates(loaded.model)
    end = loaded.eos_token_ids[0] if loaded.eos_token_ids else None
    window = min(args.window, loaded.context_tokens)
    windows = token_windows(Tokenizer.load(loaded.path), texts, end, window, args.tokens)
    if len(windows) < args.streams:
        raise ConfigError(
            f"streams: {args.streams} are more than the text's {len(windows)} windows",
            field="streams",
            hint="give more text, or a smaller --window",
        )
    recording = record_states(loaded, gates, windows, folder, bar)
    sizes = {gate.layer: gate.num_experts for gate in gates}
    files = _trained_files(args, loaded.path)
    sha256 = config_sha256(loaded.path)
    spec = next(iter(loaded.spec.moe_layers.values())).experts
    expert_bytes = expert_bytes_of(spec, loaded.dtype)
    native = loaded.runtime.native
    implementations = PLAIN if native is None else native_implementations(native)
    results = []
    for name in args.predictors or _all_names(files):

        def make(name: str = name) -> Predictor:
            return make_predictor(
                name, sizes, args.depth, gates, files.get(name), sha256, implementations
            )

        def report(share: float, name: str = name) -> None:
            bar(name, share)

        result = evaluate(make(), recording, args.streams, args.threshold, expert_bytes, report)
        if not args.no_cost:
            result.costs.extend(measure_costs(loaded, make, recording, COST_ROWS))
        results.append(result)
    about = {
        "model": str(loaded.path),
        "config_sha256": sha256,
        "tokens": windows.numel(),
        "window_tokens": window,
        "streams": args.streams,
        "threshold": args.threshold,
        "expert_bytes": expert_bytes,
        "cpu_backend": loaded.notes.get("cpu_backend", ""),
        "predictors": [result.as_json() for result in results],
    }
    return about, results


def _trained_files(args: argparse.Namespace, folder: Path) -> dict[str, Path]:
    """By name of predictor, the file it is in, be it there or not."""
    files = {name: folder / file for name, file in TRAINED_FILES.items()}
    if args.file is not None:
        named = [name for name in args.predictors or () if name in TRAINED_FILES]
        files[named[0] if named else "gate_residual"] = args.file
    return files


def _all_names(files: Mapping[str, Path]) -> list[str]:
    """Every predictor there is something to say of."""
    missing = {name for name, file in files.items() if not file.exists()}
    return [name for name in PREDICTORS if name != "none" and name not in missing]


def _print(console: Console, result: PredictorReport) -> None:
    table = Table(title=result.name, title_justify="left")
    for name in ("from layer", "ahead", "recall@k", "recall@k+2", "precision", "coverage"):
        table.add_column(name, justify="right")
    table.add_column("wasted KiB per step", justify="right")
    rows = [
        ("tokens" if layer == BEFORE else str(layer), far, each)
        for (layer, far), each in sorted(result.by_layer.items())
    ]
    rows += [("mean", far, each) for far, each in result.mean.items()]
    rows += [
        (f"{layer}, next token", far, each) for (layer, far), each in sorted(result.wrapped.items())
    ]
    for layer, far, each in rows:
        shares = (each["recall_k"], each["recall_k_plus_2"], each["precision"], each["coverage"])
        wasted = (each["wasted_bytes_per_step"] or 0) / 1024
        percents = ("–" if s is None else f"{100 * s:.1f} %" for s in shares)
        table.add_row(layer, str(far), *percents, f"{wasted:.1f}")
    console.print(table)


def _print_costs(console: Console, results: Sequence[PredictorReport]) -> None:
    if not any(result.costs for result in results):
        return
    table = Table(title="cost of a decode step", title_justify="left")
    for name in ("predictor", "sequences", "model us", "predicting us", "share", "added us"):
        table.add_column(name, justify="right")
    for result in results:
        for cost in result.costs:
            table.add_row(
                result.name,
                str(cost.rows),
                f"{cost.step_us:.0f}",
                f"{cost.predict_us:.0f}",
                f"{100 * cost.share:.1f} %",
                f"{cost.added_us:.0f}",
            )
    console.print(table)
