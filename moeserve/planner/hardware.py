"""What a profile is keyed by: the machine as moeserve would use it."""

from __future__ import annotations

from pathlib import Path

import torch

from moeserve.cpu_backend.cgroup import cgroup_cores
from moeserve.cpu_backend.machine import SYS, cpu_model, memory_bytes
from moeserve.cpu_backend.native_runtime import choose_isa
from moeserve.cpu_backend.threads import affinity_cores, plan_threads
from moeserve.environment import read_environment
from moeserve.experts.schedule.profile import Hardware

#: the profile of this machine in the user's cache directory: it can be measured again
PROFILE_FILE = "profile.json"


def this_hardware() -> Hardware:
    """With the cores that this process may use, not all that there are: figures are of those."""
    memory = memory_bytes()
    has_gpu = torch.cuda.is_available()
    return Hardware(
        cpu=cpu_model(),
        num_cores=plan_threads(None, affinity_cores(), cgroup_cores()).num_threads,
        isa=choose_isa("auto")[0],
        memory_bytes=0 if memory is None else memory[0],
        gpu=torch.cuda.get_device_name(0) if has_gpu else None,
    )


def default_profile_path() -> Path:
    """Where `moeserve calibrate` writes and an engine looks when no file is named."""
    return read_environment().cache_home / PROFILE_FILE


def last_level_cache_bytes(sys: Path = SYS) -> int:
    """The largest processor cache that the system names; 0 where it names none.

    What is measured must be larger, or it is read from there.
    """
    units = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30}
    sizes = [0]
    for path in (sys / "devices" / "system" / "cpu").glob("cpu[0-9]*/cache/index*/size"):
        text = path.read_text().strip()
        if text and text[-1] in units and text[:-1].isdigit():
            sizes.append(int(text[:-1]) * units[text[-1]])
    return max(sizes)
