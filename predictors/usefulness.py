"""Does prefetching pay? Counted per layer and distance while serving; the depth follows. And does
it as a whole bring back the time that it takes?"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Generic, TypeVar

from moeserve.core import ConfigError

#: outcomes after which one counts half
HALF_LIFE = 64.0
#: calls, one a layer and step, after which what all layers save and take counts half
HALF_LIFE_CALLS = 4096.0
#: calls that say as much as an outcome: a predictor that learns must have had time to
CALLS_OF_EVIDENCE = 64.0
#: outcomes to see before one may say that it does not pay
LEAST_EVIDENCE = 16.0
#: steps to the next try after prefetching was switched off, doubled after each try that failed
FIRST_PAUSE_STEPS = 64
LONGEST_PAUSE_STEPS = 4096
#: steps that a try goes on
TRY_STEPS = 8
#: of a prefetch's time, what one saves that a step still had to wait for
LATE_SHARE = 0.5
#: times as long as usual that a call may have taken: what is more the system took
LONGEST_CALL = 4.0


@dataclass
class Outcomes:
    """What became of the prefetches from one layer over one distance."""

    useful: float = 0.0
    wasted: float = 0.0

    def add(self, useful: int, wasted: int) -> None:
        """useful: prefetched, then used at the next visit; wasted: not used, or too late."""
        fade = 0.5 ** ((useful + wasted) / HALF_LIFE)
        self.useful = self.useful * fade + useful
        self.wasted = self.wasted * fade + wasted

    @property
    def evidence(self) -> float:
        return self.useful + self.wasted

    def pays(self, break_even: float) -> bool:
        """Whether the useful share reaches `break_even`."""
        return self.useful >= break_even * self.evidence

    def forget(self) -> None:
        self.useful = self.wasted = 0.0


@dataclass
class Returns:
    """What looking ahead takes of the engine's time, and what it saves it, of late.

    Reads of a few KB are over before a prediction and the bookkeeping of a guess are; no prediction
    is good enough for them.
    """

    num_calls: float = 0.0
    saved_us: float = 0.0
    spent_us: float = 0.0
    _usual_us: float = 0.0

    def spend(self, us: float) -> None:
        """One call to predict and to choose took so long."""
        if self._usual_us:  # what the system did meanwhile is not its doing
            us = min(us, LONGEST_CALL * self._usual_us)
        self._usual_us += (us - self._usual_us) / min(self.num_calls + 1, HALF_LIFE)
        fade = 0.5 ** (1 / HALF_LIFE_CALLS)
        self.num_calls = self.num_calls * fade + 1
        self.spent_us = self.spent_us * fade + us
        self.saved_us *= fade

    def save(self, us: float) -> None:
        """A prefetch was used, and so much was not waited for."""
        self.saved_us += us

    @property
    def evidence(self) -> float:
        return self.num_calls / CALLS_OF_EVIDENCE

    def pays(self, break_even: float) -> bool:
        """Whether at least that share of what it takes comes back."""
        return self.saved_us >= break_even * self.spent_us

    def forget(self) -> None:
        self.num_calls = self.saved_us = self.spent_us = 0.0


Evidence = TypeVar("Evidence", Outcomes, Returns)


@dataclass
class Switch(Generic[Evidence]):
    """On, off, or off and being tried again, by what is known of its outcomes."""

    outcomes: Evidence
    on: bool = True
    pause_steps: int = FIRST_PAUSE_STEPS
    until_step: int = 0  # off: when to try again; trying: when to give up
    trying: bool = False

    def allows(self, step: int, break_even: float) -> bool:
        """Whether to prefetch in this step. Called once per step, in rising order."""
        if self.on:
            if self.outcomes.evidence < LEAST_EVIDENCE or self.outcomes.pays(break_even):
                return True
            self._off(step)
            return False
        if self.trying:
            return self._tried(step, break_even)
        if step < self.until_step:
            return False
        # What was learnt before the pause is old: the try is judged by its own outcomes.
        self.outcomes.forget()
        self.trying, self.until_step = True, step + TRY_STEPS
        return True

    def _tried(self, step: int, break_even: float) -> bool:
        """The try goes on until it has shown enough, or has lasted long enough."""
        outcomes = self.outcomes
        if outcomes.evidence < LEAST_EVIDENCE and step < self.until_step:
            return True
        if outcomes.evidence > 0 and outcomes.pays(break_even):
            self.on, self.trying, self.pause_steps = True, False, FIRST_PAUSE_STEPS
            return True
        self.pause_steps = min(2 * self.pause_steps, LONGEST_PAUSE_STEPS)
        self._off(step)
        return False

    def _off(self, step: int) -> None:
        self.on = self.trying = False
        self.until_step = step + self.pause_steps


class PrefetchUsefulness:
    """How many layers ahead to prefetch from each layer.

    break_even: the share of prefetches that must be useful for them to pay, 0 to 1. It follows from
    costs: a useful one saves what its transfer took out of the step's way, a wasted one costs what
    it delayed: nothing on an idle link, a transfer on a busy one where none yields to another. May
    be set at any time.
    """

    def __init__(self, layers: Iterable[int], max_depth: int, break_even: float) -> None:
        """layers: indices of the MoE layers. max_depth: 0 never prefetches.

        Raises ConfigError for a depth below 0 or a break_even outside of 0 to 1."""
        if max_depth < 0:
            raise ConfigError(
                f"prefetch depth: {max_depth}; allowed: 0 or more layers", field="prefetch_depth"
            )
        self.max_depth = max_depth
        self._break_even = _checked(break_even)
        self._step_of = dict.fromkeys(layers, -1)
        self._switches = {
            layer: [Switch(Outcomes()) for _ in range(max_depth)] for layer in self._step_of
        }

    @property
    def break_even(self) -> float:
        return self._break_even

    @break_even.setter
    def break_even(self, value: float) -> None:
        self._break_even = _checked(value)

    def record(self, layer: int, distance: int, useful: int, wasted: int) -> None:
        """Prefetches begun at `layer` for the layer `distance` MoE layers on, when that has run."""
        self._switches[layer][distance - 1].outcomes.add(useful, wasted)

    def distances(self, layer: int) -> tuple[int, ...]:
        """The distances over which `layer` should prefetch in this step; () for none.

        To be asked once per step. Not always 1..d: over a short distance a transfer may always
        come too late, and over a longer one not.
        """
        step = self._step_of[layer] = self._step_of[layer] + 1
        each = enumerate(self._switches[layer], start=1)
        return tuple(n for n, switch in each if switch.allows(step, self._break_even))

    def useful_share(self, layer: int, distance: int) -> float | None:
        """Of the prefetches of late; None before any."""
        outcomes = self._switches[layer][distance - 1].outcomes
        return outcomes.useful / outcomes.evidence if outcomes.evidence else None

    def check_integrity(self) -> None:
        """Raises AssertionError where the books contradict themselves."""
        for layer, switches in self._switches.items():
            for switch in switches:
                assert not (switch.on and switch.trying), f"layer {layer}: on and tried"
                assert switch.outcomes.useful >= 0, f"layer {layer}: fewer than none useful"
                assert switch.outcomes.wasted >= 0, f"layer {layer}: fewer than none wasted"
                assert FIRST_PAUSE_STEPS <= switch.pause_steps <= LONGEST_PAUSE_STEPS


def _checked(break_even: float) -> float:
    if not 0 <= break_even <= 1:
        raise ConfigError(f"break_even: {break_even}; allowed: 0 to 1", field="break_even")
    return break_even
