"""How soon each expert will be used again: a logistic model that learns while serving.

For an expert let v = E[gamma^n], n being how many uses of its layer pass until it is chosen again.
v is near 1 for what comes back at once and 0 for what never does, and it obeys

    v(now) = gamma * (1 if chosen at the layer's next use, else v(then)),

so every use of a layer corrects what was said at the one before (temporal differences, R. Sutton,
1988, with the logistic loss). Nothing is trained beforehand and nothing has to be waited for.

What v is computed from, all of it known when the layer routes:
- the expert's own past: logarithms of moving averages of its use, at three rates;
- which experts the batch has just chosen in the layers around, this layer's included. A token's
  experts say much about its text, and so about the experts of the next ones: a matrix of weights
  per layer, one row for every expert of those layers, one column for every expert of this one.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moeserve.cache.numbering import ExpertNumbers, Numbers
from moeserve.core import LayerUse

Floats = NDArray[np.floating[Any]]  # float32; numpy's types say float64 of some results

#: how much later counts less. 0.8 to 0.93 do equally well (docs/log.md)
GAMMA = 0.85
#: rates of the moving averages, per use of the layer
RATES = (0.15, 0.025, 0.003)
#: keeps the logarithm of a moving average finite
LEAST_RATE = 2e-3
#: what is learnt per use: by the weights of contexts (falling with the uses of the context's
#: expert, up to FADE_USES), by those of the own past, by the experts' biases
CONTEXT_STEP, FADE, FADE_USES = 0.03, 0.03, 1000
STRENGTH = 5.0  # of all experts of a layer's use together
OWN_STEP = 2e-4
BIAS_STEP = 3e-3
#: memory for the weights of contexts: a model with more experts looks at fewer layers
MAX_CONTEXT_BYTES = 64 << 20
#: what of CONTEXT_STEP is left after so many uses
STEPS: Floats = (1 / np.sqrt(1 + FADE * np.arange(FADE_USES + 1))).astype(np.float32)


@dataclass(eq=False)
class _Said:
    """What was said at a layer's last use, and from what."""

    value: Floats  # [E]
    own: Floats  # [3, E]
    context: Numbers  # rows of the layer's weights
    step: Floats  # [len(context)] how much each of them is to learn


class ReuseModel:
    """v of all experts, each as of its layer's last use."""

    def __init__(self, numbers: ExpertNumbers, gamma: float = GAMMA) -> None:
        self.numbers = numbers
        self.gamma = gamma
        total = numbers.total
        #: [N] ln v
        self.log_value = np.full(total, np.log(gamma) - 2.0, np.float32)
        self.num_context_layers = _context_layers(numbers)
        self._rates = np.array(RATES, np.float32)[:, None]
        self._averages = np.full((len(RATES), total), 0.1, np.float32)  # [3, N]
        self._bias = np.full(total, -2.0, np.float32)  # [N]
        self._own_weights = np.array((0.2, 0.5, 0.2), np.float32)  # [3]
        self._context = [self._context_of(rank) for rank in range(len(numbers.layers))]
        self._weights = [
            np.zeros((len(context), size), np.float32)
            for context, size in zip(self._context, numbers.sizes, strict=True)
        ]
        self._chosen = np.zeros(total, np.bool_)  # [N] by the batch, of late
        self._strength = np.zeros(total, np.float32)  # [N] how much, where chosen
        self._step = np.zeros(total, np.float32)  # [N] what is learnt from it
        self._uses = np.zeros(total, np.int64)  # [N]
        self._said: list[_Said | None] = [None] * len(numbers.layers)

    def _context_of(self, rank: int) -> Numbers:
        """The experts that a layer looks at, by the rows of its weights: its own and those of the
        layers before it, around the end."""
        first = rank + 1 - self.num_context_layers
        ranks = np.arange(first, rank + 1) % len(self.numbers.layers)
        spans = [self.numbers.span_of[self.numbers.layers[r]] for r in ranks]
        return np.concatenate([np.arange(span.start, span.stop) for span in spans])

    def learn(self, use: LayerUse) -> None:
        """The next use of a layer: corrects what was said of it and says what comes after."""
        rank = self.numbers.rank_of[use.layer]
        span = self.numbers.span_of[use.layer]
        chosen = use.rows > 0
        averages = self._averages[:, span]
        averages += self._rates * (chosen - averages)
        own: Floats = np.log(averages + LEAST_RATE)
        own *= 0.5
        own += 1
        self._note(use, chosen)

        rows, strength, step = self._active(rank)
        logit = self._bias[span] + self._own_weights @ own
        logit += strength @ self._weights[rank].take(rows, axis=0)
        value: Floats = np.exp(np.negative(logit, out=logit), out=logit)
        value += 1
        np.reciprocal(value, out=value)
        said = self._said[rank]
        if said is not None:
            target = self.gamma * np.maximum(value, chosen)  # value is below 1
            self._correct(rank, said, target)
        self._said[rank] = _Said(value, own, rows, step)
        np.log(value, out=self.log_value[span])

    def _note(self, use: LayerUse, chosen: NDArray[np.bool_]) -> None:
        """The layer's experts as a context of what follows."""
        span = self.numbers.span_of[use.layer]
        self._chosen[span] = chosen
        strength = strength_of(use)
        self._strength[span] = strength
        uses = self._uses[span]
        uses += chosen
        np.multiply(strength, STEPS.take(uses, mode="clip"), out=self._step[span])

    def _active(self, rank: int) -> tuple[Numbers, Floats, Floats]:
        """Of the experts that were chosen last in the layers around: rows of the layer's weights,
        strengths, and steps."""
        context = self._context[rank]
        rows: Numbers = self._chosen[context].nonzero()[0]
        active = context[rows]
        return rows, self._strength[active], self._step[active]

    def _correct(self, rank: int, said: _Said, target: Floats) -> None:
        """One step down the gradient of the logistic loss, at what was known then."""
        error = said.value - target
        start = self.numbers.start_of[self.numbers.layers[rank]]
        self._bias[start : start + len(error)] -= BIAS_STEP * error
        self._own_weights -= OWN_STEP * (said.own @ error)
        weights = self._weights[rank]
        corrected = weights.take(said.context, axis=0)
        # BLAS's outer product is half as long as numpy's
        corrected -= np.dot(said.step[:, None], (CONTEXT_STEP * error)[None, :])
        weights[said.context] = corrected


def strength_of(use: LayerUse) -> Floats:
    """[E] how much a batch chose each expert: half by being chosen, half by the router's weight.

    The sum is the same for every use: with more rows there are more experts, and what each of them
    says of what follows is less.
    """
    chosen = use.rows > 0
    count = np.count_nonzero(chosen)
    total = float(use.weights.sum())
    if not count or total <= 0:
        return chosen.astype(np.float32)
    strength: Floats = chosen * np.float32(0.5 * STRENGTH / count)
    strength += use.weights * np.float32(0.5 * STRENGTH / total)
    return strength


def _context_layers(numbers: ExpertNumbers) -> int:
    """How many layers, the own one and those before it, fit MAX_CONTEXT_BYTES."""
    widest = max(numbers.sizes)
    fitting = MAX_CONTEXT_BYTES // (4 * widest * numbers.total)
    return max(1, min(len(numbers.layers), fitting))
