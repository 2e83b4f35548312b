"""A task that runs as long as the server does."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Coroutine
from typing import Any

RESTART_S = 1.0

log = logging.getLogger(__name__)


class LastingTask:
    """Runs `work` until stopped. A defect that ends it is logged and `work` begins anew.

    Without this a front whose receive loop died of one odd message would be deaf for good while
    /health still says that all is well.
    """

    def __init__(self, work: Callable[[], Coroutine[Any, Any, None]], name: str) -> None:
        self._work = work
        self._name = name
        self._task: asyncio.Task[None] | None = None
        self._restart: asyncio.TimerHandle | None = None

    def start(self) -> None:
        self._restart = None
        self._task = asyncio.create_task(self._work(), name=self._name)
        self._task.add_done_callback(self._ended)

    async def stop(self) -> None:
        """Returns when it has ended. Does nothing if it never started."""
        if self._restart is not None:
            self._restart.cancel()
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait({self._task})

    def _ended(self, task: asyncio.Task[None]) -> None:
        if not task.cancelled():
            log.critical("%s ended; it starts again", self._name, exc_info=task.exception())
            self._restart = asyncio.get_running_loop().call_later(RESTART_S, self.start)
