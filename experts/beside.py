"""What a layer computes beside its routed experts, from the same rows: the shared expert."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import islice

from torch import Tensor

from moeserve.core import Placement
from moeserve.experts.supply import Group, Supplied
from moeserve.timeline import Timeline


class Beside:
    """A function of the rows of one step, computed when the layer would else wait for experts that
    are being fetched: after those at hand have begun, before the first of the others is asked for.
    Its bits, and those of the sum, do not depend on when that is."""

    def __init__(
        self, function: Callable[[Tensor], Tensor], x: Tensor, layer: int, timeline: Timeline
    ) -> None:
        """x: [T, H], of which the function makes [T, H]."""
        self._function = function
        self._x = x
        self._layer = layer
        self._timeline = timeline
        self._found: Tensor | None = None

    def within(self, supplied: Supplied, placement: Placement) -> Supplied:
        """The same groups, with the function's turn among them."""
        return Supplied(supplied.slots, self._groups(supplied.groups, placement))

    def result(self) -> Tensor:
        """[T, H]; computed now if its turn has not come, as where nothing was to be fetched."""
        if self._found is None:
            with self._timeline.span("shared expert", layer=self._layer):
                self._found = self._function(self._x)
        return self._found

    def _groups(self, groups: Iterator[Group], placement: Placement) -> Iterator[Group]:
        if placement.on_device or placement.on_cpu:
            yield from islice(groups, 1)
        self.result()
        yield from groups
