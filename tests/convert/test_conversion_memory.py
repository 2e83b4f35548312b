"""A conversion holds one layer at a time: more layers cost hardly any more memory."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import torch
from dense_models import save_dense

ROOT = Path(__file__).resolve().parents[2]
HIDDEN, INNER, FEW, MANY = 512, 1024, 2, 12
#: attention (4 query heads and 2 kv heads of 128) and FFN, in the checkpoint's bfloat16
LAYER_BYTES = 2 * HIDDEN * (2 * 4 * 128 + 2 * 2 * 128 + 3 * INNER)

RUN = """
import sys
from pathlib import Path
import torch
from moeserve.config import ModelConfig
from moeserve.convert.run import convert
from moeserve.convert.settings import ConvertSettings

torch.set_num_threads(1)
text, *models = sys.argv[1:]
settings = ConvertSettings(experts=8, active=6, window_tokens=48, max_tokens=480, pregate=True)
for dense in models:
    with torch.inference_mode():
        convert(ModelConfig(model=dense), Path(dense + "-moe"), [Path(text)], settings, print)
    status = Path("/proc/self/status").read_text().splitlines()
    print("peak", next(line for line in status if line.startswith("VmHWM")).split()[1])
"""


def test_memory_does_not_grow_with_the_layers(tmp_path: Path, text: Path, seed: int) -> None:
    """What the last of three conversions in one process needs beyond the peak of the others, after
    which the process has what every conversion leaves behind."""
    models = []
    for number, num_layers in enumerate((FEW, FEW, MANY)):
        models.append(tmp_path / f"dense-{number}")
        save_dense(
            models[-1], "llama", seed, torch.bfloat16, hidden_size=HIDDEN, intermediate_size=INNER,
            head_dim=128, num_hidden_layers=num_layers, tie_word_embeddings=False,
        )  # fmt: skip
    command = [sys.executable, "-c", RUN, str(text), *map(str, models)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    index = json.loads((tmp_path / "dense-2-moe" / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] > MANY * LAYER_BYTES
    peaks = [1024 * int(n.split()[1]) for n in done.stdout.splitlines() if n.startswith("peak")]
    held = (peaks[2] - peaks[1]) / ((MANY - FEW) * LAYER_BYTES)
    assert held < 0.5, f"{held:.2f} of the further layers' weights were in memory, of {peaks}"
