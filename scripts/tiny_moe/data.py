"""Corpora, hold-out split, tokenizer and training batches; knows nothing about any model."""

from __future__ import annotations

import re
import sysconfig
from collections.abc import Callable
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor

from tiny_moe.chat import SPECIAL_TOKENS, chat_samples

END_OF_TEXT = "<|endoftext|>"
HOLD_OUT_EVERY = 20  # one document in twenty is validation text
SCENE_CHARS = 6000  # Shakespeare is cut into contiguous scenes of about this size
PYTHON_CHARS = 2_600_000
SKIPPED_PART = re.compile(
    "test|idlelib|lib2to3|encodings|pydoc_data|site-packages|ensurepip|distutils|turtledemo|"
    "tkinter|config-3|lib-dynload|__pycache__|_vendor"
)
STORY_START = re.compile(
    r"Once\b|One day, an? |One (sunny|hot|cold|rainy|nice|bright) day\b|There (was|once)\b|"
    r"In an? |[A-Z]\w+ and [A-Z]\w+ (are|were|like|liked|love|loved|play|played|live|lived)\b|"
    r"[A-Z]\w+ (is|was) an? \w+ (girl|boy|cat|dog|bird|bear)\b"
)


@dataclass(frozen=True)
class Corpus:
    """Documents of one domain, already split; no document is in both lists."""

    name: str
    train: list[str]
    valid: list[str]


def _hold_out(name: str, documents: list[str]) -> Corpus:
    """Hold back every twentieth document, by position, so that the split never moves."""
    valid = documents[HOLD_OUT_EVERY // 2 :: HOLD_OUT_EVERY]
    train = [d for i, d in enumerate(documents) if i % HOLD_OUT_EVERY != HOLD_OUT_EVERY // 2]
    return Corpus(name, train, valid)


def _group_paragraphs(text: str, starts_new: Callable[[str, int], bool]) -> list[str]:
    """Join blank-line separated paragraphs; `starts_new(paragraph, size so far)` opens the next."""
    documents: list[list[str]] = [[]]
    size = 0
    for paragraph in re.split(r"\n{2,}", text.strip()):
        if documents[-1] and starts_new(paragraph, size):
            documents.append([])
            size = 0
        documents[-1].append(paragraph.strip())
        size += len(paragraph)
    return ["\n\n".join(parts) for parts in documents]


def load_shakespeare(path: Path) -> Corpus:
    """Plays as contiguous runs of speeches."""
    text = path.read_text(encoding="utf-8")
    return _hold_out("shakespeare", _group_paragraphs(text, lambda _, size: size > SCENE_CHARS))


def load_stories(path: Path) -> Corpus:
    """One document per story; the excerpt has no separators, so openings are recognised."""
    text = path.read_text(encoding="utf-8")
    stories = _group_paragraphs(text, lambda p, _: STORY_START.match(p) is not None)
    return _hold_out("stories", [s for s in stories if len(s) > 80])


def load_python() -> Corpus:
    """Whole modules of this interpreter's standard library, in an order fixed by their names."""
    root = Path(sysconfig.get_paths()["stdlib"])
    paths = [p for p in root.rglob("*.py") if _is_wanted(p.relative_to(root))]
    paths.sort(key=lambda p: sha256(p.relative_to(root).as_posix().encode()).digest())
    modules: list[str] = []
    size = 0
    for path in paths:
        text = path.read_text(encoding="utf-8", errors="replace").strip()
        text = re.sub(r"\A(#[^\n]*\n)+\n*", "", text).replace("\t", "    ")  # drop licence banners
        if not 1500 < len(text) < 80_000 or not text.isascii() or '"""' not in text:
            continue
        modules.append(text)
        size += len(text)
        if size > PYTHON_CHARS:
            break
    return _hold_out("python", modules)


def _is_wanted(relative: Path) -> bool:
    parts = relative.parts
    generated = parts[-1].startswith(("_sysconfigdata", "_pydecimal", "stringprep", "turtle"))
    return not generated and not any(SKIPPED_PART.match(part) for part in parts)


def train_tokenizer(corpora: list[Corpus], vocab_size: int) -> Tokenizer:
    """Byte-level BPE on the training documents, each domain cut to the same size."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=SPECIAL_TOKENS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    smallest = min(sum(map(len, c.train)) for c in corpora)
    texts: list[str] = []
    for corpus in corpora:
        size = 0
        for document in corpus.train:
            if size > smallest:
                break
            texts.append(document)
            size += len(document)
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def token_id(tokenizer: Tokenizer, token: str) -> int:
    """Return the id of a token that must exist."""
    number = tokenizer.token_to_id(token)
    if number is None:
        raise ValueError(f"the tokenizer has no token {token}")
    return number


@dataclass(frozen=True)
class Stream:
    """Documents of one kind, tokenised and joined by end-of-text; `starts` are their offsets."""

    tokens: Tensor
    starts: Tensor

    @classmethod
    def encode(cls, tokenizer: Tokenizer, documents: list[str]) -> Stream:
        end = token_id(tokenizer, END_OF_TEXT)
        tokens: list[int] = []
        starts: list[int] = []
        for encoding in tokenizer.encode_batch(documents):
            starts.append(len(tokens))
            tokens += [*encoding.ids, end]
        return cls(torch.tensor(tokens), torch.tensor(starts))

    def window(self, start: int, length: int) -> Tensor:
        """Return `length` tokens from `start`, wrapping round at the end."""
        return self.tokens[torch.arange(start, start + length) % len(self.tokens)]

    def windows(self, length: int) -> Tensor:
        """Return the whole stream as [N, length], without overlap; the rest is dropped."""
        usable = len(self.tokens) // length * length
        return self.tokens[:usable].view(-1, length)


@dataclass(frozen=True)
class Dataset:
    """Per domain: plain and chat training streams and held-back validation streams."""

    train: dict[str, Stream]
    train_chat: dict[str, Stream]
    valid: dict[str, Stream]
    valid_chat: dict[str, Stream]

    @classmethod
    def build(cls, tokenizer: Tokenizer, corpora: list[Corpus]) -> Dataset:
        def chat(corpus: Corpus, documents: list[str], passes: int) -> Stream:
            return Stream.encode(tokenizer, chat_samples(corpus.name, documents, passes))

        return cls(
            train={c.name: Stream.encode(tokenizer, c.train) for c in corpora},
            train_chat={c.name: chat(c, c.train, passes=4) for c in corpora},
            valid={c.name: Stream.encode(tokenizer, c.valid) for c in corpora},
            valid_chat={c.name: chat(c, c.valid, passes=1) for c in corpora},
        )

    def batch(self, seed: int, step: int, batch_tokens: int, chat_share: float) -> Tensor:
        """Return the training rows of one step, a function of (seed, step) alone.

        Domains are drawn evenly whatever their size. Half of the plain rows and all chat rows
        begin with a document, as prompts do.
        """
        generator = torch.Generator().manual_seed(seed * 1_000_003 + step)

        def draw(limit: int) -> int:
            return int(torch.randint(limit, (1,), generator=generator))

        length = (256, 512, 512, 1024)[draw(4)]
        names = list(self.train)
        rows = []
        for row in range(batch_tokens // length):
            name = names[(row + step) % len(names)]
            is_chat = float(torch.rand(1, generator=generator)) < chat_share
            stream = self.train_chat[name] if is_chat else self.train[name]
            if is_chat or draw(2):
                start = int(stream.starts[draw(len(stream.starts))])
            else:
                start = draw(len(stream.tokens))
            rows.append(stream.window(start, length + 1))
        return torch.stack(rows)
