"""The model card: how the model came about and what was measured, all of it computed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from moeserve.convert.calibration import Calibration
from moeserve.convert.convert import Conversion
from moeserve.convert.dense import DenseModel
from moeserve.convert.tune_plot import PICTURE

COLUMNS = {
    "agreement": "agreement",
    "chance": "by chance",
    "lost": "lost",
    "lost_best": "lost by the best choice",
    "error": "error",
}


def model_card(
    model: DenseModel,
    recipe: Mapping[str, Any],
    text: Calibration,
    conversion: Conversion,
    version: str,
) -> str:
    """README.md of the converted model."""
    shape, quality = conversion.shape, conversion.quality
    parts = shape.num_shared + shape.num_routed
    idle = shape.num_routed - shape.top_k
    ratio = quality.perplexity / quality.dense_perplexity
    told = {name: value for name, value in recipe.items() if value is not None and name != "files"}
    told |= _text(text)
    return f"""---
library_name: transformers
pipeline_tag: text-generation
base_model: {model.name}
tags: [glm4_moe, mixture-of-experts, dense-to-moe]
---

# {model.name} as a Mixture-of-Experts

`{model.name}` ({model.spec.model_type}, dense), its FFNs cut into experts by `moeserve convert`
{version}, {_training(conversion)}. The licence is that of the dense model.

| | |
| --- | --- |
| architecture | `glm4_moe` (`Glm4MoeForCausalLM`) |
| FFN of each layer | {model.ffn.intermediate_size} neurons in {parts} parts of {shape.part_size} |
| shared expert | {shape.num_shared} parts |
| routed experts | {shape.num_routed}, of which {shape.top_k} work on a token |
| inactive per token | {idle / parts:.1%} of the FFN |
| context | {model.context_tokens} tokens |
{_notes(conversion)}
## Quality

On calibration text that nothing was fitted to, in float32, windows of
{recipe["window_tokens"]} tokens:

| | perplexity |
| --- | --- |
| dense | {quality.dense_perplexity:.4f} |
| converted | {quality.perplexity:.4f} ({ratio:.4f} ×) |

By layer{_before(conversion)}: the share of the best experts (those with the largest outputs) that
the router names, the same for a choice by dice, the share of the FFN's output (mean square) that is
left out, the same for the best choice, and the error of what the converted FFN gives instead.

{_table(conversion.reports)}
{_tuning(conversion)}{_pregate(conversion)}
## Recipe

| | |
| --- | --- |
{_rows(told)}

Converted in {conversion.seconds:.0f} s.
"""


def _rows(told: Mapping[str, Any]) -> str:
    return "\n".join(f"| {name} | {value} |" for name, value in told.items())


def _text(text: Calibration) -> dict[str, str]:
    """What of which text was used, and for what."""
    learnt, held = text.learnt_from.numel(), text.held_back.numel()
    return {
        "calibration text": ", ".join(text.names),
        "tokens used": f"{learnt + held:,}: {learnt:,} to learn from, {held:,} to measure on",
        "tokens there were": f"{text.tuned_on.numel() + held:,}",
    }


def _notes(conversion: Conversion) -> str:
    return "".join(f"| note | {note} |\n" for note in conversion.notes)


def _training(conversion: Conversion) -> str:
    return "without training" if conversion.tuning is None else "then tuned"


def _before(conversion: Conversion) -> str:
    return "" if conversion.tuning is None else ", before tuning"


def _tuning(conversion: Conversion) -> str:
    tuning = conversion.tuning
    if tuning is None:
        return ""
    dense = conversion.quality.dense_perplexity
    before, after = tuning.divergences
    by_layer = ", ".join(f"{share:.3f}" for share in tuning.agreement)
    return f"""
## Tuning

Routers and a low-rank correction of every part of the FFNs, distilled from the dense model: the
Kullback-Leibler divergence of the next tokens, and FactorLLM's prior-approximate loss
(arXiv:2408.11855) for the routers. The corrections are part of the weights, so with all experts
active a tuned model is *not* the dense one; an untuned conversion with all parts active is.

| | |
| --- | --- |
| steps, tokens | {tuning.num_steps}, {tuning.num_tokens:,} |
| minutes | {tuning.seconds / 60:.1f} |
| perplexity before | {tuning.untuned_perplexity:.4f} ({tuning.untuned_perplexity / dense:.4f} ×) |
| written | the mean of the weights up to step {tuning.best_step}, the best of those measured |
| divergence from the dense model, nats per token, on the text it was chosen by | {before:.4f}, \
then {after:.4f} |
| best experts that the router names, by layer | {by_layer} |

![divergence over steps]({PICTURE})
"""


def _pregate(conversion: Conversion) -> str:
    recall, reports, shape = conversion.pregate_recall, conversion.reports, conversion.shape
    if not recall:
        return ""
    by_layer = ", ".join(f"{share:.3f}" for share in recall)
    always = sum(report["always_on"] - shape.num_shared for report in reports) / len(reports)
    open_k, open_experts = shape.top_k - always, shape.num_routed - always
    chance = (always + (open_k**2 / open_experts if open_experts else 0)) / shape.top_k
    return f"""
`pregate.safetensors` foresees the experts of all layers from the last tokens alone, before the
model runs (`--predictor pregate`); it decides nothing. Of the experts that the routers choose on
text it was not trained on, it names by layer: {by_layer}; dice would name {chance:.3f}.
"""


def _table(reports: list[dict[str, float]]) -> str:
    lines = [f"| layer | parts always on | {' | '.join(COLUMNS.values())} |"]
    lines.append("| --- " * (len(COLUMNS) + 2) + "|")
    for layer, report in enumerate(reports):
        values = " | ".join(f"{report[name]:.3f}" for name in COLUMNS)
        lines.append(f"| {layer} | {report['always_on']:.0f} | {values} |")
    means = (sum(report[name] for report in reports) / len(reports) for name in COLUMNS)
    lines.append("| mean | | " + " | ".join(f"{mean:.3f}" for mean in means) + " |")
    return "\n".join(lines)
