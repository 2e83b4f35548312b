"""An engine link in the same process, for tests whose timing must be determined.

A real token source behind the real interface: a seeded bigram model, P(next | last token), with
true log-probabilities, end-of-sequence, seeds, aborts and merged deltas. It computes in steps that
a test can hold back (`gate`), so that "during prefill" is a state and not a guess about time.
"""

from __future__ import annotations

import asyncio
import itertools
import json
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import tokenizers
from tokenizers import decoders, models, pre_tokenizers

from moeserve.core import (
    EngineDelta,
    EngineRequest,
    EngineStats,
    EngineTiming,
    ErrorCode,
    FinishReason,
    ModelInfo,
    RequestError,
    TokenLogprob,
)
from moeserve.messages import EngineStatus, merge_deltas

SPECIAL = ("<eos>", "<user>", "<assistant>", "<system>")
CHAT_TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def write_byte_tokenizer(path: Path) -> None:
    """A model directory's tokenizer files: one token per byte, then the special ones."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = tokenizers.Tokenizer(
        models.BPE(vocab={char: i for i, char in enumerate(alphabet)}, merges=[])
    )
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(list(SPECIAL))
    backend.save(str(path / "tokenizer.json"))
    (path / "tokenizer_config.json").write_text(json.dumps({"eos_token": SPECIAL[0]}))
    (path / "chat_template.jinja").write_text(CHAT_TEMPLATE)


VOCAB = 256 + len(SPECIAL)
EOS_ID = 256


class _Stream:
    """One request's deltas; those nobody has read yet are merged into one."""

    def __init__(self) -> None:
        self._waiting: EngineDelta | None = None
        self._news = asyncio.Event()

    def put(self, delta: EngineDelta) -> None:
        self._waiting = delta if self._waiting is None else merge_deltas(self._waiting, delta)
        self._news.set()

    async def __aiter__(self) -> AsyncIterator[EngineDelta]:
        while True:
            await self._news.wait()
            self._news.clear()
            delta, self._waiting = self._waiting, None
            if delta is not None:
                yield delta
                if delta.finish_reason is not None:
                    return


@dataclass
class _Running:
    request: EngineRequest
    stream: _Stream
    tokens: list[int]
    generated: int = 0
    rng: np.random.Generator = field(default_factory=np.random.default_rng)


class BigramEngine:
    """EngineLink over a bigram model; `step()` gives every running request one token."""

    def __init__(self, path: Path, seed: int = 0, context_tokens: int = 4096) -> None:
        logits = np.random.default_rng(seed).normal(size=(VOCAB, VOCAB)) * 2
        logits[:, EOS_ID] -= 2  # answers of a readable length
        self.logprobs = logits - np.log(np.exp(logits).sum(1, keepdims=True))  # [V, V]
        self.info = ModelInfo(
            name="bigram", model_type="bigram", path=str(path), vocab_size=VOCAB,
            context_tokens=context_tokens, eos_token_ids=(EOS_ID,), num_parameters=VOCAB * VOCAB,
            num_layers=1, num_moe_layers=0, num_experts=0, dtype="float64", device="cpu",
            kv_blocks=64, block_tokens=16,
        )  # fmt: skip
        self.stage = "ready"
        self.detail = ""
        self.gate = asyncio.Event()  # clear it to hold the engine before its next step
        self.gate.set()
        self.submitted: list[EngineRequest] = []
        self.aborted: list[tuple[str, FinishReason]] = []
        self._running: dict[str, _Running] = {}
        self._work = asyncio.Event()
        self._counts = {"prompt_tokens": 0, "generated_tokens": 0, "requests_finished": 0}

    @property
    def status(self) -> EngineStatus:
        ready = self.stage == "ready"
        stats = EngineStats(num_running=len(self._running), kv_blocks_total=64, **self._counts)
        info = self.info if ready else None
        return EngineStatus(
            epoch="e1", stage=self.stage, detail=self.detail, info=info, stats=stats
        )

    @property
    def num_running(self) -> int:
        return len(self._running)

    def submit(self, request: EngineRequest) -> _Stream:
        if self.stage != "ready":
            raise RequestError(f"engine: {self.stage}", code=ErrorCode.UNAVAILABLE)
        stream = _Stream()
        rng = np.random.default_rng(None if (s := request.params.seed) is None else abs(s))
        self.submitted.append(request)
        running = _Running(request, stream, list(request.token_ids), rng=rng)
        self._running[request.request_id] = running
        self._counts["prompt_tokens"] += len(request.token_ids)
        self._work.set()
        return stream

    def abort(self, request_id: str, reason: FinishReason = FinishReason.CANCELLED) -> None:
        if request_id in self._running:
            self.aborted.append((request_id, reason))
            self._finish(self._running[request_id], finish_reason=reason)

    def crash(self) -> None:
        """What a link does when its engine dies: every stream ends with UNAVAILABLE."""
        self.stage, self.detail = "failed", "the engine process ended with signal 9"
        for running in list(self._running.values()):
            self._finish(
                running,
                finish_reason=FinishReason.ERROR,
                error="the engine stopped",
                error_code=ErrorCode.UNAVAILABLE,
            )

    async def run(self) -> None:
        """Steps while there is work and the gate is open."""
        while True:
            await self._work.wait()
            await self.gate.wait()
            self.step()
            if not self._running:
                self._work.clear()
            await asyncio.sleep(0)

    def step(self) -> None:
        for running in list(self._running.values()):
            self._advance(running)

    def _finish(self, running: _Running, **fields: object) -> None:
        del self._running[running.request.request_id]
        self._counts["requests_finished"] += 1
        timing = EngineTiming(queued_s=0.001, prefill_s=0.002, decode_s=0.003)
        self._put(running, timing=timing, **fields)

    @staticmethod
    def _put(running: _Running, **fields: object) -> None:
        delta = EngineDelta(request_id=running.request.request_id, **fields)  # type: ignore[arg-type]
        running.stream.put(delta)

    def score(self, last: int, token: int, num_top: int) -> TokenLogprob:
        row = self.logprobs[last]
        order = np.argsort(-row, kind="stable")
        top = [(int(t), float(row[t])) for t in order[:num_top]]
        rank = 1 + int((row > row[token]).sum())
        return TokenLogprob(token_id=token, logprob=float(row[token]), rank=rank, top=top)

    def _advance(self, running: _Running) -> None:
        params = running.request.params
        prompt = running.request.token_ids
        if not running.generated and params.prompt_logprobs is not None:
            pairs = itertools.pairwise(prompt)
            scores = [self.score(last, token, params.prompt_logprobs) for last, token in pairs]
            self._put(running, prompt_logprobs=[None, *scores])
        if params.max_tokens == 0:
            self._finish(running, finish_reason=FinishReason.LENGTH)
            return
        token = self._choose(running)
        wanted = params.logprobs
        scored = None if wanted is None else [self.score(running.tokens[-1], token, wanted)]
        running.tokens.append(token)
        running.generated += 1
        self._counts["generated_tokens"] += 1
        stops = {*params.stop_token_ids, *(() if params.ignore_eos else (EOS_ID,))}
        fields = {"token_ids": [token], "logprobs": scored}
        if token in stops:
            self._finish(running, finish_reason=FinishReason.STOP, stop_token_id=token, **fields)
        elif running.generated >= params.max_tokens:
            self._finish(running, finish_reason=FinishReason.LENGTH, **fields)
        else:
            self._put(running, **fields)

    def _choose(self, running: _Running) -> int:
        params = running.request.params
        row = self.logprobs[running.tokens[-1]].copy()
        for token, bias in params.logit_bias.items():
            row[token] += bias
        if running.generated < params.min_tokens or params.ignore_eos:
            row[EOS_ID] = -np.inf
        if params.temperature == 0:
            return int(row.argmax())
        gumbel = running.rng.gumbel(size=VOCAB)
        return int((row / params.temperature + gumbel).argmax())
