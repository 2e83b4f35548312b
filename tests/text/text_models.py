"""Tokenizers trained on the fly, in the two kinds that the served families use."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tokenizers import (
    AddedToken,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)

CORPUS = [
    "Once upon a time there was a little fox who lived near the river.",
    "def add(a, b):\n    return a + b\n\n\nclass Fox:\n    pass\n",
    "To be, or not to be: that is the question.  Whether 'tis nobler in the mind",
    "Größe, naïve, façade; Привет, мир; 你好，世界。 🦊🌊",
] * 4
SPECIAL = ["<s>", "</s>", "<unk>", "<|im_start|>", "<|im_end|>"]


def write_model(path: Path, backend: Tokenizer, config: dict[str, Any]) -> Path:
    path.mkdir(parents=True, exist_ok=True)
    backend.save(str(path / "tokenizer.json"))
    (path / "tokenizer_config.json").write_text(json.dumps(config))
    return path


def byte_level(path: Path, add_bos: bool = False, vocab_size: int = 400) -> Path:
    """As GPT-2, Qwen, Llama 3, DeepSeek and gpt-oss have it."""
    backend = Tokenizer(models.BPE())
    backend.normalizer = normalizers.NFC()
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.train_from_iterator(
        CORPUS,
        trainers.BpeTrainer(
            vocab_size=vocab_size,
            initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
            special_tokens=SPECIAL,
            show_progress=False,
        ),
    )
    backend.add_tokens([AddedToken("<think>", normalized=False)])  # not special: part of the text
    backend.post_processor = processors.ByteLevel(trim_offsets=False)
    if add_bos:
        backend.post_processor = processors.TemplateProcessing(
            single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", 0)]
        )
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<s>",
        "eos_token": "</s>",
        "pad_token": "</s>",
        "clean_up_tokenization_spaces": False,
        # a token that tokenizer.json does not have
        "extra_special_tokens": ["<|tool|>"],
    }
    return write_model(path, backend, config)


def byte_fallback(path: Path, add_bos: bool = True, metaspace_decoder: bool = False) -> Path:
    """As Llama 2 and Mixtral have it: sentencepiece BPE, `▁` for a space, `<0xE4>` for a byte."""
    byte_tokens = [f"<0x{byte:02X}>" for byte in range(256)]
    backend = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    backend.train_from_iterator(
        CORPUS[:3],
        trainers.BpeTrainer(
            vocab_size=520, special_tokens=[*SPECIAL, *byte_tokens], show_progress=False
        ),
    )
    state = json.loads(backend.to_str())
    # The trainer makes special tokens of them; in a real file they are plain vocabulary.
    state["added_tokens"] = [t for t in state["added_tokens"] if t["content"] in SPECIAL]
    backend = Tokenizer.from_str(json.dumps(state))
    if metaspace_decoder:
        backend.decoder = decoders.Metaspace(prepend_scheme="first")
    else:
        backend.decoder = decoders.Sequence(
            [
                decoders.Replace("▁", " "),
                decoders.ByteFallback(),
                decoders.Fuse(),
                decoders.Strip(" ", 1, 0),
            ]
        )
    if add_bos:
        backend.post_processor = processors.TemplateProcessing(
            single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", 0)]
        )
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<s>",
        "eos_token": {"__type": "AddedToken", "content": "</s>", "normalized": False},
        "unk_token": "<unk>",
        "clean_up_tokenization_spaces": False,
    }
    return write_model(path, backend, config)
