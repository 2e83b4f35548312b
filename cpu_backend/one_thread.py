"""Backends whose products have threads of their own: one background thread takes submitted jobs."""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor

from torch import Tensor

from moeserve.cpu_backend.backend import CpuBackend, ExpertJob


class FutureTicket:
    """A Ticket on a future of the backend's thread."""

    def __init__(self, future: Future[Tensor]) -> None:
        self._future = future

    def done(self) -> bool:
        return self._future.done()

    def wait(self) -> Tensor:
        return self._future.result()


class OneThreadBackend(CpuBackend):
    """Jobs run one after another on one thread; torch's threads share each product in a job."""

    def __init__(self) -> None:
        # Starts its thread with the first job, so a backend that is never submitted to has none.
        self._pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix="moeserve-experts")

    def submit(self, job: ExpertJob) -> FutureTicket:
        return FutureTicket(self._pool.submit(self.run, job))

    def close(self) -> None:
        self._pool.shutdown(wait=True)
