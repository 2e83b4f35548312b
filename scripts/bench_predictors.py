"""How well predictors foresee the bundled model's routing of held-out text, and what they cost.

Theory. A gate sees the residual stream; between layer l and l+1 the stream gains what the experts
of l give and what the attention of l+1 brings. gate_lookahead takes both for nothing. gate_residual
learns them: the experts' part is a function of the state and of the chosen experts, the attention's
part depends on earlier tokens, of which it has the last one's states. markov knows only which
experts followed which, frequency not even that.

Measured. The documents that the bundled model's training held out (every twentieth), which
gate_residual's training has not seen either, in windows of 512 tokens, replayed as decoding, one
token a step; the first tenth of the steps is not counted. recall@k: of the k experts of the next
layer that a token takes, the share among the k likeliest. Precision, coverage, waste: of
prefetching every expert with a probability of 0.5 or more, as if none were in memory. Costs:
medians, the predictor running between the layers of a decoding model whose experts are all in
memory, where serving would not predict (bench_predictor_cost.py measures a step that is served);
of a busy machine they say little.

    python scripts/bench_predictors.py --stories FILE --shakespeare FILE [--train] \\
        [--output benchmarks/results]

--train: trains first (minutes), else the file beside the bundled model is used. Last line printed:
one JSON object.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import io
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

from tiny_moe.data import load_python, load_shakespeare, load_stories

from moeserve import cli
from moeserve.config import BUNDLED_MODEL

TOKENS = 24_000


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--stories", type=Path, required=True, help="TinyStories excerpt")
    parser.add_argument("--shakespeare", type=Path, required=True, help="tinyshakespeare.txt")
    parser.add_argument("--train", action="store_true", help="train gate_residual first")
    parser.add_argument("--no-cost", action="store_true", help="measure no times: a busy machine")
    parser.add_argument("--threads", type=int, help="compute threads (default: all)")
    parser.add_argument("--note", default="", help="of the machine, such as: shared")
    parser.add_argument("--output", type=Path, help="directory for .md, .json and .png")
    return parser.parse_args()


def write_texts(args: argparse.Namespace, folder: Path) -> None:
    """One file per document, in folder/train and folder/valid."""
    corpora = (load_shakespeare(args.shakespeare), load_stories(args.stories), load_python())
    for corpus in corpora:
        for split in ("train", "valid"):
            target = folder / split / corpus.name
            target.mkdir(parents=True)
            for number, text in enumerate(getattr(corpus, split)):
                (target / f"{number:05d}.txt").write_text(text, encoding="utf-8")


def run(words: list[str]) -> str:
    """A moeserve command, in this process; what it printed."""
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        status = cli.main(words)
    if status != 0:
        raise SystemExit(status)
    return printed.getvalue()


def markdown(report: dict[str, Any], command: str, note: str) -> str:
    """The report as tables."""
    lines = [
        f"# Predictors of experts, {datetime.date.today()}",
        "",
        f"`{command}`",
        "",
        f"{report['cpu_backend']}. {note}".strip(),
        "",
        f"tiny-moe, {report['tokens']:,} held-out tokens, decoded one by one; see the script.",
        "",
        "| predictor | ahead | recall@k | recall@k+2 | precision | coverage | wasted KiB a step |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for each in report["predictors"]:
        lines += [row(each["name"], mean["distance"], mean) for mean in each["mean"]]
    layers = sorted({row["layer"] for each in report["predictors"] for row in each["layers"]})
    lines += ["", "recall@k by the layer that is looked from:", ""]
    lines += ["| predictor | ahead | " + " | ".join(map(str, layers)) + " |"]
    lines += ["| --- | --- |" + " --- |" * len(layers)]
    for each in report["predictors"]:
        for distance in sorted({row["distance"] for row in each["layers"]}):
            by = {r["layer"]: r["recall_k"] for r in each["layers"] if r["distance"] == distance}
            cells = (percent(by[layer]) if layer in by else "" for layer in layers)
            lines.append(f"| {each['name']} | {distance} | " + " | ".join(cells) + " |")
    if not any(each["costs"] for each in report["predictors"]):
        return "\n".join(lines) + "\n"
    lines += ["", "Cost of predicting two layers ahead, per decode step:", ""]
    lines += ["| predictor | sequences | model us | predicting us | share | added us |"]
    lines += ["| --- | --- | --- | --- | --- | --- |"]
    for each in report["predictors"]:
        for cost in each["costs"]:
            lines.append(
                f"| {each['name']} | {cost['rows']} | {cost['step_us']:.0f} "
                f"| {cost['predict_us']:.0f} | {percent(cost['share'])} | {cost['added_us']:.0f} |"
            )
    return "\n".join(lines) + "\n"


def row(name: str, distance: int, figures: dict[str, Any]) -> str:
    shares = ("recall_k", "recall_k_plus_2", "precision", "coverage")
    cells = " | ".join(percent(figures[share]) for share in shares)
    wasted = figures["wasted_bytes_per_step"] / 1024
    return f"| {name} | {distance} | {cells} | {wasted:.1f} |"


def percent(share: float | None) -> str:
    return "–" if share is None else f"{100 * share:.1f} %"


def main() -> None:
    args = parse_args()
    output = args.output or Path("benchmarks/results")
    output.mkdir(parents=True, exist_ok=True)
    name = f"{datetime.date.today()}-predictors"
    backend = ["--cpu-backend", "native"]
    if args.threads is not None:
        backend += ["--num-threads", str(args.threads)]
    with tempfile.TemporaryDirectory(prefix="moeserve-bench-") as folder:
        write_texts(args, Path(folder))
        model = [str(BUNDLED_MODEL)]
        if args.train:
            run(["predictors", "train", *model, "--text", f"{folder}/train", *backend])
        plot = ["--plot", str(output / f"{name}.png"), "--json", "--tokens", str(TOKENS)]
        plot += ["--no-cost"] if args.no_cost else []
        printed = run(["predictors", "eval", *model, "--text", f"{folder}/valid", *plot, *backend])
    report = json.loads(printed.strip().splitlines()[-1])
    report["model"] = "tiny-moe"
    files = f"--stories {args.stories.name} --shakespeare {args.shakespeare.name}"
    command = f"python scripts/bench_predictors.py {files}"
    (output / f"{name}.md").write_text(markdown(report, command, args.note))
    (output / f"{name}.json").write_text(json.dumps(report, indent=1) + "\n")
    print(json.dumps(report))


if __name__ == "__main__":
    sys.exit(main())
