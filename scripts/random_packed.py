"""Writes a packed model of any shape with random weights, for measurements of memory tiers.

python scripts/random_packed.py CONFIG.json OUT [--quantize int4]
"""

from __future__ import annotations

import argparse
from pathlib import Path

from moeserve.planner.random_model import write_random_packed


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("config", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--quantize", default="int4", choices=("none", "int8", "int4"))
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    write_random_packed(args.config, args.out, args.quantize, args.seed)


if __name__ == "__main__":
    main()
