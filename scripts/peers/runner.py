"""One run in a process of its own: `python -m peers.runner KIND`, settings as JSON on stdin.

The last line of stdout is one JSON object: the result, or `{"skipped": reason}`.
"""

from __future__ import annotations

import importlib
import json
import sys
from types import MappingProxyType

from peers.measure import Skip

#: kind -> module and function. Imported on demand: each venv has what its own kinds need.
KINDS = MappingProxyType(
    {
        "prepare": ("peers.prepare", "run"),
        "limits": ("peers.run_limits", "run"),
        "llama.cpp": ("peers.run_llama_cpp", "run"),
        "transformers": ("peers.run_transformers", "run"),
        "ours": ("peers.run_ours", "run"),
        "ours rows": ("peers.run_ours", "run_rows"),
        "layer": ("peers.run_layer", "run"),
        "ipex": ("peers.run_layer_ipex", "run"),
        "kt-kernel": ("peers.run_layer_kt", "run"),
    }
)


def main() -> int:
    module, function = KINDS[sys.argv[1]]
    settings = json.load(sys.stdin)
    try:
        result = getattr(importlib.import_module(module), function)(settings)
    except ModuleNotFoundError as error:
        result = {"skipped": f"not installed: {error.name}"}
    except Skip as reason:
        result = {"skipped": str(reason)}
    print(json.dumps(result), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
