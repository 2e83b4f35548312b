"""Reads config.json field by field and refuses what nobody read.

A field is read, checked against the values that are implemented, or known to change nothing in
inference. Any other field may change what the model computes, so it is refused by name: a config
that the code does not implement must never load as something else.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, TypeVar, cast

from moeserve.core import ModelError

#: Fields that say nothing about the computation of logits: identity, training, generation, memory.
HARMLESS = frozenset(
    # identity
    {"model_type", "architectures", "auto_map", "transformers_version", "_name_or_path"}
    | {"name_or_path", "_commit_hash", "tokenizer_class", "transformers.js_config"}
    | {"unsloth_version", "unsloth_fixed", "torch_dtype", "dtype", "id2label", "label2id"}
    | {"num_labels", "problem_type", "finetuning_task", "task_specific_params", "prefix"}
    # special tokens, which registry.py and the tokeniser read
    | {"bos_token_id", "eos_token_id", "pad_token_id", "sep_token_id", "decoder_start_token_id"}
    # training
    | {"initializer_range", "attention_dropout", "hidden_dropout", "resid_pdrop", "embd_pdrop"}
    | {"output_router_logits", "router_aux_loss_coef", "aux_loss_alpha", "seq_aux"}
    | {"router_jitter_noise", "gradient_checkpointing"}
    # how another program runs the model
    | {"use_cache", "pretraining_tp", "ep_size", "output_attentions", "output_hidden_states"}
    | {"return_dict", "use_return_dict", "torchscript", "attn_implementation", "is_decoder"}
    | {"_attn_implementation", "_attn_implementation_autoset", "experts_implementation"}
    | {"chunk_size_feed_forward"}
    # sampling defaults that old transformers wrote here
    | {"max_length", "min_length", "do_sample", "temperature", "top_k", "top_p", "typical_p"}
    | {"num_beams", "num_beam_groups", "repetition_penalty", "length_penalty", "early_stopping"}
    | {"no_repeat_ngram_size", "diversity_penalty", "encoder_no_repeat_ngram_size"}
    | {"bad_words_ids", "num_return_sequences", "output_scores", "return_dict_in_generate"}
    | {"forced_bos_token_id", "forced_eos_token_id", "remove_invalid_values"}
    | {"exponential_decay_length_penalty", "suppress_tokens", "begin_suppress_tokens"}
)
#: Fields that may be there as long as they ask for nothing.
ONLY_OFF = (
    "add_cross_attention",
    "cross_attention_hidden_size",
    "is_encoder_decoder",
    "pruned_heads",
    "tie_encoder_decoder",
    "use_bfloat16",
    "per_layer_config",
    "residual_scale",
    "logits_soft_cap",
)

T = TypeVar("T")


class _Required:
    """The type of REQUIRED: no default."""


REQUIRED = _Required()


class ConfigReader:
    """One JSON object, read by name; `where` names it in errors.

    Every method raises ModelError that names the field, its value and what is allowed. A field
    with several names (old and new) is read from whichever is there; two that differ are refused.
    null counts as absent.
    """

    def __init__(self, config: Mapping[str, Any], where: str = "config.json") -> None:
        self._config = config
        self._where = where
        self._read: set[str] = set()

    def integer(self, *names: str, default: int | _Required = REQUIRED, at_least: int = 1) -> int:
        value = self._get(names, int, default)
        if value < at_least:
            raise self.refusal(names[0], f"expected {at_least} or more")
        return value

    def optional_integer(self, *names: str, at_least: int = 1) -> int | None:
        return self.integer(*names, at_least=at_least) if self.has(*names) else None

    def number(self, *names: str, default: float | _Required = REQUIRED) -> float:
        value = float(self._get(names, (int, float), default))
        if not math.isfinite(value):
            raise self.refusal(names[0], "expected a finite number")
        return value

    def positive(self, *names: str, default: float | _Required = REQUIRED) -> float:
        value = self.number(*names, default=default)
        if value <= 0:
            raise self.refusal(names[0], "expected a number above 0")
        return value

    def flag(self, *names: str, default: bool | _Required = REQUIRED) -> bool:
        return self._get(names, bool, default)

    def text(self, *names: str, default: str | _Required = REQUIRED) -> str:
        return self._get(names, str, default)

    def choice(self, name: str, allowed: Mapping[str, T], default: str | _Required = REQUIRED) -> T:
        """The entry of `allowed` under the text in the field."""
        value = self.text(name, default=default)
        if value not in allowed:
            raise self.refusal(name, f"implemented: {', '.join(sorted(allowed))}")
        return allowed[value]

    def list_of(self, name: str, kind: type[T]) -> tuple[T, ...]:
        """The entries of a list; () where the field is absent."""
        values = self._get((name,), list, [])
        if not all(_is(value, kind) for value in values):
            raise self.refusal(name, f"expected a list of {kind.__name__}")
        return tuple(values)

    def numbers(self, name: str) -> tuple[float, ...]:
        """The finite numbers of a list; () where the field is absent."""
        values = self._get((name,), list, [])
        if not all(_is(value, (int, float)) and math.isfinite(value) for value in values):
            raise self.refusal(name, "expected a list of finite numbers")
        return tuple(map(float, values))

    def section(self, *names: str) -> ConfigReader | None:
        """A reader of a nested object, to be finished by itself; None where it is absent."""
        if not self.has(*names):
            return None
        found = self._get(names, dict, REQUIRED)
        return ConfigReader(found, f"{self._where}: {names[0]}")

    def only(self, name: str, *allowed: object, why: str = "") -> None:
        """The field is absent, null, or one of the values that are implemented."""
        self._read.add(name)
        value = self._config.get(name)
        if value is not None and not any(_same(value, each) for each in allowed):
            listed = ", ".join(repr(each) for each in allowed)
            raise self.refusal(name, f"implemented: {listed}{f'; {why}' if why else ''}")

    def ignore(self, *names: str) -> None:
        """The fields change nothing here; the caller says why in a comment."""
        self._read.update(names)

    def has(self, *names: str) -> bool:
        return any(self._config.get(name) is not None for name in names)

    def names(self, name: str) -> bool:
        """Whether the field is there, be it null."""
        return name in self._config

    def finish(self) -> None:
        """Refuses every field that nothing has read."""
        for name in ONLY_OFF:
            self.only(name, False, 0, {}, [])
        given = {name for name, value in self._config.items() if value is not None}
        unread = sorted(given - self._read - HARMLESS)
        if unread:
            found = ", ".join(f"{name}={self._config[name]!r:.80}" for name in unread)
            raise ModelError(
                f"{self._where}: fields that moeserve does not implement: {found}",
                field=unread[0],
                hint="they may change what the model computes, so it is not loaded without them",
            )

    def refusal(self, name: str, expected: str) -> ModelError:
        """The error that refuses a field's value."""
        value = self._config.get(name)
        return ModelError(f"{self._where}: {name}: {value!r:.200}: {expected}", field=name)

    def _get(
        self, names: tuple[str, ...], kind: type[T] | tuple[type, ...], default: T | _Required
    ) -> T:
        self._read.update(names)
        given = [name for name in names if self._config.get(name) is not None]
        if not given:
            if isinstance(default, _Required):
                raise ModelError(f"{self._where}: {' or '.join(names)}: missing", field=names[0])
            return default
        value = self._config[given[0]]
        for other in given[1:]:
            if not _same(self._config[other], value):
                raise self.refusal(other, f"{given[0]} says {value!r:.80}")
        if not _is(value, kind):
            kinds = kind if isinstance(kind, tuple) else (kind,)
            raise self.refusal(given[0], f"expected {' or '.join(k.__name__ for k in kinds)}")
        return cast(T, value)


def _is(value: object, kind: type | tuple[type, ...]) -> bool:
    """isinstance, without Python's bool being an int."""
    if isinstance(value, bool):
        return kind is bool
    return isinstance(value, kind)


def _same(value: object, other: object) -> bool:
    """Equality, without True being 1."""
    return isinstance(value, bool) == isinstance(other, bool) and value == other
