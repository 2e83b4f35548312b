"""How the router of a trained model spreads held-out tokens over the experts."""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import combinations

import torch
from torch import Tensor

from tiny_moe.data import Stream
from tiny_moe.model import TinyModel

WINDOW = 512


@dataclass(frozen=True)
class ExpertLoad:
    """Shares of routed tokens, each row of a layer summing to one."""

    shares: dict[str, Tensor]  # domain -> [L, E]
    half_distance: dict[str, float]  # domain -> distance between the halves of its own text
    repeat: dict[str, float]  # domain -> share of a token's experts its predecessor also used
    num_tokens: dict[str, int]

    @property
    def pooled(self) -> Tensor:
        """Mean of the domains, [L, E]."""
        return torch.stack(list(self.shares.values())).mean(0)

    def normalised_entropy(self) -> list[float]:
        """Per layer; 1 is a uniform load, 0 a single expert."""
        pooled = self.pooled
        entropy = -(pooled * pooled.clamp_min(1e-12).log()).sum(-1)
        return [float(e) / math.log(pooled.shape[-1]) for e in entropy]

    def distances(self) -> dict[tuple[str, str], list[float]]:
        """Total-variation distance per layer, for every pair of domains."""
        return {
            (a, b): total_variation(self.shares[a], self.shares[b])
            for a, b in combinations(self.shares, 2)
        }


def total_variation(a: Tensor, b: Tensor) -> list[float]:
    """Half the absolute difference, per layer: the share of the load that would have to move."""
    return [float(d) for d in (a - b).abs().sum(-1) / 2]


@torch.no_grad()
def measure_load(model: TinyModel, streams: dict[str, Stream]) -> ExpertLoad:
    """Route whole held-out streams and count."""
    shares, half_distance, repeat, num_tokens = {}, {}, {}, {}
    for name, stream in streams.items():
        ids = _route(model, stream)  # [L, N, S, K]
        shares[name] = _shares(ids, model.config.num_experts)
        middle = ids.shape[1] // 2
        halves = [_shares(h, model.config.num_experts) for h in (ids[:, :middle], ids[:, middle:])]
        half_distance[name] = sum(total_variation(*halves)) / len(ids)
        same = ids[:, :, 1:, :, None] == ids[:, :, :-1, None, :]
        repeat[name] = float(same.any(-1).float().mean())
        num_tokens[name] = ids.shape[1] * ids.shape[2]
    return ExpertLoad(shares, half_distance, repeat, num_tokens)


def _route(model: TinyModel, stream: Stream) -> Tensor:
    """Return the chosen experts of every layer, window and position: [L, N, S, K]."""
    batches = []
    for rows in torch.split(stream.windows(WINDOW), 8):
        output = model(rows)
        batches.append(torch.stack(output.expert_ids).view(len(output.expert_ids), *rows.shape, -1))
    return torch.cat(batches, dim=1)


def _shares(ids: Tensor, num_experts: int) -> Tensor:
    counts = [torch.bincount(layer.flatten(), minlength=num_experts) for layer in ids]
    return torch.stack(counts) / ids[0].numel()
