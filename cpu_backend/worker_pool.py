"""The expert workers of an engine: who holds what, and one layer's exchange with them.

No thread: the engine's own looks at the sockets once per layer, sends, computes its own part, and
then waits. What a worker that is gone was asked goes to another one that holds the same experts,
else back to the caller, who computes it. So a worker that dies costs time and nothing else.
"""

from __future__ import annotations

import logging
import time
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
import zmq
from numpy.typing import NDArray
from torch import Tensor

from moeserve.client.endpoint import CurveKeys, load_keys
from moeserve.client.types import ClientError
from moeserve.config import ExpertConfig
from moeserve.core import ConfigError
from moeserve.cpu_backend.backend import ExpertJob
from moeserve.cpu_backend.shards import Shard
from moeserve.cpu_backend.worker_link import Stage, WorkerLink
from moeserve.cpu_backend.worker_types import Answer, LinkSettings, PairRows, Pairs
from moeserve.stats import PoolStats
from moeserve.worker_messages import WorkerIdentity

Put = Callable[[Pairs, Tensor], None]

#: how long a poll lasts at most: for workers that rest, and for deadlines
POLL_MS = 100

logger = logging.getLogger(__name__)


@dataclass
class PoolCounters:
    """Since the start. Pairs: rows with one expert each. wait_s: the engine had nothing left to do
    but to wait for workers. num_taken_over: pairs that another worker or the engine computed in the
    place of one that was gone."""

    num_layers: int = 0
    num_pairs: int = 0
    num_taken_over: int = 0
    wait_s: float = 0.0


class WorkerPool:
    """For the engine's thread alone."""

    def __init__(self, config: ExpertConfig, identity: WorkerIdentity, most_experts: int) -> None:
        """Begins to connect. most_experts: of any layer. Raises ConfigError for keys that cannot be
        read."""
        self.count = PoolCounters()
        self._config = config
        self._most_experts = most_experts
        keys = _keys(config)
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        sockets: set[zmq.Socket[bytes]] = set()
        settings = LinkSettings(self._context, sockets, identity, config, keys)
        # Of an engine that is dropped without a close the context must not go before its sockets,
        # for which it would wait for ever. At exit the process takes everything with it.
        self._finish = weakref.finalize(self, _finish, self._context, sockets)
        self._finish.atexit = False
        self.links = tuple(WorkerLink(each, settings, self._admit) for each in config.workers)
        self._masks: dict[int, NDArray[np.bool_]] = {}
        self._masks_of: tuple[bool, ...] = ()

    def start(self) -> None:
        """Waits until all workers are there, for `worker_start_s`.

        Raises ConfigError for one that is not, or cannot be used; where `worker_absent` is go_on,
        says so instead and leaves its experts to others until it can.
        """
        end_s = time.monotonic() + self._config.worker_start_s
        while True:
            self.refresh()
            resting = [link for link in self.links if link.stage is Stage.RESTING]
            self._check(resting, "start it anew as this engine wants it")
            connecting = [link for link in self.links if link.stage is Stage.CONNECTING]
            if not connecting or time.monotonic() >= end_s:
                break
            self.wait()
        self._check(
            connecting,
            "start it with `moeserve worker MODEL --endpoint ENDPOINT --shard I/N`, wait longer "
            "with --worker-start-s, or go on without it: --worker-absent go_on",
        )
        for link in self.links:
            if not link.live:
                logger.error("worker %s: %s; going on without it", link.endpoint, link.problem)

    def _check(self, absent: Sequence[WorkerLink], hint: str) -> None:
        if absent and self._config.worker_absent == "refuse":
            problem = f"workers: {absent[0].endpoint}: {absent[0].problem}"
            raise ConfigError(problem, field="workers", hint=hint)

    def refresh(self) -> None:
        """Notes who came and who went; never waits."""
        for link in self.links:
            link.look()

    def held(self, num_experts: int) -> NDArray[np.bool_]:
        """[E]: whether a live worker holds the expert, in a layer of so many."""
        live = tuple(link.live for link in self.links)
        if live != self._masks_of:
            self._masks, self._masks_of = {}, live
        mask = self._masks.get(num_experts)
        if mask is None:
            mask = self._masks[num_experts] = np.zeros(num_experts, np.bool_)
            for link in self.links:
                if link.live and link.shard is not None:
                    mask[link.shard.experts(num_experts)] = True
        return mask

    def holder(self, expert: int, without: set[WorkerLink]) -> WorkerLink | None:
        """The live worker to ask; one that stands by where there is no other."""
        able = [
            link
            for link in self.links
            if link.live
            and link not in without
            and link.shard is not None
            and expert in link.shard.experts(self._most_experts)
        ]
        return min(able, key=lambda link: link.standby, default=None)

    def begin(self, job: ExpertJob, pairs: Pairs) -> Exchange:
        """Has workers compute pairs of the job; pair t * K + k is row t with its k-th expert."""
        for link in self.links:
            link.give_up_jobs()  # left by an interrupt, before its exchange was a context
        self.count.num_layers += 1
        self.count.num_pairs += len(pairs)
        return Exchange(self, job, pairs)

    def wait(self) -> None:
        """Until something happens at a socket, or for POLL_MS."""
        poller = zmq.Poller()
        for link in self.links:
            for socket in link.sockets:
                poller.register(socket, zmq.POLLIN)
        poller.poll(POLL_MS)

    def describe(self) -> str:
        """For the notes of a model."""
        return "; ".join(
            f"{link.endpoint} shard {link.shard}{', standing by' if link.standby else ''}, rows in "
            f"{'shared memory' if link.shared else 'frames'}"
            if link.live
            else f"{link.endpoint}: {link.problem}"
            for link in self.links
        )

    def stats(self) -> PoolStats:
        """Since the start."""
        return PoolStats(
            rows=self.count.num_pairs,
            taken_over_rows=self.count.num_taken_over,
            wait_s=self.count.wait_s,
            workers=[link.stats() for link in self.links],
        )

    def check_integrity(self) -> None:
        """AssertionError where a job is left over though nobody waits."""
        for link in self.links:
            assert not link.num_jobs, f"{link.endpoint}: {link.num_jobs} jobs nobody waits for"
            assert not link.lost, f"{link.endpoint}: lost work that nobody took over"

    def close(self) -> None:
        """May be called twice."""
        for link in self.links:
            link.close()
        self._finish()

    def _admit(self, link: WorkerLink, shard: Shard) -> str | None:
        own = set(shard.experts(self._most_experts))
        if not own:
            return f"shard {shard} has none of {self._most_experts} experts"
        for other in self.links:
            if other is link or not other.live or other.shard is None:
                continue
            both = own.intersection(other.shard.experts(self._most_experts))
            if both and not (link.standby or other.standby):
                return (
                    f"it claims shard {shard}, and worker {other.endpoint} holds {other.shard}: "
                    f"both have expert {min(both)} (start one of them with --standby, or give it "
                    "another --shard)"
                )
        return None


@dataclass
class Exchange:
    """One layer's pairs at workers. A context: whatever is not answered when it is left is given
    up."""

    pool: WorkerPool
    job: ExpertJob
    pairs: Pairs
    _lost: set[int] = field(default_factory=set)  # experts
    _failed: set[WorkerLink] = field(default_factory=set)
    _suspects: list[tuple[WorkerLink, Answer]] = field(default_factory=list)

    def __post_init__(self) -> None:
        ids = self.job.routing.ids.numpy().ravel()[self.pairs]
        order = np.argsort(ids, kind="stable")
        pairs, experts = self.pairs[order], ids[order]
        top_k = self.job.routing.ids.shape[1]
        rows = self.job.x[torch.from_numpy(pairs // top_k)]
        self._give(PairRows(self.job.layer, pairs, experts, rows))

    def __enter__(self) -> Exchange:
        return self

    def __exit__(self, *_: object) -> None:
        for link in self.pool.links:
            link.give_up_jobs()
            link.lost.clear()

    def collect(self, put: Put) -> tuple[int, ...]:
        """Hands over all results, [P, H] float32 for pairs [P]. Returns the experts of which some
        have none: the caller computes them."""
        begun_s = time.perf_counter()
        links = self.pool.links
        self._take_over()
        while any(link.num_jobs for link in links):
            self.pool.wait()
            for link in links:
                for answer in link.look():
                    self._accept(link, answer, put)
                link.check_deadlines()
            self._take_over()
        self.pool.count.wait_s += time.perf_counter() - begun_s
        return tuple(sorted(self._lost))

    def judge(self, ours: Tensor) -> None:
        """ours: [T * K, H], with what `collect` left to the caller. A worker that gave numbers that
        are not finite where ours are others is not asked again."""
        for link, answer in self._suspects:
            expected = ours[torch.from_numpy(answer.pairs)]
            if not torch.equal(expected.view(torch.int32), answer.results.view(torch.int32)):
                count = int((~torch.isfinite(answer.results)).sum())
                link.distrust(f"it answers nonsense: {count} numbers that are not finite")
        self._suspects.clear()

    def _accept(self, link: WorkerLink, answer: Answer, put: Put) -> None:
        # NaN and Inf survive a sum; where a sum of finite numbers overflows, no harm is done.
        if torch.isfinite(answer.results.sum()):
            put(answer.pairs, answer.results)
            return
        kept = Answer(answer.pairs, answer.experts, answer.results.clone())
        self._suspects.append((link, kept))
        self._lost.update(np.unique(answer.experts).tolist())

    def _take_over(self) -> None:
        """Gives what was lost to other workers."""
        while any(link.lost for link in self.pool.links):
            for link in self.pool.links:
                lost, link.lost = link.lost, []
                if lost:
                    self._failed.add(link)
                for work in lost:
                    self.pool.count.num_taken_over += len(work.pairs)
                    self._give(work)

    def _give(self, work: PairRows) -> None:
        """To whoever holds the experts; what nobody holds is lost."""
        by_link: dict[WorkerLink, list[int]] = {}
        for expert in np.unique(work.experts).tolist():
            link = self.pool.holder(expert, self._failed)
            if link is None:
                self._lost.add(expert)
            else:
                by_link.setdefault(link, []).append(expert)
        for link, experts in by_link.items():
            link.send(_part(work, experts))


def _finish(context: zmq.Context[zmq.Socket[bytes]], sockets: set[zmq.Socket[bytes]]) -> None:
    for socket in sockets:
        socket.close(linger=0)
    context.term()


def _part(work: PairRows, experts: Sequence[int]) -> PairRows:
    own = np.isin(work.experts, experts)
    if own.all():
        return work
    rows = work.rows[torch.from_numpy(own)]
    return PairRows(work.layer, work.pairs[own], work.experts[own], rows)


def _keys(config: ExpertConfig) -> CurveKeys | None:
    if config.worker_curve_dir is None:
        return None
    try:
        return load_keys(config.worker_curve_dir)
    except ClientError as error:
        raise ConfigError(f"worker_curve_dir: {error}", field="worker_curve_dir") from error
