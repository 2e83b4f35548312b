"""What a client asks for (`GenerateRequest`, unchecked) and what may run (`PreparedRequest`).

They are different types: only `moeserve.text.prepare.prepare` makes the second from the first, so
nothing behind it can see unchecked input.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field

from moeserve.core import EngineRequest


@dataclass(frozen=True, kw_only=True)
class GenerateRequest:
    """A request as a front received it. Nothing in it is checked, whatever the annotations say.

    Exactly one of prompt, token_ids and messages is given. A value of None in `params` means that
    the client did not say.
    """

    #: unique among the running requests of a service; fronts add what makes it so
    request_id: str
    #: name the client used; None: whichever model is served
    model: str | None = None
    #: text to continue; bytes are taken as UTF-8
    prompt: object = None
    #: the same, already tokenised: a sequence of ints
    token_ids: object = None
    #: a conversation: a sequence of mappings with `role` and `content` (text, or OpenAI text parts)
    messages: object = None
    #: fields of SamplingParams, and `n`, `stop`, `include_stop`, `skip_special_tokens`
    params: Mapping[str, object] = field(default_factory=dict)
    #: add what the tokenizer puts around a text (bos); `prompt` only, templates bring their own
    add_special_tokens: bool = True
    #: end the rendered conversation where the assistant's answer begins
    add_generation_prompt: bool = True
    #: leave the last message open, so that the answer goes on from it
    continue_final_message: bool = False
    #: more variables for the chat template, such as `tools` or `enable_thinking`
    template_variables: Mapping[str, object] = field(default_factory=dict)
    #: smaller runs first
    priority: int = 0
    #: time.time() after which the answer is of no use
    deadline_s: float | None = None
    #: time.monotonic() at receipt; timing counts from here
    received_s: float = field(default_factory=time.monotonic)


@dataclass(frozen=True, kw_only=True)
class RequestLimits:
    """What one request may ask for at most. Refused above it, never silently cut."""

    #: answers per request
    max_n: int = 16
    #: tokens per answer; None: what the context leaves
    max_tokens_cap: int | None = None
    #: tokens per answer when the client does not say: this, or what the context leaves if less
    default_max_tokens: int = 1024
    #: stop strings per request
    max_stop_strings: int = 16
    #: characters of one stop string
    max_stop_chars: int = 256


@dataclass(frozen=True, kw_only=True)
class PreparedRequest:
    """A checked request: one EngineRequest per answer, and what the text side must do."""

    request_id: str
    prompt: str | None  # the text, if the client sent text
    prompt_token_ids: list[int]
    #: answer `i` is engine_requests[i], with the id "<request_id>/<i>"
    engine_requests: tuple[EngineRequest, ...]
    stop: tuple[str, ...]
    include_stop: bool
    skip_special_tokens: bool
    received_s: float  # time.monotonic()

    @property
    def num_answers(self) -> int:
        return len(self.engine_requests)
