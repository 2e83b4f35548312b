"""The same as `moeserve convert`: see docs/conversion.md.

python scripts/convert_dense_to_moe.py DENSE OUT --text calibration.txt
"""

from __future__ import annotations

import sys

from moeserve.cli import main

if __name__ == "__main__":
    sys.exit(main(["convert", *sys.argv[1:]]))
