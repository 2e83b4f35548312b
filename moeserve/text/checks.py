"""Small checks of what comes from outside: files of a model, texts and values of a client."""

from __future__ import annotations

import json
import reprlib
from pathlib import Path
from typing import Any

import msgspec

from moeserve.core import ModelError, RequestError

MAX_SHOWN_CHARS = 80
TOKENIZER_FILE = "tokenizer.json"


class _TokenizerFile(msgspec.Struct):
    """What every tokenizer.json has; of the rest it need only be JSON."""

    model: msgspec.Raw


def check_tokenizer_file(directory: Path) -> Path:
    """The tokenizer's file in a model directory, without making a tokenizer of it.

    Raises ModelError where there is none, or it was cut short or is something else.
    """
    path = directory / TOKENIZER_FILE
    if not path.is_file():
        raise ModelError(
            f"{path}: not found",
            hint=f"a model directory needs {TOKENIZER_FILE}; "
            "AutoTokenizer.from_pretrained(...).save_pretrained(...) writes it",
        )
    try:
        msgspec.json.decode(path.read_bytes(), type=_TokenizerFile)
    except OSError as error:
        raise ModelError(f"{path}: cannot be read: {error}") from error
    except msgspec.DecodeError as error:
        raise ModelError(
            f"{path}: is not a tokenizer: {error}", hint="copy or download the file again"
        ) from error
    return path


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file of a model directory. Raises ModelError naming file and line."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise ModelError(f"{path.name}: cannot be read: {error}") from error
    except json.JSONDecodeError as error:
        raise ModelError(f"{path}: is not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise ModelError(f"{path}: holds a {type(value).__name__}, expected an object")
    return value


def check_text(text: str, field: str) -> str:
    """The text itself. Raises RequestError with the position of the first lone surrogate."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        code = ord(text[error.start])
        raise RequestError(
            f"{field}: U+{code:04X} at character {error.start} is half of a surrogate pair, "
            "which is not valid Unicode text",
            field=field,
            hint="send whole characters, encoded as UTF-8",
        ) from error
    return text


def shown(value: object) -> str:
    """A value in an error message: short and shallow, whatever was sent."""
    if value is None:
        return "null"
    shortener = reprlib.Repr()
    shortener.maxstring = shortener.maxother = shortener.maxlong = MAX_SHOWN_CHARS
    return f"{type(value).__name__} {shortener.repr(value)}"
