"""One set of random weights, written once: safetensors for moeserve and transformers, GGUF for
llama.cpp.

A file or directory is written under another name and renamed when it is complete, so what has its
name is whole; a run that was interrupted continues with the parts that are missing.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from numpy.typing import NDArray
from random_checkpoint import INDEX_FILE, Qwen3MoeShape, write_random_checkpoint
from safetensors import safe_open
from torch import Tensor
from transformers import Qwen3MoeConfig

SHAPE_FILE = "shape.json"
CHECKPOINT = "checkpoint"
#: Greedy text must not repeat itself: the same few experts would then come from the processor's
#: caches, and decoding would look faster than memory allows.
EMBEDDING_STD = 1.0
#: GGUF name -> llama.cpp's name of the file type that it is quantised to
QUANTISED = {
    "q8_0": "LLAMA_FTYPE_MOSTLY_Q8_0",
    "q4_0": "LLAMA_FTYPE_MOSTLY_Q4_0",
    "q4_k": "LLAMA_FTYPE_MOSTLY_Q4_K_S",
}
#: tensor in a layer of the checkpoint -> tensor in a block of the GGUF file
LAYER_NAMES = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate": "ffn_gate_inp",
}
EXPERT_NAMES = {
    "gate_proj": "ffn_gate_exps",
    "up_proj": "ffn_up_exps",
    "down_proj": "ffn_down_exps",
}
END_NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
}


def write_checkpoint(folder: Path, shape: Qwen3MoeShape, seed: int) -> Path:
    """The checkpoint's directory in `folder`. ValueError where weights of another shape stand."""
    wanted = {**asdict(shape), "seed": seed, "embedding_std": EMBEDDING_STD}
    note = folder / SHAPE_FILE
    if note.exists() and json.loads(note.read_text()) != wanted:
        raise ValueError(f"{folder} holds weights of another shape or seed; give another --data")
    folder.mkdir(parents=True, exist_ok=True)
    note.write_text(json.dumps(wanted))
    path = folder / CHECKPOINT
    if not path.exists():
        part = folder / f"{CHECKPOINT}.part"
        shutil.rmtree(part, ignore_errors=True)
        write_random_checkpoint(part, shape, torch.device("cpu"), seed, EMBEDDING_STD)
        part.rename(path)
    return path


def write_gguf(checkpoint: Path, path: Path) -> None:
    """The checkpoint as GGUF: matrices in bf16, bit for bit; norms and routers in float32, which
    llama.cpp asks for. One layer's experts of one kind are in memory at a time."""
    if path.exists():
        return
    config = Qwen3MoeConfig.from_pretrained(checkpoint)
    part = path.with_suffix(".part")
    writer = gguf.GGUFWriter(part, "qwen3moe")
    _add_settings(writer, config)
    files = json.loads((checkpoint / INDEX_FILE).read_text())["weight_map"]
    plan = list(_plan(config))
    for name, sources in plan:
        shape, dtype = _read_shape(checkpoint, files, sources)
        size = int(np.prod(shape)) * (4 if dtype == gguf.GGMLQuantizationType.F32 else 2)
        writer.add_tensor_info(name, shape, np.dtype(np.float32), size, raw_dtype=dtype)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for _, sources in plan:
        writer.write_tensor_data(_read(checkpoint, files, sources))
    writer.close()
    part.rename(path)


def quantise_gguf(source: Path, path: Path, file_type: str, threads: int) -> None:
    """llama.cpp's own quantiser, every matrix to the same type (`--pure` of llama-quantize)."""
    if path.exists():
        return
    import llama_cpp

    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype = getattr(llama_cpp, file_type)
    params.pure = True
    params.nthread = threads
    part = path.with_suffix(".part")
    status = llama_cpp.llama_model_quantize(str(source).encode(), str(part).encode(), params)
    if status != 0:
        raise RuntimeError(f"llama_model_quantize to {file_type} returned {status}")
    part.rename(path)


def gguf_path(folder: Path, name: str) -> Path:
    return folder / f"{name}.gguf"


def _add_settings(writer: gguf.GGUFWriter, config: Qwen3MoeConfig) -> None:
    """What llama.cpp reads for this architecture. No tokenizer: prompts are token ids."""
    writer.add_name("random qwen3moe")
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_BF16)
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_expert_feed_forward_length(config.moe_intermediate_size)
    writer.add_expert_count(config.num_experts)
    writer.add_expert_used_count(config.num_experts_per_tok)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    rope: dict[str, Any] = dict(config.rope_parameters or {})
    writer.add_rope_freq_base(rope["rope_theta"])
    writer.add_tokenizer_model("none")


def _plan(config: Qwen3MoeConfig) -> Iterator[tuple[str, list[str]]]:
    """GGUF tensor -> the checkpoint tensors it is made of: one, or one per expert."""
    for ours, theirs in END_NAMES.items():
        yield f"{theirs}.weight", [f"{ours}.weight"]
    for layer in range(config.num_hidden_layers):
        prefix = f"model.layers.{layer}."
        for ours, theirs in LAYER_NAMES.items():
            yield f"blk.{layer}.{theirs}.weight", [f"{prefix}{ours}.weight"]
        for ours, theirs in EXPERT_NAMES.items():
            names = [f"{prefix}mlp.experts.{e}.{ours}.weight" for e in range(config.num_experts)]
            yield f"blk.{layer}.{theirs}.weight", names


def _is_float32(source: str) -> bool:
    return "norm" in source or source.endswith("mlp.gate.weight")


def _read_shape(
    checkpoint: Path, files: dict[str, str], sources: list[str]
) -> tuple[list[int], gguf.GGMLQuantizationType]:
    with safe_open(checkpoint / files[sources[0]], "pt") as file:
        shape = list(file.get_slice(sources[0]).get_shape())
    types = gguf.GGMLQuantizationType
    dtype = types.F32 if _is_float32(sources[0]) else types.BF16
    return ([len(sources), *shape] if len(sources) > 1 else shape), dtype


def _read(checkpoint: Path, files: dict[str, str], sources: list[str]) -> NDArray[np.generic]:
    """float32, or the bits of bfloat16 as int16."""
    with safe_open(checkpoint / files[sources[0]], "pt") as file:
        parts = [file.get_tensor(name) for name in sources]
    tensor: Tensor = torch.stack(parts) if len(parts) > 1 else parts[0]
    if _is_float32(sources[0]):
        return tensor.float().numpy()
    return tensor.view(torch.int16).numpy()
