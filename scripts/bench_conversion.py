"""Compare ways of converting a dense model: methods, routers, shares of the FFN that are idle.

    python scripts/bench_conversion.py DENSE --text calibration.txt --held-out held_out.txt
        [--experts 16] [--tune-minutes 5] [--lines kept.json] [--plot out.png]

Every line is a whole conversion. Perplexities are those of the held-out text, by the engine, over
that of the dense model; without such a text those of the card, on windows of the calibration text
that nothing was fitted to. Tuned lines come last, each takes the minutes. Prints a table in
Markdown and, as its last line, all figures as JSON. With --lines those of earlier runs are in the
picture and in that JSON, too; the file says of which model, text and shape they are, and takes no
others.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure

from moeserve.config import ModelConfig
from moeserve.convert.run import convert
from moeserve.convert.settings import METHODS, ROUTERS, ConvertSettings
from moeserve.progress import LoadingBar


@dataclass(frozen=True)
class Line:
    """A conversion and what came of it. ratio: perplexity over the dense model's; seconds: without
    tuning."""

    method: str
    router: str
    refit: bool
    tune_minutes: float | None
    idle: float
    ratio: float
    agreement: float
    chance: float
    seconds: float


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("dense", help="directory or hub id")
    add("--text", type=Path, nargs="+", required=True, help="calibration text")
    add("--held-out", type=Path, nargs="+", help="text to measure perplexities on")
    add("--held-out-tokens", type=int, default=32_768, help="of it (%(default)s)")
    add("--experts", type=int, default=16, help="parts of every FFN (%(default)s)")
    add("--idle", type=float, nargs="+", default=[0.25, 0.5], help="shares (%(default)s)")
    add("--shared-share", type=float, default=0.25, help="(%(default)s)")
    add("--tokens", type=int, default=32_768, help="of the text (%(default)s)")
    add("--window", type=int, default=512, help="(%(default)s)")
    add("--threads", type=int, default=2, help="of torch (%(default)s)")
    add("--tune-minutes", type=float, help="also tuned conversions, by the best router")
    add("--tune-methods", choices=METHODS, nargs="+", default=["activation"], help="of those")
    add("--tuned-only", action="store_true", help="no others")
    add("--lines", type=Path, help="JSON of earlier runs, to which this one's figures are added")
    add("--plot", type=Path, help="picture to write")
    return parser.parse_args()


def cases(args: argparse.Namespace) -> Iterator[ConvertSettings]:
    """All methods with the best router, all routers with the best method, those that are tuned."""
    shares = [
        {
            "experts": args.experts,
            "active": round(args.experts * (1 - idle)),
            "shared_share": args.shared_share,
            "max_tokens": args.tokens,
            "window_tokens": args.window,
        }
        for idle in args.idle
    ]
    for common in () if args.tuned_only else shares:
        for method in METHODS:
            for refit in (False, True):
                yield ConvertSettings(method=method, refit=refit, **common)
        for router in ROUTERS[1:]:
            yield ConvertSettings(router=router, **common)
    for common in () if args.tune_minutes is None else shares:
        for method in args.tune_methods:
            yield ConvertSettings(method=method, tune_minutes=args.tune_minutes, **common)


def held_out_perplexity(args: argparse.Namespace, model: str) -> float:
    """Of a model's tokens of the held-out text, by the engine."""
    flags = ["--num-threads", str(args.threads), "--dtype", "float32"]
    command = ["--text", *map(str, args.held_out), "--tokens", str(args.held_out_tokens), "--json"]
    command += ["--window", str(args.window), *flags]
    done = subprocess.run(
        [sys.executable, "-m", "moeserve.cli", "eval", "ppl", model, *command],
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        sys.exit(done.stderr)
    return float(json.loads(done.stdout)["perplexity"])


def measure(args: argparse.Namespace, settings: ConvertSettings, dense: float | None) -> Line:
    """dense: the dense model's perplexity of the held-out text."""
    with tempfile.TemporaryDirectory() as directory:
        out = Path(directory) / "out"
        with LoadingBar() as bar, torch.inference_mode():
            made = convert(ModelConfig(model=args.dense), out, args.text, settings, bar)
        quality = made.quality
        ratio = quality.perplexity / quality.dense_perplexity
        if dense is not None:
            ratio = held_out_perplexity(args, str(out)) / dense
    return Line(
        method=settings.method,
        router=settings.router,
        refit=settings.refit,
        tune_minutes=settings.tune_minutes,
        idle=1 - settings.active / settings.experts,
        ratio=ratio,
        agreement=quality.agreement,
        chance=sum(report["chance"] for report in made.reports) / len(made.reports),
        seconds=made.seconds,
    )


def bed_of(args: argparse.Namespace) -> dict[str, str]:
    """What all figures of a file must have in common."""
    texts = {name: getattr(args, name) or [] for name in ("text", "held_out")}
    same = ("held_out_tokens", "experts", "shared_share", "tokens", "window")
    return {
        "dense": Path(args.dense).name,
        **{name: " ".join(path.name for path in paths) for name, paths in texts.items()},
        **{name: str(getattr(args, name)) for name in same},
    }


def with_earlier(lines: list[Line], path: Path, bed: dict[str, str]) -> list[Line]:
    """Those in the file but for what was measured again, then these; written back to it."""

    def case(line: Line) -> tuple[object, ...]:
        return line.method, line.router, line.refit, line.tune_minutes, line.idle

    known = earlier_lines(path, bed)
    again = {case(line) for line in lines}
    earlier = [line for line in (Line(**entry) for entry in known) if case(line) not in again]
    lines = earlier + lines
    entries = ",\n".join(json.dumps(asdict(line)) for line in lines)
    text = f'{{"bed": {json.dumps(bed)}, "lines": [\n{entries}\n]}}\n'
    path.write_text(text, encoding="utf-8")
    return lines


def earlier_lines(path: Path, bed: dict[str, str]) -> list[dict[str, Any]]:
    """Exits where they are of another model, text or shape."""
    if not path.exists():
        return []
    known = json.loads(path.read_text(encoding="utf-8"))
    if known["bed"] != bed:
        sys.exit(f"{path}: of another bed, {known['bed']}; this one is {bed}")
    lines: list[dict[str, Any]] = known["lines"]
    return lines


def draw(lines: list[Line], path: Path) -> None:
    """One group of bars per method and router, by share that is idle."""
    figure = Figure(figsize=(8, 3.8), layout="constrained")
    axes = figure.subplots()
    names = list(dict.fromkeys(_name(line) for line in lines))
    shares = sorted({line.idle for line in lines})
    for number, idle in enumerate(shares):
        ratios = {_name(line): line.ratio for line in lines if line.idle == idle}
        places = [place + 0.8 * number / len(shares) for place in range(len(names))]
        heights = [ratios.get(name, float("nan")) for name in names]
        bars = axes.bar(places, heights, 0.75 / len(shares), label=f"{idle:.0%} idle")
        axes.bar_label(bars, fmt="%.3f", fontsize=5)
    axes.set_xticks(range(len(names)), names, rotation=30, ha="right", fontsize=7)
    axes.set(ylabel="perplexity over the dense model's", yscale="log")
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter("{x:g}")
    axes.axhline(1.0, color="0.4", linewidth=0.8)
    axes.legend(fontsize=8)
    figure.savefig(path, dpi=110)


def _name(line: Line) -> str:
    tuned = "" if line.tune_minutes is None else f", tuned {line.tune_minutes:g} min"
    return f"{line.method}, {line.router}{', refit' if line.refit else ''}{tuned}"


def main() -> None:
    args = parse_args()
    if args.lines is not None:
        earlier_lines(args.lines, bed_of(args))  # refuses before anything is measured
    torch.set_num_threads(args.threads)
    dense = None
    if args.held_out is not None:
        dense = held_out_perplexity(args, args.dense)
        print(f"dense perplexity of the held-out text: {dense:.4f}")
    print("| FFN idle | method | router | refit | tuned | perplexity | agreement | by chance | s |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- | --- |")
    lines = []
    for settings in cases(args):
        line = measure(args, settings, dense)
        lines.append(line)
        print(
            f"| {line.idle:.0%} | {line.method} | {line.router} | {'yes' if line.refit else 'no'} "
            f"| {'no' if line.tune_minutes is None else f'{line.tune_minutes:g} min'} "
            f"| {line.ratio:.3f} × | {line.agreement:.2f} | {line.chance:.2f} "
            f"| {line.seconds:.1f} |",
            flush=True,
        )
    if args.lines is not None:
        lines = with_earlier(lines, args.lines, bed_of(args))
    if args.plot is not None:
        draw(lines, args.plot)
    print(json.dumps([asdict(line) for line in lines]))


if __name__ == "__main__":
    main()
