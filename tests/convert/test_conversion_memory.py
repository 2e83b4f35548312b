"""A conversion holds one layer at a time: more layers cost hardly any more memory."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import torch
from dense_models import save_dense

ROOT = Path(__file__).resolve().parents[2]
HIDDEN, INNER, FEW, MANY = 512, 1024, 2, 14
#: attention (heads of 128) and FFN, in the checkpoint's bfloat16
LAYER_BYTES = 2 * (HIDDEN * 4 * 128 * 2 + HIDDEN * 2 * 128 * 2 + 3 * HIDDEN * INNER)

RUN = """
import sys
from pathlib import Path
import torch
from moeserve.config import ModelConfig
from moeserve.convert.run import convert
from moeserve.convert.settings import ConvertSettings

torch.set_num_threads(1)
dense, out, text = sys.argv[1:]
settings = ConvertSettings(experts=8, active=6, window_tokens=48, max_tokens=480, pregate=True)
with torch.inference_mode():
    convert(ModelConfig(model=dense), Path(out), [Path(text)], settings, lambda stage, share: None)
status = Path("/proc/self/status").read_text().splitlines()
print(next(line for line in status if line.startswith("VmHWM")).split()[1])
"""


def peak_bytes(path: Path, num_layers: int, text: Path, seed: int) -> int:
    """Of a process of its own that converts a model with so many layers."""
    dense = path / f"dense-{num_layers}"
    save_dense(
        dense, "llama", seed, torch.bfloat16, hidden_size=HIDDEN, intermediate_size=INNER,
        head_dim=128, num_hidden_layers=num_layers, tie_word_embeddings=False,
    )  # fmt: skip
    command = [sys.executable, "-c", RUN, str(dense), f"{dense}-moe", str(text)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    index = json.loads(
        (path / f"dense-{num_layers}-moe" / "model.safetensors.index.json").read_text()
    )
    assert index["metadata"]["total_size"] > num_layers * LAYER_BYTES
    return 1024 * int(done.stdout.split()[-1])


def test_memory_does_not_grow_with_the_layers(tmp_path: Path, text: Path, seed: int) -> None:
    few, many = (peak_bytes(tmp_path, count, text, seed) for count in (FEW, MANY))
    held = (many - few) / ((MANY - FEW) * LAYER_BYTES)
    assert held < 0.5, f"{held:.2f} of the further layers' weights were in memory"
