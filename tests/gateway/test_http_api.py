"""The OpenAI routes of a real server with the bundled model: shapes, numbers against oracles."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
import torch
import transformers
from support.http_servers import events_of, real_server

from moeserve.config import BUNDLED_MODEL

STORY = "Once upon a time, there was a little dog named Max. He liked to play in the park"
MODEL = BUNDLED_MODEL.name


@pytest.fixture(scope="module")
def client() -> Iterator[httpx.Client]:
    with real_server("--num-threads", "1") as client:
        yield client


@pytest.fixture(scope="module")
def reference() -> Any:
    """The same checkpoint in transformers."""
    model = transformers.AutoModelForCausalLM.from_pretrained(BUNDLED_MODEL, dtype=torch.float32)
    return model.eval()


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return transformers.AutoTokenizer.from_pretrained(BUNDLED_MODEL)


def post(client: httpx.Client, path: str, **body: Any) -> Any:
    response = client.post(path, json=body)
    assert response.status_code == 200, response.text
    return response.json()


def complete(client: httpx.Client, **body: Any) -> Any:
    return post(client, "/v1/completions", **body)


def chat(client: httpx.Client, text: str = "Tell me a story.", **body: Any) -> Any:
    messages = [{"role": "user", "content": text}]
    return post(client, "/v1/chat/completions", messages=messages, **body)


def reference_logprobs(reference: Any, token_ids: list[int]) -> torch.Tensor:
    """[T-1, V]: log P(token t+1 | tokens up to t)."""
    with torch.no_grad():
        logits = reference(torch.tensor([token_ids])).logits[0, :-1]
    return torch.log_softmax(logits.double(), -1)


def test_models(client: httpx.Client) -> None:
    listed = client.get("/v1/models").json()
    assert listed["object"] == "list"
    [model] = listed["data"]
    assert (model["id"], model["object"]) == (MODEL, "model")
    assert client.get(f"/v1/models/{MODEL}").json() == model
    assert client.get("/health").json()["status"] == "ready"
    assert client.head("/health").status_code == 200


def test_chat_completion_has_the_documented_shape(client: httpx.Client) -> None:
    answer = chat(client, model=MODEL, max_completion_tokens=12, temperature=0)
    assert answer["object"] == "chat.completion"
    assert answer["id"].startswith("chatcmpl-")
    assert answer["model"] == MODEL
    assert answer["system_fingerprint"].startswith("fp_")
    [choice] = answer["choices"]
    assert choice["message"]["role"] == "assistant"
    assert choice["finish_reason"] in ("stop", "length")
    usage = answer["usage"]
    assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]
    assert usage["completion_tokens"] <= 12


def test_greedy_completion_is_that_of_transformers(
    client: httpx.Client, reference: Any, tokenizer: Any
) -> None:
    ids = tokenizer(STORY)["input_ids"]
    expected = reference.generate(
        torch.tensor([ids]), max_new_tokens=24, do_sample=False, temperature=None, top_p=None
    )[0, len(ids) :]
    answer = complete(client, prompt=STORY, max_tokens=24, temperature=0, top_p=1)
    assert answer["choices"][0]["text"] == tokenizer.decode(expected, skip_special_tokens=True)


@pytest.mark.parametrize("include_usage", [False, True])
def test_stream_says_the_same_as_the_whole(client: httpx.Client, include_usage: bool) -> None:
    body: dict[str, Any] = {"prompt": STORY, "max_tokens": 20, "seed": random.getrandbits(60)}
    whole = complete(client, **body)
    options = {"stream_options": {"include_usage": include_usage}}
    with client.stream("POST", "/v1/completions", json={**body, "stream": True, **options}) as r:
        assert r.status_code == 200
        assert r.headers["content-type"].startswith("text/event-stream")
        events = events_of(r)
    parts = [event for event in events if event["choices"]]
    text = "".join(event["choices"][0]["text"] for event in parts)
    assert text == whole["choices"][0]["text"], body
    reasons = [event["choices"][0]["finish_reason"] for event in parts]
    assert reasons[:-1] == [None] * (len(reasons) - 1)
    assert reasons[-1] == whole["choices"][0]["finish_reason"]
    if include_usage:
        assert events[-1]["choices"] == []
        got = events[-1]["usage"]
        assert got["completion_tokens"] == whole["usage"]["completion_tokens"]
        assert all(event["usage"] is None for event in parts)
    else:
        assert len(parts) == len(events)
        assert all("usage" not in event for event in events)


def test_chat_stream(client: httpx.Client) -> None:
    seed = random.getrandbits(60)
    whole = chat(client, seed=seed, max_tokens=20, n=2)
    body = {"messages": [{"role": "user", "content": "Tell me a story."}], "stream": True}
    body |= {"seed": seed, "max_tokens": 20, "n": 2}
    with client.stream("POST", "/v1/chat/completions", json=body) as response:
        events = events_of(response)
    assert {event["object"] for event in events} == {"chat.completion.chunk"}
    assert len({event["id"] for event in events}) == 1
    for index in range(2):
        mine = [e["choices"][0] for e in events if e["choices"][0]["index"] == index]
        assert mine[0]["delta"] == {"role": "assistant", "content": ""}
        assert mine[-1]["delta"] == {}
        assert mine[-1]["finish_reason"] == whole["choices"][index]["finish_reason"]
        text = "".join(choice["delta"].get("content", "") for choice in mine)
        assert text == whole["choices"][index]["message"]["content"], seed


def test_prompt_forms_agree(client: httpx.Client, tokenizer: Any) -> None:
    texts = [STORY, "def main(", "ROMEO:"]
    ids = [tokenizer(text)["input_ids"] for text in texts]
    params: dict[str, Any] = {"max_tokens": 8, "temperature": 0}
    single = [complete(client, prompt=t, **params)["choices"][0]["text"] for t in texts]
    by_ids = [complete(client, prompt=i, **params)["choices"][0]["text"] for i in ids]
    many = complete(client, prompt=texts, **params)["choices"]
    many_ids = complete(client, prompt=ids, **params)["choices"]
    assert single == by_ids
    assert [choice["index"] for choice in many] == [0, 1, 2]
    assert [choice["text"] for choice in many] == single
    assert [choice["text"] for choice in many_ids] == single


def test_choices_of_many_prompts_are_grouped_by_prompt(client: httpx.Client) -> None:
    params: dict[str, Any] = {"max_tokens": 6, "seed": 5, "n": 2}
    many = complete(client, prompt=[STORY, "ROMEO:"], **params)
    alone = [complete(client, prompt=p, **params)["choices"] for p in (STORY, "ROMEO:")]
    assert [c["index"] for c in many["choices"]] == [0, 1, 2, 3]
    assert [c["text"] for c in many["choices"]] == [c["text"] for group in alone for c in group]


@pytest.mark.parametrize("max_tokens", [0, 1])
def test_echo_scores_the_prompt_like_transformers(
    client: httpx.Client, reference: Any, tokenizer: Any, max_tokens: int
) -> None:
    rng = random.Random(seed := random.getrandbits(32))
    ids = [rng.randrange(4, len(tokenizer)) for _ in range(rng.randrange(2, 60))]
    params = {"echo": True, "logprobs": 3, "temperature": 0, "max_tokens": max_tokens}
    answer = complete(client, prompt=ids, **params)
    [choice] = answer["choices"]
    logprobs = choice["logprobs"]
    lists = [logprobs[key] for key in ("tokens", "token_logprobs", "top_logprobs", "text_offset")]
    assert {len(item) for item in lists} == {len(ids) + max_tokens}
    assert logprobs["token_logprobs"][0] is None
    expected = reference_logprobs(reference, ids)
    for position in range(1, len(ids)):
        row = expected[position - 1]
        got = logprobs["token_logprobs"][position]
        assert got == pytest.approx(float(row[ids[position]]), abs=1e-3), f"seed {seed}"
        top = sorted(logprobs["top_logprobs"][position].values(), reverse=True)
        best = row.topk(len(top)).values
        assert top[0] == pytest.approx(float(best[0]), abs=1e-3), f"seed {seed}"
    assert answer["usage"]["completion_tokens"] == max_tokens
    assert choice["finish_reason"] == "length"


def test_offsets_point_at_the_tokens_of_the_text(client: httpx.Client) -> None:
    answer = complete(client, prompt=STORY, echo=True, logprobs=0, max_tokens=12, temperature=0)
    [choice] = answer["choices"]
    assert choice["text"].startswith(STORY)
    logprobs = choice["logprobs"]
    for token, offset in zip(logprobs["tokens"], logprobs["text_offset"], strict=True):
        if not token.startswith("bytes:"):
            assert choice["text"][offset:].startswith(token)


def test_streamed_echo_adds_up(client: httpx.Client) -> None:
    body = {"prompt": STORY, "echo": True, "logprobs": 1, "max_tokens": 6, "temperature": 0}
    whole = complete(client, **body)["choices"][0]
    with client.stream("POST", "/v1/completions", json={**body, "stream": True}) as response:
        parts = [event["choices"][0] for event in events_of(response)]
    assert "".join(part["text"] for part in parts) == whole["text"]
    tokens = [token for part in parts for token in part["logprobs"]["tokens"]]
    assert tokens == whole["logprobs"]["tokens"]
    offsets = [offset for part in parts for offset in part["logprobs"]["text_offset"]]
    assert offsets == whole["logprobs"]["text_offset"]


def test_every_answer_echoes_the_scored_prompt(client: httpx.Client) -> None:
    params: dict[str, Any] = {"prompt": STORY, "echo": True, "logprobs": 0, "max_tokens": 2}
    first, second = complete(client, **params, n=2)["choices"]
    for key in ("tokens", "token_logprobs", "text_offset"):
        assert first["logprobs"][key][:-2] == second["logprobs"][key][:-2]
    assert first["text"].startswith(STORY)
    assert second["text"].startswith(STORY)


def test_prompt_logprobs_extension_agrees_with_echo(client: httpx.Client, tokenizer: Any) -> None:
    ids = tokenizer(STORY)["input_ids"]
    echoed = complete(client, prompt=ids, echo=True, logprobs=2, max_tokens=0)["choices"][0]
    scored = complete(client, prompt=ids, prompt_logprobs=2, max_tokens=1)["choices"][0]
    assert scored["prompt_logprobs"][0] is None
    for position in range(1, len(ids)):
        entry = scored["prompt_logprobs"][position][str(ids[position])]
        expected = echoed["logprobs"]["token_logprobs"][position]
        assert entry["logprob"] == pytest.approx(expected, abs=1e-5)
    ranks = [e[str(i)]["rank"] for i, e in zip(ids[1:], scored["prompt_logprobs"][1:], strict=True)]
    assert min(ranks) >= 1


def test_chat_logprobs_spell_the_answer(client: httpx.Client) -> None:
    answer = chat(client, logprobs=True, top_logprobs=4, max_tokens=16, seed=3, ignore_eos=True)
    [choice] = answer["choices"]
    content = choice["logprobs"]["content"]
    assert len(content) == 16
    spelled = b"".join(bytes(entry["bytes"]) for entry in content)
    assert spelled.decode("utf-8", "replace") == choice["message"]["content"]
    for entry in content:
        assert len(entry["top_logprobs"]) == 4
        values = [top["logprob"] for top in entry["top_logprobs"]]
        assert values == sorted(values, reverse=True)
        assert entry["logprob"] <= values[0] <= 0


def test_chat_without_top_logprobs(client: httpx.Client) -> None:
    answer = chat(client, logprobs=True, max_tokens=3)
    assert all(not e["top_logprobs"] for e in answer["choices"][0]["logprobs"]["content"])
    assert chat(client, max_tokens=1)["choices"][0]["logprobs"] is None


def test_stop_strings(client: httpx.Client) -> None:
    params: dict[str, Any] = {"prompt": STORY, "temperature": 0, "max_tokens": 40}
    whole = complete(client, **params)["choices"][0]["text"]
    stop = whole[len(whole) // 2 :][:4]
    cut = complete(client, **params, stop=[stop, "never in there"])["choices"][0]
    assert cut["text"] == whole[: whole.index(stop)]
    assert (cut["finish_reason"], cut["stop_reason"]) == ("stop", stop)
    kept = complete(client, **params, stop=stop, include_stop_str_in_output=True)["choices"][0]
    assert kept["text"] == whole[: whole.index(stop) + len(stop)]


def test_stop_token_ids_and_min_tokens(client: httpx.Client, tokenizer: Any) -> None:
    params: dict[str, Any] = {"prompt": STORY, "temperature": 0, "max_tokens": 20}
    whole = complete(client, **params, logprobs=0)["choices"][0]
    stop = tokenizer.convert_tokens_to_ids(tokenizer.tokenize(whole["logprobs"]["tokens"][5])[-1])
    cut = complete(client, **params, stop_token_ids=[stop])
    assert cut["choices"][0]["finish_reason"] == "stop"
    assert cut["choices"][0]["stop_reason"] == stop
    assert cut["usage"]["completion_tokens"] <= 6
    longer = complete(client, **params, stop_token_ids=[stop], min_tokens=20)
    assert longer["usage"]["completion_tokens"] == 20


def test_seed_and_n(client: httpx.Client) -> None:
    seed = random.getrandbits(60)
    params: dict[str, Any] = {"prompt": STORY, "max_tokens": 16, "temperature": 1}
    both = complete(client, **params, seed=seed, n=2)["choices"]
    alone = [complete(client, **params, seed=seed + i)["choices"][0]["text"] for i in range(2)]
    assert [choice["text"] for choice in both] == alone, seed
    assert complete(client, **params, seed=seed)["choices"][0]["text"] == alone[0], seed
    assert both[0]["text"] != both[1]["text"], seed


def test_logit_bias_decides(client: httpx.Client, tokenizer: Any) -> None:
    [token] = tokenizer(" the")["input_ids"]
    answer = complete(client, prompt=STORY, max_tokens=3, logit_bias={str(token): 100})
    assert answer["choices"][0]["text"] == " the the the"


def test_usage_counts_reused_prompt_tokens(client: httpx.Client) -> None:
    prompt = f"{random.getrandbits(64)} " * 8  # a prefix nobody sent before
    first, second = (complete(client, prompt=prompt, max_tokens=1)["usage"] for _ in range(2))
    assert first["prompt_tokens_details"]["cached_tokens"] == 0
    cached = second["prompt_tokens_details"]["cached_tokens"]
    assert 0 < cached < second["prompt_tokens"]


def test_defaults_differ_between_the_routes(client: httpx.Client) -> None:
    legacy = complete(client, prompt=STORY, ignore_eos=True)
    assert legacy["usage"]["completion_tokens"] == 16
    # A chat may go on to the end of the context.
    context = client.get("/v1/models").json()["data"][0]["max_model_len"]
    usage = chat(client, "the " * (context - 80), ignore_eos=True)["usage"]
    assert usage["total_tokens"] == context
    assert usage["completion_tokens"] > 16


def test_tokenize_and_back(client: httpx.Client, tokenizer: Any) -> None:
    text = "Äpfel & 東京 🙂 def f(x):\n\treturn x"
    got = post(client, "/tokenize", prompt=text, return_token_strs=True)
    assert got["tokens"] == tokenizer(text)["input_ids"]
    assert got["count"] == len(got["tokens"]) == len(got["token_strs"])
    assert post(client, "/detokenize", tokens=got["tokens"])["prompt"] == text


def test_messages_are_rendered_by_the_chat_template(client: httpx.Client, tokenizer: Any) -> None:
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi\nyou"}]
    expected = tokenizer.apply_chat_template(
        messages, add_generation_prompt=True, return_dict=True
    )["input_ids"]
    assert post(client, "/tokenize", messages=messages)["tokens"] == expected
    parts = [
        {"role": "developer", "content": [{"type": "text", "text": "Be brief."}]},
        {"role": "user", "content": [{"type": "text", "text": x} for x in ("Hi", "you")]},
    ]
    assert post(client, "/tokenize", messages=parts)["tokens"] == expected
    usage = post(client, "/v1/chat/completions", messages=messages, max_tokens=1)["usage"]
    assert usage["prompt_tokens"] == len(expected)


def test_an_answer_can_be_sent_back(client: httpx.Client) -> None:
    """SDKs repeat the whole message object, with its empty fields."""
    message = chat(client, max_tokens=4)["choices"][0]["message"]
    message |= {"annotations": [], "audio": None, "function_call": None, "tool_calls": None}
    messages = [{"role": "user", "content": "a"}, message, {"role": "user", "content": "b"}]
    post(client, "/v1/chat/completions", messages=messages, max_tokens=1)


def test_fields_without_effect_are_accepted(client: httpx.Client) -> None:
    neutral: dict[str, Any] = {
        "user": "u",
        "metadata": {"a": "b"},
        "store": True,
        "tools": [],
        "tool_choice": "none",
        "response_format": {"type": "text"},
        "parallel_tool_calls": True,
        "modalities": ["text"],
        "service_tier": "auto",
        "prompt_cache_key": "k",
        "safety_identifier": "s",
        "audio": None,
        "reasoning_effort": None,
        "logit_bias": None,
        "stop": None,
    }
    chat(client, max_tokens=1, **neutral)
    complete(client, prompt="a", max_tokens=1, suffix=None, best_of=1, user="u")


def test_extreme_numbers_pass_every_wire(client: httpx.Client) -> None:
    for extreme in (-(2**63), 2**63 - 1):
        complete(client, prompt="a", max_tokens=1, seed=extreme, priority=extreme, n=2)
    complete(client, prompt="a", max_tokens=1, top_k=2**63 - 1, temperature=1e-300)
    complete(client, prompt="a", max_tokens=1, temperature=100, min_p=1, repetition_penalty=1e-300)


def test_openapi_describes_the_bodies(client: httpx.Client) -> None:
    described = client.get("/openapi.json").json()
    for path, name in (
        ("/v1/chat/completions", "ChatRequest"),
        ("/v1/completions", "CompletionRequest"),
    ):
        body = described["paths"][path]["post"]["requestBody"]["content"]["application/json"]
        assert body["schema"]["$ref"].endswith(name)
        assert "max_tokens" in described["components"]["schemas"][name]["properties"]
