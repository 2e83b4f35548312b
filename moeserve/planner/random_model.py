"""A packed model of any shape with random weights, for measurements.

Speed depends on shapes, and on values only as far as the router spreads its tokens.

No checkpoint is written first, which would be four times the size. Experts repeat: DISTINCT of them
are drawn and packed, the others are copies in other places, which cost the same to read.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import torch
from torch import Tensor

from moeserve.config import ModelConfig
from moeserve.cpu_backend.native_runtime import NativeRuntime
from moeserve.cpu_backend.packing import PackedExperts, PackedWeight
from moeserve.models.pack import PackWriter
from moeserve.models.packed_targets import PackedTargets
from moeserve.models.registry import find_model
from moeserve.models.targets import EMBEDDING, HEAD
from moeserve.models.weight_formats import weight_formats

DISTINCT = 4
DTYPE = torch.bfloat16
#: draws that products of unit rows are near one, whatever the width
EMBEDDING_STD = 1.0


def write_random_packed(config_path: Path, out: Path, quantize: str, seed: int = 0) -> None:
    """Raises ModelError for a config that cannot be served, FileExistsError for `out`."""
    out.mkdir()
    shutil.copyfile(config_path, out / "config.json")
    config = ModelConfig(model=str(out), dtype="bfloat16", quantize=quantize)
    found = find_model(config)
    generator = torch.Generator().manual_seed(seed)
    rules = found.family.weight_rules(found.spec, (), DTYPE)
    memory = PackWriter(out)
    targets = PackedTargets(
        found.spec, NativeRuntime(), weight_formats(config, DTYPE), DTYPE, memory
    )
    made = targets.make(rules)
    filled: set[int] = set()
    for name, target in made.items():
        weight = target.weight
        if id(weight) in filled:
            continue
        filled.add(id(weight))
        if isinstance(weight, PackedExperts):
            _fill_experts(weight, generator)
        elif isinstance(weight, PackedWeight):
            if name != HEAD or not found.spec.tie_word_embeddings:
                _fill_matrix(weight, generator)
        else:
            _fill_tensor(name, weight, generator)
    targets.finish(made)
    memory.close()
    memory.write_manifest(out.name, "bfloat16")


def _draw(rows: int, cols: int, generator: torch.Generator) -> Tensor:
    return torch.randn(rows, cols, generator=generator).mul_(cols**-0.5)


def _fill_matrix(weight: PackedWeight, generator: torch.Generator) -> None:
    """In pieces: a head is large."""
    rows, cols = weight.layout.rows, weight.layout.cols
    for start in range(0, rows, 4096):
        ids = torch.arange(start, min(start + 4096, rows))
        weight.put(ids, _draw(len(ids), cols, generator))


def _fill_experts(experts: PackedExperts, generator: torch.Generator) -> None:
    spec = experts.spec
    hidden, inner = spec.hidden_size, spec.intermediate_size
    gate_up_rows, down_rows = torch.arange(2 * inner), torch.arange(hidden)
    distinct = min(DISTINCT, spec.num_experts)
    for expert in range(distinct):
        experts.put_gate_up(expert, gate_up_rows, _draw(2 * inner, hidden, generator))
        experts.put_down(expert, down_rows, _draw(hidden, inner, generator))
        if spec.bias:
            experts.put_gate_up_bias(expert, gate_up_rows, torch.zeros(2 * inner, 1))
            experts.put_down_bias(expert, down_rows, torch.zeros(hidden, 1))
    for expert in range(distinct, spec.num_experts):
        experts.records[expert] = experts.records[expert % distinct]


def _fill_tensor(name: str, weight: object, generator: torch.Generator) -> None:
    assert isinstance(weight, Tensor)
    if name.endswith("norm"):
        weight.fill_(1.0)
    elif name == EMBEDDING:
        for start in range(0, len(weight), 4096):
            weight[start : start + 4096].normal_(0.0, EMBEDDING_STD, generator=generator)
    elif weight.dim() >= 2:
        weight.normal_(0.0, weight.shape[-1] ** -0.5, generator=generator)
    else:
        weight.zero_()
