"""Tunes a conversion whose shards are written: from there to other shards in their places.

Cut off at any point it goes on: while steps are made, from the last that were saved; then the tuned
shards are written beside the others, and only when all of them are there they take their places.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moeserve.convert.calibration import Calibration
from moeserve.convert.convert import Conversion, Quality
from moeserve.convert.dense import DenseModel
from moeserve.convert.glm import layer_names, make_gate
from moeserve.convert.measure import measure_perplexity
from moeserve.convert.pregate_layers import WrittenModel
from moeserve.convert.settings import ConvertSettings
from moeserve.convert.shards import Source, write_safetensors
from moeserve.convert.tune import History, Progress, Tuner, Tuning, TuningText
from moeserve.convert.tune_ffn import KINDS, CutFfn
from moeserve.convert.tune_model import TunedModel
from moeserve.convert.tune_plot import draw_history
from moeserve.convert.workplace import Saved, Workplace
from moeserve.models.safetensors_file import SafetensorsFile

NOTE = "tuned.json"


def tune_conversion(
    model: DenseModel,
    settings: ConvertSettings,
    described: Mapping[str, Any],
    conversion: Conversion,
    text: Calibration,
    workplace: Workplace,
    progress: Progress,
) -> Conversion:
    """described: the config.json that belongs to the shards. The conversion with what is known of
    the tuned model. Raises ConfigError, ModelError."""
    note = workplace.load_note(NOTE)
    if note is None:
        with torch.inference_mode(False):
            note = asdict(_tune(model, settings, conversion, text, workplace, progress))
        workplace.save_note(NOTE, note)
    workplace.take_next_shards()
    tuning = Tuning(**note)
    quality = Quality(
        conversion.quality.dense_perplexity,
        _written_perplexity(model, described, text, workplace),
        sum(tuning.agreement) / len(tuning.agreement),
    )
    return replace(conversion, quality=quality, tuning=tuning)


def _tune(
    model: DenseModel,
    settings: ConvertSettings,
    conversion: Conversion,
    text: Calibration,
    workplace: Workplace,
    progress: Progress,
) -> Tuning:
    shape, total = conversion.shape, model.spec.num_layers
    shards = [workplace.shard(number, total + 1) for number in range(1, total + 1)]
    always_on = [int(report["always_on"]) - shape.num_shared for report in conversion.reports]
    tuned = TunedModel(model, shape, shards, always_on, text.window_tokens, settings.seed)
    own = TuningText.of(text)
    tuner = Tuner(tuned, own, settings)
    saved = workplace.load_last("tuning")
    if saved is not None:
        tuner.restore(saved.tensors, History(**saved.notes["history"]))

    def save() -> None:
        notes = {"history": asdict(tuner.history)}
        workplace.save_last("tuning", Saved(tuner.history.step, tuner.tensors(), notes))

    tuner.run(save, progress)
    tuner.take_best()
    history = tuner.history
    draw_history(history, workplace.out)
    progress("writing what was tuned", 1.0)
    with torch.no_grad():
        _, _, inputs = tuned.tuned(own.batch(settings.seed, 0))
        for index, (shard, normed) in enumerate(zip(shards, inputs, strict=True)):
            merged = tuned.ffns[index].merged()
            target = workplace.next_shard(index + 1, total + 1)
            _write(shard, target, index, merged, normed)
        agreement = _agreement(tuned, text.held_back)
    return Tuning(
        untuned_perplexity=conversion.quality.perplexity,
        divergences=(history.checks[0][1], history.best[1]),
        agreement=agreement,
        best_step=int(history.best[0]),
        num_steps=history.step,
        num_tokens=history.step * own.windows_per_step * text.window_tokens,
        seconds=history.seconds,
    )


def _write(shard: Path, target: Path, index: int, merged: CutFfn, normed: Tensor) -> None:
    """The tensors of the shard, in its dtypes; those of the FFN are the merged ones. normed:
    [T, H], inputs of the FFN, over which the spread of the router's weights is meant."""
    file = SafetensorsFile(shard)
    names = layer_names(index)
    correction = f"{names['gate']}e_score_correction_bias"
    num_routed = len(file.read(correction))
    num_shared = len(merged.gate) - num_routed
    dtype = file.entries[f"{names['gate']}weight"].dtype
    gate = make_gate(merged.router, num_routed, merged.num_fixed - num_shared, normed, dtype)
    tensors = {f"{names['gate']}weight": gate.weight, correction: gate.correction}
    for kind, dim in zip(KINDS, (0, 0, 1), strict=True):
        parts: Tensor = getattr(merged, kind)
        shared = torch.cat(list(parts[:num_shared]), dim)
        tensors[f"{names['shared']}{kind}_proj.weight"] = shared
        for expert, part in enumerate(parts[num_shared:]):
            tensors[f"{names['expert']}{expert}.{kind}_proj.weight"] = part
    sources = {
        name: Source.of(tensors[name].to(entry.dtype) if name in tensors else file.read(name))
        for name, entry in file.entries.items()
    }
    write_safetensors(target, sources)


def _agreement(tuned: TunedModel, windows: Tensor) -> tuple[float, ...]:
    """By layer, over all windows."""
    found = []
    for part in windows.split(8):
        _, done, _ = tuned.tuned(part)
        pairs = zip(tuned.ffns, done, strict=True)
        found.append([ffn.agreement(worked) * len(part) for ffn, worked in pairs])
    return tuple((torch.tensor(found).sum(0) / len(windows)).tolist())


def _written_perplexity(
    model: DenseModel, described: Mapping[str, Any], text: Calibration, workplace: Workplace
) -> float:
    """Of what lies on the disk, run as anybody else would run it."""
    total = model.spec.num_layers + 1
    shards = [workplace.shard(number, total) for number in range(1, total + 1)]
    with WrittenModel.open(workplace.out, described, shards) as written:
        x = written.embed(text.held_back.flatten())
        for index in range(model.spec.num_layers):
            written.run_layer(index, x, text.window_tokens)
    return measure_perplexity(model, x, text.held_back)
