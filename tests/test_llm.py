"""LLM with the real engine and the bundled model, against transformers and under interrupts."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from typing import Any

import pytest
import torch

import moeserve
from moeserve.config import BUNDLED_MODEL
from moeserve.core import (
    ConfigError,
    EngineDelta,
    ErrorCode,
    FinishReason,
    MoeserveError,
    RequestError,
    SamplingParams,
)
from moeserve.llm import LLM, engine_config

PROMPTS = ["Once upon a time", "def main(self):\n", "To be, or not to be"]
NUM_TOKENS = 16


@pytest.fixture(scope="module")
def llm() -> Iterator[LLM]:
    with LLM(dtype="float32", max_batch_tokens=64, num_threads=1) as loaded:
        yield loaded


@pytest.fixture(scope="module")
def reference() -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(BUNDLED_MODEL, dtype=torch.float32).eval()


def greedy(llm: LLM, prompt: Any, **given: Any) -> list[int]:
    given = {"temperature": 0, "max_tokens": NUM_TOKENS, "ignore_eos": True, **given}
    return llm.generate(prompt, **given)[0].answers[0].token_ids


def is_idle(llm: LLM) -> bool:
    engine = llm._engine
    assert engine is not None
    engine.check_integrity()
    return not llm._jobs and not engine.has_work and engine.stats().num_running == 0


def test_greedy_text_and_scores_equal_transformers(llm: LLM, reference: Any) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(BUNDLED_MODEL)
    results = llm.generate(
        PROMPTS, temperature=0, max_tokens=NUM_TOKENS, ignore_eos=True, logprobs=1
    )
    for prompt, result in zip(PROMPTS, results, strict=True):
        ids = tokenizer(prompt, return_tensors="pt").input_ids
        assert result.prompt_token_ids == ids[0].tolist()
        with torch.inference_mode():
            for _ in range(NUM_TOKENS):
                ids = torch.cat([ids, reference(ids).logits[:, -1:].argmax(-1)], dim=1)
            logprobs = reference(ids).logits[0].log_softmax(-1)
        start = len(result.prompt_token_ids)
        answer = result.answers[0]
        assert answer.token_ids == ids[0, start:].tolist()
        assert result.prompt_token_ids + answer.token_ids == ids[0].tolist()
        assert prompt + answer.text == tokenizer.decode(ids[0])
        assert answer.logprobs is not None
        for position, entry in enumerate(answer.logprobs):
            expected = logprobs[start + position - 1, entry.token_id].item()
            assert entry.logprob == pytest.approx(expected, abs=1e-3)
            assert answer.text[entry.text_offset :].startswith(entry.text)
        assert answer.finish_reason is FinishReason.LENGTH
        assert result.usage.completion_tokens == NUM_TOKENS


def test_prompt_forms_are_one(llm: LLM) -> None:
    ids = llm.tokenizer.encode(PROMPTS[0])
    expected = greedy(llm, PROMPTS[0])
    assert greedy(llm, ids) == greedy(llm, [ids]) == greedy(llm, [PROMPTS[0]]) == expected
    params = SamplingParams(temperature=0, max_tokens=NUM_TOKENS, ignore_eos=True)
    assert llm.generate(ids, params)[0].answers[0].token_ids == expected
    assert llm.generate(ids, params, max_tokens=3)[0].answers[0].token_ids == expected[:3]
    assert llm.generate([]) == []


def test_chat(llm: LLM) -> None:
    from transformers import AutoTokenizer

    chat = [{"role": "user", "content": "Tell me a story"}]
    theirs = AutoTokenizer.from_pretrained(BUNDLED_MODEL)
    expected = theirs.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
    result = llm.chat(chat, max_tokens=2)
    assert llm.tokenizer.decode(result.prompt_token_ids, False) == expected
    assert [r.prompt_token_ids for r in llm.generate([chat, chat], max_tokens=1)] == [
        result.prompt_token_ids
    ] * 2


def test_stream_equals_generate(llm: LLM) -> None:
    given = {"seed": 5, "max_tokens": 24, "n": 2, "temperature": 1.2}
    whole = llm.generate(PROMPTS[2], **given)[0]
    texts = ["", ""]
    for event in llm.stream(PROMPTS[2], **given):
        texts[event.index] += event.text
    assert texts == [answer.text for answer in whole.answers]
    assert texts[0] != texts[1]  # the second has the seed + 1
    alone = llm.generate(PROMPTS[2], **{**given, "seed": 6, "n": 1})[0]
    assert alone.text == texts[1]


def test_stop_strings_end_the_answer_in_the_engine(llm: LLM) -> None:
    text = llm.generate(PROMPTS[0], temperature=0, max_tokens=NUM_TOKENS)[0].text
    stop = text[len(text) // 2 :][:3]
    result = llm.generate(PROMPTS[0], temperature=0, max_tokens=NUM_TOKENS, stop=stop)[0]
    assert result.text == text[: text.index(stop)]
    assert (result.answers[0].finish_reason, result.answers[0].stop) == (FinishReason.STOP, stop)
    assert result.usage.completion_tokens < NUM_TOKENS
    assert is_idle(llm)


def test_scoring_a_prompt(llm: LLM, reference: Any) -> None:
    ids = llm.tokenizer.encode("Once upon a time there was a fox")
    result = llm.generate(ids, max_tokens=0, prompt_logprobs=3)[0]
    assert result.answers[0].token_ids == []
    with torch.inference_mode():
        logprobs = reference(torch.tensor([ids])).logits[0].log_softmax(-1)
    assert result.prompt_logprobs is not None
    assert result.prompt_logprobs[0].logprob is None
    for position, entry in enumerate(result.prompt_logprobs[1:]):
        expected = logprobs[position, ids[position + 1]].item()
        assert entry.logprob == pytest.approx(expected, abs=1e-3)
        top = logprobs[position].topk(3)
        assert [token.token_id for token in entry.top] == top.indices.tolist()


def test_many_prompts_pass_a_short_queue() -> None:
    with LLM(dtype="float32", num_threads=1, max_waiting=2, max_running=2) as small:
        results = small.generate(PROMPTS * 2, temperature=0, max_tokens=4, n=2)
        assert [len(result.answers) for result in results] == [2] * 6
        texts = [[answer.text for answer in result.answers] for result in results]
        assert texts[:3] == texts[3:]
        assert is_idle(small)


# -- errors and interrupts ----------------------------------------------------------------------


def test_bad_requests_run_nothing(llm: LLM) -> None:
    with pytest.raises(RequestError, match=r"prompts\[1\]: prompt: it is empty"):
        llm.generate(["fine", ""])
    with pytest.raises(RequestError, match="did you mean 'temperature'"):
        llm.stream("x", temprature=1)
    with pytest.raises(RequestError) as caught:
        llm.generate("x " * 3000)
    assert caught.value.code is ErrorCode.CONTEXT_LENGTH
    assert is_idle(llm)


def test_leaving_a_stream_early_takes_it_out_of_the_engine(llm: LLM) -> None:
    expected = greedy(llm, PROMPTS[0])
    stream = llm.stream(PROMPTS[1], max_tokens=500, ignore_eos=True, n=2)
    next(stream)
    assert not is_idle(llm)
    stream.close()
    assert is_idle(llm)
    assert greedy(llm, PROMPTS[0]) == expected


def test_streams_may_be_interleaved(llm: LLM) -> None:
    given = {"temperature": 0, "max_tokens": 10, "ignore_eos": True}
    expected = [llm.generate(prompt, **given)[0].text for prompt in PROMPTS]
    streams = [llm.stream(prompt, **given) for prompt in PROMPTS]
    texts = ["", "", ""]
    first = next(streams[0])
    texts[0] += first.text
    for index in (2, 1, 0):
        texts[index] += "".join(event.text for event in streams[index])
    assert texts == expected
    assert is_idle(llm)


def test_threads_share_the_engine(llm: LLM) -> None:
    expected = [greedy(llm, prompt) for prompt in PROMPTS]
    found: dict[int, list[int]] = {}

    def work(index: int) -> None:
        found[index] = greedy(llm, PROMPTS[index])

    threads = [threading.Thread(target=work, args=(index,)) for index in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [found[index] for index in range(3)] == expected
    assert is_idle(llm)


@pytest.mark.parametrize("way", ["generate", "stream"])
def test_an_interrupt_leaves_the_llm_usable(
    llm: LLM, way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SIGINT arrives in the middle of a step, where it would do most harm."""
    expected = greedy(llm, PROMPTS[0])
    engine = llm._engine
    assert engine is not None
    schedule = engine.scheduler.schedule
    steps = []

    def interrupted_schedule(now_s: float) -> Any:
        batch = schedule(now_s)
        steps.append(batch)
        if len(steps) == 3:
            os.kill(os.getpid(), signal.SIGINT)
        return batch

    monkeypatch.setattr(engine.scheduler, "schedule", interrupted_schedule)
    given = {"max_tokens": 100, "ignore_eos": True}
    if way == "generate":
        with pytest.raises(KeyboardInterrupt):
            llm.generate(PROMPTS, **given)
    else:
        with pytest.raises(KeyboardInterrupt):
            list(llm.stream(PROMPTS[0], **given))
    assert len(steps) == 3
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert is_idle(llm)
    assert greedy(llm, PROMPTS[0]) == expected


def test_an_engine_error_reaches_the_caller(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = llm._engine
    assert engine is not None
    step = engine.step

    def failing_step() -> list[EngineDelta]:
        failed = {delta.request_id for delta in step()}
        return [
            EngineDelta(request_id=name, finish_reason=FinishReason.ERROR, error="NaN in logits")
            for name in failed
            for _ in engine.abort(name)
        ]

    monkeypatch.setattr(engine, "step", failing_step)
    with pytest.raises(RequestError, match="NaN in logits"):
        llm.generate(PROMPTS)
    monkeypatch.undo()
    assert is_idle(llm)


def test_settings() -> None:
    config = engine_config({"model": "x", "block_tokens": 8, "max_running": 2, "num_threads": 1})
    assert (config.model.model, config.kv.block_tokens) == ("x", 8)
    assert (config.scheduler.max_running, config.experts.num_threads) == (2, 1)
    with pytest.raises(ConfigError, match="did you mean 'block_tokens'"):
        LLM(block_token=8)
    with pytest.raises(ConfigError, match="unknown setting"):
        LLM(zzz=8)


def test_a_closed_llm_says_so() -> None:
    llm = LLM(num_threads=1)
    llm.close()
    llm.close()
    with pytest.raises(MoeserveError, match="closed"):
        llm.generate("x")


# -- the package root ---------------------------------------------------------------------------


def test_importing_moeserve_imports_no_torch() -> None:
    code = (
        "import sys, moeserve; moeserve.SamplingParams; moeserve.Client; "
        "import moeserve.gateway.service; print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def test_the_package_root() -> None:
    assert moeserve.LLM is LLM
    assert moeserve.SamplingParams is SamplingParams
    assert set(dir(moeserve)) == set(moeserve.__all__)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        moeserve.nothing  # noqa: B018
