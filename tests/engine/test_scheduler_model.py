"""RequestScheduler under random operations; see scheduler_harness.py for what must hold."""

from __future__ import annotations

import pytest
from fake_model import ChunkRoom, expected_output, request
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule
from scheduler_harness import Harness

from moeserve.core import FinishReason, RequestError
from moeserve.engine.batch import ScheduledBatch


class SchedulerMachine(RuleBasedStateMachine):
    @initialize(
        num_blocks=st.integers(6, 20),
        block_tokens=st.integers(1, 3),
        reuse=st.sampled_from([True, True, False]),
        max_batch_tokens=st.integers(1, 12),
        max_running=st.integers(1, 6),
        admission=st.sampled_from(["past_future", "aggressive", "conservative"]),
        overtaking=st.integers(0, 3),
        kv_switch_tokens=st.sampled_from([None, 3, 6, 10]),
        extent=st.sampled_from([0, 2, 20]),
        chunk=st.integers(1, 4),
    )
    def start(
        self,
        num_blocks: int,
        block_tokens: int,
        reuse: bool,
        extent: int,
        chunk: int,
        **config: object,
    ) -> None:
        room = ChunkRoom(min(extent, num_blocks), num_blocks, chunk, keeps_idle=chunk > 2)
        self.harness = Harness(
            num_blocks,
            block_tokens,
            reuse,
            room=room,
            history_requests=4,
            max_waiting=10,
            **config,
        )
        self.in_flight: ScheduledBatch | None = None
        self.count = 0

    @rule(
        prompt=st.lists(st.integers(1, 2), min_size=1, max_size=9),
        max_tokens=st.integers(0, 12),
        priority=st.integers(-1, 1),
        ignore_eos=st.booleans(),
        patience_s=st.one_of(st.none(), st.none(), st.integers(-1, 12)),
        logprobs=st.sampled_from([None, 1]),
        prompt_logprobs=st.sampled_from([None, None, 0]),
    )
    def add(
        self, prompt: list[int], max_tokens: int, patience_s: int | None, **more: object
    ) -> None:
        deadline_s = None if patience_s is None else self.harness.now_s + patience_s
        new = request(f"r{self.count}", prompt, max_tokens, deadline_s=deadline_s, **more)
        self.count += 1
        needed = self.harness.blocks.blocks_for(len(prompt) + max(max_tokens - 1, 0))
        if needed > self.harness.blocks.num_blocks:
            with pytest.raises(RequestError, match="the pool has"):
                self.harness.add(new)
        elif self.harness.scheduler.num_waiting >= 10:
            with pytest.raises(RequestError, match="wait already"):
                self.harness.add(new)
        else:
            self.harness.add(new)

    @precondition(lambda self: self.in_flight is None)
    @rule()
    def schedule(self) -> None:
        self.harness.now_s += 1
        self.in_flight = self.harness.schedule()

    @precondition(lambda self: self.in_flight is not None)
    @rule()
    def commit(self) -> None:
        assert self.in_flight is not None
        self.harness.commit(self.in_flight)
        self.in_flight = None

    @precondition(lambda self: self.in_flight is None)
    @rule(data=st.data())
    def shrink(self, data: st.DataObject) -> None:
        """Kv has less memory from now on; what is held moves into it."""
        blocks = self.harness.blocks
        self.harness.shrink(data.draw(st.integers(blocks.num_held, blocks.extent)))

    @precondition(lambda self: self.in_flight is None)
    @rule(count=st.integers(1, 6))
    def steps(self, count: int) -> None:
        for _ in range(count):
            self.harness.step()

    @precondition(lambda self: self.harness.requests)
    @rule(data=st.data(), reason=st.sampled_from(list(FinishReason)))
    def abort(self, data: st.DataObject, reason: FinishReason) -> None:
        """Any request, also one that ended, also between schedule and commit."""
        name = data.draw(st.sampled_from(sorted(self.harness.requests)))
        was_alive = name in self.harness.scheduler._sequences
        deltas = self.harness.scheduler.abort(name, reason, self.harness.now_s)
        assert [d.finish_reason for d in deltas] == [reason] * was_alive
        for delta in deltas:
            self.harness.ended[name] = delta
            self.harness.computed.pop(name, None)
            asked = self.harness.requests[name]
            got = self.harness.output[name]
            assert got == expected_output(asked)[: len(got)]
            del self.harness.requests[name], self.harness.ended[name]
        self.harness.scheduler.check_integrity()

    def teardown(self) -> None:
        if not hasattr(self, "harness"):
            return
        harness = self.harness
        if self.in_flight is not None:
            self.commit()
        while harness.scheduler.has_work:
            harness.step()
        assert set(harness.ended) == set(harness.requests)
        for name, asked in harness.requests.items():
            harness.check_output(name, asked)
        assert harness.scheduler.stats().kv_blocks_used == 0, "a block leaked"


SchedulerMachine.TestCase.settings = settings(max_examples=80, stateful_step_count=40)
TestScheduler = SchedulerMachine.TestCase
