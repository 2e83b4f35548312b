"""What a model directory says about text: tokenizer, chat template, sampling defaults."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from moeserve.core import ModelError, RequestError, SamplingParams
from moeserve.text.chat_template import ChatTemplate, TemplateLimits
from moeserve.text.checks import read_json
from moeserve.text.tokenizer import Tokenizer

# Fields of generation_config.json that are defaults of a request, and their names there.
DEFAULT_FIELDS = {
    "temperature": "temperature",
    "top_k": "top_k",
    "top_p": "top_p",
    "min_p": "min_p",
    "repetition_penalty": "repetition_penalty",
    "max_new_tokens": "max_tokens",
}


@dataclass(frozen=True)
class TextAssets:
    """Everything a front needs to turn requests into tokens and tokens into text.

    defaults: fields of SamplingParams that hold when the client does not say.
    """

    tokenizer: Tokenizer
    chat_template: ChatTemplate | None
    defaults: Mapping[str, Any]

    @classmethod
    def load(cls, path: str | Path, limits: TemplateLimits | None = None) -> TextAssets:
        """Reads a model directory. Raises ModelError naming the file and what is wrong."""
        tokenizer = Tokenizer.load(path)
        template = ChatTemplate.load(path, tokenizer.special_tokens, limits)
        return cls(tokenizer, template, load_defaults(path))

    def close(self) -> None:
        """Ends the process that renders chat templates, if it runs."""
        if self.chat_template is not None:
            self.chat_template.close()


def load_defaults(path: str | Path) -> dict[str, Any]:
    """The sampling defaults of generation_config.json; {} without that file.

    Raises ModelError for a value that no request could have.
    """
    file = Path(path) / "generation_config.json"
    if not file.is_file():
        return {}
    config = read_json(file)
    defaults = {
        ours: config[theirs]
        for theirs, ours in DEFAULT_FIELDS.items()
        if config.get(theirs) is not None
    }
    try:
        msgspec.convert(defaults, SamplingParams)
    except (RequestError, msgspec.ValidationError) as error:
        raise ModelError(f"{file}: {error}") from error
    return defaults
