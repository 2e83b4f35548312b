"""The engine: schedules, runs the model, chooses tokens. `step()` is the design."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable

import msgspec
import torch

from moeserve.cache.tiers.source import StoreError
from moeserve.config import EngineConfig
from moeserve.core import (
    EngineDelta,
    EngineRequest,
    EngineStats,
    ErrorCode,
    FinishReason,
    ModelInfo,
    RequestError,
    TokenLogprob,
)
from moeserve.cpu_backend._native import usable_isa_extensions
from moeserve.cpu_backend.threads import use_threads
from moeserve.engine.batch import SampledToken, ScheduledBatch, StepResult
from moeserve.engine.heap import map_large_blocks, trim_heap
from moeserve.engine.host_memory import HostMemory
from moeserve.engine.kv_blocks import BlockManager
from moeserve.engine.kv_sizes import kv_sizes
from moeserve.engine.model_runner import ModelRunner, StepOutput, chunk_rows
from moeserve.engine.request_scheduler import RequestScheduler
from moeserve.engine.row_links import LastRouting, RowLinks, recent_tokens
from moeserve.engine.sampler import Sampler, SampleRow, score
from moeserve.models.kv_pool import KvPool
from moeserve.models.page_mover import PageMover
from moeserve.models.registry import CheckDirectory, LoadedModel, load_model
from moeserve.stats import ExpertStats

EXPERT_STATS_S = 1.0
NOT_A_NUMBER = "the model produced NaN for this prompt; --check-weights finds broken weights"
log = logging.getLogger(__name__)
Progress = Callable[[str, float], None]


class Engine:
    """One model and the requests that run on it. One thread calls all methods.

    page_mover: may still be at work when the engine is ready; who measures waits for it.

    Errors of a request (a context too long, a full queue) raise RequestError in `add`; whatever
    happens later arrives as a delta with a finish_reason.
    """

    def __init__(self, config: EngineConfig, loaded: LoadedModel) -> None:
        self.config = config
        self.loaded = loaded
        block_tokens = config.kv.block_tokens
        sizes = kv_sizes(config, loaded)
        budget_bytes = config.experts.host_memory_bytes
        self.memory = HostMemory(
            loaded.runtime,
            loaded.resident_bytes,
            sizes,
            config.experts.min_host_slots,
            shares=budget_bytes is not None,
            kv_elsewhere=loaded.kv_elsewhere,
        )
        self.blocks = BlockManager(
            sizes.num_blocks, block_tokens, config.kv.prefix_reuse, self.memory
        )
        self._row_links = RowLinks()
        self._last_routing = self._remember_routing()
        self.scheduler = RequestScheduler(
            config.scheduler,
            self.blocks,
            loaded.eos_token_ids,
            loaded.context_tokens,
            predicted_experts=None if self._last_routing is None else self._last_routing.predicted,
            kv_switch_tokens=loaded.spec.kv_switch_tokens,
        )
        shared = config.experts.is_tiered
        kv = KvPool(
            loaded.spec, sizes.num_blocks, block_tokens, loaded.dtype, loaded.device, shared
        )
        self.runner = ModelRunner(loaded.model, kv, block_tokens, loaded.device)
        if budget_bytes is not None:
            self.resize_host_memory(budget_bytes)
        self.sampler = Sampler(loaded.spec.vocab_size, loaded.eos_token_ids, loaded.device)
        self.timeline = loaded.runtime.watch.timeline
        self._num_steps = 0
        self._step_s = 0.0
        # Beside workers most of what is mapped is theirs to read.
        moves = config.experts.huge_pages and not config.experts.workers
        self.page_mover = PageMover(
            loaded.mapped if moves else (),
            keep_bytes=self.memory.limit_bytes,
            is_busy=lambda: self.has_work,
        )
        self._expert_stats: ExpertStats | None = None
        self._expert_stats_due_s = 0.0

    @classmethod
    def from_config(
        cls,
        config: EngineConfig,
        progress: Progress | None = None,
        check: CheckDirectory | None = None,
    ) -> Engine:
        """Loads the model and sets this process's compute threads.

        Raises ModelError or ConfigError. progress gets (stage, 0..1). check: see `load_model`.
        """
        map_large_blocks()
        threads = use_threads(config.experts.num_threads)
        loaded = load_model(config.model, config.experts, progress, check)
        loaded.notes["threads"] = f"{threads.num_threads} ({threads.reason})"
        if loaded.runtime.backend.name == "native":
            # The native threads compute; torch's, spinning between its small parts, would only
            # take the cores from them.
            torch.set_num_threads(1)
        loaded.notes["isa"] = ", ".join(usable_isa_extensions()) or "no vector extension known"
        engine = cls(config, loaded)
        engine.page_mover.start()
        trim_heap()
        return engine

    @property
    def info(self) -> ModelInfo:
        spec = self.loaded.spec
        return ModelInfo(
            name=self.config.model.name,
            model_type=spec.model_type,
            path=str(self.loaded.path),
            vocab_size=spec.vocab_size,
            context_tokens=self.loaded.context_tokens,
            eos_token_ids=tuple(self.loaded.eos_token_ids),
            num_parameters=self.loaded.num_parameters,
            num_layers=spec.num_layers,
            num_moe_layers=spec.num_moe_layers,
            num_experts=spec.num_experts,
            dtype=str(self.loaded.dtype).removeprefix("torch."),
            device=str(self.loaded.device),
            kv_blocks=self.blocks.num_blocks,
            block_tokens=self.blocks.block_tokens,
            notes=self.loaded.notes | self.loaded.runtime.notes,
        )

    @property
    def has_work(self) -> bool:
        return self.scheduler.has_work

    def add(self, request: EngineRequest) -> None:
        """Queues a request. Raises RequestError when it can never run or the queue is full."""
        self._check_token_ids(request)
        if request.params.seed is None:
            seed = int.from_bytes(os.urandom(8), "little", signed=True)
            params = msgspec.structs.replace(request.params, seed=seed)
            request = msgspec.structs.replace(request, params=params)
        self.scheduler.add(request, time.time())

    def abort(
        self, request_id: str, reason: FinishReason = FinishReason.CANCELLED
    ) -> list[EngineDelta]:
        """Ends a request now; its last delta is returned. Unknown ids are ignored."""
        return self._ended(self.scheduler.abort(request_id, reason, time.time()))

    def step(self) -> list[EngineDelta]:
        """Runs the tokens that the scheduler picks; returns what they added to each request.

        Raises ModelError where a file that weights are mapped from was changed: nothing more that
        this engine computes could be trusted.
        """
        self.timeline.lap("between steps")
        started_s = time.perf_counter()
        begun_s = self.timeline.lap_s
        batch = self.scheduler.schedule(time.time())
        self.timeline.lap("schedule")
        if batch is None:
            return self._ended(self.scheduler.drain_events())
        self.loaded.check_files()
        self.loaded.runtime.begin_step(
            self._row_links.of(batch), lambda count: recent_tokens(batch, count)
        )
        if self._last_routing is not None:
            self._last_routing.begin(batch)
        try:
            output = self.runner.forward(batch)
        except StoreError as error:
            return self._ended(self._fail_batch(batch, error))
        result, failed = self._sample(batch, output)
        self.timeline.lap("head and sampler")
        deltas = failed + self.scheduler.commit(batch, result, time.time())
        self._balance_memory()
        self.timeline.lap("commit")
        self._num_steps += 1
        self._step_s += time.perf_counter() - started_s
        self.timeline.add_here("step", begun_s, self.timeline.lap_s, step=batch.step)
        return self._ended(deltas)

    def stats(self, fresh: bool = False) -> EngineStats:
        """Those of experts are collected at most once per second while there is work.

        fresh: collects them now.
        """
        now_s = time.monotonic()
        if fresh or now_s >= self._expert_stats_due_s or not self.has_work:
            self._expert_stats = self.loaded.runtime.stats()
            self._expert_stats_due_s = now_s + EXPERT_STATS_S
        return msgspec.structs.replace(
            self.scheduler.stats(),
            num_steps=self._num_steps,
            step_s=self._step_s,
            kv_bytes=self.kv_bytes,
            experts=self._expert_stats,
            memory=self.memory.stats(),
            pages=self.page_mover.stats(),
        )

    @property
    def kv_bytes(self) -> int:
        """Memory of the kv blocks that may be used now."""
        return self.blocks.extent * self.memory.sizes.block_bytes

    def resize_host_memory(self, budget_bytes: int) -> None:
        """One budget for weights of every token, kv and experts, from now on.

        Between two steps; raises ConfigError where that is not enough or more than the system has,
        or experts need none.
        """
        self.memory.set_budget(budget_bytes)
        if not self._balance_memory():
            self.memory.shrink(self.blocks.extent)

    @property
    def trouble(self) -> str | None:
        """Why requests may fail: an expert could not be read from disk and has not been since."""
        return self.loaded.runtime.trouble

    def retry_failed_reads(self, most_s: float) -> None:
        """Looks for so long, between two steps, whether what could not be read can be by now."""
        self.loaded.runtime.retry_failed_reads(most_s)

    def check_integrity(self) -> None:
        """Checks all bookkeeping; called when idle. Raises AssertionError."""
        self.scheduler.check_integrity()
        self.loaded.runtime.check_integrity()

    def close(self) -> None:
        """Ends the threads of the engine. Nothing may be called after it."""
        self.page_mover.close()
        self.loaded.close()

    def _balance_memory(self) -> bool:
        """Between two steps: gives experts the memory of kv blocks that nobody uses, if any."""
        before = self.blocks.extent
        extent = self.memory.fitting_extent(self.blocks.num_held, self.blocks.num_idle)
        if extent < before:
            self.runner.kv.move(self.scheduler.shrink_kv(extent))
            self.runner.kv.give_back(extent, before)
            self.memory.shrink(extent)
        return extent < before

    def _remember_routing(self) -> LastRouting | None:
        """What decodes are grouped by; None where they are not."""
        numbers = {i: ffn.experts.num_experts for i, ffn in self.loaded.spec.moe_layers.items()}
        if self.config.scheduler.decode_group is None or not numbers:
            return None
        routing = LastRouting(numbers)
        self.loaded.runtime.observers.append(routing.observe)
        return routing

    def _sample(
        self, batch: ScheduledBatch, output: StepOutput
    ) -> tuple[StepResult, list[EngineDelta]]:
        """The step's result, and the last deltas of requests whose logits hold NaN."""
        chunks = [chunk for chunk in batch.chunks if chunk.samples]
        rows = [
            SampleRow(s.request_id, s.token_ids, s.num_prompt_tokens, s.request.params)
            for s in (chunk.sequence for chunk in chunks)
        ]
        with torch.inference_mode():
            sampled = self.sampler.sample(output.next_token_logits(batch), rows) if rows else []
            prompt_logprobs = self._score_prompts(batch, output)
        tokens: dict[str, SampledToken] = {}
        failed: list[EngineDelta] = []
        for row, token in zip(rows, sampled, strict=True):
            if token is None:
                failed += self._fail(row.request_id, NOT_A_NUMBER, ErrorCode.INTERNAL)
            else:
                tokens[row.request_id] = token
        return StepResult(tokens, prompt_logprobs), failed

    def _fail(self, request_id: str, error: str, code: ErrorCode) -> list[EngineDelta]:
        now_s = time.time()
        return self.scheduler.abort(
            request_id, FinishReason.ERROR, now_s, error=error, error_code=code
        )

    def _fail_batch(self, batch: ScheduledBatch, error: StoreError) -> list[EngineDelta]:
        """An expert that a step needs cannot be read: its requests end, others go on."""
        log.error("step %d failed: %s", batch.step, error)
        return [
            delta
            for chunk in batch.chunks
            for delta in self._fail(chunk.sequence.request_id, str(error), ErrorCode(error.code))
        ]

    @staticmethod
    def _score_prompts(batch: ScheduledBatch, output: StepOutput) -> dict[str, list[TokenLogprob]]:
        """Log-probabilities of the prompt tokens that this step's rows predict."""
        scored: dict[str, list[TokenLogprob]] = {}
        for chunk, start, _ in chunk_rows(batch):
            if not chunk.scored:
                continue
            sequence = chunk.sequence
            num_top = sequence.request.params.prompt_logprobs or 0
            targets = sequence.token_ids[chunk.scored.start : chunk.scored.stop]
            # The row of position p scores the token at p + 1.
            first_row = start + chunk.scored.start - 1 - chunk.start
            scored[sequence.request_id] = [
                entry
                for rows, logits in output.prompt_logits(first_row, len(targets))
                for entry in score(logits, targets[rows], num_top)
            ]
        return scored

    def _ended(self, deltas: list[EngineDelta]) -> list[EngineDelta]:
        for delta in deltas:
            if delta.finish_reason is not None:
                self.sampler.forget(delta.request_id)
        return deltas

    def _check_token_ids(self, request: EngineRequest) -> None:
        vocab_size = self.loaded.spec.vocab_size
        params = request.params
        for field, ids in (
            ("token_ids", request.token_ids),
            ("stop_token_ids", params.stop_token_ids),
            ("logit_bias", params.logit_bias),
        ):
            bad = next((token for token in ids if not 0 <= token < vocab_size), None)
            if bad is not None:
                raise RequestError(
                    f"{field}: token id {bad} is outside the vocabulary (0 to {vocab_size - 1})",
                    field=field,
                )
