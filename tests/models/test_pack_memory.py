"""Memory while a checkpoint is quantised: pieces of it, and what it becomes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from transformers import Qwen3MoeConfig

ROOT = Path(__file__).resolve().parents[2]
MEBI = 1 << 20
HIDDEN, INNER, EXPERTS, LAYERS, VOCAB = 2048, 768, 32, 3, 4096

MEASURE = """
import json, sys
from pathlib import Path
from moeserve.config import ExpertConfig, ModelConfig
from moeserve.models.pack import pack_model
from moeserve.models.registry import load_model

def memory(field):
    status = Path("/proc/self/status").read_text()
    return int(status.split(field + ":")[1].split()[0]) * 1024

config = ModelConfig(model=sys.argv[1], quantize=sys.argv[2])
before = memory("VmRSS")
if len(sys.argv) > 3:
    size = pack_model(config, Path(sys.argv[3]), 1).num_bytes
else:
    model = load_model(config, ExpertConfig(cpu_backend="native", num_threads=1))
    size = memory("VmRSS") - before
print(json.dumps({"size": size, "peak": memory("VmHWM") - before}))
"""


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """About 1 GiB of bfloat16, in a file per layer. The numbers repeat, which nothing looks at."""
    path = tmp_path_factory.mktemp("large")
    config = Qwen3MoeConfig(
        hidden_size=HIDDEN, moe_intermediate_size=INNER, num_experts=EXPERTS, vocab_size=VOCAB,
        num_hidden_layers=LAYERS, num_attention_heads=16, num_key_value_heads=2, head_dim=128,
        intermediate_size=INNER, tie_word_embeddings=False, dtype=torch.bfloat16, eos_token_id=0,
    )  # fmt: skip
    config.save_pretrained(path)
    torch.manual_seed(0)
    numbers = torch.randn(HIDDEN * 2 * VOCAB).bfloat16() * 0.02

    def tensor(*shape: int) -> torch.Tensor:
        return numbers[: torch.Size(shape).numel()].view(shape).clone()

    location: dict[str, str] = {}
    for layer in range(LAYERS + 1):
        prefix = f"model.layers.{layer}."
        shapes: dict[str, tuple[int, ...]] = {
            "input_layernorm": (HIDDEN,), "post_attention_layernorm": (HIDDEN,),
            "self_attn.q_proj": (2048, HIDDEN), "self_attn.k_proj": (256, HIDDEN),
            "self_attn.v_proj": (256, HIDDEN), "self_attn.o_proj": (HIDDEN, 2048),
            "self_attn.q_norm": (128,), "self_attn.k_norm": (128,), "mlp.gate": (EXPERTS, HIDDEN),
        }  # fmt: skip
        for expert in range(EXPERTS):
            shapes[f"mlp.experts.{expert}.gate_proj"] = (INNER, HIDDEN)
            shapes[f"mlp.experts.{expert}.up_proj"] = (INNER, HIDDEN)
            shapes[f"mlp.experts.{expert}.down_proj"] = (HIDDEN, INNER)
        if layer == LAYERS:
            prefix = ""
            table = (VOCAB, HIDDEN)
            shapes = {"model.embed_tokens": table, "model.norm": (HIDDEN,), "lm_head": table}
        file = f"model-{layer + 1:05}-of-{LAYERS + 1:05}.safetensors"
        tensors = {f"{prefix}{name}.weight": tensor(*shape) for name, shape in shapes.items()}
        save_file(tensors, path / file, metadata={"format": "pt"})
        location |= dict.fromkeys(tensors, file)
    (path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": location}))
    return path


def measure(*arguments: object) -> dict[str, int]:
    run = subprocess.run(
        [sys.executable, "-c", MEASURE, *map(str, arguments)],
        cwd=ROOT, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    return dict(json.loads(run.stdout))


def test_peak_of_quantising_and_of_packing(checkpoint: Path, tmp_path: Path) -> None:
    """The rule is: at most the packed model plus 1 GiB. Were the mapped pages of the checkpoint
    kept, or a whole layer held twice, it would be hundreds of MiB above the bounds here."""
    total = sum(file.stat().st_size for file in checkpoint.glob("*.safetensors"))
    loaded = measure(checkpoint, "int4")
    assert loaded["size"] < 0.4 * total + 100 * MEBI, loaded
    assert loaded["peak"] < loaded["size"] + 200 * MEBI, loaded
    packed = measure(checkpoint, "int8", tmp_path / "out")
    assert packed["size"] > 0.5 * total, packed
    assert packed["peak"] < 512 * MEBI, packed
    for directory in (checkpoint, tmp_path / "out"):  # pytest keeps those of its last runs
        for file in directory.glob("*.safetensors"):
            file.unlink()
