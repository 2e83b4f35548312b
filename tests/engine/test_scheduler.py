"""RequestScheduler with a model whose tokens are a function of the prefix and whose kv is real.

However requests are chunked, preempted, reused and aborted, the tokens must be those of an
undisturbed run, and after every operation the bookkeeping must be whole.
"""

from __future__ import annotations

import pytest
from fake_model import EOS, ChunkRoom, FakeModel, expected_output, request
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule

from moeserve.config import SchedulerConfig
from moeserve.core import EngineDelta, EngineRequest, ErrorCode, FinishReason, RequestError
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
        self.sequences: dict[str, Sequence] = {}
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
            self._check_output(name, asked)
        stats = self.scheduler.stats()
        assert stats.kv_blocks_used == 0, "a block leaked"
        assert stats.requests_finished == len(self.requests)

    def _check_output(self, name: str, asked: EngineRequest) -> None:
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
            harness._check_output(name, asked)
        assert harness.scheduler.stats().kv_blocks_used == 0, "a block leaked"


SchedulerMachine.TestCase.settings = settings(max_examples=80, stateful_step_count=40)
TestScheduler = SchedulerMachine.TestCase


@pytest.mark.parametrize("admission", ["past_future", "aggressive", "conservative"])
@pytest.mark.parametrize("reuse", [True, False])
def test_a_crowd_in_a_small_pool_all_finish(admission: str, reuse: bool) -> None:
    harness = Harness(12, 2, reuse, admission=admission, max_batch_tokens=7, max_running=5)
    for number in range(40):
        prompt = [1 + number % 2] * (1 + number % 5)
        harness.add(request(f"r{number}", prompt, 3 + number % 16, ignore_eos=True))
    harness.finish()
    preemptions = harness.scheduler.stats().num_preemptions
    assert (preemptions == 0) == (admission == "conservative")


def test_decodes_run_beside_a_long_prompt() -> None:
    harness = Harness(20, 2, max_batch_tokens=4)
    harness.add(request("short", [1], 10, ignore_eos=True))
    harness.step()
    harness.add(request("long", [2] * 14, 2, ignore_eos=True))
    sizes = []
    while "long" not in harness.ended:
        batch = harness.schedule()
        assert batch is not None
        sizes.append([(c.sequence.request_id, c.num_tokens, c.samples) for c in batch.chunks])
        harness.commit(batch)
    for step in sizes[:4]:
        assert step[0] == ("short", 1, True)
        assert step[1] == ("long", 3, False)
    assert sizes[4] == [("short", 1, True), ("long", 2, True)]
    harness.finish()


def test_priority_decides_who_starts_and_arrival_among_equals() -> None:
    harness = Harness(max_running=1)
    for name, priority in (("late", 5), ("first", 0), ("second", 0), ("urgent", -1)):
        harness.add(request(name, [1], 1, priority=priority))
    harness.finish()
    assert list(harness.ended) == ["urgent", "first", "second", "late"]


@pytest.mark.parametrize("overtaking", [0, 1, 2, 5])
def test_a_long_prompt_is_overtaken_so_often_and_then_starts(overtaking: int) -> None:
    """`running` holds 4 of 8 blocks, so `long` has to wait for its end, and small ones need not."""
    harness = Harness(8, 2, admission="aggressive", overtaking=overtaking, max_batch_tokens=16)
    harness.add(request("running", [1] * 7, 2, ignore_eos=True))
    harness.step()
    harness.add(request("long", [2] * 15, 1))
    for number in range(4):
        harness.add(request(f"small{number}", [1, 2], 1, priority=number == 3))
    harness.finish()
    before = list(harness.ended).index("long")
    assert before == 1 + min(overtaking, 3)  # the last is less urgent: it overtakes nobody


def test_a_preempted_request_is_not_overtaken() -> None:
    harness = Harness(8, 2, admission="aggressive", overtaking=8, max_batch_tokens=16)
    harness.add(request("first", [1] * 6, 9, ignore_eos=True))
    harness.add(request("victim", [2] * 6, 9, ignore_eos=True))
    while not harness.scheduler.stats().num_preemptions:
        harness.step()
    harness.add(request("small", [1, 2], 1))
    assert harness.blocks.num_available > 1
    while harness.scheduler.num_waiting == 2:
        harness.step()
    assert "first" in harness.ended
    harness.finish()


def test_the_least_urgent_gives_way() -> None:
    harness = Harness(6, 2, admission="aggressive", max_batch_tokens=16)
    harness.add(request("low", [1, 2, 1, 2], 8, priority=1, ignore_eos=True))
    harness.add(request("high", [2, 2, 2, 2], 8, priority=0, ignore_eos=True))
    sequences = dict(harness.scheduler._sequences)
    harness.finish()
    assert sequences["low"].num_preemptions >= 1
    assert sequences["high"].num_preemptions == 0
    assert list(harness.ended) == ["high", "low"]


def test_next_turn_reuses_prompt_and_answer() -> None:
    harness = Harness(30, 2)
    harness.add(request("turn1", [1, 2, 1, 2, 1], 6, ignore_eos=True))
    harness.finish()
    history = [1, 2, 1, 2, 1, *harness.output["turn1"]]  # 11 tokens, 10 of them have kv
    harness.add(request("turn2", [*history, 2], 2, ignore_eos=True))
    harness.finish()
    assert harness.ended["turn2"].num_cached_tokens == 10
    assert harness.scheduler.stats().cached_prompt_tokens == 10


def test_a_fully_indexed_prompt_still_computes_its_last_token() -> None:
    harness = Harness(30, 2)
    for name in ("one", "two"):
        harness.add(request(name, [1, 2, 1, 2], 1))
        harness.finish()
    assert harness.ended["two"].num_cached_tokens == 2  # not 4: the last block is computed anew


def test_preempted_blocks_are_found_again() -> None:
    recomputed = {}
    for reuse in (True, False):
        harness = Harness(8, 2, reuse, admission="aggressive", max_batch_tokens=16)
        for number in (1, 2):
            harness.add(request(f"r{number}", [number] * 6, 9, ignore_eos=True))
        harness.finish()
        stats = harness.scheduler.stats()
        assert stats.num_preemptions == 1
        recomputed[reuse] = stats.extra["recomputed_tokens"]
    assert 0 < recomputed[True] < recomputed[False]


def test_scored_prompts_reuse_nothing_but_may_be_reused() -> None:
    harness = Harness(30, 2)
    for name, logprobs in (("plain", None), ("scored", 0), ("after", None)):
        harness.add(request(name, [1, 2, 1, 2, 1], 0, prompt_logprobs=logprobs))
        harness.finish()
    cached = {name: delta.num_cached_tokens for name, delta in harness.ended.items()}
    assert cached == {"plain": 0, "scored": 0, "after": 4}
    scores = harness.ended["scored"].prompt_logprobs
    assert scores is not None
    assert len(scores) == 5


def test_max_tokens_zero_ends_without_a_token() -> None:
    harness = Harness()
    harness.add(request("score", [1, 2, 1], 0))
    harness.finish()
    end = harness.ended["score"]
    assert (end.token_ids, end.finish_reason) == ([], FinishReason.LENGTH)


def test_stop_token_ids_end_and_are_named() -> None:
    harness = Harness()
    undisturbed = expected_output(request("x", [1], 8, ignore_eos=True))
    stop = undisturbed[3]
    harness.add(request("x", [1], 8, ignore_eos=True, stop_token_ids=(stop,)))
    while harness.scheduler.has_work:
        harness.step()
    assert harness.output["x"] == undisturbed[: undisturbed.index(stop) + 1]
    assert harness.ended["x"].stop_token_id == stop


@pytest.mark.parametrize("steps", [0, 1, 4])
def test_deadline_ends_a_request_wherever_it_is(steps: int) -> None:
    """Waiting, in the middle of its prompt, in decode."""
    harness = Harness(max_batch_tokens=4)
    harness.add(request("x", [1] * 8, 9, ignore_eos=True, deadline_s=steps + 0.5))
    for _ in range(steps):
        harness.step()
    harness.step()
    assert harness.ended["x"].finish_reason is FinishReason.DEADLINE
    assert not harness.scheduler.has_work
    assert harness.scheduler.stats().kv_blocks_used == 0


def test_deadline_of_a_reused_name_is_not_the_old_one() -> None:
    harness = Harness()
    harness.add(request("x", [1], 1, deadline_s=3.0))
    harness.step()
    assert harness.ended.pop("x").finish_reason is not FinishReason.DEADLINE
    harness.output.clear()
    harness.add(request("x", [1], 10, ignore_eos=True))
    while harness.scheduler.has_work:
        harness.step()
    assert harness.ended["x"].finish_reason is FinishReason.LENGTH


def test_abort_in_the_middle_of_a_prompt_keeps_what_is_computed_for_others() -> None:
    harness = Harness(30, 2, max_batch_tokens=4)
    harness.add(request("gone", [1] * 12, 4))
    harness.step()
    harness.take(harness.scheduler.abort("gone", FinishReason.CANCELLED, harness.now_s))
    assert harness.scheduler.stats().kv_blocks_used == 0
    harness.add(request("next", [1] * 12, 4))
    harness.finish()
    assert harness.ended["next"].num_cached_tokens == 4


def test_an_uncommitted_step_can_be_scheduled_again() -> None:
    harness = Harness(max_batch_tokens=4)
    harness.add(request("x", [1, 2] * 4, 3, ignore_eos=True))
    first, second = harness.schedule(), harness.schedule()
    assert first is not None
    assert second is not None
    assert [(c.start, c.stop) for c in first.chunks] == [(c.start, c.stop) for c in second.chunks]
    harness.commit(second)
    harness.finish()


@pytest.mark.parametrize(
    ("new", "code", "message"),
    [
        (request("a", [], 1), ErrorCode.INVALID, "no tokens"),
        (request("a", [1] * 20, 5), ErrorCode.CONTEXT_LENGTH, "context of 24"),
        (request("a", [1] * 8, 6), ErrorCode.CONTEXT_LENGTH, "need 7 kv blocks.*pool has 6"),
        (request("taken", [1], 1), ErrorCode.INVALID, "in use"),
    ],
)
def test_requests_that_can_never_run_are_refused(
    new: EngineRequest, code: ErrorCode, message: str
) -> None:
    harness = Harness(6, 2)
    harness.add(request("taken", [1], 1))
    with pytest.raises(RequestError, match=message) as caught:
        harness.add(new)
    assert caught.value.code is code
    harness.finish()


def test_a_request_that_just_fits_the_pool_runs() -> None:
    harness = Harness(6, 2)
    harness.add(request("x", [1] * 8, 5, ignore_eos=True))  # 12 tokens of kv: the last needs none
    harness.finish()
    assert len(harness.output["x"]) == 5


def test_a_full_queue_is_refused_as_overloaded() -> None:
    harness = Harness(max_waiting=2)
    for number in range(2):
        harness.add(request(str(number), [1], 1))
    with pytest.raises(RequestError, match="at most 2") as caught:
        harness.add(request("2", [1], 1))
    assert caught.value.code is ErrorCode.OVERLOADED
    harness.finish()
