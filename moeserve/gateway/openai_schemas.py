"""What the OpenAI routes accept: one struct per route, and the fields refused by name.

Field meanings: https://platform.openai.com/docs/api-reference. Fields marked `extension` are not in
the OpenAI API; their names are those other open servers use. None means that the client did not
say. Ranges are checked where the values are used (SamplingParams), types here.
"""

from __future__ import annotations

from types import MappingProxyType
from typing import Any, Final

import msgspec

from moeserve.gateway.http_json import Unimplemented

#: https://platform.openai.com/docs/api-reference/completions/create: max_tokens defaults to 16
COMPLETION_MAX_TOKENS: Final = 16

#: fields of GenerateRequest.params that have the same name and meaning here
SAMPLING_FIELDS: Final = (
    "max_tokens",
    "min_tokens",
    "temperature",
    "top_k",
    "top_p",
    "min_p",
    "repetition_penalty",
    "presence_penalty",
    "frequency_penalty",
    "stop",
    "stop_token_ids",
    "ignore_eos",
    "seed",
    "n",
    "prompt_logprobs",
    "skip_special_tokens",
)


class StreamOptions(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    include_usage: bool | None = None
    include_obfuscation: bool | None = None  # padding against size side channels: not implemented


class GenerationFields(msgspec.Struct, frozen=True, kw_only=True):
    """What both generating routes share."""

    model: str | None = None
    max_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    n: int | None = None
    stop: str | list[str] | None = None
    seed: int | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    logit_bias: dict[str, float] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    user: str | None = None  # accepted: it names the end user and changes nothing

    top_k: int | None = None  # extension
    min_p: float | None = None  # extension
    repetition_penalty: float | None = None  # extension
    min_tokens: int | None = None  # extension
    ignore_eos: bool | None = None  # extension
    stop_token_ids: list[int] | None = None  # extension
    include_stop_str_in_output: bool | None = None  # extension
    skip_special_tokens: bool | None = None  # extension
    priority: int | None = None  # extension: smaller runs first
    prompt_logprobs: int | None = None  # extension


class CompletionRequest(GenerationFields, frozen=True, kw_only=True):
    """POST /v1/completions."""

    #: a text, token ids, a list of texts, or a list of token id lists
    prompt: str | list[str | int | list[int]]
    echo: bool | None = None
    logprobs: int | None = None
    best_of: int | None = None
    add_special_tokens: bool | None = None  # extension


class ChatRequest(GenerationFields, frozen=True, kw_only=True):
    """POST /v1/chat/completions."""

    messages: list[dict[str, Any]]
    logprobs: bool | None = None
    top_logprobs: int | None = None
    max_completion_tokens: int | None = None
    # accepted, because leaving them out would give the same answer:
    metadata: dict[str, str] | None = None
    store: bool | None = None
    prompt_cache_key: str | None = None
    safety_identifier: str | None = None
    parallel_tool_calls: bool | None = None

    add_generation_prompt: bool | None = None  # extension
    continue_final_message: bool | None = None  # extension
    chat_template_kwargs: dict[str, Any] | None = None  # extension


class TokenizeRequest(msgspec.Struct, frozen=True, kw_only=True):
    """POST /tokenize: a text, or a conversation as the chat template renders it."""

    model: str | None = None
    prompt: str | None = None
    messages: list[dict[str, Any]] | None = None
    add_special_tokens: bool | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    return_token_strs: bool | None = None


class DetokenizeRequest(msgspec.Struct, frozen=True, kw_only=True):
    """POST /detokenize."""

    model: str | None = None
    tokens: list[int]


#: fields of either generating route that would change the answer, and the values that do not
_UNIMPLEMENTED: Final[dict[str, tuple[object, ...]]] = {
    # OpenAI
    "response_format": ({"type": "text"},),
    "service_tier": ("auto", "default"),
    "prediction": (),
    "moderation": (),
    # other open servers
    "guided_json": (),
    "guided_regex": (),
    "guided_choice": (),
    "guided_grammar": (),
    "structured_outputs": (),
    "use_beam_search": (False,),
    "length_penalty": (1.0,),
    "logits_processors": ([],),
    "truncate_prompt_tokens": (),
    "bad_words": ([],),
}

COMPLETION_UNIMPLEMENTED: Unimplemented = MappingProxyType(
    {**_UNIMPLEMENTED, "suffix": ("",), "prompt_embeds": ()}
)

CHAT_UNIMPLEMENTED: Unimplemented = MappingProxyType(
    {
        **_UNIMPLEMENTED,
        "tools": ([],),
        "tool_choice": ("none", "auto"),
        "functions": ([],),
        "function_call": ("none", "auto"),
        "audio": (),
        "modalities": (["text"],),
        "reasoning_effort": ("none",),
        "verbosity": ("medium",),
        "web_search_options": (),
        "prompt_cache_options": (),
        "prompt_cache_retention": ("in_memory",),
        "documents": ([],),
        "chat_template": (),
        "best_of": (1,),
        "echo": (False,),
    }
)

#: fields of one chat message; SDKs send them back empty when they repeat an answer
MESSAGE_UNIMPLEMENTED: Unimplemented = MappingProxyType(
    {
        "name": (),
        "tool_calls": ([],),
        "tool_call_id": (),
        "function_call": (),
        "refusal": ("",),
        "audio": (),
        "annotations": ([],),
        "reasoning_content": ("",),
        "reasoning": ("",),
    }
)

TOKENIZE_UNIMPLEMENTED: Unimplemented = MappingProxyType({"tools": ([],), "chat_template": ()})
