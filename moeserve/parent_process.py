"""A process that must not outlive the one that started it."""

from __future__ import annotations

import ctypes
import os
import signal
import sys

_PR_SET_PDEATHSIG = 1  # linux/prctl.h


def end_with_parent(parent_pid: int) -> None:
    """Asks the kernel to kill us when the thread that started us ends (prctl(2); Linux only).

    Raises SystemExit where the parent is gone already, OSError where the kernel refuses.
    """
    if sys.platform == "linux":
        libc = ctypes.CDLL(None, use_errno=True)
        if libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0) != 0:
            error = ctypes.get_errno()
            raise OSError(error, f"prctl: {os.strerror(error)}")
    if os.getppid() != parent_pid:  # it died before we asked
        raise SystemExit(f"the parent {parent_pid} is gone")
