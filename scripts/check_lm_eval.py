"""lm-eval against a running moeserve and against transformers: equal log-likelihoods.

    pip install -e ".[eval]" && python scripts/check_lm_eval.py [--model DIR]

Starts a server with the model (default: the bundled one) on a free port, runs one small local
multiple-choice task through lm-eval's `local-completions` client (echo + logprobs over
/v1/completions) and through its `hf` client on the same checkpoint, and compares every
log-likelihood. Exit status 1 when any differs by more than --tolerance. Nothing is downloaded.
Last line: one JSON object.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

from server_process import running_server

from moeserve.config import BUNDLED_MODEL

#: a context and its continuations, the most sensible first
QUESTIONS: list[tuple[str, list[str]]] = [
    ("Once upon a time, there was a little girl named", [" Lily", " import", " thou"]),
    ("The dog was very happy. He wagged his", [" tail", " return", " sword"]),
    ("They played together all day and became best", [" friends", " self", " lord"]),
    ("Tom was sad because he lost his", [" toy", " None", " crown"]),
    ("One day, they went to the", [" park", " def", " duke"]),
    ("ROMEO:\nO, she doth teach the torches to burn", [" bright", " import", " mommy"]),
    ("KING RICHARD III:\nMy lord, I", [" will", " self", " toy"]),
    ("What, ho! who is", [" there", " return", " park"]),
    ("I pray thee, good", [" sir", " def", " tail"]),
    ("import os\nimport", [" sys", " thou", " Lily"]),
    ("def __init__(", ["self", "thee", "mom"]),
    ("    if not isinstance(value,", [" str", " dog", " grace"]),
    ("        raise", [" ValueError", " lord", " happy"]),
    ("for i in range(", ["len", "king", "ball"]),
]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, default=BUNDLED_MODEL)
    parser.add_argument("--tolerance", type=float, default=1e-3)
    parser.add_argument("--concurrent", type=int, default=4, help="requests in flight")
    args = parser.parse_args()
    os.environ.update(HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1", TOKENIZERS_PARALLELISM="false")
    with tempfile.TemporaryDirectory() as directory:
        task = write_task(Path(directory))
        with running_server("--served-name", "model", model=args.model) as server:
            served = evaluate(
                task,
                "local-completions",
                model="model",
                base_url=f"{server.http}/v1/completions",
                tokenizer=str(args.model),
                tokenizer_backend="huggingface",
                num_concurrent=args.concurrent,
            )
        oracle = evaluate(
            task, "hf", pretrained=str(args.model), dtype="float32", device="cpu", batch_size=1
        )
    differences = [abs(a - b) for a, b in zip(served, oracle, strict=True)]
    report = {
        "task": "local multiple choice",
        "log_likelihoods": len(differences),
        "largest_difference": max(differences),
        "tolerance": args.tolerance,
        "equal": max(differences) <= args.tolerance,
    }
    print(json.dumps(report))
    return 0 if report["equal"] else 1


def write_task(directory: Path) -> Path:
    """An lm-eval task directory: documents as JSON lines, the task as YAML."""
    documents = directory / "questions.jsonl"
    with documents.open("w") as file:
        for context, choices in QUESTIONS:
            file.write(json.dumps({"context": context, "choices": choices, "gold": 0}) + "\n")
    (directory / "local_choice.yaml").write_text(
        f"""\
task: local_choice
dataset_path: json
dataset_kwargs:
  data_files:
    test: {documents}
output_type: multiple_choice
test_split: test
doc_to_text: "{{{{context}}}}"
doc_to_choice: choices
doc_to_target: gold
target_delimiter: ""
metric_list:
  - metric: acc
"""
    )
    return directory


def evaluate(task: Path, client: str, **model_args: Any) -> list[float]:
    """All log-likelihoods of the task, in the order of documents and choices."""
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    result = simple_evaluate(
        model=client,
        model_args=model_args,
        tasks=["local_choice"],
        task_manager=TaskManager(include_path=str(task), include_defaults=False),
        log_samples=True,
        bootstrap_iters=0,
    )
    samples = sorted(result["samples"]["local_choice"], key=lambda sample: sample["doc_id"])
    print(f"{client}: accuracy {result['results']['local_choice']['acc,none']:.3f}")
    return [float(answer[0][0]) for sample in samples for answer in sample["resps"]]


if __name__ == "__main__":
    sys.exit(main())
