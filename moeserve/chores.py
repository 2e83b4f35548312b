"""Work that nothing waits for, done while a step waits for something else."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import TypeAlias

Work: TypeAlias = Callable[[], None]
#: does the work now or later, in the order in which it was given
PutOff: TypeAlias = Callable[[Work], None]


def at_once(work: Work) -> None:
    """A PutOff for who has no time to spare later."""
    work()


class Chores:
    """First in, first out, on the thread that calls."""

    def __init__(self, most: int) -> None:
        """most: how much may wait; when there is more, the oldest is done at once."""
        self._most = most
        self._waiting: deque[Work] = deque()

    def __len__(self) -> int:
        return len(self._waiting)

    def put_off(self, work: Work) -> None:
        self._waiting.append(work)
        if len(self._waiting) > self._most:
            self._waiting.popleft()()

    def do_while(self, idle: Callable[[], bool]) -> None:
        """As long as there is nothing better to do."""
        while self._waiting and idle():
            self._waiting.popleft()()
