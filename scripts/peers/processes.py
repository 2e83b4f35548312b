"""Starts runs in processes of their own and keeps what they return."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

SCRIPTS = Path(__file__).resolve().parent.parent
TAIL_CHARS = 2000
#: Set for other work they would change the engines' own choice of threads.
THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")


def run_alone(
    kind: str, settings: Mapping[str, Any], python: str = sys.executable
) -> dict[str, Any]:
    """The result of `peers.runner KIND`; {"failed": last lines} where it did not end well."""
    env = {name: value for name, value in os.environ.items() if name not in THREAD_VARIABLES}
    with tempfile.TemporaryFile("w+") as output:
        ended = subprocess.run(
            [python, "-m", "peers.runner", kind],
            input=json.dumps(settings),
            stdout=output,
            stderr=subprocess.STDOUT,
            cwd=SCRIPTS,
            env=env,
            text=True,
        )
        output.seek(0)
        text = output.read().strip()
    if ended.returncode != 0:
        return {"failed": f"exit status {ended.returncode}: ...{text[-TAIL_CHARS:]}"}
    result: dict[str, Any] = json.loads(text.splitlines()[-1])
    return result
