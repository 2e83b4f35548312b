"""Routing traces: which experts every token took, as arrays in an npz file.

ids [T, L, K] uint8 (uint16 where a layer has more than 256 experts): tokens in order, MoE layers,
experts by falling weight. probs [T, L, K] float16: their router weights. tokens [T] int32: ids of
the tokens. lens [S] int64: tokens per sequence; they sum to T. layers [L] int32: indices of the MoE
layers in the model. about: a JSON text (format, version, model's config_sha256).
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from moeserve.core import ConfigError, Routing

FORMAT = "moeserve routing"
VERSION = 1


class RoutingRecorder:
    """An observer of layers. Rows must come in the order of the tokens: one sequence at a time."""

    def __init__(self, num_experts: dict[int, int]) -> None:
        """num_experts: experts per MoE layer, by the layer's index."""
        self.layers = tuple(sorted(num_experts))
        self._dtype = np.uint8 if max(num_experts.values()) <= 256 else np.uint16
        self._ids: dict[int, list[NDArray[np.integer]]] = {n: [] for n in self.layers}
        self._weights: dict[int, list[NDArray[np.float16]]] = {n: [] for n in self.layers}
        self._tokens: list[int] = []
        self._lens: list[int] = []

    def __call__(self, layer: int, x: Tensor, routing: Routing) -> None:
        self._ids[layer].append(routing.ids.cpu().numpy().astype(self._dtype))
        self._weights[layer].append(routing.weights.cpu().numpy().astype(np.float16))

    def end_sequence(self, tokens: Sequence[int]) -> None:
        """tokens: those of the sequence that went through the model since the last end."""
        self._tokens += tokens
        self._lens.append(len(tokens))

    def arrays(self) -> dict[str, NDArray[np.generic]]:
        """ids, probs, tokens, lens, layers."""
        each = {n: _by_weight(self._ids[n], self._weights[n]) for n in self.layers}
        ids = np.stack([each[n][0] for n in self.layers], axis=1)
        assert len(ids) == sum(self._lens), f"{len(ids)} rows of {sum(self._lens)} tokens"
        return {
            "ids": ids,
            "probs": np.stack([each[n][1] for n in self.layers], axis=1),
            "tokens": np.array(self._tokens, np.int32),
            "lens": np.array(self._lens, np.int64),
            "layers": np.array(self.layers, np.int32),
        }

    def save(self, path: Path, config_sha256: str) -> None:
        """Writes the file as a whole. Raises ConfigError where it cannot."""
        about = {"format": FORMAT, "version": VERSION, "config_sha256": config_sha256}
        partial = path.with_name(path.name + ".partial")
        try:
            with partial.open("wb") as file:
                arrays: dict[str, Any] = {"about": np.array(json.dumps(about)), **self.arrays()}
                np.savez_compressed(file, **arrays)
            partial.replace(path)
        except OSError as error:
            raise ConfigError(
                f"out: {path} cannot be written: {error.strerror}", field="out"
            ) from error


def _by_weight(
    ids: list[NDArray[np.integer]], weights: list[NDArray[np.float16]]
) -> tuple[NDArray[np.integer], NDArray[np.float16]]:
    """All steps together, [T, K], each row by falling weight."""
    all_ids, all_weights = np.concatenate(ids), np.concatenate(weights)
    order = np.argsort(-all_weights, axis=1, kind="stable")
    return np.take_along_axis(all_ids, order, 1), np.take_along_axis(all_weights, order, 1)
