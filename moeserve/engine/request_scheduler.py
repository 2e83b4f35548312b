"""Which tokens run in the next step: continuous batching with chunked prefill.

Every step has one token budget. Running decodes go first, one token each; what is left of the
budget goes to prompts, cut into chunks that fit (Agrawal et al., "Taming Throughput-Latency
Tradeoff in LLM Inference with Sarathi-Serve", OSDI 2024, section 4: decodes never stall behind a
long prompt, prompts fill the compute that decodes leave over).

Order everywhere is (priority, arrival): smaller priority first, first come first served within
one. A steady stream of more urgent requests can starve less urgent ones, which is what priorities
ask for. A running request is not stopped because a more urgent one arrives; priorities decide who
starts next (entrance.py) and who gives way when kv runs out.

A sequence gets blocks for all its tokens when it starts, so a prefill never stops half-way for
want of kv; only decodes grow. When a decode finds no block, the last sequence in order gives up
its blocks and waits again (preemption by recompute). What it computed stays in the prefix index
until overwritten, so recompute often costs little. The first sequence in order can take the blocks
of all others, and alone it fits (`add` saw to that): somebody always advances, everybody finishes.
"""

from __future__ import annotations

from collections.abc import Iterable

from moeserve.config import SchedulerConfig
from moeserve.core import (
    EngineDelta,
    EngineRequest,
    EngineStats,
    ErrorCode,
    FinishReason,
    RequestError,
)
from moeserve.engine.admission import AdmissionPolicy, check_length, make_admission
from moeserve.engine.batch import ScheduledBatch, ScheduledChunk, StepResult
from moeserve.engine.deadlines import Deadlines
from moeserve.engine.decode_groups import PredictedExperts
from moeserve.engine.decodes import Decodes
from moeserve.engine.deltas import end_delta, token_delta
from moeserve.engine.entrance import Entrance
from moeserve.engine.kv_blocks import BlockManager
from moeserve.engine.request_counts import RequestCounts
from moeserve.engine.sequence import Sequence, SequenceState
from moeserve.engine.sequence_queue import SequenceQueue


class RequestScheduler:
    """Queues, kv bookkeeping and stop conditions of all requests of one engine.

    One thread calls everything. A cycle is `schedule`, the model, `commit`. `schedule` advances no
    sequence, so a step that failed may be scheduled again, or its requests aborted.
    All times are `time.time()` seconds, the clock of deadlines.
    """

    def __init__(
        self,
        config: SchedulerConfig,
        blocks: BlockManager,
        eos_token_ids: Iterable[int],
        context_tokens: int,
        admission: AdmissionPolicy | None = None,
        kv_switch_tokens: int | None = None,
        predicted_experts: PredictedExperts | None = None,
    ) -> None:
        """admission: instead of the policy that `config.admission` names.

        predicted_experts: what `config.decode_group` groups decodes by. Without it, that setting
        raises ConfigError.

        kv_switch_tokens: sequences longer than that need other kv for the same tokens; one that
        grows beyond it is computed anew, as after a preemption.
        """
        self._config = config
        self._blocks = blocks
        self._eos_token_ids = frozenset(eos_token_ids)
        self._context_tokens = context_tokens
        self._kv_switch_tokens = kv_switch_tokens
        self._admission = make_admission(config) if admission is None else admission
        self._decodes = Decodes(config, blocks, predicted_experts)
        self._entrance = Entrance(config, blocks, self._admission)
        self._sequences: dict[str, Sequence] = {}
        self._waiting = SequenceQueue(SequenceState.WAITING)
        self._running = SequenceQueue(SequenceState.RUNNING)
        self._deadlines = Deadlines()
        self._events: list[EngineDelta] = []
        self._num_arrivals = 0
        self._step = 0
        self._count = RequestCounts()

    @property
    def has_work(self) -> bool:
        """Something waits or runs, or an event was not drained yet."""
        return bool(self._sequences or self._events)

    @property
    def num_running(self) -> int:
        return len(self._running)

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    def stats(self) -> EngineStats:
        """What the scheduler knows; step counts and times are the engine's."""
        return self._count.stats(len(self._running), len(self._waiting), self._blocks)

    # -- requests come and go ---------------------------------------------------------------------

    def add(self, request: EngineRequest, now_s: float) -> None:
        """Queues a request.

        Raises RequestError: OVERLOADED when too many wait, CONTEXT_LENGTH when prompt and output
        exceed the context or the whole kv pool, INVALID for an empty prompt or an id in use.
        """
        name = request.request_id
        if name in self._sequences:
            raise RequestError(
                f"request_id: {name!r} is in use; choose another", field="request_id"
            )
        check_length(request, self._context_tokens, self._blocks)
        if len(self._waiting) >= self._config.max_waiting:
            raise RequestError(
                f"{len(self._waiting)} requests wait already, at most {self._config.max_waiting}",
                code=ErrorCode.OVERLOADED,
                hint="retry later, or raise max_waiting",
            )
        sequence = Sequence(request, self._num_arrivals, now_s)
        self._num_arrivals += 1
        sequence.table.variant = self._kv_variant(sequence)
        self._sequences[name] = sequence
        self._waiting.add(sequence)
        self._deadlines.watch(sequence)

    def abort(
        self,
        request_id: str,
        reason: FinishReason,
        now_s: float,
        error: str | None = None,
        error_code: ErrorCode | None = None,
    ) -> list[EngineDelta]:
        """Ends a request in whatever state it is, also between `schedule` and `commit`.

        reason STOP says that the front found a stop string, so the output is complete and its
        length is learnt from. Unknown ids give no delta.
        """
        sequence = self._sequences.get(request_id)
        if sequence is None:
            return []
        self._remove(sequence, reason)
        return [end_delta(sequence, reason, now_s, error, error_code)]

    def drain_events(self) -> list[EngineDelta]:
        """Deltas that arose in `schedule` (passed deadlines). `commit` returns them too."""
        events, self._events = self._events, []
        return events

    def _remove(self, sequence: Sequence, reason: FinishReason) -> None:
        queue = self._running if sequence.state is SequenceState.RUNNING else self._waiting
        queue.remove(sequence)
        del self._sequences[sequence.request_id]
        self._blocks.release(sequence.table)
        sequence.table.path.clear()
        sequence.state = SequenceState.FINISHED
        self._count.requests_finished += 1
        ended_by_itself = reason in (FinishReason.STOP, FinishReason.LENGTH)
        if ended_by_itself and sequence.num_output_tokens:
            self._admission.observe(sequence.num_output_tokens)

    # -- what runs next ---------------------------------------------------------------------------

    def schedule(self, now_s: float) -> ScheduledBatch | None:
        """The next step, or None when nothing can run. Ends requests whose deadline passed."""
        for late in self._deadlines.passed(now_s, self._sequences):
            self._events += self.abort(late.request_id, FinishReason.DEADLINE, now_s)
        preemptions = self._count.preemptions
        chunks = self._decodes.chunks(self._running, now_s, self._preempt)
        budget = self._config.max_batch_tokens - len(chunks)
        for sequence in self._running:
            if budget and sequence.num_tokens_to_compute > 1:
                chunks.append(ScheduledChunk.of(sequence, budget, self._blocks))
                budget -= chunks[-1].num_tokens
        if self._count.preemptions == preemptions:  # else kv is short: what starts would be next
            while budget and (new := self._entrance.next(self._waiting, self._running)):
                self._start(new, now_s)
                chunks.append(ScheduledChunk.of(new, budget, self._blocks))
                budget -= chunks[-1].num_tokens
        if not chunks:
            return None
        self._step += 1
        return ScheduledBatch(tuple(chunks), self._step)

    def _preempt(self, sequence: Sequence) -> None:
        """Takes the blocks of a sequence that was running and has left that queue."""
        self._compute_anew(sequence)
        sequence.num_preemptions += 1
        self._count.preemptions += 1

    def _compute_anew(self, sequence: Sequence) -> None:
        """A sequence that was running waits at its old place in order, without blocks."""
        self._blocks.release(sequence.table)
        sequence.num_computed_tokens = 0
        self._waiting.add(sequence)

    def _kv_variant(self, sequence: Sequence) -> int:
        switch = self._kv_switch_tokens
        return int(switch is not None and sequence.num_tokens > switch)

    def _start(self, sequence: Sequence, now_s: float) -> None:
        num_reused = len(sequence.table.path) * self._blocks.block_tokens
        self._waiting.start(sequence)
        self._running.add(sequence)
        self._blocks.claim(sequence.table)
        self._blocks.extend(sequence.table, sequence.num_tokens)
        sequence.num_computed_tokens = num_reused
        if sequence.started_s is None:
            sequence.started_s = now_s
            sequence.num_cached_tokens = num_reused
            self._count.started(sequence)

    def shrink_kv(self, extent: int) -> list[tuple[int, int]]:
        """See BlockManager.shrink; between `commit` and `schedule`."""
        return self._blocks.shrink(extent, [sequence.table for sequence in self._running])

    # -- what came out ----------------------------------------------------------------------------

    def commit(self, batch: ScheduledBatch, result: StepResult, now_s: float) -> list[EngineDelta]:
        """Advances the sequences of the last scheduled batch by what the model computed.

        One delta per new token, and those that wait in `drain_events`. Requests aborted since
        `schedule` are passed over.
        """
        assert batch.step == self._step, "only the last scheduled batch can be committed"
        deltas = self.drain_events()
        for chunk in batch.chunks:
            if chunk.sequence.state is SequenceState.RUNNING:
                delta = self._advance(chunk, result, now_s)
                if delta is not None:
                    deltas.append(delta)
        return deltas

    def _advance(
        self, chunk: ScheduledChunk, result: StepResult, now_s: float
    ) -> EngineDelta | None:
        sequence = chunk.sequence
        assert chunk.start == sequence.num_computed_tokens
        sequence.num_computed_tokens = chunk.stop
        self._count.computed(chunk)
        sequence.most_computed_tokens = max(sequence.most_computed_tokens, chunk.stop)
        if chunk.scored:
            assert sequence.prompt_logprobs is not None
            sequence.prompt_logprobs += result.prompt_logprobs[sequence.request_id]
        self._blocks.publish(sequence.table, sequence.token_ids, chunk.stop)
        if chunk.stop < sequence.num_tokens:
            return None
        if sequence.first_token_s is None:
            sequence.first_token_s = now_s
        token, reason = None, FinishReason.LENGTH if not chunk.samples else None
        if chunk.samples:
            token = result.tokens[sequence.request_id]
            sequence.token_ids.append(token.token_id)
            self._count.generated_tokens += 1
            reason = sequence.stop_reason(self._eos_token_ids)
        if reason is not None:
            self._remove(sequence, reason)
        elif self._kv_variant(sequence) != sequence.table.variant:
            self._running.remove(sequence)
            self._compute_anew(sequence)
            sequence.table.path.clear()
            sequence.table.variant = self._kv_variant(sequence)
        return token_delta(sequence, token, reason, now_s)

    def check_integrity(self) -> None:
        """Asserts that queues, states and blocks agree."""
        self._waiting.check_integrity()
        self._running.check_integrity()
        everyone = [*self._waiting, *self._running]
        assert len(everyone) == len(self._sequences)
        assert all(self._sequences[s.request_id] is s for s in everyone)
        assert len(self._running) <= self._entrance.max_running
        for sequence in self._waiting:
            assert not sequence.block_ids
            assert sequence.num_computed_tokens == 0
        size = self._blocks.block_tokens
        for sequence in self._running:
            assert sequence.num_computed_tokens < sequence.num_tokens
            assert len(sequence.block_ids) * size >= sequence.num_tokens - 1
            if self._blocks.prefix_reuse:
                assert len(sequence.table.path) == sequence.num_computed_tokens // size
        self._blocks.check_integrity(sequence.table for sequence in self._running)
