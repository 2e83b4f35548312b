"""Log-probabilities in the three shapes of the API: chat, legacy completions, prompt_logprobs."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, Final

from moeserve.text.events import TokenText, TopToken

#: the API's value for "so unlikely that it has no number"; JSON has no -Infinity
LEAST_LOGPROB: Final = -9999.0


def _finite(logprob: float) -> float:
    return max(logprob, LEAST_LOGPROB)


def chat_logprobs(tokens: Iterable[TokenText]) -> dict[str, Any]:
    """`choice.logprobs` of a chat completion; `top_logprobs` holds what was asked for."""

    def entry(token: TokenText | TopToken) -> dict[str, Any]:
        assert token.logprob is not None  # only the first token of a prompt has none
        logprob = _finite(token.logprob)
        return {"token": token.text, "logprob": logprob, "bytes": list(token.raw)}

    content = [{**entry(token), "top_logprobs": [entry(t) for t in token.top]} for token in tokens]
    return {"content": content, "refusal": None}


def _legacy_name(token: TokenText | TopToken) -> str:
    r"""The token's text; `bytes:\xe2\x80` where its bytes are no whole character.

    Two such tokens would otherwise share the key U+FFFD in `top_logprobs`.
    """
    if "\ufffd" not in token.text:
        return token.text
    return "bytes:" + "".join(f"\\x{byte:02x}" for byte in token.raw)


def legacy_logprobs(tokens: Sequence[TokenText], shift: int = 0) -> dict[str, Any]:
    """`choice.logprobs` of a legacy completion.

    `top_logprobs` maps text to log-probability and includes the token itself, so it may hold one
    more than asked for, as the API documents. The first token of an echoed prompt has null in both
    lists. shift: characters of the returned text before the first token's text_offset counts.
    """
    top: list[dict[str, float] | None] = []
    for token in tokens:
        if token.logprob is None:
            top.append(None)
            continue
        entry = {_legacy_name(t): _finite(t.logprob) for t in reversed(token.top)}
        entry.setdefault(_legacy_name(token), _finite(token.logprob))
        top.append(entry)
    return {
        "tokens": [_legacy_name(token) for token in tokens],
        "token_logprobs": [None if t.logprob is None else _finite(t.logprob) for t in tokens],
        "top_logprobs": top,
        "text_offset": [shift + token.text_offset for token in tokens],
    }


def prompt_logprobs(tokens: Iterable[TokenText]) -> list[dict[str, Any] | None]:
    """The `prompt_logprobs` extension: per prompt token a map from token id to its entry."""

    def entry(text: str, logprob: float, rank: int) -> dict[str, Any]:
        return {"logprob": _finite(logprob), "rank": rank, "decoded_token": text}

    result: list[dict[str, Any] | None] = []
    for token in tokens:
        if token.logprob is None or token.rank is None:
            result.append(None)
            continue
        entries = {
            str(top.token_id): entry(top.text, top.logprob, rank)
            for rank, top in enumerate(token.top, start=1)
        }
        entries.setdefault(str(token.token_id), entry(token.text, token.logprob, token.rank))
        result.append(entries)
    return result
