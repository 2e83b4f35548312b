"""What is refused, with which words, and what a good request becomes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import msgspec
import pytest
import text_models

from moeserve.core import ErrorCode, ModelError, ModelInfo, RequestError, SamplingParams
from moeserve.text.assets import TextAssets, load_defaults
from moeserve.text.prepare import prepare
from moeserve.text.request import GenerateRequest, PreparedRequest, RequestLimits

TEMPLATE = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
CONTEXT = 100


@pytest.fixture(scope="module")
def assets(tmp_path_factory: pytest.TempPathFactory) -> Any:
    path = text_models.byte_level(tmp_path_factory.mktemp("model"), add_bos=True)
    (path / "chat_template.jinja").write_text(TEMPLATE)
    loaded = TextAssets.load(path)
    yield loaded
    loaded.close()


def info(vocab_size: int = 420, context_tokens: int = CONTEXT) -> ModelInfo:
    return ModelInfo(
        name="tiny", model_type="x", path="", vocab_size=vocab_size,
        context_tokens=context_tokens, eos_token_ids=(1,), num_parameters=1, num_layers=1,
        num_moe_layers=1, num_experts=2, dtype="float32", device="cpu", kv_blocks=9, block_tokens=4,
    )  # fmt: skip


def run(assets: TextAssets, limits: RequestLimits | None = None, **fields: Any) -> PreparedRequest:
    if not fields.keys() & {"prompt", "token_ids", "messages"}:
        fields["prompt"] = "Once upon a time"
    params = fields.pop("params", {})
    request = GenerateRequest(request_id="r", params=params, **fields)
    return prepare(request, assets, info(), limits or RequestLimits(max_n=4, max_tokens_cap=50))


INVALID, TOO_LONG = ErrorCode.INVALID, ErrorCode.CONTEXT_LENGTH
LONG = "fox " * 200
BAD: list[tuple[dict[str, Any], str, str, ErrorCode]] = [
    ({"prompt": ""}, "prompt", "prompt: it is empty", INVALID),
    ({"prompt": 5}, "prompt", "prompt: int 5 is no text", INVALID),
    ({"prompt": "a\ud800b"}, "prompt", "U+D800 at character 1", INVALID),
    ({"prompt": b"ab\xffc"}, "prompt", "byte 0xff at position 2", INVALID),
    ({"prompt": LONG}, "prompt", "this model's context holds 100", TOO_LONG),
    ({"prompt": "a", "token_ids": [1]}, "token_ids", "exactly one of", INVALID),
    ({"prompt": None}, "prompt", "got none of them", INVALID),
    ({"token_ids": []}, "token_ids", "it has no tokens", INVALID),
    ({"token_ids": "abc"}, "token_ids", "is no list of ids", INVALID),
    ({"token_ids": [1, "a"]}, "token_ids", "token_ids[1]: str 'a'", INVALID),
    ({"token_ids": [1, True]}, "token_ids", "bool True", INVALID),
    ({"token_ids": [1, 1.5]}, "token_ids", "float 1.5", INVALID),
    ({"token_ids": [1, 420]}, "token_ids", "id 420 (entry 1)", INVALID),
    ({"token_ids": [1, -1]}, "token_ids", "allowed: 0 to 419", INVALID),
    ({"token_ids": [1] * 101}, "token_ids", "101 tokens", TOO_LONG),
    ({"token_ids": [1] * 100}, "prompt", "no room for an answer", TOO_LONG),
    ({"messages": []}, "messages", "it is empty", INVALID),
    ({"messages": "hi"}, "messages", "is no list", INVALID),
    ({"messages": [5]}, "messages[0]", "int 5 is no object", INVALID),
    ({"messages": [{"content": "x"}]}, "messages[0].role", "null is no role", INVALID),
    (
        {"messages": [{"role": "x", "content": "x"}]},
        "messages[0].role",
        "'x' is not known",
        INVALID,
    ),
    ({"messages": [{"role": "user"}]}, "messages[0].content", "null is no text", INVALID),
    (
        {"messages": [{"role": "user", "content": "\udfff"}]},
        "messages[0].content",
        "U+DFFF",
        INVALID,
    ),
    (
        {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
        "messages[0].content",
        "only parts of type 'text'",
        INVALID,
    ),
    ({"model": "gpt-5"}, "model", "this server has 'tiny'", ErrorCode.UNKNOWN_MODEL),
    ({"priority": 2**70}, "priority", "no 64-bit integer", INVALID),
    ({"params": {"temprature": 1}}, "temprature", "did you mean 'temperature'?", INVALID),
    ({"params": {"zzz": 1}}, "zzz", "unknown field (known: ", INVALID),
    ({"params": {"temperature": "hot"}}, "temperature", "str 'hot': Expected `float`", INVALID),
    ({"params": {"temperature": True}}, "temperature", "bool True", INVALID),
    ({"params": {"temperature": -1}}, "temperature", "allowed: 0 to 100", INVALID),
    ({"params": {"temperature": float("nan")}}, "temperature", "nan is out of range", INVALID),
    ({"params": {"temperature": 10**400}}, "temperature", "no 64-bit integer", INVALID),
    ({"params": {"top_k": 2**64}}, "top_k", "no 64-bit integer", INVALID),
    ({"params": {"top_k": 1.5}}, "top_k", "float 1.5", INVALID),
    ({"params": {"n": 0}}, "n", "allowed: 1 to 4", INVALID),
    ({"params": {"n": 5}}, "n", "5 is out of range", INVALID),
    ({"params": {"n": "2"}}, "n", "str '2'", INVALID),
    ({"params": {"stop": ""}}, "stop", "stop[0]: 0 characters", INVALID),
    ({"params": {"stop": ["a", "b" * 257]}}, "stop", "stop[1]: 257 characters", INVALID),
    ({"params": {"stop": ["a"] * 17}}, "stop", "17 strings, at most 16", INVALID),
    ({"params": {"stop": [5]}}, "stop", "Expected `str`", INVALID),
    ({"params": {"max_tokens": 51}}, "max_tokens", "above the limit of 50", INVALID),
    ({"params": {"max_tokens": -1}}, "max_tokens", "0 or more", INVALID),
    (
        {"token_ids": [1] * 60, "params": {"max_tokens": 41}},
        "max_tokens",
        "at most 40 fit",
        TOO_LONG,
    ),
    ({"params": {"min_tokens": 51}}, "min_tokens", "0 to max_tokens (50)", INVALID),
    ({"params": {"logprobs": 21}}, "logprobs", "0 to 20", INVALID),
    ({"params": {"stop_token_ids": [420]}}, "stop_token_ids", "outside the vocabulary", INVALID),
    ({"params": {"logit_bias": {"420": 1}}}, "logit_bias", "outside the vocabulary", INVALID),
    ({"params": {"logit_bias": {"x": 1}}}, "logit_bias", "logit_bias: dict", INVALID),
    ({"params": {"logit_bias": {"1": 101}}}, "logit_bias", "-100 to 100", INVALID),
    ({"params": {"seed": 2**63}}, "seed", "64-bit", INVALID),
]


@pytest.mark.parametrize(("fields", "field", "words", "code"), BAD, ids=lambda v: str(v)[:40])
def test_refused(
    assets: TextAssets, fields: dict[str, Any], field: str, words: str, code: ErrorCode
) -> None:
    with pytest.raises(RequestError) as caught:
        run(assets, **fields)
    assert words in str(caught.value)
    assert (caught.value.field, caught.value.code) == (field, code)
    assert len(str(caught.value)) < 600


def test_a_text_prompt(assets: TextAssets) -> None:
    prepared = run(assets, params={"stop": "x", "include_stop": True, "temperature": None})
    tokens = assets.tokenizer.encode("Once upon a time")
    assert prepared.prompt_token_ids == tokens
    assert prepared.prompt == "Once upon a time"
    (request,) = prepared.engine_requests
    assert request.request_id == "r/0"
    assert request.params == SamplingParams(max_tokens=50)  # the cap is below the default
    assert prepared.stop == ("x",)
    assert (prepared.include_stop, prepared.skip_special_tokens) == (True, True)
    bare = run(assets, add_special_tokens=False)
    assert bare.prompt_token_ids == tokens[1:]
    assert run(assets, prompt="Größe".encode()).prompt == "Größe"


def test_a_conversation(assets: TextAssets) -> None:
    chat = [
        {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
        {"role": "assistant", "content": "c", "name": None},
    ]
    prepared = run(assets, messages=chat)
    expected = assets.tokenizer.encode("<user>a\nb<assistant>c", add_special_tokens=False)
    assert prepared.prompt_token_ids == expected
    assert prepared.prompt is None
    without = TextAssets(assets.tokenizer, None, {})
    with pytest.raises(RequestError, match="no chat template"):
        run(without, messages=chat)


@pytest.mark.parametrize("seed", [7, 2**63 - 1, None])
def test_answers_fan_out(assets: TextAssets, seed: int | None) -> None:
    prepared = run(assets, params={"n": 3, "seed": seed, "prompt_logprobs": 2}, priority=-1)
    requests = prepared.engine_requests
    assert [r.request_id for r in requests] == ["r/0", "r/1", "r/2"]
    assert {r.priority for r in requests} == {-1}
    assert [r.params.prompt_logprobs for r in requests] == [2, None, None]
    seeds = [r.params.seed for r in requests]
    if seed is None:
        assert seeds == [None] * 3
    else:
        assert seeds[0] == seed
        assert [(s - seed) % 2**64 for s in seeds if s is not None] == [0, 1, 2]
    assert all(msgspec.msgpack.encode(r) for r in requests)  # fits the wire


def test_max_tokens_default(assets: TextAssets) -> None:
    unlimited = RequestLimits()

    def default(num_prompt: int, limits: RequestLimits = unlimited, **params: Any) -> int:
        prepared = run(assets, limits, token_ids=[5] * num_prompt, params=params)
        return prepared.engine_requests[0].params.max_tokens

    assert default(30) == CONTEXT - 30
    assert default(30, RequestLimits(default_max_tokens=16)) == 16
    assert default(30, RequestLimits(max_tokens_cap=20)) == 20
    assert default(30, RequestLimits(default_max_tokens=16), min_tokens=18) == 18
    assert default(100, max_tokens=0) == 0
    assert default(60, max_tokens=40) == 40


def test_defaults_of_the_model(assets: TextAssets, tmp_path: Path) -> None:
    file = tmp_path / "generation_config.json"
    assert load_defaults(tmp_path) == {}
    file.write_text(
        json.dumps({"temperature": 0.6, "top_k": 20, "top_p": None, "max_new_tokens": 9, "x": 1})
    )
    defaults = load_defaults(tmp_path)
    assert defaults == {"temperature": 0.6, "top_k": 20, "max_tokens": 9}
    model = TextAssets(assets.tokenizer, None, defaults)
    params = run(model, params={"top_k": 0, "temperature": None}).engine_requests[0].params
    assert (params.temperature, params.top_k, params.top_p, params.max_tokens) == (0.6, 0, 1.0, 9)
    for broken in ({"temperature": -1}, {"top_p": "x"}, {"top_k": 1.5}):
        file.write_text(json.dumps(broken))
        with pytest.raises(ModelError, match=r"generation_config\.json"):
            load_defaults(tmp_path)
