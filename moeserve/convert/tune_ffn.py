"""One converted FFN as it is tuned: its router, and a low-rank correction of every part.

The written weights stand still; a part's gate, up and down become W + B A with B [out, R] and
A [R, in], R small (LoRA, arXiv:2106.09685), which is added up when the model is written. Where the
factors would have as many numbers as W, the correction is one matrix [out, in]. All parts
are computed for all tokens and multiplied with the choice, so that a part that was not chosen
still says by how much it would have helped. The choice of the k best is hard, as it will be when
the model is served; its derivative is that of a sigmoid of the distance from the border between
chosen and idle (straight-through, arXiv:1308.3432).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from moeserve.convert.glm import SPREAD, Gate, layer_names
from moeserve.convert.routers import LinearRouter
from moeserve.convert.settings import MoeShape
from moeserve.models.safetensors_file import SafetensorsFile

#: of a correction
RANK = 16
KINDS = ("gate", "up", "down")
#: names of a correction: its factors, or the one matrix
INNER, OUTER, WHOLE = ".inner", ".outer", ".whole"


@dataclass(frozen=True)
class CutFfn:
    """A written FFN in float32, part after part, shared ones first. gate, up: [P, m, H]. down:
    [P, H, m]. router: of the experts that there is a choice of, scores of standard deviation one;
    the `num_fixed` parts before those work on every token."""

    gate: Tensor
    up: Tensor
    down: Tensor
    router: LinearRouter
    num_fixed: int

    @staticmethod
    def read(file: SafetensorsFile, index: int, shape: MoeShape, always_on: int) -> CutFfn:
        """always_on: of the routed experts, those that every token chooses."""
        names = layer_names(index)

        def tensor(name: str) -> Tensor:
            return file.read(name).to(torch.float32, copy=True)

        def parts(kind: str, dim: int) -> Tensor:
            shared = tensor(f"{names['shared']}{kind}_proj.weight").chunk(shape.num_shared, dim)
            routed = [
                tensor(f"{names['expert']}{expert}.{kind}_proj.weight")
                for expert in range(shape.num_routed)
            ]
            return torch.stack([*shared, *routed])

        gate = Gate(
            tensor(f"{names['gate']}weight"), tensor(f"{names['gate']}e_score_correction_bias")
        )
        # Back from glm4_moe's terms, see make_gate.
        router = LinearRouter(
            gate.weight[always_on:] / (2 * SPREAD), gate.correction[always_on:] * 2 / SPREAD
        )
        return CutFfn(
            parts("gate", 0), parts("up", 0), parts("down", 1), router, shape.num_shared + always_on
        )


@dataclass(frozen=True)
class Worked:
    """What a tuned FFN did with T tokens. output: [T, H]. margin: [T, C], the scores less the
    border between chosen and idle. norms: [T, C], those of the outputs that the experts have or
    would have; no gradient."""

    output: Tensor
    margin: Tensor
    norms: Tensor


class TunedFfn:
    """parameters: by name, what is tuned."""

    def __init__(
        self,
        written: CutFfn,
        num_active: int,
        activation: Callable[[Tensor], Tensor],
        generator: torch.Generator,
    ) -> None:
        """num_active: parts that work on a token."""
        self._written = written
        self._k = num_active - written.num_fixed
        self._activation = activation
        router = written.router
        self.parameters = {"router.weight": router.weight, "router.bias": router.bias}
        for kind in KINDS:
            num_parts, rows, columns = getattr(written, kind).shape
            if RANK * (rows + columns) >= rows * columns:
                self.parameters[kind + WHOLE] = torch.zeros(num_parts, rows, columns)
                continue
            inner = torch.randn(num_parts, RANK, columns, generator=generator)
            self.parameters[kind + INNER] = inner * columns**-0.5
            self.parameters[kind + OUTER] = torch.zeros(num_parts, rows, RANK)
        for parameter in self.parameters.values():
            parameter.requires_grad_()

    def __call__(self, normed: Tensor) -> Worked:
        """normed: [T, H]."""
        now = self.merged()
        num_parts, size, hidden = now.gate.shape
        gate, up = now.gate.view(-1, hidden), now.up.view(-1, hidden)
        down = now.down.transpose(0, 1)  # [H, P, m]
        scores = now.router.scores(normed)
        margin = scores - _border(scores.detach(), self._k)
        soft = margin.sigmoid()
        choice = (margin > 0).float() + (soft - soft.detach())
        always = normed.new_ones(len(normed), now.num_fixed)
        weights = torch.cat((always, choice), dim=1)
        activations = self._activation(normed @ gate.T) * (normed @ up.T)
        activations = activations.view(-1, num_parts, size)  # [T, P, m]
        output = (activations * weights[:, :, None]).flatten(1) @ down.flatten(1).T
        with torch.no_grad():
            norms = _output_norms(activations[:, now.num_fixed :], now.down[now.num_fixed :])
        return Worked(output, margin, norms)

    def agreement(self, worked: Worked) -> float:
        """The share of the k experts with the largest outputs that are chosen."""
        best = best_experts(worked.norms, self._k)
        return float((best * (worked.margin > 0)).sum() / best.sum())

    def prior_loss(self, worked: Worked) -> Tensor:
        """FactorLLM's prior-approximate loss for the router (arXiv:2408.11855): the experts
        themselves say which of them a token should have had, here those with the largest outputs,
        and the router is taught to name them. Binary cross-entropy, because k are chosen."""
        labels = best_experts(worked.norms, self._k)
        return F.binary_cross_entropy_with_logits(worked.margin, labels)

    def merged(self) -> CutFfn:
        """With the corrections added up."""
        parameters = self.parameters
        weights = {kind: getattr(self._written, kind) + self._correction(kind) for kind in KINDS}
        router = LinearRouter(parameters["router.weight"], parameters["router.bias"])
        return replace(self._written, **weights, router=router)

    def _correction(self, kind: str) -> Tensor:
        parameters = self.parameters
        if kind + WHOLE in parameters:
            return parameters[kind + WHOLE]
        return torch.bmm(parameters[kind + OUTER], parameters[kind + INNER])


def best_experts(norms: Tensor, k: int) -> Tensor:
    """[T, C]: 1 for the k largest of a token."""
    return torch.zeros_like(norms).scatter_(1, norms.topk(k, 1).indices, 1.0)


def _border(scores: Tensor, k: int) -> Tensor:
    """[T, 1]: half way between the last score that is chosen and the first that is not."""
    ranked = scores.topk(k + 1, dim=1).values
    return ranked[:, k - 1 :].mean(1, keepdim=True)


def _output_norms(activations: Tensor, down: Tensor) -> Tensor:
    """activations: [T, C, m], down: [C, H, m] -> [T, C], by Gram matrices: m is less than H."""
    gram = down.transpose(1, 2) @ down  # [C, m, m]
    by_expert = activations.transpose(0, 1)  # [C, T, m]
    squares = ((by_expert @ gram) * by_expert).sum(2)
    return squares.clamp_min(0).sqrt().T
