"""A conversion holds one layer at a time: more layers cost hardly any more memory."""

from __future__ import annotations

import ctypes
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from dense_models import save_dense

ROOT = Path(__file__).resolve().parents[2]
HIDDEN, INNER, FEW, MANY = 512, 1024, 2, 12
#: attention (4 query heads and 2 kv heads of 128) and FFN, in the checkpoint's bfloat16
LAYER_BYTES = 2 * HIDDEN * (2 * 4 * 128 + 2 * 2 * 128 + 3 * INNER)

RUN = """
import ctypes, sys
from pathlib import Path
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from moeserve.config import ModelConfig
from moeserve.convert.run import convert
from moeserve.convert.settings import ConvertSettings

class Mallinfo(ctypes.Structure):
    FIELDS = "arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks fordblks keepcost"
    _fields_ = [(name, ctypes.c_size_t) for name in FIELDS.split()]

mallinfo = ctypes.CDLL(None).mallinfo2
mallinfo.restype = Mallinfo

def allocated():
    info = mallinfo()
    return info.uordblks + info.hblkhd

def mapped():
    total, ours = 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        first, *rest = line.split()
        if not first.endswith(":"):
            ours = line.endswith(".safetensors")
        elif ours and first == "Rss:":
            total += 1024 * int(rest[0])
    return total

class Peak(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.bytes = 0
        self.mapped = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.bytes = max(self.bytes, allocated() + self.mapped)
        return out

    def progress(self, stage, share):
        self.mapped = mapped()

torch.set_num_threads(1)
text, *models = sys.argv[1:]
settings = ConvertSettings(experts=8, active=6, window_tokens=48, max_tokens=480, pregate=True)
for dense in models:
    with torch.inference_mode(), Peak() as peak:
        convert(
            ModelConfig(model=dense), Path(dense + "-moe"), [Path(text)], settings, peak.progress
        )
    print("peak", peak.bytes)
"""


def test_memory_does_not_grow_with_the_layers(tmp_path: Path, text: Path, seed: int) -> None:
    """What the last of three conversions in one process holds beyond the peak of the one before, at
    which the process has what every conversion leaves behind.

    Held is what was allocated and not freed, after every operation of torch, and what is resident
    of mapped checkpoints. The peak of the process's own resident memory would also count what the
    allocator keeps in fragments and the system has or has not taken back from libraries, which
    differ by half of these layers from run to run.
    """
    if not hasattr(ctypes.CDLL(None), "mallinfo2"):
        pytest.skip("mallinfo2 is in glibc 2.33 and later")
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
    peaks = [int(n.split()[1]) for n in done.stdout.splitlines() if n.startswith("peak")]
    assert min(peaks) > 2 * LAYER_BYTES, f"no layer was seen: in float32 it takes more than {peaks}"
    held = (peaks[2] - peaks[1]) / ((MANY - FEW) * LAYER_BYTES)
    assert held < 0.2, f"{held:.2f} of the further layers' weights were in memory, of {peaks}"
