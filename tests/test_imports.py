"""What may be imported without torch, checked in fresh interpreters."""

from __future__ import annotations

import subprocess
import sys

import pytest

WITHOUT_TORCH = [
    "moeserve",
    "moeserve.cli",
    "moeserve.cli_options",
    "moeserve.client",
    "moeserve.text",
    "moeserve.gateway.server",
    "moeserve.progress",
    "moeserve.gateway.service",
    "moeserve.engine.request_scheduler",
    "moeserve.engine.kv_blocks",
    "moeserve.cache.expert_cache",
]


@pytest.mark.parametrize("module", WITHOUT_TORCH)
def test_needs_no_torch(module: str) -> None:
    code = f"import sys, {module}; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_client_needs_pyzmq_and_msgpack_alone() -> None:
    code = (
        "import sys, moeserve.client\n"
        "bad = {'torch', 'msgspec', 'tokenizers', 'fastapi', 'pydantic', 'jinja2'}\n"
        "found = bad & {name.partition('.')[0] for name in sys.modules}\n"
        "sys.exit(', '.join(sorted(found)) or 0)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
