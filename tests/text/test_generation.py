"""GenerationState on scripted deltas, against what the whole token stream says."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moeserve.core import (
    EngineDelta,
    EngineTiming,
    ErrorCode,
    FinishReason,
    ModelInfo,
    RequestError,
    TokenLogprob,
)
from moeserve.text.assets import TextAssets
from moeserve.text.events import TextEvent
from moeserve.text.generation import GenerationState
from moeserve.text.prepare import prepare
from moeserve.text.request import GenerateRequest, RequestLimits
from moeserve.text.tokenizer import Tokenizer


class Clock:
    def __init__(self) -> None:
        self.now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


def start(tokenizer: Tokenizer, clock: Clock | None = None, **fields: Any) -> GenerationState:
    if not fields.keys() & {"prompt", "token_ids"}:
        fields["prompt"] = "Once"
    info = ModelInfo(
        name="tiny", model_type="x", path="", vocab_size=tokenizer.vocab_size,
        context_tokens=10_000, eos_token_ids=(1,), num_parameters=1, num_layers=1,
        num_moe_layers=1, num_experts=2, dtype="float32", device="cpu", kv_blocks=9, block_tokens=4,
    )  # fmt: skip
    request = GenerateRequest(request_id="r", received_s=0.0, **fields)
    prepared = prepare(request, TextAssets(tokenizer, None, {}), info, RequestLimits())
    return GenerationState(prepared, tokenizer, clock or Clock())


def joined(events: list[TextEvent], index: int = 0) -> TextEvent:
    mine = [event for event in events if event.index == index]
    assert all(event.finish_reason is None for event in mine[:-1])
    return TextEvent(
        index=index,
        text="".join(event.text for event in mine),
        token_ids=tuple(token for event in mine for token in event.token_ids),
        logprobs=tuple(entry for event in mine for entry in event.logprobs or ()),
        finish_reason=mine[-1].finish_reason,
        stop=mine[-1].stop,
    )


def chunked(data: st.DataObject, ids: list[int]) -> list[list[int]]:
    """The tokens cut into deltas of random lengths, none empty."""
    chunks = []
    while ids:
        size = data.draw(st.integers(1, len(ids)))
        chunks.append(ids[:size])
        ids = ids[size:]
    return chunks


@settings(max_examples=120)
@given(data=st.data())
def test_any_stream_equals_the_oracle(model_path: Path, data: st.DataObject) -> None:
    """Text, tokens, offsets, reason and usage, for random tokens, cuts and stop strings."""
    tokenizer = Tokenizer.load(model_path)
    n = data.draw(st.integers(1, 3))
    stops = data.draw(st.lists(st.text("aeno x", min_size=1, max_size=3), max_size=3))
    include = data.draw(st.booleans())
    common = tokenizer.encode("an ox on a axe, one nexus; 你好 <think>", False)
    token = st.sampled_from(common) | st.integers(0, tokenizer.vocab_size - 1)
    answers = [data.draw(st.lists(token, max_size=20)) for _ in range(n)]
    state = start(
        tokenizer,
        params={"n": n, "stop": stops, "include_stop": include, "logprobs": 1, "max_tokens": 99},
    )
    prompt = state.prepared.prompt_token_ids
    queues = [answer_deltas(index, chunked(data, ids)) for index, ids in enumerate(answers)]
    events, aborted = [], []
    while queues:
        queue = data.draw(st.sampled_from(queues)) if len(queues) > 1 else queues[0]
        progress = state.feed(queue.pop(0))
        queues = [queue for queue in queues if queue]
        events += progress.events
        aborted += progress.abort
    assert state.finished

    num_tokens = 0
    for index, ids in enumerate(answers):
        text, used, stop = oracle(tokenizer, prompt, ids, stops, include)
        answer = joined(events, index)
        assert (answer.text, list(answer.token_ids)) == (text, ids[:used])
        assert answer.stop == stop
        assert answer.finish_reason is (FinishReason.LENGTH if stop is None else FinishReason.STOP)
        assert answer.logprobs is not None
        offsets = [len(whole_characters(tokenizer, prompt, ids[:k])) for k in range(used)]
        assert [entry.text_offset for entry in answer.logprobs] == offsets
        assert [entry.raw for entry in answer.logprobs] == [
            tokenizer.token_bytes(token) for token in ids[:used]
        ]
        if not include:
            assert not any(s in answer.text for s in stops)
        num_tokens += used
    assert state.usage.completion_tokens == num_tokens
    assert set(aborted) <= {f"r/{i}" for i in range(n)}
    assert len(aborted) == len(set(aborted))


def answer_deltas(index: int, chunks: list[list[int]]) -> list[EngineDelta]:
    def score(token: int) -> TokenLogprob:
        return TokenLogprob(token, -1.0, 1, [(token, -1.0)])

    with_tokens = [
        EngineDelta(request_id=f"r/{index}", token_ids=chunk, logprobs=list(map(score, chunk)))
        for chunk in chunks
    ]
    return [*with_tokens, EngineDelta(request_id=f"r/{index}", finish_reason=FinishReason.LENGTH)]


def whole_characters(tokenizer: Tokenizer, prompt: list[int], ids: list[int]) -> str:
    """The text of an answer so far, without the character that is still unfinished."""
    before = _bytes(tokenizer, prompt).decode("utf-8", "replace")
    raw = _bytes(tokenizer, [*prompt, *ids])
    unfinished = [k for k in (1, 2, 3) if k <= len(raw) and _is_unfinished(raw[len(raw) - k :])]
    head = raw[: len(raw) - max(unfinished, default=0)]
    return head.decode("utf-8", "replace")[len(before) :]


def _is_unfinished(tail: bytes) -> bool:
    """Whether these bytes are the beginning of a character: more bytes could make them valid.

    Python's incremental decoder also waits for the third byte of a surrogate, which some error
    handlers would take. It changes no text, only the token that gives it out.
    """
    if len(tail) == 2 and tail[0] == 0xED and 0xA0 <= tail[1] <= 0xBF:
        return True
    try:
        tail.decode()
    except UnicodeDecodeError as error:
        return error.reason == "unexpected end of data" and error.start == 0
    return False


def _bytes(tokenizer: Tokenizer, ids: list[int]) -> bytes:
    shown = [token for token in ids if not tokenizer.is_special(token)]
    raw = b"".join(map(tokenizer.token_bytes, shown))
    first = next((t for t in shown if tokenizer.token_bytes(t)), None)
    if first is None:
        return raw
    lead = tokenizer.token_bytes(first)
    return tokenizer.token_bytes(first, first=True) + raw[len(lead) :]


def oracle(
    tokenizer: Tokenizer, prompt: list[int], ids: list[int], stops: list[str], include: bool
) -> tuple[str, int, str | None]:
    """(text, tokens used, stop string), by looking at the whole text after every token."""
    whole = _bytes(tokenizer, [*prompt, *ids]).decode("utf-8", "replace")
    whole = whole[len(_bytes(tokenizer, prompt).decode("utf-8", "replace")) :]
    for used in range(1, len(ids) + 2):
        is_all = used > len(ids)  # then an unfinished character at the end counts too
        text = whole if is_all else whole_characters(tokenizer, prompt, ids[:used])
        for end in range(1, len(text) + 1):
            ending = [stop for stop in stops if text[:end].endswith(stop)]
            if ending:
                stop = max(ending, key=len)
                kept = text[: end if include else end - len(stop)]
                return kept, min(used, len(ids)), stop
    return whole, len(ids), None


# -- particular cases ---------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tokenizer(byte_level_path: Path) -> Tokenizer:
    return Tokenizer.load(byte_level_path)


def ids_of(tokenizer: Tokenizer, text: str) -> list[int]:
    return tokenizer.encode(text, add_special_tokens=False)


def test_a_stop_token_is_counted_and_not_shown(tokenizer: Tokenizer) -> None:
    ids = ids_of(tokenizer, "fox!")
    state = start(tokenizer, params={"stop_token_ids": [ids[-1]]})
    progress = state.feed(
        EngineDelta(
            request_id="r/0",
            token_ids=ids,
            finish_reason=FinishReason.STOP,
            stop_token_id=ids[-1],
        )
    )
    (event,) = progress.events
    assert (event.text, event.token_ids, event.stop) == ("fox", tuple(ids), ids[-1])
    assert (state.usage.completion_tokens, progress.abort) == (len(ids), [])
    # The same id in the middle of an answer is text.
    state = start(tokenizer, params={"ignore_eos": True})
    state.feed(EngineDelta(request_id="r/0", token_ids=ids))
    (event,) = state.feed(EngineDelta(request_id="r/0", finish_reason=FinishReason.STOP)).events
    assert (event.text, event.stop, state.usage.completion_tokens) == ("", None, len(ids))


def test_deltas_after_a_stop_string_are_dropped(tokenizer: Tokenizer) -> None:
    state = start(tokenizer, params={"stop": ["fox"]})
    ids = ids_of(tokenizer, "a fox and more")
    progress = state.feed(EngineDelta(request_id="r/0", token_ids=ids))
    (event,) = progress.events
    assert (event.text, event.finish_reason, event.stop) == ("a ", FinishReason.STOP, "fox")
    assert progress.abort == ["r/0"]
    usage = state.usage
    assert usage.completion_tokens < len(ids)
    late = EngineDelta(request_id="r/0", token_ids=ids, finish_reason=FinishReason.STOP)
    assert state.feed(late).events == []
    assert state.usage == usage


def test_held_text_comes_out_at_the_end(tokenizer: Tokenizer) -> None:
    state = start(tokenizer, params={"stop": ["river!"]})
    ids = ids_of(tokenizer, "the river")
    first = state.feed(EngineDelta(request_id="r/0", token_ids=ids)).events
    assert joined(first).text == "the "
    last = state.feed(EngineDelta(request_id="r/0", finish_reason=FinishReason.LENGTH)).events
    assert (last[0].text, last[0].finish_reason) == ("river", FinishReason.LENGTH)


def test_min_tokens_holds_for_stop_strings(tokenizer: Tokenizer) -> None:
    ids = ids_of(tokenizer, "fox fox fox fox")
    for min_tokens in range(len(ids)):
        state = start(tokenizer, params={"stop": ["fox"], "min_tokens": min_tokens})
        events = state.feed(EngineDelta(request_id="r/0", token_ids=ids)).events
        assert state.usage.completion_tokens >= max(min_tokens, 1)
        assert events[-1].finish_reason is FinishReason.STOP


def test_prompt_scores_come_before_any_event(tokenizer: Tokenizer) -> None:
    prompt = ids_of(tokenizer, "Once 你 upon")
    state = start(tokenizer, token_ids=prompt, params={"n": 2, "prompt_logprobs": 1})
    token = ids_of(tokenizer, "a")
    assert state.feed(EngineDelta(request_id="r/1", token_ids=token)).events == []
    assert state.prompt_logprobs is None
    scores = [None, *(TokenLogprob(t, -2.0, 3, [(token[0], -0.5)]) for t in prompt[1:])]
    events = state.feed(
        EngineDelta(request_id="r/0", token_ids=token, prompt_logprobs=scores)
    ).events
    assert [event.index for event in events] == [0, 1]
    assert state.prompt_logprobs is not None
    assert [entry.token_id for entry in state.prompt_logprobs] == prompt
    assert state.prompt_logprobs[0].logprob is None
    assert state.prompt_logprobs[1].rank == 3
    assert state.prompt_logprobs[1].top[0].text == "a"
    text = state.prompt_text
    assert text == "Once 你 upon"
    for entry in state.prompt_logprobs:
        assert text[entry.text_offset :].startswith(entry.text) or "\ufffd" in entry.text


def test_prompt_offsets_count_from_the_text_as_sent(byte_fallback_path: Path) -> None:
    tokenizer = Tokenizer.load(byte_fallback_path)
    state = start(tokenizer, prompt="Once upon", params={"prompt_logprobs": 0, "max_tokens": 0})
    prompt = state.prepared.prompt_token_ids
    assert tokenizer.token_text(prompt[0]) == "<s>"
    scores = [None, *(TokenLogprob(t, -1.0, 1, []) for t in prompt[1:])]
    done = EngineDelta(request_id="r/0", prompt_logprobs=scores, finish_reason=FinishReason.LENGTH)
    (event,) = state.feed(done).events
    assert (event.text, event.token_ids) == ("", ())
    assert state.prompt_logprobs is not None
    assert state.prompt_text == "Once upon"
    offsets = [entry.text_offset for entry in state.prompt_logprobs]
    assert offsets[:2] == [0, 0]
    assert offsets == sorted(offsets)
    assert offsets[-1] + len(state.prompt_logprobs[-1].text) == len("Once upon")


def test_timing_and_cached_tokens(tokenizer: Tokenizer) -> None:
    clock = Clock()
    state = start(tokenizer, clock, params={"n": 2})
    token = ids_of(tokenizer, "a")
    clock.now_s = 1.5
    state.feed(EngineDelta(request_id="r/0", token_ids=token, num_cached_tokens=0))
    clock.now_s = 2.0
    timing = EngineTiming(queued_s=0.25, prefill_s=1, decode_s=1)
    end = {"finish_reason": FinishReason.LENGTH, "timing": timing}
    state.feed(EngineDelta(request_id="r/0", **end))
    state.feed(EngineDelta(request_id="r/1", token_ids=token, num_cached_tokens=1))
    assert not state.finished
    clock.now_s = 3.0
    state.feed(EngineDelta(request_id="r/1", **end))
    clock.now_s = 9.0
    assert (state.timing.queued_ms, state.timing.ttft_ms) == (250, 1500)
    assert state.timing.total_ms == 3000
    # Answer 1 reused what answer 0 computed; the request as a whole reused nothing.
    assert (state.usage.completion_tokens, state.usage.cached_tokens) == (2, 0)


def test_an_engine_error_ends_the_request(tokenizer: Tokenizer) -> None:
    state = start(tokenizer, params={"n": 2, "prompt_logprobs": 1})
    failed = EngineDelta(
        request_id="r/1",
        finish_reason=FinishReason.ERROR,
        error="the engine died",
        error_code=ErrorCode.UNAVAILABLE,
    )
    with pytest.raises(RequestError, match="the engine died") as caught:
        state.feed(failed)
    assert caught.value.code is ErrorCode.UNAVAILABLE
