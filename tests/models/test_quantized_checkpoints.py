"""Checkpoints whose weights are stored in FP8 blocks or MXFP4, against transformers on the same
numbers in float32; and layers for multi-token prediction that are left alone."""

from __future__ import annotations

import copy
import json
import random
from pathlib import Path

import pytest
import torch
from parity_cases import VOCAB, draw_config, make_reference, save
from safetensors.torch import load_file, save_file
from support.model_runner import Runner, load_native
from support.settled import is_settled, reference_logits, relative_error
from torch import Tensor
from transformers import PreTrainedModel
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from moeserve.core import ModelError

pytestmark = pytest.mark.usefixtures("quiet")

BLOCK = (16, 24)


def set_config(path: Path, **fields: object) -> None:
    file = path / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))


def logits_of(path: Path, token_ids: list[int], dtype: str = "float32") -> Tensor:
    return Runner(load_native(path, dtype=dtype)).logits(token_ids)


def prompt(reference: PreTrainedModel, seed: int) -> list[int]:
    """On which no choice of an expert hangs on rounding."""
    rng = random.Random(seed)
    while True:
        token_ids = [rng.randrange(VOCAB) for _ in range(50)]
        if is_settled(reference, token_ids, reference_logits(reference, token_ids)):
            return token_ids


def put(reference: PreTrainedModel, path: Path, tensors: dict[str, Tensor]) -> None:
    """Gives the reference the dense form of what the checkpoint holds, by loading it."""
    dense = path.parent / "dense"
    save(reference, dense, packed=False, old_style=False)
    save_file(tensors, dense / "model.safetensors", metadata={"format": "pt"})
    loaded = type(reference).from_pretrained(dense)
    reference.load_state_dict(loaded.state_dict())


def to_fp8_blocks(weight: Tensor, block: tuple[int, int] = BLOCK) -> tuple[Tensor, Tensor, Tensor]:
    """(e4m3, scale per block, the float32 that they stand for)."""
    rows, columns = weight.shape
    blocks = torch.zeros(-(-rows // block[0]), -(-columns // block[1]))
    stored = torch.zeros(weight.shape, dtype=torch.float8_e4m3fn)
    dense = torch.zeros(weight.shape)
    for i, j in [(i, j) for i in range(blocks.shape[0]) for j in range(blocks.shape[1])]:
        at = (
            slice(i * block[0], (i + 1) * block[0]),
            slice(j * block[1], (j + 1) * block[1]),
        )
        blocks[i, j] = weight[at].abs().max() / 448
        stored[at] = (weight[at] / blocks[i, j]).to(torch.float8_e4m3fn)
        dense[at] = stored[at].float() * blocks[i, j]
    return stored, blocks, dense


def save_fp8(
    reference: PreTrainedModel, path: Path, block: tuple[int, int], plain: tuple[str, ...] = ()
) -> dict[str, Tensor]:
    """A checkpoint in FP8 blocks, except for tensors that have one of `plain` in their names.
    Returns the numbers that it stands for."""
    save(reference, path, packed=False, old_style=False)
    stored = load_file(path / "model.safetensors")
    dense = dict(stored)
    plain = ("embed", "lm_head", "gate.weight", *plain)
    for name, tensor in list(stored.items()):
        if tensor.dim() == 2 and not any(part in name for part in plain):
            stored[name], stored[f"{name}_scale_inv"], dense[name] = to_fp8_blocks(tensor, block)
    save_file(stored, path / "model.safetensors", metadata={"format": "pt"})
    quantization = {
        "quant_method": "fp8",
        "fmt": "e4m3",
        "activation_scheme": "dynamic",
        "weight_block_size": list(block),
        "modules_to_not_convert": ["lm_head"],
    }
    set_config(path, quantization_config=quantization)
    return dense


@pytest.mark.parametrize("model_type", ["deepseek_v3", "qwen3_moe", "glm4_moe"])
def test_fp8_blocks(model_type: str, seed: int, tmp_path: Path) -> None:
    reference = make_reference(draw_config(model_type, seed), model_type, seed)
    path = tmp_path / "fp8"
    put(reference, path, save_fp8(reference, path, BLOCK))
    token_ids = prompt(reference, seed)
    expected = reference_logits(reference, token_ids)
    assert relative_error(logits_of(path, token_ids), expected) < 1e-4
    set_config(path, quantization_config=None)
    with pytest.raises(ModelError, match=r"extra tensors.*_scale_inv.*cannot be used"):
        logits_of(path, token_ids)


WIDE = {"hidden_size": 160, "moe_intermediate_size": 144, "intermediate_size": 264}


@pytest.mark.parametrize("block", [(128, 128), (24, 128), (64, 256)], ids=str)
@pytest.mark.parametrize("model_type", ["deepseek_v3", "qwen3_moe", "glm4_moe"])
def test_fp8_codes_are_kept(
    model_type: str, block: tuple[int, int], seed: int, tmp_path: Path
) -> None:
    """Rows and columns that are no multiple of a block, in every order that a family wants."""
    reference = make_reference(draw_config(model_type, seed) | WIDE, model_type, seed)
    path = tmp_path / "fp8"
    put(reference, path, save_fp8(reference, path, block))
    token_ids = prompt(reference, seed)
    expected = reference_logits(reference, token_ids)
    loaded = load_native(path)
    assert relative_error(Runner(loaded).logits(token_ids), expected) < 1e-4
    assert "fp8_blocks: kept in" in loaded.notes["quantization"]
    assert "gate and up: fp8; down: fp8; attention: fp8" in loaded.notes["weights"]


def test_fp8_codes_beside_plain_weights_are_converted(seed: int, tmp_path: Path) -> None:
    """A matrix of several tensors is stored in one form."""
    reference = make_reference(draw_config("qwen3_moe", seed) | WIDE, "qwen3_moe", seed)
    path = tmp_path / "fp8"
    plain = ("layers.0.self_attn.k_proj", "layers.2.mlp.experts.1.up_proj")
    put(reference, path, save_fp8(reference, path, (128, 128), plain))
    token_ids = prompt(reference, seed)
    expected = reference_logits(reference, token_ids)
    loaded = load_native(path)
    assert relative_error(Runner(loaded).logits(token_ids), expected) < 1e-4
    assert "converted to float32" in loaded.notes["quantization"]
    assert "attention: float32 (1), fp8 (7)" in loaded.notes["weights"]


@pytest.mark.parametrize("quantize", ["int8", "int4"])
def test_quantize_rounds_fp8_and_keeps_mxfp4(quantize: str, seed: int, tmp_path: Path) -> None:
    reference = make_reference(draw_config("qwen3_moe", seed) | WIDE, "qwen3_moe", seed)
    save_fp8(reference, tmp_path / "fp8", (128, 128))
    loaded = load_native(tmp_path / "fp8", quantize=quantize)
    assert f"converted to {quantize}" in loaded.notes["quantization"]
    assert "kept" not in loaded.notes["quantization"]
    save_mxfp4(tmp_path / "mxfp4", seed)
    loaded = load_native(tmp_path / "mxfp4", quantize=quantize)
    assert loaded.notes["quantization"] == "mxfp4: kept in 6 weights"
    assert "gate and up: mxfp4; down: mxfp4; attention: int" in loaded.notes["weights"]
    loaded = load_native(tmp_path / "mxfp4", quantize=quantize, quantize_activations=False)
    assert "gate and up: mxfp4 weight-only" in loaded.notes["weights"]


def save_mxfp4(path: Path, seed: int) -> tuple[PreTrainedModel, dict[str, Tensor]]:
    """A gpt-oss checkpoint with random codes, its model, and the numbers that they stand for."""
    config = draw_config("gpt_oss", seed) | {"hidden_size": 64, "intermediate_size": 32}
    reference = make_reference(config, "gpt_oss", seed)
    save(reference, path, packed=False, old_style=True)
    stored = load_file(path / "model.safetensors")
    dense = dict(stored)
    generator = torch.Generator().manual_seed(seed)
    for name in [name for name in stored if name.endswith(("gate_up_proj", "down_proj"))]:
        experts, columns, rows = stored.pop(name).shape  # the dense form is transposed
        shape = (experts, rows, columns // 32)
        blocks = torch.randint(0, 256, (*shape, 16), generator=generator, dtype=torch.uint8)
        scales = torch.randint(122, 126, shape, generator=generator, dtype=torch.uint8)
        stored[f"{name}_blocks"], stored[f"{name}_scales"] = blocks, scales
        whole = convert_moe_packed_tensors(blocks, scales, dtype=torch.float32)
        dense[name] = whole.reshape(experts, columns, rows).contiguous()
    save_file(stored, path / "model.safetensors", metadata={"format": "pt"})
    set_config(path, quantization_config={"quant_method": "mxfp4", "modules_to_not_convert": []})
    return reference, dense


def test_mxfp4(seed: int, tmp_path: Path) -> None:
    path = tmp_path / "mxfp4"
    reference, dense = save_mxfp4(path, seed)
    put(reference, path, dense)
    token_ids = prompt(reference, seed)
    expected = reference_logits(reference, token_ids)
    loaded = load_native(path)
    assert relative_error(Runner(loaded).logits(token_ids), expected) < 1e-4
    assert loaded.notes["quantization"] == "mxfp4: kept in 6 weights"
    # In bfloat16, as far from float32 as transformers' own is: see test_parity.
    peer = copy.deepcopy(reference).to(torch.bfloat16)
    theirs = (reference_logits(peer, token_ids) - expected).abs().amax(-1)
    ours = (logits_of(path, token_ids, "bfloat16") - expected).abs().amax(-1)
    assert float(ours.quantile(0.1)) < 2.5 * float(theirs.quantile(0.1))
    assert float(ours.median()) < 6 * float(theirs.median())


def test_bad_codes_are_named(seed: int, tmp_path: Path) -> None:
    save_mxfp4(tmp_path / "mxfp4", seed)
    name = "model.layers.1.mlp.experts.down_proj_scales"
    spoil(tmp_path / "mxfp4", name, 255)
    with pytest.raises(ModelError, match=rf"{name}: .*NaN or Inf cannot be stored as mxfp4"):
        load_native(tmp_path / "mxfp4")
    reference = make_reference(draw_config("qwen3_moe", seed) | WIDE, "qwen3_moe", seed)
    save_fp8(reference, tmp_path / "fp8", (128, 128))
    name = "model.layers.1.self_attn.o_proj.weight"
    spoil(tmp_path / "fp8", name, 0x7F)
    with pytest.raises(ModelError, match=rf"{name} .*NaN or Inf cannot be stored as fp8"):
        load_native(tmp_path / "fp8")


def spoil(path: Path, name: str, byte: int) -> None:
    stored = load_file(path / "model.safetensors")
    stored[name].view(torch.uint8).view(-1)[-1] = byte
    save_file(stored, path / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize("model_type", ["deepseek_v3", "glm4_moe"])
def test_prediction_layers_are_left_alone(model_type: str, seed: int, tmp_path: Path) -> None:
    reference = make_reference(draw_config(model_type, seed), model_type, seed)
    save(reference, tmp_path, packed=False, old_style=False)
    file = tmp_path / "model.safetensors"
    stored = load_file(file)
    extra = {
        "model.layers.3.eh_proj.weight": torch.ones(2, 2),
        "model.layers.3.self_attn.o_proj.weight": torch.ones(2, 2),
    }
    save_file(stored | extra, file, metadata={"format": "pt"})
    token_ids = prompt(reference, seed)
    expected = reference_logits(reference, token_ids)
    assert relative_error(logits_of(tmp_path, token_ids), expected) < 1e-4
    set_config(tmp_path, num_nextn_predict_layers=0)
    with pytest.raises(ModelError, match=r"extra tensors.*layers\.3\.eh_proj"):
        logits_of(tmp_path, token_ids)
