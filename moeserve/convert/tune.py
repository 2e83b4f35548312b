"""Tuning: router and corrections of all layers, distilled from the dense model.

What is made small is the Kullback-Leibler divergence of the converted model's next tokens from
the dense model's on the calibration text, all layers at once, and a little of the prior-
approximate loss of every router (`tune_ffn.py`). AdamW, a warm-up, then a cosine to zero over the
budget. What comes of it is the mean of the last steps' weights (Polyak averaging), where that was
best on text that no step learns from; the untuned model is the first of those.
docs/conversion.md has what else was tried.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor

from moeserve.convert.calibration import Calibration
from moeserve.convert.settings import ConvertSettings
from moeserve.convert.tune_ffn import INNER, Worked
from moeserve.convert.tune_model import TunedModel
from moeserve.core import ConfigError, ModelError
from moeserve.text_windows import evenly

#: of one step, in whole windows
STEP_TOKENS = 1024
#: text that is too little would be learnt by heart
MIN_STEPS_OF_TEXT = 8
RATE = 1e-3
#: columns of a matrix from which its rate falls with their number: a step of Adam changes every
#: number by as much, and so a product by as much times the columns (muP, arXiv:2203.03466)
RATE_COLUMNS = 64
WARM_UP_STEPS = 10
BETAS = (0.9, 0.95)
GRADIENT_CLIP = 1.0
#: of the prior-approximate loss, the mean over layers, beside the divergence in nats
PRIOR_WEIGHT = 0.1
#: of factors that begin as noise: less than that of those that begin as zeros, so that their
#: product does not change faster and faster as they grow (LoRA+, arXiv:2402.12354)
INNER_RATE = 1 / 16
#: steps whose weights the mean is of
MEAN_STEPS = 50
#: tokens that no step learns from, on which the divergence is measured now and then
CHECK_TOKENS = 4096
#: of the windows, at most one in so many for that
CHECK_WINDOWS = 5
#: of the budget, from one such measurement to the next
CHECK_SHARE = 0.1
#: what a kill may cost
SAVE_S = 20.0

Progress = Callable[[str, float], None]


@dataclass
class History:
    """What has happened so far. seconds: of tuning, over all runs. divergences: [step, nats per
    token, prior-approximate loss] of every step on its own text; checks: [step, nats per token] of
    the mean weights on text that no step learns from."""

    step: int = 0
    seconds: float = 0.0
    divergences: list[list[float]] = field(default_factory=list)
    checks: list[list[float]] = field(default_factory=list)

    @property
    def best(self) -> list[float]:
        """The check with the least divergence, the first of those."""
        return min(self.checks, key=lambda check: check[1])


@dataclass(frozen=True)
class Tuning:
    """What came of it. divergences: nats per token, before and after, on the text that the best
    step was chosen by. agreement: by layer, the share of the best experts that the tuned router
    names, on text that was kept back. best_step: whose weights were written."""

    untuned_perplexity: float
    divergences: tuple[float, float]
    agreement: tuple[float, ...]
    best_step: int
    num_steps: int
    num_tokens: int
    seconds: float


@dataclass(frozen=True)
class TuningText:
    """learnt_from, chosen_by: [N, W] token ids; by the latter, how far tuning went well."""

    learnt_from: Tensor
    chosen_by: Tensor

    @property
    def windows_per_step(self) -> int:
        return max(1, STEP_TOKENS // self.learnt_from.shape[1])

    @staticmethod
    def of(text: Calibration) -> TuningText:
        windows = text.tuned_on
        wanted = min(CHECK_TOKENS // text.window_tokens, len(windows) // CHECK_WINDOWS)
        chosen_by = torch.zeros(len(windows), dtype=torch.bool)
        chosen_by[evenly(len(windows), wanted)] = True
        # Not the tensors of inference mode, of which torch takes no derivative.
        return TuningText(windows[~chosen_by].clone(), windows[chosen_by].clone())

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
        self._mean = self._now()
        self._best = self._now()
        groups = [{"params": [p], "rate": _rate_of(n, p)} for n, p in self._parameters.items()]
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
                self._check()
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

    def _check(self) -> None:
        """Measures the mean of the weights, and remembers the best one."""
        with self._weights(self._mean), torch.no_grad():
            rows = self._text.chosen_by
            tuned, _, _ = self.model.tuned(rows)
            divergence, _ = self.model.divergence(self.model.dense(rows), tuned)
        history = self.history
        history.checks.append([history.step, divergence])
        if history.best is history.checks[-1]:
            self._best = {name: tensor.clone() for name, tensor in self._mean.items()}

    def take_best(self) -> None:
        """Makes the model the best one that was found."""
        for name, parameter in self._parameters.items():
            parameter.data.copy_(self._best[name])

    def _now(self) -> dict[str, Tensor]:
        return {name: p.detach().clone() for name, p in self._parameters.items()}

    @contextmanager
    def _weights(self, tensors: Mapping[str, Tensor]) -> Iterator[None]:
        """The model with others for the time being."""
        own = {name: p.data for name, p in self._parameters.items()}
        for name, parameter in self._parameters.items():
            parameter.data = tensors[name]
        try:
            yield
        finally:
            for name, parameter in self._parameters.items():
                parameter.data = own[name]

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
        # Of few steps so far only the last ones: the first are far from where it goes.
        newest = max(1 / MEAN_STEPS, 10 / (10 + history.step))
        for name, parameter in self._parameters.items():
            self._mean[name].lerp_(parameter.detach(), newest)
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

    def _kept(self) -> dict[str, dict[str, Tensor]]:
        return {"parameter": self._parameters, "mean": self._mean, "best": self._best}

    def tensors(self) -> dict[str, Tensor]:
        """Whatever the next step reads and changes, beside the history."""
        state = self._optimizer.state_dict()["state"]
        named = {
            f"{kind}.{name}": tensor.detach()
            for kind, tensors in self._kept().items()
            for name, tensor in tensors.items()
        }
        for index, moments in state.items():
            named |= {f"moment.{index}.{name}": moment for name, moment in moments.items()}
        return named

    def restore(self, tensors: Mapping[str, Tensor], history: History) -> None:
        """The inverse of `tensors`."""
        self.history = history
        weights = self._kept()
        moments: dict[int, dict[str, Tensor]] = {}
        for key, tensor in tensors.items():
            kind, _, name = key.partition(".")
            if kind in weights:
                weights[kind][name].data.copy_(tensor)
            else:
                index, _, moment = name.partition(".")
                moments.setdefault(int(index), {})[moment] = tensor.clone()
        groups = self._optimizer.state_dict()["param_groups"]
        self._optimizer.load_state_dict({"state": moments, "param_groups": groups})


def _rate_of(name: str, parameter: Tensor) -> float:
    columns = 1 if parameter.dim() == 1 else parameter.shape[-1]
    rate = RATE * min(1.0, RATE_COLUMNS / columns)
    return rate * INNER_RATE if name.endswith(INNER) else rate
