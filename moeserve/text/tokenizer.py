"""Text to token ids and back, for one model directory.

The `tokenizers` library encodes. Decoding goes through the bytes of single tokens instead of the
library's whole-sequence decoder, so that the text of a stream is the same whatever its pieces
(moeserve/text/detokenize.py). Where the bytes are valid UTF-8 both agree. They differ in one case:
in a run of byte tokens (`<0xE4>`) with a broken character, the library replaces the whole run by
U+FFFD, here only the broken character is replaced and its whole neighbours stay.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import tokenizers

from moeserve.core import ModelError
from moeserve.text.checks import check_text, check_tokenizer_file, read_json
from moeserve.text.token_bytes import decoding_of

NAMED_TOKENS = (
    "bos_token",
    "eos_token",
    "unk_token",
    "sep_token",
    "pad_token",
    "cls_token",
    "mask_token",
)


class Tokenizer:
    """One model's tokenizer. Safe to use from several threads."""

    def __init__(self, backend: tokenizers.Tokenizer, special_tokens: dict[str, str]) -> None:
        """special_tokens: content by name ("bos_token"), as chat templates want them."""
        backend.no_truncation()
        backend.no_padding()
        self.special_tokens = special_tokens
        self._backend = backend
        added = backend.get_added_tokens_decoder()
        self._added = {id: token.content for id, token in added.items()}
        self._special_ids = frozenset(id for id, token in added.items() if token.special)
        self._to_bytes, self._drop_lead = decoding_of(backend.decoder)
        self._bytes: dict[int, bytes] = {}  # by id, filled as tokens are met
        self.vocab_size = backend.get_vocab_size(with_added_tokens=True)

    @classmethod
    def load(cls, path: str | Path) -> Tokenizer:
        """Reads tokenizer.json, tokenizer_config.json and special_tokens_map.json of a directory.

        Raises ModelError when tokenizer.json is missing or broken, or its decoder is of a kind that
        is not implemented.
        """
        directory = Path(path)
        backend = _load_backend(directory)
        config_path = directory / "tokenizer_config.json"
        config = read_json(config_path) if config_path.is_file() else {}
        map_path = directory / "special_tokens_map.json"
        # Files written since `added_tokens_decoder` exists repeat the map in the config; the older
        # map alone must not override them.
        if "added_tokens_decoder" not in config and map_path.is_file():
            config = {**config, **read_json(map_path)}
        where = config_path.name
        backend.add_tokens(list(_declared_tokens(config, where)))
        # Flags (does the token eat the space before it?) are those of the file that declares all
        # tokens; a name in the config only points at one.
        declared = _declared_tokens(config, where) or backend.get_added_tokens_decoder().values()
        flagged = {token.content: token for token in declared}
        named, unnamed = _special_tokens(config, where)
        backend.add_special_tokens([flagged.get(t.content, t) for t in (*named.values(), *unnamed)])
        return cls(backend, {name: token.content for name, token in named.items()})

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Token ids. Raises RequestError for a lone surrogate, which no UTF-8 can hold."""
        try:
            return list(self._backend.encode(text, add_special_tokens=add_special_tokens).ids)
        except TypeError:
            check_text(text, "text")  # says where, if that was the reason
            raise

    def decode(self, token_ids: Iterable[int], skip_special_tokens: bool = True) -> str:
        """The text of a whole sequence; U+FFFD for bytes that are no character."""
        pieces: list[bytes] = []
        first = True
        for token_id in token_ids:
            if skip_special_tokens and token_id in self._special_ids:
                continue
            piece = self.token_bytes(token_id, first=first)
            first = first and not self.token_bytes(token_id)
            pieces.append(piece)
        return b"".join(pieces).decode("utf-8", "replace")

    def token_bytes(self, token_id: int, *, first: bool = False) -> bytes:
        """Exact bytes of one token; b"" for an id without a token (rows that pad the vocabulary).

        first: as the first token of a text, where some tokenizers drop the space they put before
        every word.
        """
        raw = self._bytes.get(token_id)
        if raw is None:
            raw = self._bytes[token_id] = self._find_bytes(token_id)
        if first and token_id not in self._added:
            return self._drop_lead(raw)
        return raw

    def _find_bytes(self, token_id: int) -> bytes:
        added = self._added.get(token_id)
        if added is not None:
            return added.encode()
        token = self._backend.id_to_token(token_id) if 0 <= token_id < 2**32 else None
        return b"" if token is None else self._to_bytes(token)

    def token_text(self, token_id: int) -> str:
        """Text of one token alone; U+FFFD where its bytes are no whole character."""
        return self.token_bytes(token_id).decode("utf-8", "replace")

    def is_special(self, token_id: int) -> bool:
        """True for control tokens (`<|im_end|>`), which are not part of an answer's text."""
        return token_id in self._special_ids

    def token_id(self, token: str) -> int | None:
        """The id of a token by its exact name in the vocabulary."""
        found: int | None = self._backend.token_to_id(token)
        return found


def _load_backend(directory: Path) -> tokenizers.Tokenizer:
    path = check_tokenizer_file(directory)
    try:
        return tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises nothing narrower
        raise ModelError(f"{path}: is not a tokenizer: {error}") from error


def _added_token(value: object, where: str, special: bool = True) -> tokenizers.AddedToken:
    """A special token as the config files write it: a string, or an object with `content`."""
    if isinstance(value, str):
        return tokenizers.AddedToken(value, special=True, normalized=False)
    content = value.get("content") if isinstance(value, dict) else None
    if not isinstance(value, dict) or not isinstance(content, str):
        raise ModelError(f"{where}: {value!r} is neither a string nor an object with `content`")
    flags = {
        name: bool(value[name])
        for name in ("single_word", "lstrip", "rstrip", "normalized")
        if name in value
    }
    return tokenizers.AddedToken(content, special=bool(value.get("special", special)), **flags)


def _declared_tokens(config: dict[str, Any], where: str) -> list[tokenizers.AddedToken]:
    """Tokens of `added_tokens_decoder`, in the order of their ids."""
    declared = config.get("added_tokens_decoder") or {}
    if not isinstance(declared, dict) or not all(str(key).isdigit() for key in declared):
        raise ModelError(f"{where}: added_tokens_decoder must map token ids to tokens")
    ordered = sorted(declared.items(), key=lambda item: int(item[0]))
    return [
        _added_token(token, f"{where}: added_tokens_decoder[{key}]", special=False)
        for key, token in ordered
    ]


def _special_tokens(
    config: dict[str, Any], where: str
) -> tuple[dict[str, tokenizers.AddedToken], list[tokenizers.AddedToken]]:
    """Special tokens with a name (`bos_token`; models may have names of their own) and without."""
    named = {
        name: value
        for name, value in config.items()
        if name in NAMED_TOKENS or (name.endswith("_token") and isinstance(value, str))
    }
    extra = config.get("extra_special_tokens") or config.get("additional_special_tokens") or []
    if isinstance(extra, dict):
        named, extra = {**named, **extra}, []
    return (
        {
            name: _added_token(value, f"{where}: {name}")
            for name, value in named.items()
            if value is not None
        },
        [_added_token(value, f"{where}: extra_special_tokens") for value in extra],
    )
