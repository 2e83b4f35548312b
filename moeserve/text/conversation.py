"""Checks the messages of a conversation, as a client sent them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from moeserve.core import RequestError
from moeserve.text.checks import check_text, shown


def check_messages(messages: object) -> list[dict[str, Any]]:
    """Messages with a role and text each; what else they hold is left for the template.

    Raises RequestError naming the message and the field in it.
    """
    if not isinstance(messages, Sequence) or isinstance(messages, str | bytes):
        raise RequestError(f"messages: {shown(messages)} is no list", field="messages")
    if not messages:
        raise RequestError(
            "messages: it is empty", field="messages", hint="send at least one message"
        )
    return [_check_message(message, f"messages[{i}]") for i, message in enumerate(messages)]


def _check_message(message: object, where: str) -> dict[str, Any]:
    if not isinstance(message, Mapping) or not all(isinstance(key, str) for key in message):
        raise RequestError(f"{where}: {shown(message)} is no object", field=where)
    role = message.get("role")
    if not isinstance(role, str) or not role:
        raise RequestError(
            f"{where}.role: {shown(role)} is no role",
            field=f"{where}.role",
            hint="such as 'user', 'assistant' or 'system'",
        )
    content = message.get("content")
    if content is None and message.get("tool_calls"):
        return dict(message)  # an assistant that only calls tools says nothing
    return {**message, "content": _content_text(content, f"{where}.content")}


def _content_text(content: object, where: str) -> str:
    """The text of a message: as it is, or the text parts of the OpenAI form, joined."""
    if isinstance(content, str):
        return check_text(content, where)
    if not isinstance(content, Sequence) or isinstance(content, bytes):
        raise RequestError(f"{where}: {shown(content)} is no text", field=where)
    texts: list[str] = []
    for index, part in enumerate(content):
        text = part.get("text") if isinstance(part, Mapping) else None
        if not isinstance(part, Mapping) or part.get("type") != "text" or not isinstance(text, str):
            raise RequestError(
                f"{where}[{index}]: {shown(part)} is not supported; only parts of type 'text' are",
                field=where,
            )
        texts.append(check_text(text, f"{where}[{index}].text"))
    return "\n".join(texts)
