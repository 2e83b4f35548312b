"""Encoding against transformers; decoding against the tokenizers library and plain UTF-8."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import text_models
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

from moeserve.core import ModelError, RequestError
from moeserve.text.tokenizer import Tokenizer

TEXTS = [
    "Once upon a time",
    "  leading, trailing  ",
    "tabs\tand\nnew\r\nlines\n\n",
    "你好 Привет naïve 🦊👩‍👩‍👧 e\u0301",
    "<s>special</s><|im_start|>user\nhi<|im_end|> <think>x</think> <|tool|>",
    "▁metaspace▁ and Ġ and <0xE4>",
    "\x00\x01 null",
    "a" * 300,
]


@pytest.mark.parametrize("add_special_tokens", [True, False])
@pytest.mark.parametrize(
    "build",
    [
        text_models.byte_level,
        lambda path: text_models.byte_level(path, add_bos=True),
        text_models.byte_fallback,
        lambda path: text_models.byte_fallback(path, add_bos=False, metaspace_decoder=True),
    ],
    ids=["byte_level", "byte_level_bos", "byte_fallback", "metaspace"],
)
def test_encoding_equals_transformers(tmp_path: Path, build, add_special_tokens: bool) -> None:
    from transformers import AutoTokenizer

    path = build(tmp_path)
    ours, theirs = Tokenizer.load(path), AutoTokenizer.from_pretrained(path)
    assert ours.vocab_size == len(theirs)
    assert ours.special_tokens == theirs.special_tokens_map
    for text in TEXTS:
        expected = theirs.encode(text, add_special_tokens=add_special_tokens)
        assert ours.encode(text, add_special_tokens) == expected, text
        for skip in (True, False):
            assert ours.decode(expected, skip) == theirs.decode(
                expected, skip_special_tokens=skip
            ), text


@settings(max_examples=150)
@given(text=st.text(max_size=60))
def test_decode_inverts_encode(model_path: Path, text: str) -> None:
    tokenizer = _load(model_path)
    theirs = tokenizers.Tokenizer.from_file(str(model_path / "tokenizer.json"))
    ids = tokenizer.encode(text, add_special_tokens=False)
    expected = theirs.decode(ids, skip_special_tokens=False)
    assert tokenizer.decode(ids, skip_special_tokens=False) == expected


@settings(max_examples=150)
@given(data=st.data())
def test_decoding_any_tokens(model_path: Path, data: st.DataObject) -> None:
    """Random streams: equal to the library wherever those are whole characters."""
    tokenizer = _load(model_path)
    theirs = tokenizers.Tokenizer.from_file(str(model_path / "tokenizer.json"))
    ids = data.draw(st.lists(st.integers(0, theirs.get_vocab_size() - 1), max_size=12))
    skip = data.draw(st.booleans())
    ours = tokenizer.decode(ids, skip)
    expected = theirs.decode(ids, skip_special_tokens=skip)
    if "\ufffd" not in expected:
        assert ours == expected
    else:  # both find something broken
        assert "\ufffd" in ours


def _load(path: Path) -> Tokenizer:
    return Tokenizer.load(path)


def test_a_broken_character_leaves_its_neighbours(byte_fallback_path: Path) -> None:
    """Where the library would replace the whole run of bytes."""
    tokenizer = Tokenizer.load(byte_fallback_path)
    ids = [tokenizer.token_id(f"<0x{byte:02X}>") for byte in "你".encode() + b"\xe4\xbd"]
    assert tokenizer.decode([i for i in ids if i is not None]) == "你\ufffd"


def test_token_bytes(byte_fallback_path: Path, byte_level_path: Path) -> None:
    for path in (byte_fallback_path, byte_level_path):
        tokenizer = Tokenizer.load(path)
        text = " 你好, fox🦊"
        ids = tokenizer.encode(text, add_special_tokens=False)
        assert b"".join(map(tokenizer.token_bytes, ids)).decode().lstrip() == text.lstrip()
        assert tokenizer.token_bytes(tokenizer.vocab_size + 5) == b""  # a padding row
        assert tokenizer.token_text(tokenizer.token_id("<|im_end|>") or -1) == "<|im_end|>"
        assert tokenizer.is_special(tokenizer.token_id("</s>") or -1)
    partial = Tokenizer.load(byte_fallback_path)
    byte_id = partial.token_id("<0xE4>")
    assert byte_id is not None
    assert (partial.token_bytes(byte_id), partial.token_text(byte_id)) == (b"\xe4", "\ufffd")


def test_lone_surrogates_are_refused_with_their_position(byte_level_path: Path) -> None:
    with pytest.raises(RequestError, match=r"U\+D83D at character 3") as caught:
        Tokenizer.load(byte_level_path).encode("abc\ud83d def")
    assert caught.value.field == "text"


FLAGS = {"lstrip": False, "rstrip": True, "normalized": False, "single_word": False}


@pytest.mark.parametrize(
    "config",
    [
        {"mask_token": "<mask>"},  # its flags are those in tokenizer.json
        {"mask_token": {"__type": "AddedToken", "content": "<mask>", **FLAGS}},
        {
            "added_tokens_decoder": {
                "0": {"content": "<s>", "special": True},
                "406": {"content": "<x>", **FLAGS},
                "500": {"content": "fox", "lstrip": True, "normalized": True},
            }
        },
        {"bos_token": "river"},  # a word of the vocabulary made special
        {"additional_special_tokens": ["<a>", "<b>"], "extra_special_tokens": None},
        {"extra_special_tokens": {"image_token": "<img>"}},
        {"audio_token": "<aud>"},  # a name that only this model has
    ],
    ids=lambda config: next(iter(config)),
)
def test_declared_tokens_equal_transformers(tmp_path: Path, config: dict[str, Any]) -> None:
    from transformers import AutoTokenizer

    file = text_models.byte_level(tmp_path) / "tokenizer.json"
    backend = tokenizers.Tokenizer.from_file(str(file))
    backend.add_special_tokens([tokenizers.AddedToken("<mask>", lstrip=True, special=True)])
    backend.save(str(file))
    config_file = tmp_path / "tokenizer_config.json"
    config_file.write_text(json.dumps({**json.loads(config_file.read_text()), **config}))
    ours, theirs = Tokenizer.load(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
    assert ours.special_tokens == theirs.special_tokens_map
    assert ours.vocab_size == len(theirs)
    for text in ("a <mask> b", "<x> y a fox river <a><b> c<|tool|><img> <aud>."):
        ids = theirs.encode(text)
        assert ours.encode(text) == ids
        for skip in (True, False):
            assert ours.decode(ids, skip) == theirs.decode(ids, skip_special_tokens=skip)


def test_legacy_special_tokens_map(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    text_models.byte_level(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"})
    )
    (tmp_path / "special_tokens_map.json").write_text(
        json.dumps({"bos_token": "<s>", "eos_token": {"content": "<end>", "lstrip": False}})
    )
    ours, theirs = Tokenizer.load(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
    assert ours.special_tokens == theirs.special_tokens_map
    assert ours.encode("a<end>") == theirs.encode("a<end>")


def test_broken_directories(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"tokenizer\.json: not found"):
        Tokenizer.load(tmp_path)
    file = tmp_path / "tokenizer.json"
    for content in ("", "{", '{"model": 1}', "[]"):
        file.write_text(content)
        with pytest.raises(ModelError, match=r"tokenizer\.json: is not a tokenizer"):
            Tokenizer.load(tmp_path)
    text_models.byte_level(tmp_path)
    config = tmp_path / "tokenizer_config.json"
    for content, message in [
        ("{", "not valid JSON"),
        ("[]", "expected an object"),
        ('{"bos_token": 5}', "neither a string"),
        ('{"added_tokens_decoder": {"x": "y"}}', "must map token ids"),
        (b"\xff\xfe{}", "cannot be read"),
    ]:
        config.write_bytes(content if isinstance(content, bytes) else content.encode())
        with pytest.raises(ModelError, match=message):
            Tokenizer.load(tmp_path)


def test_an_unknown_decoder_is_refused_by_name(tmp_path: Path) -> None:
    from tokenizers import decoders

    backend = tokenizers.Tokenizer.from_file(
        str(text_models.byte_level(tmp_path) / "tokenizer.json")
    )
    for decoder in (decoders.WordPiece(), decoders.CTC(), decoders.Strip("_", 2, 0)):
        backend.decoder = decoder
        backend.save(str(tmp_path / "tokenizer.json"))
        kind = json.loads(decoder.__getstate__())["type"]
        with pytest.raises(ModelError, match=kind):
            Tokenizer.load(tmp_path)
