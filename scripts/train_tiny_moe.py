"""Train the bundled tiny Mixture-of-Experts model and write it as a Hugging Face directory.

The model is a `qwen3_moe` of about 4.7 M parameters, trained on Shakespeare, short stories and the
Python source of the running interpreter's standard library, with chat samples made from all three.
The exact command:

    python scripts/train_tiny_moe.py --shakespeare tinyshakespeare.txt --stories tinystories.txt

A killed run continues where its last checkpoint was. `--export-only` writes the directory again
from the best checkpoint; `--eval-only` prints the held-out losses of that checkpoint.
Needs torch, tokenizers, transformers, safetensors, jinja2, matplotlib and tqdm.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from tiny_moe.card import Facts, write_card
from tiny_moe.data import (
    Corpus,
    Dataset,
    load_python,
    load_shakespeare,
    load_stories,
    train_tokenizer,
)
from tiny_moe.export import check_size, export_model, load_exported, verify, write_samples
from tiny_moe.model import ModelConfig
from tiny_moe.routing import measure_load
from tiny_moe.train import TrainConfig, evaluate, load_best, train
from tokenizers import Tokenizer

REPOSITORY = Path(__file__).resolve().parent.parent


def parse_args() -> argparse.Namespace:
    """Read the command line; every default is the one the bundled model was trained with."""
    defaults = TrainConfig()
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
    add("--balance", type=float, default=defaults.balance_coefficient, help="(%(default)s)")
    add("--eval-every", type=int, default=defaults.eval_every, help="steps (%(default)s)")
    add("--seed", type=int, default=defaults.seed, help="(%(default)s)")
    add("--threads", type=int, default=2, help="torch threads (%(default)s)")
    add("--work-dir", type=Path, default=REPOSITORY / "build" / "tiny-moe", help="checkpoints")
    add("--out", type=Path, default=REPOSITORY / "moeserve" / "assets" / "tiny-moe")
    add("--hardware-note", default="", help="words for the card, such as: machine shared")
    mode = parser.add_mutually_exclusive_group()
    mode.add_argument("--export-only", action="store_true", help="write --out again, no training")
    mode.add_argument("--eval-only", action="store_true", help="print held-out losses and stop")
    return parser.parse_args()


def main() -> None:
    """Train (or resume), then export the best checkpoint with its card."""
    args = parse_args()
    torch.set_num_threads(args.threads)
    args.work_dir.mkdir(parents=True, exist_ok=True)
    corpora = [load_shakespeare(args.shakespeare), load_stories(args.stories), load_python()]
    tokenizer_path = args.work_dir / "tokenizer.json"
    if not tokenizer_path.exists():
        train_tokenizer(corpora, ModelConfig().vocab_size).save(str(tokenizer_path))
    tokenizer = Tokenizer.from_file(str(tokenizer_path))
    dataset = Dataset.build(tokenizer, corpora)
    if not (args.export_only or args.eval_only):
        config = TrainConfig(
            steps=args.steps,
            batch_tokens=args.batch_tokens,
            learning_rate=args.learning_rate,
            dropout=args.dropout,
            balance_coefficient=args.balance,
            eval_every=args.eval_every,
            seed=args.seed,
        )
        train(ModelConfig(), config, dataset, args.work_dir)
    if args.eval_only:
        model, progress, _ = load_best(args.work_dir)
        print({"step": progress.best_step, **evaluate(model, dataset)})
        return
    export(args, tokenizer, corpora, dataset)


def export(
    args: argparse.Namespace, tokenizer: Tokenizer, corpora: list[Corpus], dataset: Dataset
) -> None:
    """Write the model directory; every reported figure is measured on the exported weights."""
    model, progress, config = load_best(args.work_dir)
    export_model(model, tokenizer, args.out)
    exported = load_exported(model, args.out)
    rows = torch.cat([s.windows(256)[:2] for s in dataset.valid.values()])
    facts = Facts(
        model=exported,
        config=config,
        progress=progress,
        corpora=corpora,
        dataset=dataset,
        losses=evaluate(exported, dataset),
        load=measure_load(exported, dataset.valid),
        samples=write_samples(args.out, config.seed),
        logit_difference=verify(exported, args.out, rows),
        hardware_note=args.hardware_note,
    )
    write_card(facts, args.out)
    print(f"{args.out}: {check_size(args.out):,} bytes, held-out losses {facts.losses}")


if __name__ == "__main__":
    main()
