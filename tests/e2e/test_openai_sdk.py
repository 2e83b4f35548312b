"""The openai SDK against a really started `moeserve serve` with the bundled model."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import openai
import pytest
from server_process import Server, running_server

from moeserve.config import BUNDLED_MODEL

MODEL = BUNDLED_MODEL.name
KEY = "sk-local"
STORY = "Once upon a time, there was a little girl named Lily. She"
PATIENCE_S = 150


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with running_server("--api-key", KEY, "--num-threads", "1") as server:
        yield server


@pytest.fixture
def client(server: Server) -> Iterator[openai.OpenAI]:
    url = f"{server.http}/v1"
    with openai.OpenAI(base_url=url, api_key=KEY, max_retries=0, timeout=PATIENCE_S) as client:
        yield client


def user(text: str) -> Any:
    return [{"role": "user", "content": text}]


def metric(server: Server, name: str) -> float:
    headers = {"authorization": f"Bearer {KEY}"}
    text = httpx.get(f"{server.http}/metrics", headers=headers, timeout=120).text
    [line] = [line for line in text.splitlines() if line.startswith(f"{name} ")]
    return float(line.split()[-1])


def wait_until(condition: Callable[[], bool]) -> None:
    deadline_s = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < deadline_s, "it did not come about"
        time.sleep(0.05)


# -- models ---------------------------------------------------------------------------------------


def test_models(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == [MODEL]
    assert client.models.retrieve(MODEL).owned_by == "moeserve"
    with pytest.raises(openai.NotFoundError) as caught:
        client.models.retrieve("gpt-9")
    assert caught.value.code == "model_not_found"


# -- chat -----------------------------------------------------------------------------------------


def test_chat(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(model=MODEL, messages=user("Hello"), max_tokens=12)
    choice = answer.choices[0]
    assert choice.message.role == "assistant"
    assert choice.message.content
    assert choice.finish_reason in ("stop", "length")
    assert answer.usage is not None
    assert answer.usage.completion_tokens <= 12
    assert answer.usage.prompt_tokens_details is not None
    assert answer._request_id == answer.id


def test_chat_stream(client: openai.OpenAI) -> None:
    seed = random.getrandbits(60)
    params: Any = {"model": MODEL, "messages": user("Hello"), "max_tokens": 24, "seed": seed}
    whole = client.chat.completions.create(**params)
    text, usages, reasons = "", [], []
    options: Any = {"include_usage": True}
    for chunk in client.chat.completions.create(**params, stream=True, stream_options=options):
        usages.append(chunk.usage)
        for choice in chunk.choices:
            text += choice.delta.content or ""
            reasons.append(choice.finish_reason)
    assert text == whole.choices[0].message.content, seed
    assert reasons[-1] == whole.choices[0].finish_reason
    assert usages[:-1] == [None] * (len(usages) - 1)
    assert usages[-1].completion_tokens == whole.usage.completion_tokens
    assert usages[-1].prompt_tokens == whole.usage.prompt_tokens


def test_the_sdks_stream_helper(client: openai.OpenAI) -> None:
    """It rebuilds the whole answer from the chunks and checks them on the way."""
    params: Any = {"model": MODEL, "messages": user("Hello"), "n": 2, "logprobs": True, "seed": 1}
    # It takes an answer cut off by its length for an error, so something must stop this one.
    params |= {"stop": [" "], "max_tokens": 300}
    with client.chat.completions.stream(**params) as stream:
        kinds = {event.type for event in stream}
        final = stream.get_final_completion()
    assert {"chunk", "content.delta", "content.done"} <= kinds
    whole = client.chat.completions.create(**params)
    for mine, theirs in zip(final.choices, whole.choices, strict=True):
        assert mine.message.content == theirs.message.content
        assert mine.logprobs is not None
        assert theirs.logprobs is not None
        assert mine.logprobs.content == theirs.logprobs.content


def test_chat_logprobs(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(
        model=MODEL,
        messages=user("Hello"),
        max_tokens=8,
        temperature=0,
        logprobs=True,
        top_logprobs=5,
    )
    logprobs = answer.choices[0].logprobs
    assert logprobs is not None
    assert logprobs.content
    for entry in logprobs.content:
        assert len(entry.top_logprobs) == 5
        assert entry.logprob == entry.top_logprobs[0].logprob  # greedy takes the most likely
        assert entry.bytes is not None


def test_stop(client: openai.OpenAI) -> None:
    params: Any = {"model": MODEL, "prompt": STORY, "max_tokens": 40, "temperature": 0}
    whole = client.completions.create(**params).choices[0].text
    stop = whole[10:13]
    cut = client.completions.create(**params, stop=[stop]).choices[0]
    assert cut.text == whole[: whole.index(stop)]
    assert cut.finish_reason == "stop"
    streamed = client.completions.create(**params, stop=stop, stream=True)
    assert "".join(chunk.choices[0].text for chunk in streamed) == cut.text


def test_seed(client: openai.OpenAI) -> None:
    def ask(seed: int) -> Any:
        return client.chat.completions.create(
            model=MODEL, messages=user("Hello"), max_tokens=24, temperature=1.5, seed=seed
        )

    seed = random.getrandbits(60)
    first, again, other = ask(seed), ask(seed), ask(seed + 1)
    assert first.choices[0].message.content == again.choices[0].message.content, seed
    assert first.choices[0].message.content != other.choices[0].message.content, seed
    assert first.system_fingerprint == again.system_fingerprint


def test_n(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(
        model=MODEL, messages=user("Hello"), max_tokens=24, temperature=1.5, n=4
    )
    assert [choice.index for choice in answer.choices] == [0, 1, 2, 3]
    assert len({choice.message.content for choice in answer.choices}) == 4


def test_extensions_through_extra_body(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(
        model=MODEL,
        messages=user("Hello"),
        max_completion_tokens=10,
        extra_body={"top_k": 1, "min_p": 0.1, "repetition_penalty": 1.1, "ignore_eos": True},
    )
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 10


# -- legacy completions ---------------------------------------------------------------------------


def test_completions(client: openai.OpenAI) -> None:
    answer = client.completions.create(model=MODEL, prompt=[STORY, "def f("], max_tokens=8, n=2)
    assert [choice.index for choice in answer.choices] == [0, 1, 2, 3]
    assert answer.object == "text_completion"


def test_scoring(client: openai.OpenAI) -> None:
    """As evaluation harnesses do: echo the prompt with its log-probabilities, generate nothing."""
    answer = client.completions.create(
        model=MODEL, prompt=STORY, max_tokens=0, echo=True, logprobs=2
    )
    choice = answer.choices[0]
    assert choice.text == STORY
    logprobs = choice.logprobs
    assert logprobs is not None
    assert "".join(logprobs.tokens or []) == STORY
    assert (logprobs.token_logprobs or [])[0] is None
    assert all(value < 0 for value in (logprobs.token_logprobs or [])[1:])


def test_completions_stream(client: openai.OpenAI) -> None:
    params: Any = {"model": MODEL, "prompt": STORY, "max_tokens": 16, "temperature": 0}
    whole = client.completions.create(**params)
    chunks = list(client.completions.create(**params, stream=True))
    assert "".join(chunk.choices[0].text for chunk in chunks) == whole.choices[0].text
    assert chunks[-1].choices[0].finish_reason == whole.choices[0].finish_reason


# -- leaving early --------------------------------------------------------------------------------


#: Eight answers up to the end of the context: they still run when a slow client leaves them.
LONG: dict[str, Any] = {
    "model": MODEL,
    "prompt": STORY,
    "max_tokens": 900,
    "n": 8,
    "extra_body": {"ignore_eos": True},
}


def test_cancelling_a_stream_frees_the_engine(server: Server, client: openai.OpenAI) -> None:
    wait_until(lambda: metric(server, "moeserve_requests_running") == 0)
    stream = client.completions.create(**LONG, stream=True)
    next(iter(stream))
    stream.close()
    wait_until(lambda: metric(server, "moeserve_requests_running") == 0)
    wait_until(lambda: metric(server, "moeserve_kv_blocks_used") == 0)


def test_cancelling_an_asyncio_task(server: Server) -> None:
    async def run() -> None:
        url = f"{server.http}/v1"
        async with openai.AsyncOpenAI(base_url=url, api_key=KEY, max_retries=0) as client:
            task = asyncio.ensure_future(client.completions.create(**LONG))
            while metric(server, "moeserve_requests_running") == 0:
                await asyncio.sleep(0.05)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task

    asyncio.run(run())
    wait_until(lambda: metric(server, "moeserve_requests_running") == 0)
    wait_until(lambda: metric(server, "moeserve_kv_blocks_used") == 0)


def test_a_client_that_gives_up_waiting(server: Server, client: openai.OpenAI) -> None:
    with pytest.raises(openai.APITimeoutError):
        client.with_options(timeout=0.3).completions.create(**LONG)
    wait_until(lambda: metric(server, "moeserve_kv_blocks_used") == 0)


def test_many_at_once(server: Server) -> None:
    """Each gets its own answer: the one it gets alone."""
    prompts = [f"{STORY} saw {number} birds." for number in range(12)]

    async def run() -> tuple[list[str], list[str]]:
        url = f"{server.http}/v1"
        async with openai.AsyncOpenAI(base_url=url, api_key=KEY, max_retries=0) as client:

            async def ask(prompt: str) -> str:
                answer = await client.completions.create(
                    model=MODEL, prompt=prompt, max_tokens=12, temperature=0
                )
                return answer.choices[0].text

            together = await asyncio.gather(*map(ask, prompts))
            return together, [await ask(prompt) for prompt in prompts]

    together, alone = asyncio.run(run())
    assert together == alone


# -- errors ---------------------------------------------------------------------------------------


def test_wrong_key(server: Server) -> None:
    with openai.OpenAI(base_url=f"{server.http}/v1", api_key="wrong", max_retries=0) as client:
        with pytest.raises(openai.AuthenticationError):
            client.models.list()
        with pytest.raises(openai.AuthenticationError):
            client.chat.completions.create(model=MODEL, messages=user("a"), stream=True)


@pytest.mark.parametrize("stream", [False, True])
def test_unknown_model(client: openai.OpenAI, stream: bool) -> None:
    with pytest.raises(openai.NotFoundError, match=MODEL):
        client.chat.completions.create(model="gpt-9", messages=user("a"), stream=stream)


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"temperature": -1}, "temperature"),
        ({"n": 10_000}, "n"),
        ({"max_tokens": 10**9}, "max_tokens"),
        ({"messages": []}, "messages"),
        ({"tools": [{"type": "function", "function": {"name": "f"}}]}, "tools"),
        ({"extra_body": {"temprature": 1}}, "temprature"),
        ({"extra_body": {"guided_json": {}}}, "guided_json"),
    ],
)
def test_bad_requests(client: openai.OpenAI, fields: Any, param: str) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(**{"model": MODEL, "messages": user("a"), **fields})
    assert caught.value.param == param
    assert caught.value.type == "invalid_request_error"
    assert caught.value.body


@pytest.mark.parametrize("stream", [False, True])
def test_a_prompt_beyond_the_context(client: openai.OpenAI, stream: bool) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        client.completions.create(model=MODEL, prompt="word " * 5000, stream=stream)
    assert caught.value.code == "context_length_exceeded"


def test_an_unknown_route(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError):
        client.embeddings.create(model=MODEL, input="a")
