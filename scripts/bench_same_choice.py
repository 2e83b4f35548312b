"""What it would cost if one choice of experts, made from the tokens, routed all layers (Read-ME).

    python scripts/bench_same_choice.py DENSE OUT --text TEXT [--tokens 32768] [--window 512]

OUT is what `moeserve convert DENSE OUT --pregate` wrote with the same text, tokens and window. Its
routers are replaced, and perplexities are those of the windows that nothing was fitted to.

- routers: the layers' own, the model as it is.
- pregate: by layer, the k likeliest of its file; what lookahead without any doubt would cost.
- same, by the routers: one choice for all layers, the k experts that most layers' routers choose.
  It is not known before the model runs; it says how far layers agree at all.
- same, by pregate: one choice for all layers, the k experts whose chances add up to most.
- same, by dice.

The numbers of experts mean nothing across layers. So each layer's experts are matched with those of
the layers before: by the assignment under which most choices of the learnt text agree with how
often the matched experts were chosen so far (exact; moeserve.convert.balanced).

Last line: one JSON object.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from moeserve.config import ModelConfig
from moeserve.convert.balanced import balanced_assignment
from moeserve.convert.calibration import Calibration
from moeserve.convert.dense import DenseModel, open_dense
from moeserve.convert.measure import measure_perplexity
from moeserve.convert.pregate import Routed, route
from moeserve.convert.pregate_layers import Reroute, WrittenModel
from moeserve.convert.run import read_calibration
from moeserve.convert.settings import ConvertSettings
from moeserve.core import Routing
from moeserve.experts.layer import Routes
from moeserve.models.checkpoint import read_json
from moeserve.models.packed_model import config_sha256
from moeserve.predictors.pregate_file import PREGATE_FILE, load_pregate
from moeserve.text_windows import recent_tokens


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("dense", help="directory or hub id")
    add("converted", type=Path, help="what was converted of it, with --pregate")
    add("--text", type=Path, nargs="+", required=True)
    add("--tokens", type=int, default=32_768, help="(%(default)s)")
    add("--window", type=int, default=512, help="(%(default)s)")
    add("--threads", type=int, default=1, help="(%(default)s)")
    return parser.parse_args()


class Forced:
    """A router that chooses what it is told, row by row, and weighs all of it by one."""

    def __init__(self, router: Routes, ids: Tensor) -> None:
        """ids: [T, K] of all rows to come."""
        self.spec = router.spec
        self._ids = ids

    def __call__(self, x: Tensor) -> Routing:
        ids, self._ids = self._ids[: len(x)], self._ids[len(x) :]
        return Routing(ids.long(), torch.ones(ids.shape))


def chosen(ids: Tensor, num_experts: int) -> Tensor:
    """[T, K] to [T, E]: 1 for the experts that were chosen."""
    return torch.zeros(len(ids), num_experts).scatter_(1, ids.long(), 1.0)


def matched_numbers(routed: Routed, rows: slice) -> list[Tensor]:
    """By layer, [E]: the expert of that layer that each number stands for. rows: to go by."""
    num_experts = routed.gates[0].num_experts
    total = chosen(routed.choices[0][rows], num_experts)
    numbers = [torch.arange(num_experts)]
    for ids in routed.choices[1:]:
        own = chosen(ids[rows], num_experts)
        cost = -(total.T @ own).double().numpy()  # [number, expert]
        expert_of = torch.from_numpy(balanced_assignment(cost))
        numbers.append(expert_of)
        total += own[:, expert_of]
    return numbers


def same_choice(scores: list[Tensor], numbers: list[Tensor], k: int) -> list[Tensor]:
    """scores: by layer, [T, E]. The k best numbers of each row, as the experts of each layer."""
    total = sum(each[:, own] for each, own in zip(scores, numbers, strict=True))
    best = total.topk(k, dim=1).indices
    return [own[best] for own in numbers]


def perplexity(
    dense: DenseModel, model: WrittenModel, windows: Tensor, choices: list[Tensor] | None
) -> float:
    """choices: by layer, [T, K] in the order of the windows' tokens; None: the routers' own."""
    reroute: Reroute | None = None
    if choices is not None:
        reroute = lambda layer, router: Forced(router, choices[layer])  # noqa: E731
    x = model.embed(windows.flatten())
    for index in range(model.spec.num_layers):
        model.run_layer(index, x, windows.shape[1], reroute)
    return measure_perplexity(dense, x, windows)


def measure(args: argparse.Namespace, dense: DenseModel, model: WrittenModel) -> dict[str, float]:
    settings = ConvertSettings(max_tokens=args.tokens, window_tokens=args.window)
    text: Calibration = read_calibration(dense, args.text, settings)
    routed = route(model, text, lambda stage, share: None)
    held, windows = text.held_back_rows, text.held_back
    num_experts, k = routed.gates[0].num_experts, routed.choices[0].shape[1]
    numbers = matched_numbers(routed, text.learnt_rows)
    own = [chosen(ids[held], num_experts) for ids in routed.choices]
    sha256 = config_sha256(args.converted)
    weights = load_pregate(args.converted / PREGATE_FILE, sha256, routed.gates).weights
    recent = recent_tokens(windows, weights.place.shape[1]).flatten(0, 1).numpy()
    chances = torch.from_numpy(weights.row_chances(recent)).unflatten(1, (len(own), -1))
    foreseen = list(chances.unbind(1))
    cases: dict[str, list[Tensor] | None] = {
        "routers": None,
        "pregate": [each.topk(k, dim=1).indices for each in foreseen],
        "same, by the routers": same_choice(own, numbers, k),
        "same, by pregate": same_choice(foreseen, numbers, k),
    }
    generator = np.random.default_rng(0)
    dice = generator.permuted(np.tile(np.arange(num_experts), (windows.numel(), 1)), axis=1)[:, :k]
    cases["same, by dice"] = [torch.from_numpy(dice)] * len(own)
    return {name: perplexity(dense, model, windows, each) for name, each in cases.items()}


def main() -> None:
    args = parse_args()
    torch.set_num_threads(args.threads)
    shards = sorted(args.converted.glob("model-*.safetensors"))
    config = read_json(args.converted / "config.json")
    with (
        torch.inference_mode(),
        open_dense(ModelConfig(model=args.dense)) as dense,
        WrittenModel.open(args.converted, config, shards) as model,
    ):
        found = measure(args, dense, model)
    print("| routed by | perplexity | of the model as it is |\n| --- | --- | --- |")
    for name, value in found.items():
        print(f"| {name} | {value:.3f} | {value / found['routers']:.3f} × |")
    print(json.dumps(found))


if __name__ == "__main__":
    main()
