"""A request scheduler with a model whose tokens are a function of the prefix and whose kv is real.

However requests are chunked, preempted, reused and aborted, the tokens must be those of an
undisturbed run, and after every operation the bookkeeping must be whole.
"""

from __future__ import annotations

from fake_model import EOS, ChunkRoom, FakeModel, expected_output

from moeserve.config import SchedulerConfig
from moeserve.core import EngineDelta, EngineRequest, FinishReason
from moeserve.engine.batch import ScheduledBatch
from moeserve.engine.kv_blocks import BlockManager
from moeserve.engine.request_scheduler import RequestScheduler
from moeserve.engine.sequence import Sequence, SequenceState

CONTEXT = 24


class Harness:
    """A scheduler, its pool and the fake model, with the checks that hold in every step."""

    def __init__(
        self,
        num_blocks: int = 16,
        block_tokens: int = 2,
        reuse: bool = True,
        kv_switch_tokens: int | None = None,
        room: ChunkRoom | None = None,
        **config: object,
    ) -> None:
        self.config = SchedulerConfig(**config)  # type: ignore[arg-type]
        self.room = room or ChunkRoom(num_blocks, num_blocks, 1, True)
        self.blocks = BlockManager(num_blocks, block_tokens, reuse, self.room)
        self.scheduler = RequestScheduler(
            self.config, self.blocks, [EOS], CONTEXT, kv_switch_tokens=kv_switch_tokens
        )
        self.model = FakeModel(num_blocks, block_tokens, kv_switch_tokens)
        self.requests: dict[str, EngineRequest] = {}
        self.output: dict[str, list[int]] = {}
        self.ended: dict[str, EngineDelta] = {}
        self.overtaken: dict[str, int] = {}  # by how many
        self.computed: dict[str, int] = {}  # where the next chunk of a running request starts
        self.now_s = 0.0

    def shrink(self, extent: int) -> None:
        self.model.shrink(self.scheduler.shrink_kv(extent), extent)
        self.room.extent = extent
        self.scheduler.check_integrity()

    def add(self, new: EngineRequest) -> None:
        self.scheduler.add(new, self.now_s)
        self.requests[new.request_id] = new
        self.output[new.request_id] = []
        self.scheduler.check_integrity()

    def schedule(self) -> ScheduledBatch | None:
        running_before = list(self.scheduler._running)
        waiting_before = list(self.scheduler._waiting)
        batch = self.scheduler.schedule(self.now_s)
        self.scheduler.check_integrity()
        running = self.scheduler._running
        preempted = [s for s in running_before if s.state is SequenceState.WAITING]
        started = [s for s in waiting_before if s.state is SequenceState.RUNNING]
        for sequence in preempted:
            assert not started
            assert all(other.order < sequence.order for other in running), "a wrong victim"
            del self.computed[sequence.request_id]
        for sequence in started:
            self._count_overtaken(sequence)
            start = sequence.num_computed_tokens
            assert start % self.blocks.block_tokens == 0
            assert start < sequence.num_tokens
            self.computed[sequence.request_id] = start
        if batch is None:
            assert not running, "something runs and nothing is computed"
        else:
            self._check_batch(batch)
        return batch

    def _count_overtaken(self, started: Sequence) -> None:
        for other in self.scheduler._waiting:
            if other.order < started.order:
                name = other.request_id
                self.overtaken[name] = self.overtaken.get(name, 0) + 1
                assert self.overtaken[name] <= self.config.overtaking, "overtaken too often"
                assert other.started_s is None, "a preempted request was overtaken"
                assert other.request.priority == started.request.priority

    def _check_batch(self, batch: ScheduledBatch) -> None:
        assert 1 <= batch.num_tokens <= self.config.max_batch_tokens
        assert len({c.sequence.request_id for c in batch.chunks}) == len(batch.chunks)
        size = self.blocks.block_tokens
        holders: dict[int, int] = {}
        for sequence in self.scheduler._running:
            for block_id in sequence.block_ids:
                holders[block_id] = holders.get(block_id, 0) + 1
        decodes = {c.sequence.request_id for c in batch.chunks}
        for sequence in self.scheduler._running:
            decode = sequence.num_tokens_to_compute == 1
            assert not decode or sequence.request_id in decodes, "a decode was left out"
        for chunk in batch.chunks:
            name = chunk.sequence.request_id
            assert chunk.start == self.computed[name], "a token left out or computed twice"
            for position in range(chunk.start, chunk.stop):
                block_id = chunk.block_ids[position // size]
                assert holders[block_id] == 1, "a shared block is written"

    def commit(self, batch: ScheduledBatch) -> None:
        deltas = self.scheduler.commit(batch, self.model.run(batch), self.now_s)
        self.scheduler.check_integrity()
        for chunk in batch.chunks:
            self.computed[chunk.sequence.request_id] = chunk.stop
        self.take(deltas)

    def take(self, deltas: list[EngineDelta]) -> None:
        for delta in deltas:
            name = delta.request_id
            assert name not in self.ended, "a delta after the last"
            self.output[name] += delta.token_ids
            asked = self.requests[name].params
            assert (delta.logprobs is not None) == (
                asked.logprobs is not None and bool(delta.token_ids)
            )
            if delta.prompt_logprobs is not None:
                assert asked.prompt_logprobs is not None
                assert delta.prompt_logprobs[0] is None
                scored = [entry.token_id for entry in delta.prompt_logprobs[1:] if entry]
                assert scored == self.requests[name].token_ids[1:]
            if delta.finish_reason is not None:
                assert delta.timing is not None
                assert (
                    min(delta.timing.queued_s, delta.timing.prefill_s, delta.timing.decode_s) >= 0
                )
                self.ended[name] = delta
                self.computed.pop(name, None)

    def step(self) -> None:
        self.now_s += 1
        batch = self.schedule()
        if batch is not None:
            self.commit(batch)
        else:
            self.take(self.scheduler.drain_events())

    def finish(self) -> None:
        """Runs until nothing is left; then all tokens must be right and no block held."""
        steps = 0
        while self.scheduler.has_work:
            self.step()
            steps += 1
            assert steps < 5000, "no progress"
        assert set(self.ended) == set(self.requests), "a request was lost"
        for name, asked in self.requests.items():
            self.check_output(name, asked)
        stats = self.scheduler.stats()
        assert stats.kv_blocks_used == 0, "a block leaked"
        assert stats.requests_finished == len(self.requests)

    def check_output(self, name: str, asked: EngineRequest) -> None:
        expected, got = expected_output(asked), self.output[name]
        end = self.ended[name]
        if end.finish_reason is FinishReason.STOP and end.stop_token_id is not None:
            assert got == expected
            assert got[-1] == EOS == end.stop_token_id
        elif end.finish_reason is FinishReason.LENGTH:
            assert got == expected
            assert len(got) == asked.params.max_tokens
        else:
            assert got == expected[: len(got)], "tokens before the abort are wrong"
