"""POST /tokenize and /detokenize: what the server's tokenizer makes of a text, and back.

Not part of the OpenAI API; fields and answers are named as other open servers name them.
"""

from __future__ import annotations

import asyncio

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from moeserve.gateway.errors import check_model, invalid, json_response
from moeserve.gateway.http_json import read_json
from moeserve.gateway.lifecycle import Lifecycle
from moeserve.gateway.openai_chat import template_messages
from moeserve.gateway.openai_schemas import (
    TOKENIZE_UNIMPLEMENTED,
    DetokenizeRequest,
    TokenizeRequest,
)
from moeserve.text.prepare import prepare
from moeserve.text.request import GenerateRequest


async def tokenize(request: Request, lifecycle: Lifecycle) -> Response:
    """Token ids of a text or of a rendered conversation, checked as a generation's prompt is."""
    body = await read_json(request, TokenizeRequest, TOKENIZE_UNIMPLEMENTED)
    service = lifecycle.service()
    # How many tokens a text has is a fair question also beyond the context.
    boundless = msgspec.structs.replace(service.info, context_tokens=2**31)
    # In a thread: long texts take a while, and chat templates render in another process.
    prepared = await asyncio.to_thread(
        prepare, _prompt_of(body), service.assets, boundless, service.limits
    )
    token_ids = prepared.prompt_token_ids
    texts = [service.tokenizer.token_text(token_id) for token_id in token_ids]
    return json_response(
        {
            "count": len(token_ids),
            "max_model_len": service.info.context_tokens,
            "tokens": token_ids,
            "token_strs": texts if body.return_token_strs else None,
        }
    )


def _prompt_of(body: TokenizeRequest) -> GenerateRequest:
    return GenerateRequest(
        request_id="tokenize",
        model=body.model,
        prompt=body.prompt,
        messages=None if body.messages is None else template_messages(body.messages),
        params={"max_tokens": 0},
        add_special_tokens=body.add_special_tokens is not False,
        add_generation_prompt=body.add_generation_prompt is not False,
        continue_final_message=bool(body.continue_final_message),
        template_variables=body.chat_template_kwargs or {},
    )


async def detokenize(request: Request, lifecycle: Lifecycle) -> Response:
    """The text of token ids, special tokens included."""
    body = await read_json(request, DetokenizeRequest, TOKENIZE_UNIMPLEMENTED)
    service = lifecycle.service()
    check_model(body.model, service.info)
    vocab_size = service.info.vocab_size
    for index, token_id in enumerate(body.tokens):
        if not 0 <= token_id < vocab_size:
            text = f"tokens[{index}]: {token_id} is outside the vocabulary; allowed: 0 to"
            raise invalid(f"{text} {vocab_size - 1}", "tokens")
    text = await asyncio.to_thread(service.tokenizer.decode, body.tokens, skip_special_tokens=False)
    return json_response({"prompt": text})
