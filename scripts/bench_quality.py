"""What rounding the weights costs: perplexity of the bundled model, and the error of each format.

Theory. A weight w is stored as w + e. Rounding to the nearest of evenly spaced codes makes e spread
evenly over one step s, so that its root mean square is s / sqrt(12): with b bits over a range r,
r / ((2^b - 1) sqrt(12)). One scale per row must span the row's largest weight, one per group only
that of its group: smaller groups, smaller steps. bf16, mxfp4 and fp8 are floats, whose step grows
with the number: bf16 has e about 2^-9 / sqrt(3) of w, e4m3 2^-4 / sqrt(3). Products add K such
errors with random signs, so the relative error of a product is about that of the weights; and
rounding its inputs to int8, one scale per token, adds an error of its own. Whether that matters,
only the loss can tell: exp(mean negative log-likelihood per token), the perplexity.

Measured. Perplexity over windows of `--window` tokens, each read from its start (no overlap), of
the first `--tokens` tokens of each text: those given with `--text`, and the held-out documents of
the corpora that the bundled model was trained on (Python from this interpreter's own library).
Differences are in nats per token against float32 on the same tokens, with the standard error of the
mean difference per token; the model is small, so the errors of its weights are not averaged over
many inputs, and it was not trained on WikiText, of which it knows little.

Formats: `--quantize` as the server does it (head int8 with int4, routers float32). mxfp4 and fp8
are made here: weights of products rounded to OCP e2m1 blocks of 32 with a power-of-two scale, and
to e4m3 blocks of 128 x 128 scaled to 448, then served as float32, which is what the kernels compute
from such codes with inputs left alone.

Error: root mean square of e over that of w, for 1024 x 2048 normal weights, and for all weights of
products of the bundled model together, read back from packed memory.

    python scripts/bench_quality.py --text WIKITEXT --stories FILE --shakespeare FILE \\
        [--output benchmarks/results]

WIKITEXT: the validation text of WikiText-2 (Merity et al. 2016, arXiv:1609.07843), raw or not.
Last line printed: one JSON object.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from tiny_moe.data import load_python, load_shakespeare, load_stories
from torch import Tensor

from moeserve import LLM
from moeserve.config import BUNDLED_MODEL
from moeserve.cpu_backend.native_runtime import NativeRuntime
from moeserve.cpu_backend.packing import PackedWeight, PackFormat
from moeserve.experts.weights import FP4_VALUES, dequantize_fp8_blocks

FP8_MAX = 448.0
NOT_PRODUCTS = ("embed_tokens", "norm", "mlp.gate.weight")
SETTINGS: dict[str, dict[str, Any]] = {
    "float32": {},
    "bfloat16": {"dtype": "bfloat16"},
    "int8": {"quantize": "int8"},
    "int8, weight-only": {"quantize": "int8", "quantize_activations": False},
    **{f"int4/{g}": {"quantize": "int4", "quantize_group": g} for g in (32, 64, 128, "auto")},
    **{
        f"int4/{g}, zero points": {
            "quantize": "int4",
            "quantize_group": g,
            "quantize_zero_points": True,
        }
        for g in (32, 64, 128)
    },
    **{
        f"int4/{g}, weight-only": {
            "quantize": "int4",
            "quantize_group": g,
            "quantize_activations": False,
        }
        for g in (32, 64, 128)
    },
}
FORMS = {
    "bfloat16": PackFormat("bfloat16"),
    "int8": PackFormat("int8"),
    **{f"int4/{g}": PackFormat("int4", g) for g in (32, 64, 128)},
    **{f"int4/{g}, zero points": PackFormat("int4", g, zero_points=True) for g in (32, 64, 128)},
}


def to_mxfp4(weight: Tensor) -> Tensor:
    """[N, K] to the nearest e2m1 times a power of two per 32 inputs (OCP MX v1.0, section 6.3)."""
    padded = torch.nn.functional.pad(weight, (0, -weight.shape[1] % 32))
    blocks = padded.unflatten(1, (-1, 32))
    bound = blocks.abs().amax(-1, keepdim=True)
    # The largest number gets e2m1's largest exponent, 2.
    scale = torch.where(bound > 0, torch.exp2(torch.floor(torch.log2(bound)) - 2), 1.0)
    values = torch.tensor(FP4_VALUES)
    middles = (values[1:] + values[:-1]) / 2
    codes = torch.bucketize((blocks / scale).abs(), middles)
    return (values[codes] * blocks.sign() * scale).flatten(1)[:, : weight.shape[1]]


def to_fp8(weight: Tensor) -> Tensor:
    """[N, K] to e4m3 with a scale per 128 x 128."""
    rows, cols = weight.shape
    padded = torch.nn.functional.pad(weight, (0, -cols % 128, 0, -rows % 128))
    blocks = padded.unflatten(0, (-1, 128)).unflatten(2, (-1, 128))  # [R, 128, C, 128]
    scale = blocks.abs().amax((1, 3)).clamp(min=1e-30) / FP8_MAX
    spread = scale.repeat_interleave(128, 0).repeat_interleave(128, 1)[:rows, :cols]
    codes = (weight / spread).to(torch.float8_e4m3fn)
    return dequantize_fp8_blocks(codes, scale, torch.float32)


CONVERTED: dict[str, Callable[[Tensor], Tensor]] = {"mxfp4": to_mxfp4, "fp8": to_fp8}


def is_product(name: str, tensor: Tensor) -> bool:
    return tensor.dim() == 2 and not any(part in name for part in NOT_PRODUCTS)


def converted_model(convert: Callable[[Tensor], Tensor], path: Path) -> Path:
    """The bundled model with the weights of products replaced."""
    for file in BUNDLED_MODEL.iterdir():
        (path / file.name).write_bytes(file.read_bytes())
    tensors = load_file(path / "model.safetensors")
    for name, tensor in tensors.items():
        if is_product(name, tensor):
            tensors[name] = convert(tensor.float()).contiguous()
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    return path


def texts(args: argparse.Namespace) -> dict[str, str]:
    found = {path.stem: path.read_text(encoding="utf-8") for path in args.text}
    corpora = [load_python()]
    if args.stories:
        corpora.append(load_stories(args.stories))
    if args.shakespeare:
        corpora.append(load_shakespeare(args.shakespeare))
    for corpus in corpora:
        found[f"{corpus.name}, held out"] = "\n\n".join(corpus.valid)
    return found


def losses(
    model: str, windows: dict[str, list[list[int]]], settings: dict[str, Any], num_threads: int
) -> tuple[dict[str, Tensor], str]:
    """Nats of every token but the first of each window, by text; and how weights are kept."""
    found = {}
    with LLM(
        model,
        cpu_backend="native",
        num_threads=num_threads,
        prefix_reuse=False,
        max_batch_tokens=1024,
        **settings,
    ) as llm:
        for name, prompts in windows.items():
            results = llm.generate(prompts, max_tokens=1, temperature=0, prompt_logprobs=0)
            found[name] = torch.tensor(
                [
                    -token.logprob
                    for result in results
                    for token in result.prompt_logprobs or ()
                    if token.logprob is not None
                ],
                dtype=torch.float64,
            )
        return found, llm.info.notes["weights"]


@dataclass
class Figures:
    """perplexity: by format and text. errors: relative, by format and kind of weights."""

    model: str
    tokens: dict[str, int]
    window: int
    perplexity: dict[str, dict[str, dict[str, float]]] = field(default_factory=dict)
    weights: dict[str, str] = field(default_factory=dict)
    errors: dict[str, dict[str, float]] = field(default_factory=dict)


def measure_losses(figures: Figures, args: argparse.Namespace) -> None:
    with LLM(cpu_backend="native", num_threads=1) as llm:
        encoded = {name: llm.tokenizer.encode(text) for name, text in texts(args).items()}
    windows = {
        name: [ids[i : i + args.window] for i in range(0, min(len(ids), args.tokens), args.window)]
        for name, ids in encoded.items()
    }
    base: dict[str, Tensor] = {}
    with tempfile.TemporaryDirectory() as scratch:
        runs = [(name, str(BUNDLED_MODEL), given) for name, given in SETTINGS.items()]
        for name, convert in CONVERTED.items():
            path = Path(scratch) / name
            path.mkdir()
            runs.append((name, str(converted_model(convert, path)), {}))
        for name, model, given in runs:
            found, kept = losses(model, windows, given, args.num_threads)
            base = base or found
            figures.weights[name] = kept
            figures.tokens = {text: nats.numel() for text, nats in found.items()}
            figures.perplexity[name] = {
                text: compare(nats, base[text]) for text, nats in found.items()
            }
            print(name, figures.perplexity[name], file=sys.stderr, flush=True)


def compare(nats: Tensor, base: Tensor) -> dict[str, float]:
    difference = nats - base
    return {
        "perplexity": math.exp(float(nats.mean())),
        "nats_more": float(difference.mean()),
        "standard_error": float(difference.std()) / math.sqrt(difference.numel()),
    }


def sets_of_weights() -> Iterator[tuple[str, list[Tensor]]]:
    yield "normal", [torch.randn(1024, 2048, generator=torch.Generator().manual_seed(0))]
    tensors = load_file(BUNDLED_MODEL / "model.safetensors")
    yield "trained", [t.float() for name, t in tensors.items() if is_product(name, t)]


def measure_errors(figures: Figures) -> None:
    runtime = NativeRuntime(1)

    def packed(form: PackFormat) -> Callable[[Tensor], Tensor]:
        def numbers(weight: Tensor) -> Tensor:
            stored = PackedWeight(runtime.handle, tuple(weight.shape), form)
            stored.put(torch.arange(len(weight)), weight)
            return stored.numbers()

        return numbers

    ways = {**{name: packed(form) for name, form in FORMS.items()}, **CONVERTED}
    for kind, weights in sets_of_weights():
        power = sum(float(weight.double().square().sum()) for weight in weights)
        for name, way in ways.items():
            wrong = sum(float((way(w) - w).double().square().sum()) for w in weights)
            figures.errors.setdefault(name, {})[kind] = math.sqrt(wrong / power)


def as_markdown(figures: Figures, command: str) -> str:
    lines = [f"# Quality of quantised weights, {date.today()}", "", f"`{command}`", ""]
    names = list(figures.tokens)
    counts = ", ".join(f"{name}: {count:,}" for name, count in figures.tokens.items())
    lines += [f"Perplexity of {figures.model}, windows of {figures.window} tokens ({counts}); in "]
    lines[-1] += "brackets nats per token above float32 ± standard error. See the script."
    lines += ["", f"| format | {' | '.join(names)} |", "| --- " * (len(names) + 1) + "|"]
    for form, found in figures.perplexity.items():
        cells = [
            f"{f['perplexity']:.3f} ({f['nats_more']:+.4f} ± {f['standard_error']:.4f})"
            for f in (found[name] for name in names)
        ]
        lines.append(f"| {form} | {' | '.join(cells)} |")
    lines += ["", "Root mean square error of weights, relative to that of the weights:", ""]
    lines += ["| format | normal | trained |", "| --- | --- | --- |"]
    for form, errors in figures.errors.items():
        lines.append(f"| {form} | {errors['normal']:.5f} | {errors['trained']:.5f} |")
    lines += ["", f"int4/auto chose {figures.weights['int4/auto'].removeprefix('packed; ')}.", ""]
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description="Perplexity and error of weight formats.")
    parser.add_argument("--text", type=Path, action="append", default=[], help="any text file")
    parser.add_argument("--stories", type=Path, help="the bundled model's corpus of stories")
    parser.add_argument("--shakespeare", type=Path, help="the bundled model's corpus of plays")
    parser.add_argument("--tokens", type=int, default=65536, help="tokens of each text")
    parser.add_argument("--window", type=int, default=512)
    parser.add_argument("--num-threads", type=int, default=1)
    parser.add_argument("--output", type=Path, help="directory for <date>-quality.json and .md")
    args = parser.parse_args()
    if args.output:
        args.output.mkdir(parents=True, exist_ok=True)
    figures = Figures(BUNDLED_MODEL.name, {}, args.window)
    measure_errors(figures)
    print(figures.errors, file=sys.stderr, flush=True)
    measure_losses(figures, args)
    line = json.dumps(figures.__dict__)
    if args.output:
        named = [part.name if Path(part).is_file() else part for part in map(Path, sys.argv[1:])]
        command = f"python scripts/bench_quality.py {' '.join(map(str, named))}"
        stem = args.output / f"{date.today()}-quality"
        stem.with_suffix(".json").write_text(line + "\n", encoding="utf-8")
        stem.with_suffix(".md").write_text(as_markdown(figures, command), encoding="utf-8")
    print(line)
    return 0


if __name__ == "__main__":
    sys.exit(main())
