"""A process beside this one, for simulations that take long."""

from __future__ import annotations

import multiprocessing
import os
from concurrent.futures import Executor, ProcessPoolExecutor
from contextlib import ExitStack


def second_process(stack: ExitStack) -> Executor | None:
    """It lives until the stack is unwound, takes some two seconds to start, and gets functions of
    modules only. None: there is no core for it."""
    if len(os.sched_getaffinity(0)) < 2:
        return None
    context = multiprocessing.get_context("spawn")
    return stack.enter_context(ProcessPoolExecutor(1, context))
