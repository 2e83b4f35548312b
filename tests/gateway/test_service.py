"""GenerationService over a link whose deltas the test sends by hand."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest
import tokenizers
from tokenizers import decoders, models, pre_tokenizers

from moeserve.core import (
    EngineDelta,
    EngineRequest,
    EngineTiming,
    ErrorCode,
    FinishReason,
    ModelInfo,
    RequestError,
)
from moeserve.gateway.service import AnswerRecord, Generation, GenerationService
from moeserve.gateway.zmq_link import ZmqEngineStream
from moeserve.messages import EngineStatus, Timing, Usage
from moeserve.text.assets import TextAssets
from moeserve.text.events import TextEvent
from moeserve.text.request import GenerateRequest, RequestLimits
from moeserve.text.tokenizer import Tokenizer

INFO = ModelInfo(
    name="bytes", model_type="x", path="", vocab_size=256, context_tokens=1000,
    eos_token_ids=(0,), num_parameters=1, num_layers=1, num_moe_layers=1, num_experts=2,
    dtype="float32", device="cpu", kv_blocks=9, block_tokens=4,
)  # fmt: skip
TIMING = EngineTiming(queued_s=0.5, prefill_s=1, decode_s=2)


def byte_backend() -> tokenizers.Tokenizer:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {char: number for number, char in enumerate(alphabet)}
    backend = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    return backend


class ScriptedLink:
    """An EngineLink that keeps the real stream's merging and does what the test says."""

    def __init__(self) -> None:
        self.status = EngineStatus(epoch="e", stage="ready", info=INFO)
        self.streams: dict[str, ZmqEngineStream] = {}
        self.submitted: list[EngineRequest] = []
        self.aborted: list[tuple[str, FinishReason]] = []
        self.refuse_after: int | None = None

    def submit(self, request: EngineRequest) -> ZmqEngineStream:
        if self.refuse_after is not None and len(self.submitted) >= self.refuse_after:
            raise RequestError("the engine is not ready", code=ErrorCode.UNAVAILABLE)
        self.submitted.append(request)
        self.streams[request.request_id] = ZmqEngineStream()
        return self.streams[request.request_id]

    def abort(self, request_id: str, reason: FinishReason = FinishReason.CANCELLED) -> None:
        if request_id in self.streams:
            self.aborted.append((request_id, reason))

    def send(self, request_id: str, text: str = "", **fields: Any) -> None:
        tokens = TOKENIZER.encode(text)
        self.streams[request_id].push(
            EngineDelta(request_id=request_id, token_ids=tokens, **fields)
        )
        if "finish_reason" in fields:
            del self.streams[request_id]

    def end_all(self, reason: FinishReason = FinishReason.LENGTH) -> None:
        for request_id in list(self.streams):
            self.send(request_id, finish_reason=reason)


class Observer:
    """Keeps what a metrics object would count."""

    def __init__(self) -> None:
        self.heard: list[tuple[str, Any]] = []

    def names(self) -> list[str]:
        return [name for name, _ in self.heard]

    def request_started(self, prompt_tokens: int) -> None:
        self.heard.append(("started", prompt_tokens))

    def request_refused(self, code: ErrorCode) -> None:
        self.heard.append(("refused", code))

    def first_token(self, seconds: float) -> None:
        self.heard.append(("first", seconds))

    def token_gap(self, seconds: float, tokens: int) -> None:
        self.heard.append(("gap", tokens))

    def answer_finished(self, record: AnswerRecord) -> None:
        self.heard.append(("answer", record))

    def request_finished(self, usage: Usage, timing: Timing) -> None:
        self.heard.append(("finished", usage))


TOKENIZER = Tokenizer(byte_backend(), {})


def service(link: ScriptedLink, **fields: Any) -> GenerationService:
    assets = TextAssets(TOKENIZER, None, {})
    return GenerationService(link, RequestLimits(), assets=assets, **fields)


def request(name: str = "r", prompt: str = "hi", **fields: Any) -> GenerateRequest:
    params = fields.pop("params", {})
    return GenerateRequest(request_id=name, prompt=prompt, params=params, **fields)


async def settle() -> None:
    """Lets every task run until it waits for something."""
    for _ in range(20):
        await asyncio.sleep(0)


async def everything(generation: Generation) -> list[TextEvent]:
    return [event async for event in generation]


def in_loop(test: Callable[[], Awaitable[None]]) -> Callable[[], None]:
    def run() -> None:
        asyncio.run(asyncio.wait_for(test(), 200))  # type: ignore[arg-type]

    run.__name__ = test.__name__
    run.__doc__ = test.__doc__
    return run


@in_loop
async def test_one_answer_from_start_to_end() -> None:
    link, observer = ScriptedLink(), Observer()
    front = service(link, observer=observer)
    generation = await front.start(request(params={"temperature": 0, "seed": 3}))
    assert link.submitted[0].params.seed == 3
    assert front.num_running == 1
    link.send("r/0", "Hel", num_cached_tokens=1)
    assert (await anext(generation)).text == "Hel"
    link.send("r/0", "lo")
    assert (await anext(generation)).text == "lo"
    link.send("r/0", "!", finish_reason=FinishReason.LENGTH, timing=TIMING)
    last = await anext(generation)
    assert (last.text, last.finish_reason) == ("!", FinishReason.LENGTH)
    with pytest.raises(StopAsyncIteration):
        await anext(generation)
    assert generation.usage == Usage(prompt_tokens=2, completion_tokens=6, cached_tokens=1)
    assert generation.timing.queued_ms == 500
    assert 0 <= generation.timing.ttft_ms <= generation.timing.total_ms
    await settle()
    assert (front.num_running, link.aborted) == (0, [])
    assert observer.names() == ["started", "first", "gap", "gap", "answer", "finished"]
    record = observer.heard[4][1]
    assert (record.reason, record.num_tokens, record.engine) == (FinishReason.LENGTH, 6, TIMING)
    assert 0 <= record.first_token_s <= record.last_token_s <= record.total_s


@in_loop
async def test_answers_are_merged_per_answer_and_read_in_turn() -> None:
    link = ScriptedLink()
    generation = await service(link).start(request(params={"n": 3}))
    for round_ in range(5):
        for index in range(3):
            link.send(f"r/{index}", f"{index}{round_}")
            await settle()
    events = [await anext(generation) for _ in range(3)]
    assert [event.index for event in events] == [0, 1, 2]
    assert [event.text for event in events] == [
        "".join(f"{index}{round_}" for round_ in range(5)) for index in range(3)
    ]
    link.send("r/1", "x")
    assert await anext(generation) == TextEvent(1, "x", tuple(TOKENIZER.encode("x")))
    link.end_all()
    assert {event.index for event in await everything(generation)} == {0, 1, 2}


@in_loop
async def test_a_reader_that_stops_costs_one_event_per_answer() -> None:
    link = ScriptedLink()
    generation = await service(link).start(request(params={"n": 2, "max_tokens": 900}))
    for _ in range(400):
        for index in range(2):
            link.send(f"r/{index}", "ab")
        await settle()
    assert len(generation._waiting) == 2
    assert all(stream._waiting is None for stream in link.streams.values())
    link.end_all()
    await settle()
    events = await everything(generation)
    assert [(len(event.text), len(event.token_ids)) for event in events] == [(800, 800)] * 2


@in_loop
async def test_a_stop_string_ends_the_answer_in_the_engine() -> None:
    link = ScriptedLink()
    front = service(link)
    generation = await front.start(request(params={"stop": "END", "logprobs": None}))
    link.send("r/0", "text EN")
    assert (await anext(generation)).text == "text "
    link.send("r/0", "D and more")
    last = await anext(generation)
    assert (last.text, last.finish_reason, last.stop) == ("", FinishReason.STOP, "END")
    assert link.aborted == [("r/0", FinishReason.STOP)]
    assert generation.usage.completion_tokens == len("text END")
    assert generation.finished
    assert front.num_running == 1  # until the engine has let go of it
    link.send("r/0", "late", finish_reason=FinishReason.STOP)
    assert await everything(generation) == []
    await settle()
    assert front.num_running == 0


@in_loop
async def test_cancel_ends_it_at_once_and_drops_what_comes_later() -> None:
    link = ScriptedLink()
    front = service(link)
    generation = await front.start(request(params={"n": 2}))
    link.send("r/0", "abc")
    link.send("r/1", "x", finish_reason=FinishReason.LENGTH)
    await settle()
    generation.cancel()
    generation.cancel()
    assert link.aborted == [("r/0", FinishReason.CANCELLED)]
    link.send("r/0", "late")
    events = await everything(generation)
    assert [(e.index, e.text, e.finish_reason) for e in events] == [
        (0, "abc", FinishReason.CANCELLED),
        (1, "x", FinishReason.LENGTH),
    ]
    assert await front.drain(0) is False
    link.end_all(FinishReason.CANCELLED)
    assert await front.drain(10) is True


@in_loop
async def test_a_waiting_reader_may_be_cancelled_and_come_back() -> None:
    link = ScriptedLink()
    generation = await service(link).start(request())
    for _ in range(2):
        reader = asyncio.ensure_future(anext(generation))
        await settle()
        reader.cancel()
        await settle()
        assert reader.cancelled()
    link.send("r/0", "ab")
    await settle()
    assert (await anext(generation)).text == "ab"
    link.end_all()
    await everything(generation)


@in_loop
async def test_an_engine_failure_reaches_the_reader_after_the_text() -> None:
    link, observer = ScriptedLink(), Observer()
    front = service(link, observer=observer)
    generation = await front.start(request(params={"n": 2}))
    link.send("r/1", "abc")
    await settle()
    failure = {"error": "the engine died", "error_code": ErrorCode.UNAVAILABLE}
    link.send("r/0", finish_reason=FinishReason.ERROR, **failure)
    assert (await anext(generation)).text == "abc"
    for _ in range(2):
        with pytest.raises(RequestError, match="the engine died") as caught:
            await anext(generation)
        assert caught.value.code is ErrorCode.UNAVAILABLE
    assert link.aborted == [("r/1", FinishReason.CANCELLED)]
    link.end_all(FinishReason.CANCELLED)
    assert await front.drain(10)
    assert observer.names().count("finished") == 1


@in_loop
async def test_the_deadline_ends_it_with_the_text_so_far() -> None:
    link = ScriptedLink()
    front = service(link)
    with pytest.raises(RequestError) as caught:
        await front.start(request(deadline_s=time.time() - 1))
    assert caught.value.code is ErrorCode.DEADLINE
    assert front.num_running == 0
    generation = await front.start(request(deadline_s=time.time() + 20))
    link.send("r/0", "abc")
    await settle()
    loop = asyncio.get_running_loop()
    now_s = loop.time
    loop.time = lambda: now_s() + 30  # type: ignore[method-assign]
    events = await everything(generation)
    assert "".join(e.text for e in events) == "abc"
    assert events[-1].finish_reason is FinishReason.DEADLINE
    assert link.aborted == [("r/0", FinishReason.DEADLINE)]
    link.end_all(FinishReason.DEADLINE)


@in_loop
async def test_what_start_refuses() -> None:
    link, observer = ScriptedLink(), Observer()
    front = service(link, max_running=2, observer=observer)
    await front.start(request("a"))

    async def refused(name: str, prompt: str = "hi", **fields: Any) -> ErrorCode:
        with pytest.raises(RequestError) as caught:
            await front.start(request(name, prompt, **fields))
        return caught.value.code

    assert await refused("a") is ErrorCode.INVALID  # still running
    assert await refused("b", prompt="") is ErrorCode.INVALID
    assert await refused("b", model="other") is ErrorCode.UNKNOWN_MODEL
    await front.start(request("b"))
    assert await refused("c") is ErrorCode.OVERLOADED
    link.send("a/0", finish_reason=FinishReason.LENGTH)
    await settle()
    await front.start(request("a"))  # its name is free again
    link.end_all()
    await settle()
    front.stop_accepting()
    assert await refused("d") is ErrorCode.UNAVAILABLE
    codes = [value for name, value in observer.heard if name == "refused"]
    assert codes == [
        ErrorCode.INVALID, ErrorCode.INVALID, ErrorCode.UNKNOWN_MODEL, ErrorCode.OVERLOADED,
        ErrorCode.UNAVAILABLE,
    ]  # fmt: skip


@in_loop
async def test_a_half_submitted_request_is_taken_back() -> None:
    link = ScriptedLink()
    link.refuse_after = 1
    front = service(link)
    with pytest.raises(RequestError) as caught:
        await front.start(request(params={"n": 2}))
    assert caught.value.code is ErrorCode.UNAVAILABLE
    assert link.aborted == [("r/0", FinishReason.CANCELLED)]
    assert await front.drain(0)


@in_loop
async def test_long_prompts_are_tokenised_off_the_event_loop() -> None:
    link = ScriptedLink()
    entered, go_on = threading.Event(), threading.Event()

    class Slow(Tokenizer):
        def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
            entered.set()
            assert go_on.wait(120)
            return super().encode(text, add_special_tokens)[:5]

    front = GenerationService(
        link, RequestLimits(), assets=TextAssets(Slow(byte_backend(), {}), None, {}), max_running=1
    )
    starting = asyncio.ensure_future(front.start(request(prompt="a" * 100_000)))
    await asyncio.to_thread(entered.wait)
    # The loop is free; the request counts, for the limit and for a drain.
    assert front.num_running == 1
    with pytest.raises(RequestError) as caught:
        await front.start(request("other"))
    assert caught.value.code is ErrorCode.OVERLOADED
    assert await front.drain(0) is False
    go_on.set()
    generation = await starting
    link.end_all()
    assert (await everything(generation))[-1].finish_reason is FinishReason.LENGTH
    assert await front.tokenize("b" * 10_000) == TOKENIZER.encode("b" * 5)


@in_loop
async def test_draining() -> None:
    link = ScriptedLink()
    front = service(link)
    assert await front.drain(0)
    generations = [await front.start(request(name)) for name in "abc"]
    front.stop_accepting()
    draining = asyncio.ensure_future(front.drain(30))
    await settle()
    assert not draining.done()
    link.send("a/0", "x", finish_reason=FinishReason.LENGTH)
    front.cancel_all()
    link.end_all(FinishReason.CANCELLED)
    assert await draining
    reasons = [(await everything(generation))[-1].finish_reason for generation in generations]
    assert reasons[1:] == [FinishReason.CANCELLED] * 2


def test_loading_from_the_engines_model(tmp_path: Path) -> None:
    async def run() -> None:
        byte_backend().save(str(tmp_path / "tokenizer.json"))
        link = ScriptedLink()
        info = msgspec.structs.replace(INFO, path=str(tmp_path))
        link.status = EngineStatus(epoch="e", stage="loading")
        with pytest.raises(RequestError, match="the engine is loading"):
            await GenerationService.load(link, RequestLimits())
        link.status = EngineStatus(epoch="e", stage="ready", info=info)
        front = await GenerationService.load(link, RequestLimits())
        assert front.info is info
        assert await front.tokenize("abc") == TOKENIZER.encode("abc")

    asyncio.run(run())
