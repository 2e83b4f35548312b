"""Checks a request and makes of it what the engine runs: GenerateRequest to PreparedRequest."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from typing import Any

import msgspec

from moeserve.core import (
    EngineRequest,
    ErrorCode,
    ModelInfo,
    RequestError,
    SamplingParams,
    unknown_fields,
)
from moeserve.text.assets import TextAssets
from moeserve.text.checks import check_text, shown
from moeserve.text.conversation import check_messages
from moeserve.text.request import GenerateRequest, PreparedRequest, RequestLimits

SAMPLING_TYPES: dict[str, Any] = {
    field.name: field.type for field in msgspec.structs.fields(SamplingParams)
}
TEXT_TYPES: dict[str, Any] = {
    "n": int,
    "stop": str | list[str],
    "include_stop": bool,
    "skip_special_tokens": bool,
}


def prepare(
    request: GenerateRequest, assets: TextAssets, info: ModelInfo, limits: RequestLimits
) -> PreparedRequest:
    """Checks everything a client can get wrong.

    Raises RequestError naming the field, the value, the limit and the fix; its code is
    UNKNOWN_MODEL, CONTEXT_LENGTH or INVALID.
    """
    if request.model is not None and request.model != info.name:
        raise RequestError(
            f"model: {shown(request.model)} is not served here; this server has {info.name!r}",
            code=ErrorCode.UNKNOWN_MODEL,
            field="model",
        )
    given = _convert_params(request.params)
    stop = _check_stop(given.pop("stop", []), limits)
    n = given.pop("n", 1)
    if not 1 <= n <= limits.max_n:
        raise RequestError(f"n: {n} is out of range; allowed: 1 to {limits.max_n}", field="n")
    include_stop = given.pop("include_stop", False)
    skip_special_tokens = given.pop("skip_special_tokens", True)
    _check_range("priority", request.priority)
    prompt, token_ids = _prompt_ids(request, assets, info)
    given["max_tokens"] = _max_tokens(given, assets, info, limits, len(token_ids))
    params = SamplingParams(**{**assets.defaults, **given})
    _check_ids("stop_token_ids", params.stop_token_ids, info.vocab_size)
    _check_ids("logit_bias", tuple(params.logit_bias), info.vocab_size)
    return PreparedRequest(
        request_id=request.request_id,
        prompt=prompt,
        prompt_token_ids=token_ids,
        engine_requests=tuple(
            EngineRequest(
                request_id=f"{request.request_id}/{index}",
                token_ids=token_ids,
                params=_answer_params(params, index),
                priority=request.priority,
                deadline_s=request.deadline_s,
            )
            for index in range(n)
        ),
        stop=stop,
        include_stop=include_stop,
        skip_special_tokens=skip_special_tokens,
        received_s=request.received_s,
    )


def _answer_params(params: SamplingParams, index: int) -> SamplingParams:
    """Answer 0 has the request's own seed, answer i the seed + i (as a signed 64-bit number).

    Only answer 0 scores the prompt: the others would compute the same numbers again.
    """
    if index == 0:
        return params
    seed = params.seed
    if seed is not None:
        seed = (seed + index + 2**63) % 2**64 - 2**63
    return msgspec.structs.replace(params, seed=seed, prompt_logprobs=None)


# -- parameters ---------------------------------------------------------------------------------


def _convert_params(params: Mapping[str, object]) -> dict[str, Any]:
    """The parameters the client gave, with the right types. None means not given."""
    known = SAMPLING_TYPES | TEXT_TYPES
    unknown = unknown_fields(params, set(known))
    if unknown:
        name = unknown[0]
        near = difflib.get_close_matches(name, known, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(sorted(known))}"
        raise RequestError(f"{name}: unknown field", field=name, hint=hint)
    return {
        name: _convert(name, value, known[name])
        for name, value in params.items()
        if value is not None
    }


def _convert(name: str, value: object, wanted: Any) -> Any:
    if wanted is int and isinstance(value, float) and value.is_integer():
        value = int(value)  # JSON has one kind of number; some clients write 16.0
    if isinstance(value, int):
        _check_range(name, value)
    try:
        return msgspec.convert(value, wanted, str_keys=True)
    except msgspec.ValidationError as error:
        raise RequestError(f"{name}: {shown(value)}: {error}", field=name) from error


def _check_range(name: str, value: int) -> None:
    if not -(2**63) <= value < 2**63:  # what the wire to the engine can hold
        raise RequestError(f"{name}: {shown(value)} is no 64-bit integer", field=name)


def _check_stop(stop: str | list[str], limits: RequestLimits) -> tuple[str, ...]:
    strings = (stop,) if isinstance(stop, str) else tuple(stop)
    if len(strings) > limits.max_stop_strings:
        raise RequestError(
            f"stop: {len(strings)} strings, at most {limits.max_stop_strings}", field="stop"
        )
    for index, string in enumerate(strings):
        if not 1 <= len(string) <= limits.max_stop_chars:
            raise RequestError(
                f"stop[{index}]: {len(string)} characters; allowed: 1 to {limits.max_stop_chars}",
                field="stop",
            )
    return strings


def _max_tokens(
    given: Mapping[str, Any],
    assets: TextAssets,
    info: ModelInfo,
    limits: RequestLimits,
    num_prompt_tokens: int,
) -> int:
    """What the client asked for, or a default that fits. Raises RequestError if it cannot fit."""
    cap = limits.max_tokens_cap
    room = info.context_tokens - num_prompt_tokens
    if "max_tokens" not in given:
        default = assets.defaults.get("max_tokens", limits.default_max_tokens)
        if room < 1:
            raise RequestError(
                f"prompt: {num_prompt_tokens} tokens leave no room for an answer in a context of "
                f"{info.context_tokens}",
                code=ErrorCode.CONTEXT_LENGTH,
                field="prompt",
                hint="shorten the prompt",
            )
        default = max(default, given.get("min_tokens", 0))
        return int(min(default, room) if cap is None else min(default, room, cap))
    asked: int = given["max_tokens"]
    if cap is not None and asked > cap:
        raise RequestError(f"max_tokens: {asked} is above the limit of {cap}", field="max_tokens")
    if asked > room:
        raise RequestError(
            f"max_tokens: {asked} after a prompt of {num_prompt_tokens} tokens is "
            f"{num_prompt_tokens + asked} in all, above the context of {info.context_tokens}",
            code=ErrorCode.CONTEXT_LENGTH,
            field="max_tokens",
            hint=f"at most {room} fit, or leave max_tokens out",
        )
    return asked


# -- prompt -------------------------------------------------------------------------------------


def _prompt_ids(
    request: GenerateRequest, assets: TextAssets, info: ModelInfo
) -> tuple[str | None, list[int]]:
    """The prompt as sent, if it was text, and its tokens."""
    given = [
        name for name in ("prompt", "token_ids", "messages") if getattr(request, name) is not None
    ]
    if len(given) != 1:
        got = " and ".join(given) or "none of them"
        raise RequestError(
            f"prompt: exactly one of prompt, token_ids and messages is needed, got {got}",
            field=given[1] if given else "prompt",
        )
    field, prompt = given[0], None
    match field:
        case "token_ids":
            token_ids = _check_token_ids(request.token_ids)
        case "messages":
            text = _render(request, assets)
            token_ids = assets.tokenizer.encode(text, add_special_tokens=False)
        case _:
            prompt = _check_prompt(request.prompt)
            token_ids = assets.tokenizer.encode(prompt, request.add_special_tokens)
    if not token_ids:
        raise RequestError(f"{field}: it has no tokens", field=field)
    if len(token_ids) > info.context_tokens:
        raise RequestError(
            f"{field}: {len(token_ids)} tokens, this model's context holds {info.context_tokens}",
            code=ErrorCode.CONTEXT_LENGTH,
            field=field,
            hint="shorten the prompt",
        )
    _check_ids(field, token_ids, info.vocab_size)
    return prompt, token_ids


def _check_prompt(prompt: object) -> str:
    if isinstance(prompt, bytes):
        try:
            prompt = prompt.decode("utf-8")
        except UnicodeDecodeError as error:
            raise RequestError(
                f"prompt: byte 0x{error.object[error.start]:02x} at position {error.start} is not "
                f"valid UTF-8: {error.reason}",
                field="prompt",
            ) from error
    if not isinstance(prompt, str):
        raise RequestError(f"prompt: {shown(prompt)} is no text", field="prompt")
    if not prompt:
        raise RequestError("prompt: it is empty", field="prompt", hint="send at least a character")
    return check_text(prompt, "prompt")


def _check_token_ids(token_ids: object) -> list[int]:
    if not isinstance(token_ids, Sequence) or isinstance(token_ids, str | bytes):
        raise RequestError(f"token_ids: {shown(token_ids)} is no list of ids", field="token_ids")
    for index, token_id in enumerate(token_ids):
        if not isinstance(token_id, int) or isinstance(token_id, bool):
            raise RequestError(
                f"token_ids[{index}]: {shown(token_id)} is no whole number", field="token_ids"
            )
    return list(token_ids)


def _check_ids(field: str, token_ids: Sequence[int], vocab_size: int) -> None:
    if token_ids and not (min(token_ids) >= 0 and max(token_ids) < vocab_size):
        index, bad = next(
            (i, token) for i, token in enumerate(token_ids) if not 0 <= token < vocab_size
        )
        raise RequestError(
            f"{field}: token id {bad} (entry {index}) is outside the vocabulary; "
            f"allowed: 0 to {vocab_size - 1}",
            field=field,
        )


def _render(request: GenerateRequest, assets: TextAssets) -> str:
    messages = check_messages(request.messages)
    if assets.chat_template is None:
        raise RequestError(
            "messages: this model has no chat template",
            field="messages",
            hint="send `prompt` instead",
        )
    text = assets.chat_template.render(
        messages,
        add_generation_prompt=request.add_generation_prompt,
        continue_final_message=request.continue_final_message,
        variables=request.template_variables,
    )
    return check_text(text, "messages")
