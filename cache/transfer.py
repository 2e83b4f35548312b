"""Copies records of experts into slots, by a few threads, the wanted ones first.

There are two classes: what a step waits for (DEMAND), and what was fetched on a guess (PREFETCH). A
record is copied chunk by chunk, and a thread that is free takes the next chunk of the oldest demand
before any of a prefetch: a running prefetch yields after the chunks that are in flight. Several
threads share one record, so the first to be wanted is also the first to be complete.

What is in flight cannot be called back, and a demand waits behind it. So prefetches may be allowed
fewer threads than demands: no more than the source needs to be busy.

A record is checked while it arrives (`RecordCopy`), by the thread that brings the piece that the
checksum waits for.

A slot is written between `start` and its arrival, which the engine's thread takes from `finished`
or `wait`; only then may the slot be read.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial

from moeserve.cache.expert_cache import Load
from moeserve.cache.record_copy import RecordCopy, Urgency, equal_chunk
from moeserve.cache.tiers.source import RecordSource, SlotMemory, StoreError
from moeserve.cache.transfer_stats import TransferStats
from moeserve.core import ExpertKey
from moeserve.timeline import Timeline

logger = logging.getLogger(__name__)

NUM_ATTEMPTS = 4
FIRST_PAUSE_S = 0.02  # before the second attempt; doubled each time
STALL_WARNING_S = 5.0


@dataclass(frozen=True)
class Arrival:
    """A record that is complete in its slot, or, with an error, will not be."""

    load: Load
    error: StoreError | None = None


class Transfers:
    """Threads that copy from one source into slots.

    All methods but the threads' own are for one thread, the engine's.
    """

    def __init__(
        self,
        source: RecordSource,
        slot: Callable[[int], SlotMemory],
        num_threads: int,
        chunk_bytes: int,
        timeline: Timeline | None = None,
        prefetch_threads: int | None = None,
    ) -> None:
        """slot: the memory of a slot by its number, at least as long as a record. chunk_bytes: that
        chunks of a record, which are equal, come nearest to.
        prefetch_threads: how many may read prefetches at a time; None: all."""
        self.stats = TransferStats()
        self.timeline = timeline or Timeline()
        self._source = source
        self._slot = slot
        self._chunk_bytes = chunk_bytes
        self._lock = threading.Lock()
        self._work_there = threading.Condition(self._lock)  # what the threads wait for
        self._arrived = threading.Condition(self._lock)  # what the engine's thread waits for
        self._queues: dict[Urgency, dict[ExpertKey, RecordCopy]] = {u: {} for u in Urgency}
        self._active: dict[ExpertKey, RecordCopy] = {}
        self._finished: list[Arrival] = []
        self._in_flight = dict.fromkeys(Urgency, 0)
        self._most_in_flight = {
            Urgency.DEMAND: num_threads,
            Urgency.PREFETCH: min(num_threads, prefetch_threads or num_threads),
        }
        self._busy_since = 0.0
        self._closing = False
        self._threads = [
            threading.Thread(target=self._work, name=f"expert-transfer-{i}", daemon=True)
            for i in range(num_threads)
        ]
        for thread in self._threads:
            thread.start()

    def start(self, loads: Iterable[Load], urgency: Urgency) -> None:
        """Begins to write the slots, in this order."""
        with self._lock:
            for load in loads:
                assert load.key not in self._active, f"{load.key} is on its way already"
                num_bytes = self._source.num_bytes(load.key)
                record = self._slot(load.slot).data[:num_bytes]
                check = self._source.begin_check(load.key)
                copy = RecordCopy(load, urgency, record, check, time.perf_counter())
                self._active[load.key] = copy
                self._queues[urgency][load.key] = copy
                if urgency is Urgency.DEMAND:
                    self.stats.num_demands += 1
                else:
                    self.stats.num_prefetches += 1
            self._work_there.notify(self._most_in_flight[urgency] - self._in_flight[urgency])

    def promote(self, keys: Iterable[ExpertKey]) -> None:
        """Prefetches that a step now waits for become demands, behind those that are there."""
        with self._lock:
            for key in keys:
                copy = self._active.get(key)
                if copy is None or copy.urgency is Urgency.DEMAND:
                    continue
                copy.urgency = Urgency.DEMAND
                self.stats.num_promoted += 1
                if self._queues[Urgency.PREFETCH].pop(key, None) is not None:
                    self._queues[Urgency.DEMAND][key] = copy
                    self._work_there.notify_all()

    def cancel_prefetches(self) -> list[Load]:
        """Calls off the prefetches of which nothing was read yet; their slots are as they were."""
        with self._lock:
            waiting = [c for c in self._queues[Urgency.PREFETCH].values() if c.given == 0]
            for copy in waiting:
                del self._queues[Urgency.PREFETCH][copy.load.key]
                del self._active[copy.load.key]
            return [copy.load for copy in waiting]

    def finished(self) -> list[Arrival]:
        """What has arrived since the last time; does not wait."""
        if not self._finished:  # looked at once per layer: no lock where nothing is on its way
            return []
        with self._lock:
            arrivals, self._finished = self._finished, []
            return arrivals

    def none_finished(self) -> bool:
        """Whether `wait` would have to wait."""
        return not self._finished

    def wait(self, layer: int | None = None) -> list[Arrival]:
        """As `finished`, but waits until there is something. Something must be on its way.

        layer: whose step waits.
        """
        begun = time.perf_counter()
        with self._lock:
            assert self._active or self._finished, "nothing is on its way"
            while not self._finished:
                if not self._arrived.wait(STALL_WARNING_S):
                    self._warn_of_stall()
            arrivals, self._finished = self._finished, []
        with self._lock:
            self.stats.waited(layer, time.perf_counter() - begun)
        return arrivals

    def snapshot(self) -> TransferStats:
        """The statistics as they are now, all of one moment."""
        with self._lock:
            return self.stats.copy()

    @property
    def num_active(self) -> int:
        return len(self._active)

    def close(self) -> None:
        """Ends the threads after the chunks in flight. May be called twice."""
        with self._lock:
            self._closing = True
            self._work_there.notify_all()
        for thread in self._threads:
            thread.join()

    def check_integrity(self) -> None:
        """AssertionError where queues and copies do not agree."""
        with self._lock:
            for urgency, queue in self._queues.items():
                for key, copy in queue.items():
                    assert self._active.get(key) is copy, f"{key} waits and is not active"
                    assert copy.urgency is urgency, f"{key} waits in the wrong class"
            taken = {arrival.load.key for arrival in self._finished}
            assert not taken & self._active.keys(), "arrived and still on its way"

    # The threads

    def _work(self) -> None:
        while True:
            with self._lock:
                while (job := self._take_chunk()) is None:
                    if self._closing:
                        return
                    self._work_there.wait()
            urgency, copy, start, stop = job
            error = self._attempt(partial(self._read, copy, start, stop))
            self._put_back(urgency, copy, start, stop, error)

    def _take_chunk(self) -> tuple[Urgency, RecordCopy, int, int] | None:
        """The next chunk by urgency and age, and as what it is read. Called with the lock held."""
        if self._closing:
            return None
        for urgency, queue in self._queues.items():
            if self._in_flight[urgency] >= self._most_in_flight[urgency]:
                continue
            for key, copy in queue.items():
                start, stop = copy.take(equal_chunk(len(copy.record), self._chunk_bytes))
                if copy.all_given:
                    del queue[key]
                if not any(self._in_flight.values()):
                    self._busy_since = time.perf_counter()
                self._in_flight[urgency] += 1
                return urgency, copy, start, stop
        return None

    def _read(self, copy: RecordCopy, start: int, stop: int) -> None:
        layer, expert = copy.load.key
        urgency = copy.urgency.name.lower()
        with self.timeline.span("read", urgency=urgency, layer=layer, expert=expert, start=start):
            self._source.read(copy.load.key, start, copy.record[start:stop])

    def _put_back(
        self,
        taken_as: Urgency,
        copy: RecordCopy,
        start: int,
        stop: int,
        error: StoreError | None,
    ) -> None:
        with self._lock:
            self._in_flight[taken_as] -= 1
            if taken_as is Urgency.PREFETCH and self._queues[Urgency.DEMAND]:
                self._work_there.notify()  # this thread goes on with a demand
            self._count(copy, stop - start)
            copy.arrived(start, stop, error)
            piece = self._next_piece(copy)
        while piece is not None:
            error = copy.check_piece(*piece)
            with self._lock:
                copy.checked(piece[1], error)
                piece = self._next_piece(copy)

    def _next_piece(self, copy: RecordCopy) -> tuple[int, int] | None:
        """What this thread has to check now; hands out what is complete. With the lock held."""
        if copy.error is not None:
            self._queues[copy.urgency].pop(copy.load.key, None)
        if not copy.complete:
            return copy.take_piece()
        del self._active[copy.load.key]
        self.stats.num_failed += copy.error is not None
        self._finished.append(Arrival(copy.load, copy.error))
        self._arrived.notify_all()
        return None

    def _count(self, copy: RecordCopy, num_bytes: int) -> None:
        """Called with the lock held, when a chunk has arrived."""
        now_s = time.perf_counter()
        demanded = copy.urgency is Urgency.DEMAND
        self.stats.arrived(copy.load.key.layer, num_bytes, demanded, now_s - self._busy_since)
        self._busy_since = now_s

    def _attempt(self, work: Callable[[], None]) -> StoreError | None:
        """Does the work, again where the system reports an error that may pass."""
        pause_s = FIRST_PAUSE_S
        for attempt in range(1, NUM_ATTEMPTS + 1):
            try:
                work()
                return None
            except StoreError as error:
                return error
            except OSError as error:
                logger.warning("attempt %d of %d to read failed: %s", attempt, NUM_ATTEMPTS, error)
                last = error
            if attempt < NUM_ATTEMPTS:
                self.stats.num_retries += 1
                time.sleep(pause_s)
                pause_s *= 2
        return StoreError(
            f"records of experts cannot be read: {last}",
            "look at the disk; the kernel's log says what it reported",
        )

    def _warn_of_stall(self) -> None:
        # Else what is on its way would be waited for without an end.
        assert all(thread.is_alive() for thread in self._threads), "a transfer thread has died"
        now = time.perf_counter()
        oldest = max(self._active.values(), key=lambda copy: now - copy.begun_s)
        logger.warning(
            "layer %d, expert %d has been on its way for %.1f s: the disk stalls",
            *oldest.load.key,
            now - oldest.begun_s,
        )
