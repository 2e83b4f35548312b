"""Moves mapped weights into huge pages while the model serves.

A packed model is mapped, so that it starts at once, and stands in the pages that the page cache
happens to have: huge ones, or 4 KiB ones, from which a stream is read a quarter slower, waiting for
address translation. Linux makes no huge pages of those. So each 2 MiB are read into a huge page of
our own, which then takes the place of the small ones at the same address (mremap over the mapping):
pointers stay, and whoever reads sees the old page or the new one, which hold the same bytes.

Pace: 2 MiB take 1.5 ms of one core and of memory. While requests run, a piece is followed by a
pause of nine times the time that it took, so moving takes a tenth of a core at most, and slows down
as the machine does; while none run, there are no pauses. A compute thread that faults on a page
meanwhile waits as long as one mremap, 0.1 ms.

Memory: what was moved cannot be dropped and read again, as pages of a file can. So nothing moves
unless all that is mapped has room besides what kv may take and SPARE_BYTES, and it ends where that
comes to be untrue. The page cache keeps what was moved, so that the next start is as quick; it is
dropped where otherwise the system would have to look for memory.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from moeserve.core import ModelError
from moeserve.cpu_backend._native import allocate, drop_pages, is_huge, move_pages
from moeserve.cpu_backend.machine import huge_page_mode
from moeserve.cpu_backend.memory_room import MemoryRoom, memory_room
from moeserve.models.safetensors_file import MappedFile
from moeserve.stats import PageStats

HUGE_PAGE_BYTES = 2 << 20
#: for what else the process and others come to want
SPARE_BYTES = 1 << 30
#: pieces between two looks at the memory that is left
LOOK_EVERY = 32
#: pieces for which the system had no huge page: where memory is in pieces, reading on is in vain
MOST_REFUSALS = 64
BUSY_SHARE = 1 / 10
OFF = "the system gives no transparent huge pages; `moeserve doctor` tells how to have them"

log = logging.getLogger(__name__)


class _Stop(Exception):
    """Nothing more is to be moved. Its text says why, or nothing where it was asked for."""


class PageMover:
    """One thread that moves the weights of mapped files, once; then it ends.

    It keeps the mappings until then. Pages that were moved must not be given back (MADV_DONTNEED):
    they would be zeros.
    """

    def __init__(
        self,
        mapped: Sequence[MappedFile],
        keep_bytes: int = 0,
        is_busy: Callable[[], bool] = lambda: False,
        room: Callable[[], MemoryRoom] = memory_room,
        mode: str | None = None,
    ) -> None:
        """keep_bytes: of memory that this process is still going to take. is_busy: whether somebody
        waits for what the compute threads do; asked from the thread. mode: of huge pages, by
        default the system's."""
        self._mapped = tuple(mapped)
        self._keep_bytes = keep_bytes
        self._is_busy = is_busy
        self._room = room
        self._mode = mode or huge_page_mode()
        self._mapped_bytes = self._left_bytes = sum(each.memory.nbytes for each in mapped)
        self._cached_huge_bytes = self._moved_bytes = self._num_refused = 0
        self._problem = ""
        self._drops = False
        self._seconds = 0.0
        self._stop = threading.Event()
        # No daemon: one in native code while the interpreter goes away would take it down.
        self._thread = threading.Thread(target=self._run, name="page-mover")

    def start(self) -> None:
        if self._mapped:
            self._thread.start()

    def wait(self) -> None:
        """Until nothing more will be moved."""
        if self._thread.ident is not None:
            self._thread.join()

    def close(self) -> None:
        """Ends the thread after the piece that it is at; what was moved stays so."""
        self._stop.set()
        self.wait()

    def stats(self) -> PageStats | None:
        """None where nothing is mapped."""
        if not self._mapped_bytes:
            return None
        return PageStats(
            mapped_bytes=self._mapped_bytes,
            cached_huge_bytes=self._cached_huge_bytes,
            moved_bytes=self._moved_bytes,
            moving=self._thread.is_alive(),
            seconds=self._seconds,
            problem=self._problem,
        )

    def _run(self) -> None:
        try:
            self._move_all()
        except _Stop as stop:
            self._problem = str(stop)
        except MemoryError:
            self._problem = "no address space to read them into (ulimit -v)"
        except (ModelError, OSError) as error:
            self._problem = str(error)
            log.warning("weights are not moved into huge pages: %s", self._problem)
        if not self._problem and self._num_refused:
            self._problem = f"the system had no huge page for {self._num_refused} pieces of 2 MiB"
        log.info(
            "weights: of %.0f MB mapped, the page cache has %.0f in huge pages, and %.0f were moved"
            " into such in %.1f s%s",
            self._mapped_bytes / 1e6,
            self._cached_huge_bytes / 1e6,
            self._moved_bytes / 1e6,
            self._seconds,
            f"; the rest stays: {self._problem}" if self._problem else "",
        )
        self._mapped = ()

    def _move_all(self) -> None:
        if self._mode in (None, "never"):
            raise _Stop(OFF)
        started_s = time.monotonic()
        for number, (mapped, start, pages, place) in enumerate(self._pieces()):
            if number % LOOK_EVERY == 0:
                self._look_at_memory()
            began_s = time.monotonic()
            self._move(mapped, start, pages, place)
            self._left_bytes -= HUGE_PAGE_BYTES
            now_s = time.monotonic()
            self._seconds = now_s - started_s
            self._pause(now_s - began_s)

    def _pieces(
        self,
    ) -> Iterator[tuple[MappedFile, int, NDArray[np.uint8], NDArray[np.uint8]]]:
        """File, offset, its pages and where to read them: all that is aligned to huge pages.

        Places lie as far from each other as the pages do, so that the system, which counts the
        pages of a mapping through, joins what was moved into one mapping again: it allows a
        process 65530 of them.
        """
        for mapped in self._mapped:
            first = -mapped.memory.ctypes.data % HUGE_PAGE_BYTES
            count = max(0, mapped.memory.nbytes - first) // HUGE_PAGE_BYTES
            places = allocate(count * HUGE_PAGE_BYTES)
            for number in range(count):
                begin = number * HUGE_PAGE_BYTES
                start = first + begin
                pages = mapped.memory[start : start + HUGE_PAGE_BYTES]
                yield mapped, start, pages, places[begin : begin + HUGE_PAGE_BYTES]

    def _move(
        self,
        mapped: MappedFile,
        start: int,
        pages: NDArray[np.uint8],
        place: NDArray[np.uint8],
    ) -> None:
        huge = is_huge(pages)
        if huge is None:
            raise _Stop("this system does not tell which pages are huge (Linux 6.7 does)")
        if huge:
            self._cached_huge_bytes += HUGE_PAGE_BYTES
            return
        # By a read, and not from the mapping: a file that was cut short then is an error with a
        # name instead of SIGBUS.
        mapped.file.read_into(start, place)
        if not is_huge(place):
            drop_pages(place)
            self._num_refused += 1
            if self._num_refused == MOST_REFUSALS:
                raise _Stop(f"the system had no huge page {MOST_REFUSALS} times")
            return
        mapped.file.check_unchanged()
        move_pages(place, pages)
        self._moved_bytes += HUGE_PAGE_BYTES
        if self._drops:
            os.posix_fadvise(mapped.file.handle, start, HUGE_PAGE_BYTES, os.POSIX_FADV_DONTNEED)

    def _look_at_memory(self) -> None:
        available_bytes, free_bytes = self._room()
        needed_bytes = self._left_bytes + self._keep_bytes + SPARE_BYTES
        if available_bytes < needed_bytes:
            raise _Stop(
                f"{available_bytes / 1e6:.0f} MB of memory are available, and must have room for"
                f" {self._left_bytes / 1e6:.0f} of weights, {self._keep_bytes / 1e6:.0f} of kv and"
                f" {SPARE_BYTES / 1e6:.0f} to spare"
            )
        self._drops = free_bytes < needed_bytes

    def _pause(self, spent_s: float) -> None:
        pause_s = spent_s * (1 / BUSY_SHARE - 1) if self._is_busy() else 0.0
        if self._stop.wait(pause_s):
            raise _Stop("the engine was closed")
        if not threading.main_thread().is_alive():
            raise _Stop("the process ends")
