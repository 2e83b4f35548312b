"""Which of many decodes run together: those that want the same experts.

A step reads every expert that any of its rows wants. Where a step cannot take all decodes anyway,
taking those with like routing makes it read fewer (Read-ME, arXiv 2410.19123, expert-aware
batching; ExpertFlow, arXiv 2410.17954, token scheduling). Splitting what could run together never
pays: two parts read at least what the whole reads.
"""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as Seq
from typing import TypeAlias

from moeserve.config import SchedulerConfig
from moeserve.core import ConfigError
from moeserve.engine.sequence import Sequence

#: for each sequence the experts that its next token is expected to want, as the bits of a number:
#: one per expert of every layer, or only of those that would have to be fetched
PredictedExperts: TypeAlias = Callable[[Seq[Sequence]], Seq[int]]

#: of the time of a step, how much the latest counts
STEP_WEIGHT = 1 / 8


class DecodeGroups:
    """Chooses at most `size` decodes for a step, more where more are in such a hurry.

    In this order: who has waited so long that it, or another with it, would else wait longer than
    allowed; who must run in every step to be done before its deadline; then, beginning with who
    waited longest, whoever adds the fewest experts. Where that reads no fewer experts than those
    who waited longest would, these run.

    No decode waits longer than `max_wait_steps` in a row, or than taking turns takes where that is
    longer: ceil(decodes / size) - 1 steps, of the most decodes that there were meanwhile.
    """

    def __init__(self, size: int, max_wait_steps: int, predicted: PredictedExperts) -> None:
        self.size = size
        self._max_wait_steps = max_wait_steps
        self._predicted = predicted
        self._waited: dict[Sequence, int] = {}  # steps in a row, of those that could have run
        self._most = 0  # steps that one may wait now
        self._step_s: float | None = None
        self._called_s: float | None = None

    def choose(self, ready: Seq[Sequence], now_s: float) -> Seq[Sequence]:
        """ready: decodes in the order of the queue. To be called once per step."""
        self._note_step(now_s)
        if len(ready) <= self.size:
            self._waited, self._most = {}, 0
            return ready
        waited = {sequence: self._waited.get(sequence, 0) for sequence in ready}
        most = self._most_steps(waited)
        slack = {sequence: max(0, most - steps) for sequence, steps in waited.items()}
        experts = dict(zip(ready, self._predicted(ready), strict=True))
        # Stable: of those that waited as long, the order of the queue.
        longest_first = sorted(ready, key=slack.__getitem__)
        chosen = self._grow(longest_first, slack, experts, now_s)
        if not any(self._is_urgent(sequence, now_s) for sequence in ready):
            plain = longest_first[: self.size]
            if union_size(plain, experts) <= union_size(chosen, experts):
                chosen = plain
        running = set(chosen)
        self._waited = {s: steps + 1 for s, steps in waited.items() if s not in running}
        return chosen

    def _most_steps(self, waited: dict[Sequence, int]) -> int:
        """How long each may wait. It falls only as far as that can be kept: when many have gone,
        those that are left have already waited as one of many."""
        turns = -(-len(waited) // self.size) - 1
        least = max(self._max_wait_steps, turns)
        steps = sorted(waited.values(), reverse=True)
        kept = max(count + place // self.size for place, count in enumerate(steps))
        self._most = max(least, min(self._most, kept))
        return self._most

    def _grow(
        self,
        longest_first: Seq[Sequence],
        slack: dict[Sequence, int],
        experts: dict[Sequence, int],
        now_s: float,
    ) -> list[Sequence]:
        chosen: list[Sequence] = []
        union = 0
        left = list(longest_first)

        def take(among: Seq[Sequence]) -> None:
            nonlocal union
            # min: the first of equals, which waited longest
            best = among[0]
            if chosen:
                best = min(among, key=lambda s: (union | experts[s]).bit_count())
            chosen.append(best)
            left.remove(best)
            union |= experts[best]

        # Those whose slack is at most t have t more steps to come, which take size * t of them;
        # the others of them must run now.
        for t in range(max(slack.values()) + 1):
            due = sum(s <= t for s in slack.values()) - self.size * t
            taken = sum(slack[s] <= t for s in chosen)
            for _ in range(min(due - taken, self.size - len(chosen))):
                take([s for s in left if slack[s] <= t])
        urgent = [s for s in left if self._is_urgent(s, now_s)]
        while urgent or len(chosen) < self.size:
            take(urgent or left)
            urgent = [s for s in urgent if s not in chosen]
        return chosen

    def _is_urgent(self, sequence: Sequence, now_s: float) -> bool:
        """Whether one step without it could be the one that its deadline lacks."""
        deadline_s = sequence.request.deadline_s
        if deadline_s is None or self._step_s is None:
            return deadline_s is not None
        tokens = sequence.request.params.max_tokens - sequence.num_output_tokens
        return deadline_s - now_s < (tokens + 1) * self._step_s

    def _note_step(self, now_s: float) -> None:
        """Learns the time of a step; a pause without work counts for at most two."""
        if self._called_s is not None:
            took_s = now_s - self._called_s
            known_s = took_s if self._step_s is None else self._step_s
            self._step_s = known_s + STEP_WEIGHT * (min(took_s, 2 * known_s) - known_s)
        self._called_s = now_s


def union_size(group: Seq[Sequence], experts: dict[Sequence, int]) -> int:
    """Experts that a step with these sequences reads."""
    union = 0
    for sequence in group:
        union |= experts[sequence]
    return union.bit_count()


def make_decode_groups(
    config: SchedulerConfig, predicted: PredictedExperts | None
) -> DecodeGroups | None:
    """None where every decode runs in every step, which is the default.

    Raises ConfigError where groups are asked for and nothing says what they have in common.
    """
    if config.decode_group is None:
        return None
    if predicted is None:
        raise ConfigError(
            f"decode_group: {config.decode_group} decodes are to be grouped by the experts that"
            " they want, and nothing predicts these here",
            field="decode_group",
            hint="leave it out, or serve a model with routed experts",
        )
    return DecodeGroups(config.decode_group, config.decode_wait_steps, predicted)
