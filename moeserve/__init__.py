"""moeserve: serve Mixture-of-Experts language models whose experts do not fit the GPU.

Names are imported when they are first used, so that `import moeserve`, the client and the command
line start without torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from moeserve.client import AsyncClient, Client
    from moeserve.core import SamplingParams
    from moeserve.llm import LLM

__version__ = "0.1.0"

__all__ = ["LLM", "AsyncClient", "Client", "SamplingParams", "__version__"]

_HOME = {
    "AsyncClient": "moeserve.client",
    "Client": "moeserve.client",
    "LLM": "moeserve.llm",
    "SamplingParams": "moeserve.core",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'moeserve' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return __all__
