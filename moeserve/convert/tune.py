"""Tuning: router and corrections of all layers, distilled from the dense model.

What is made small is the Kullback-Leibler divergence of the converted model's next tokens from
the dense model's on the calibration text, all layers at once, and a little of the prior-
approximate loss of every router (`tune_ffn.py`). AdamW, a warm-up, then a cosine to zero over the
budget. docs/conversion.md has what else was tried.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from moeserve.convert.calibration import Calibration
from moeserve.convert.settings import ConvertSettings
from moeserve.convert.tune_ffn import Worked
from moeserve.convert.tune_model import TunedModel
from moeserve.core import ConfigError, ModelError
from moeserve.text_windows import evenly

#: of one step, in whole windows
STEP_TOKENS = 1024
#: text that is too little would be learnt by heart
MIN_STEPS_OF_TEXT = 8
RATE = 2e-3
#: columns of a matrix from which its rate falls with their number: a step of Adam changes every
#: number by as much, and so a product by as much times the columns (muP, arXiv:2203.03466)
RATE_COLUMNS = 64
WARM_UP_STEPS = 10
BETAS = (0.9, 0.95)
GRADIENT_CLIP = 1.0
#: of the prior-approximate loss, the mean over layers, beside the divergence in nats
PRIOR_WEIGHT = 0.1
#: tokens that were kept back, on which the divergence is measured now and then
CHECK_TOKENS = 2048
#: of the budget, from one such measurement to the next
CHECK_SHARE = 0.1
#: what a kill may cost
SAVE_S = 20.0

Progress = Callable[[str, float], None]


@dataclass
class History:
    """What has happened so far. seconds: of tuning, over all runs. divergences: [step, nats per
    token, prior-approximate loss] of every step on its own text; checks: [step, nats per token] on
    text that was kept back."""

    step: int = 0
    seconds: float = 0.0
    divergences: list[list[float]] = field(default_factory=list)
    checks: list[list[float]] = field(default_factory=list)


@dataclass(frozen=True)
class Tuning:
    """What came of it, on text that was kept back. divergences: nats per token, before and after.
    agreement: by layer, the share of the best experts that the tuned router names."""

    untuned_perplexity: float
    divergences: tuple[float, float]
    agreement: tuple[float, ...]
    num_steps: int
    num_tokens: int
    seconds: float


@dataclass(frozen=True)
class TuningText:
    """learnt_from, held_back: [N, W] token ids."""

    learnt_from: Tensor
    held_back: Tensor

    @property
    def windows_per_step(self) -> int:
        return max(1, STEP_TOKENS // self.learnt_from.shape[1])

    @staticmethod
    def of(text: Calibration) -> TuningText:
        # Not the tensors of inference mode, of which torch takes no derivative.
        return TuningText(text.tuned_on.clone(), text.held_back.clone())

    def check(self) -> None:
        """Raises ConfigError where there is too little to tune on."""
        tokens, least = self.learnt_from.numel(), MIN_STEPS_OF_TEXT * STEP_TOKENS
        if tokens < least:
            raise ConfigError(
                f"text: {tokens} tokens to tune on; {least} or more are needed",
                field="text",
                hint="give more text, or convert without --tune-minutes",
            )

    def batch(self, seed: int, step: int) -> Tensor:
        """[B, W]: every window once, in any order, then all in another one."""
        count, size = len(self.learnt_from), self.windows_per_step
        places = torch.arange(step * size, (step + 1) * size)
        rows = []
        for turn in range(int(places[0]) // count, int(places[-1]) // count + 1):
            generator = torch.Generator().manual_seed(seed * 1_000_003 + turn)
            order = torch.randperm(count, generator=generator)
            rows.append(order[places[places // count == turn] % count])
        return self.learnt_from[torch.cat(rows)]


class Tuner:
    """A model, its optimiser and how far it has come."""

    def __init__(self, model: TunedModel, text: TuningText, settings: ConvertSettings) -> None:
        self.model = model
        self.history = History()
        self._text = text
        self._settings = settings
        self._parameters = model.parameters()
        groups = [{"params": [p], "rate": _rate_of(p)} for p in self._parameters.values()]
        self._optimizer = torch.optim.AdamW(groups, betas=BETAS, weight_decay=0.0)

    @property
    def spent(self) -> float:
        """Of the budget, from 0 to 1."""
        settings, history = self._settings, self.history
        if settings.tune_steps is not None:
            return min(1.0, history.step / settings.tune_steps)
        assert settings.tune_minutes is not None, "nobody tunes without a budget"
        return min(1.0, history.seconds / (60 * settings.tune_minutes))

    def run(self, save: Callable[[], None], progress: Progress) -> None:
        """Until the budget is spent. save: called now and then, and at the end."""
        history = self.history
        saved = history.seconds
        while not self._done():
            started = time.monotonic()
            spent = self.spent
            if spent >= min(1.0, len(history.checks) * CHECK_SHARE):
                history.checks.append([history.step, self.held_back_divergence()])
            if spent < 1.0:
                self._step()
            history.seconds += time.monotonic() - started
            if spent >= 1.0 or history.seconds - saved > SAVE_S:
                save()
                saved = history.seconds
            recent = history.divergences[-10:]
            mean = sum(entry[1] for entry in recent) / len(recent)
            progress(f"tuning: divergence {mean:.3f}", self.spent)

    def _done(self) -> bool:
        """The budget is spent, and what came of it was measured."""
        checks = self.history.checks
        return self.spent >= 1.0 and bool(checks) and checks[-1][0] == self.history.step

    def held_back_divergence(self) -> float:
        """Nats per token, on windows from all over the text that was kept back."""
        rows = self._text.held_back
        rows = rows[evenly(len(rows), max(1, CHECK_TOKENS // rows.shape[1]))]
        with torch.no_grad():
            tuned, _, _ = self.model.tuned(rows)
        return self.model.divergence(self.model.dense(rows), tuned)[0]

    def _step(self) -> None:
        history, model = self.history, self.model
        batch = self._text.batch(self._settings.seed, history.step)
        for group in self._optimizer.param_groups:
            group["lr"] = group["rate"] * self._share_of_rate()
        tuned, done, _ = model.tuned(batch)
        divergence, gradient = model.divergence(model.dense(batch), tuned)
        prior = self._prior(done)
        torch.autograd.backward((tuned, PRIOR_WEIGHT * prior), (gradient, None))
        torch.nn.utils.clip_grad_norm_(self._parameters.values(), GRADIENT_CLIP)
        self._optimizer.step()
        self._optimizer.zero_grad()
        history.step += 1
        history.divergences.append([history.step, divergence, float(prior.detach())])
        if not math.isfinite(divergence):
            raise ModelError(
                f"tuning: a divergence of {divergence} at step {history.step}",
                hint="convert without --tune-minutes",
            )

    def _prior(self, done: list[Worked]) -> Tensor:
        pairs = zip(self.model.ffns, done, strict=True)
        return torch.stack([ffn.prior_loss(worked) for ffn, worked in pairs]).mean()

    def _share_of_rate(self) -> float:
        warm = min(1.0, (self.history.step + 1) / WARM_UP_STEPS)
        return warm * 0.5 * (1 + math.cos(math.pi * self.spent))

    def tensors(self) -> dict[str, Tensor]:
        """Whatever the next step reads and changes, beside the history."""
        state = self._optimizer.state_dict()["state"]
        named = {f"parameter.{name}": p.detach() for name, p in self._parameters.items()}
        for index, moments in state.items():
            named |= {f"moment.{index}.{name}": moment for name, moment in moments.items()}
        return named

    def restore(self, tensors: Mapping[str, Tensor], history: History) -> None:
        """The inverse of `tensors`."""
        self.history = history
        moments: dict[int, dict[str, Tensor]] = {}
        for key, tensor in tensors.items():
            kind, _, name = key.partition(".")
            if kind == "parameter":
                self._parameters[name].data.copy_(tensor)
            else:
                index, _, moment = name.partition(".")
                moments.setdefault(int(index), {})[moment] = tensor.clone()
        groups = self._optimizer.state_dict()["param_groups"]
        self._optimizer.load_state_dict({"state": moments, "param_groups": groups})


def _rate_of(parameter: Tensor) -> float:
    columns = 1 if parameter.dim() == 1 else parameter.shape[-1]
    return RATE * min(1.0, RATE_COLUMNS / columns)
