"""How the tokens of a vocabulary become bytes, by the kind of decoder in tokenizer.json."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from typing import Any

from moeserve.core import ModelError

TokenBytes = Callable[[str], bytes]


def _byte_alphabet() -> dict[str, int]:
    """Character to byte of byte-level BPE (Radford et al. 2019, GPT-2): printable Latin-1 stands
    for itself, the other bytes for the characters from U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    alphabet = {chr(byte): byte for byte in printable}
    alphabet.update({chr(0x100 + n): byte for n, byte in enumerate(others)})
    return alphabet


def _byte_level(alphabet: dict[str, int], token: str) -> bytes:
    # A token with any other character was put into the vocabulary as plain text.
    if all(char in alphabet for char in token):
        return bytes(alphabet[char] for char in token)
    return token.encode()


def _sentencepiece(replacements: list[tuple[str, str]], byte_fallback: bool, token: str) -> bytes:
    if byte_fallback and len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
        try:
            return bytes.fromhex(token[3:5])
        except ValueError:
            pass  # "<0xZZ>" is ordinary text
    for pattern, content in replacements:
        token = token.replace(pattern, content)
    return token.encode()


def _keep(raw: bytes) -> bytes:
    return raw


def _drop_one_space(raw: bytes) -> bytes:
    return raw.removeprefix(b" ")


def _drop_all_spaces(raw: bytes) -> bytes:
    return raw.replace(b" ", b"")


def decoding_of(decoder: Any) -> tuple[TokenBytes, Callable[[bytes], bytes]]:
    """How a token becomes bytes, and what the first token of a text loses.

    Raises ModelError for a decoder that is not byte-level, byte-fallback or Metaspace.
    """
    spec: dict[str, Any] = {"type": "none"}
    if decoder is not None:
        spec = json.loads(decoder.__getstate__())
    steps: list[dict[str, Any]] = spec["decoders"] if spec["type"] == "Sequence" else [spec]
    kinds = [step["type"] for step in steps]
    if kinds == ["ByteLevel"]:
        return partial(_byte_level, _byte_alphabet()), _keep
    replacements: list[tuple[str, str]] = []
    drop_lead = _keep
    for step in steps:
        match step:
            case {"type": "Replace", "pattern": {"String": str(pattern)}, "content": str(content)}:
                replacements.append((pattern, content))
            case {"type": "Strip", "content": " ", "start": 1, "stop": 0}:
                drop_lead = _drop_one_space
            case {"type": "Metaspace", "replacement": str(mark)}:
                replacements.append((mark, " "))
                if step.get("prepend_scheme", "always") != "never":
                    drop_lead = _drop_all_spaces
            case {"type": "ByteFallback" | "Fuse"}:
                pass
            case _:
                raise ModelError(
                    f"tokenizer.json: decoder {json.dumps(step, ensure_ascii=False)} is not "
                    "implemented; implemented are ByteLevel, Metaspace, and sequences of Replace "
                    "(string), ByteFallback, Fuse and Strip (one leading space)"
                )
    return partial(_sentencepiece, replacements, "ByteFallback" in kinds), drop_lead
