"""A whole conversion: read, convert, write everything that makes OUT a model."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from moeserve import __version__
from moeserve.config import ModelConfig
from moeserve.convert.calibration import Calibration
from moeserve.convert.card import model_card
from moeserve.convert.convert import Conversion, convert_layers, recipe
from moeserve.convert.dense import DenseModel, open_dense
from moeserve.convert.glm import glm_config, grouped_note
from moeserve.convert.pregate import write_pregate
from moeserve.convert.settings import ConvertSettings, MoeShape
from moeserve.convert.shards import write_text
from moeserve.convert.tune import TuningText
from moeserve.convert.tune_plot import check_plot
from moeserve.convert.tune_run import tune_conversion
from moeserve.convert.workplace import Workplace
from moeserve.core import ConfigError, ModelError
from moeserve.models.checkpoint import read_generation_config
from moeserve.models.loader import check_finite
from moeserve.models.safetensors_file import SafetensorsFile
from moeserve.text.tokenizer import Tokenizer
from moeserve.text_windows import read_texts, token_windows

#: what belongs to a model besides its weights
COPIED = (
    "tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt",
    "*.model", "*.jinja", "generation_config.json", "LICENSE*", "NOTICE*",
)  # fmt: skip

Progress = Callable[[str, float], None]


def convert(
    config: ModelConfig,
    out: Path,
    texts: Sequence[Path],
    settings: ConvertSettings,
    progress: Progress,
) -> Conversion:
    """Raises ConfigError, ModelError. Whatever ends it, the same call goes on from there."""
    with open_dense(config) as model:
        MoeShape.of(settings, model.ffn.intermediate_size)
        if settings.tunes:
            check_plot()
        if out.exists() and out.resolve() == model.path.resolve():
            raise ConfigError(f"out: {out} is the dense model", field="out")
        text = read_calibration(model, texts, settings)
        check_finite(model.checkpoint, model.rules, progress)
        settings = replace(settings, window_tokens=text.window_tokens)
        made_of = recipe(model, settings, text)
        with Workplace.open(out, made_of) as workplace:
            return _write(model, settings, made_of, text, workplace, progress)


def _write(
    model: DenseModel,
    settings: ConvertSettings,
    made_of: Mapping[str, Any],
    text: Calibration,
    workplace: Workplace,
    progress: Progress,
) -> Conversion:
    out = workplace.out
    conversion = convert_layers(model, settings, text, workplace, progress)
    for pattern in COPIED:
        for file in sorted(model.path.glob(pattern)):
            if file.is_file():
                workplace.copy(file)
    described = glm_config(model, conversion.shape)
    note = grouped_note(model, conversion.shape)
    if note is not None:
        conversion = replace(conversion, notes=(note,))
    write_text(out / "config.json", json.dumps(described, indent=2) + "\n")
    total = model.spec.num_layers + 1
    shards = [workplace.shard(number, total) for number in range(1, total + 1)]
    if settings.tunes:
        conversion = tune_conversion(
            model, settings, described, conversion, text, workplace, progress
        )
    if settings.pregate:
        recall = write_pregate(out, described, shards, text, settings.seed, progress)
        conversion = replace(conversion, pregate_recall=tuple(recall))
    card = model_card(model, made_of, text, conversion, __version__)
    write_text(out / "README.md", card)
    weight_map: dict[str, str] = {}
    num_bytes = 0
    for file in shards:
        entries = SafetensorsFile(file).entries
        weight_map |= dict.fromkeys(entries, file.name)
        num_bytes += sum(entry.num_bytes for entry in entries.values())
    workplace.finish(weight_map, num_bytes)
    return replace(conversion, num_bytes=num_bytes)


def read_calibration(
    model: DenseModel, texts: Sequence[Path], settings: ConvertSettings
) -> Calibration:
    """Raises ConfigError for text that is too short or not UTF-8, ModelError for a tokeniser with
    more tokens than the model."""
    tokenizer = Tokenizer.load(model.path)
    end = _end_token(model)
    window = min(settings.window_tokens, model.context_tokens)
    windows = token_windows(tokenizer, read_texts(texts), end, window, None)
    if int(windows.max()) >= model.spec.vocab_size:
        raise ModelError(
            f"{model.path}: the tokeniser gives token {int(windows.max())}, the model knows "
            f"{model.spec.vocab_size}",
            hint="the tokeniser belongs to another model",
        )
    names = tuple(Path(os.path.abspath(path)).name for path in texts)
    text = Calibration.of(windows, settings.max_tokens, names)
    if settings.tunes:
        TuningText.of(text).check()
    return text


def _end_token(model: DenseModel) -> int | None:
    """What stands between texts: the first end of sequence that the model knows, if any.

    Raises ModelError for what is no token: the file goes along with the converted model.
    """
    told = {
        "generation_config.json": read_generation_config(model.path).get("eos_token_id"),
        "config.json": model.raw.get("eos_token_id"),
    }
    ends: list[int] = []
    for file, found in told.items():
        ids = [] if found is None else found if isinstance(found, list) else [found]
        if any(type(each) is not int or not 0 <= each < model.spec.vocab_size for each in ids):
            raise ModelError(
                f"{model.path / file}: eos_token_id: {found!r:.80}; allowed: a token or a list of "
                f"tokens, 0 to {model.spec.vocab_size - 1}",
                field="eos_token_id",
                hint="correct it, or leave it out",
            )
        ends += ids
    return ends[0] if ends else None
