"""Train a small dense Qwen3 model: the test bed of `moeserve convert`.

About 6.5 M parameters, most of them in SwiGLU FFNs of 1024, on the same text and with the same
tokenizer as the bundled model (scripts/train_tiny_moe.py):

    python scripts/train_tiny_dense.py --shakespeare tinyshakespeare.txt --stories tinystories.txt

A run that is killed continues where its last checkpoint was; SIGTERM makes one first. Beside the
model stand `calibration.txt`, training text for the conversion, and `held_out.txt`, on which
nothing was trained. `--export-only` writes the best checkpoint so far.
Needs torch, tokenizers, transformers, safetensors, jinja2, matplotlib and tqdm.
"""

from __future__ import annotations

import argparse
import signal
from pathlib import Path

import torch
from tiny_moe.card import draw_losses
from tiny_moe.data import Corpus, Dataset, load_python, load_shakespeare, load_stories
from tiny_moe.export import export_model, load_exported, verify
from tiny_moe.model import DenseConfig
from tiny_moe.train import TrainConfig, evaluate, load_best, train
from tokenizers import Tokenizer

REPOSITORY = Path(__file__).resolve().parent.parent
TOKENIZER = REPOSITORY / "moeserve" / "assets" / "tiny-moe" / "tokenizer.json"
CALIBRATION_CHARS = 400_000  # of each domain


def parse_args() -> argparse.Namespace:
    defaults = TrainConfig(eval_every=100, learning_rate=2e-3)
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--shakespeare", type=Path, required=True, help="text file of plays (public domain)")
    add("--stories", type=Path, required=True, help="text file of short stories (TinyStories)")
    add("--steps", type=int, default=defaults.steps, help="optimiser steps (%(default)s)")
    add("--batch-tokens", type=int, default=defaults.batch_tokens, help="(%(default)s)")
    add("--learning-rate", type=float, default=defaults.learning_rate, help="(%(default)s)")
    add("--dropout", type=float, default=defaults.dropout, help="(%(default)s)")
    add("--eval-every", type=int, default=defaults.eval_every, help="steps (%(default)s)")
    add("--seed", type=int, default=defaults.seed, help="(%(default)s)")
    add("--threads", type=int, default=2, help="torch threads (%(default)s)")
    add("--work-dir", type=Path, default=REPOSITORY / "build" / "tiny-dense", help="checkpoints")
    add("--out", type=Path, default=REPOSITORY / "build" / "tiny-dense-model")
    add("--export-only", action="store_true", help="write --out again, no training")
    return parser.parse_args()


class StopSignal:
    """Whether SIGTERM or SIGINT has come; a second one ends the process as usual."""

    def __init__(self) -> None:
        self.came = False
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._note)

    def __call__(self) -> bool:
        return self.came

    def _note(self, number: int, _: object) -> None:
        self.came = True
        signal.signal(number, signal.SIG_DFL)


def main() -> None:
    """Train (or resume), then export the best checkpoint."""
    args = parse_args()
    torch.set_num_threads(args.threads)
    args.work_dir.mkdir(parents=True, exist_ok=True)
    corpora = [load_shakespeare(args.shakespeare), load_stories(args.stories), load_python()]
    tokenizer = Tokenizer.from_file(str(TOKENIZER))
    dataset = Dataset.build(tokenizer, corpora)
    stop = StopSignal()
    if not args.export_only:
        config = TrainConfig(
            steps=args.steps,
            batch_tokens=args.batch_tokens,
            learning_rate=args.learning_rate,
            dropout=args.dropout,
            eval_every=args.eval_every,
            seed=args.seed,
        )
        train(DenseConfig(), config, dataset, args.work_dir, stop)
    if not stop.came:
        export(args, tokenizer, corpora, dataset)


def export(
    args: argparse.Namespace, tokenizer: Tokenizer, corpora: list[Corpus], dataset: Dataset
) -> None:
    """Write the model directory, checked against transformers, and the texts for a conversion."""
    model, progress, _ = load_best(args.work_dir)
    export_model(model, tokenizer, args.out)
    exported = load_exported(model, args.out)
    rows = torch.cat([s.windows(256)[:2] for s in dataset.valid.values()])
    difference = verify(exported, args.out, rows)
    draw_losses(progress, args.out / "loss_curve.png")
    learnt = "\n\n".join("\n\n".join(c.train)[:CALIBRATION_CHARS] for c in corpora)
    (args.out / "calibration.txt").write_text(learnt, encoding="utf-8")
    held_out = "\n\n".join("\n\n".join(c.valid) for c in corpora)
    (args.out / "held_out.txt").write_text(held_out, encoding="utf-8")
    total = sum(p.numel() for p in model.parameters())
    print(
        f"{args.out}: {total:,} parameters, step {progress.best_step}, held-out losses "
        f"{evaluate(exported, dataset)}, logits within {difference:.1e} of transformers"
    )


if __name__ == "__main__":
    main()
