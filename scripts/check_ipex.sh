#!/usr/bin/env bash
# Runs the tests of the ipex backend against the package itself.
#
#     scripts/check_ipex.sh DIR [PYTHON]        default: python3
#
# intel-extension-for-pytorch 2.8 wants torch 2.8, so DIR becomes a venv of its own: 7 GB with the
# torch that the package index gives, which carries CUDA; less where pip finds a CPU build of 2.8.
# A DIR that is there already is used again. Minutes, most of them the download.
set -euo pipefail

if [ $# -lt 1 ]; then
  sed -n '2,8s/^# \{0,1\}//p' "$0" >&2
  exit 2
fi
root=$(cd "$(dirname "$0")/.." && pwd)
python=${2:-python3}
mkdir -p "$1"
venv=$(cd "$1" && pwd)
bin=$venv/bin

[ -x "$bin/python" ] || "$python" -m venv "$venv"
"$bin/pip" install -q "torch==2.8.*" "intel-extension-for-pytorch==2.8.*"
"$bin/pip" install -q "scikit-build-core>=0.11" "nanobind>=2.4" "cmake>=3.18" ninja
# Not editable: the build folder of an editable install in this checkout stays as it is.
"$bin/pip" install -q --no-build-isolation -C "build-dir=$venv/build" "$root[ipex]"
"$bin/pip" install -q "pytest>=8" "pytest-timeout>=2.3"

# From elsewhere, so that the installed package is tested and not the checkout, which has no
# extension module built for this torch's Python.
cd "$venv"
"$bin/python" - <<'PROGRAM'
import torch, intel_extension_for_pytorch as ipex
print(f"torch {torch.__version__}, intel-extension-for-pytorch {ipex.__version__}")
PROGRAM
"$bin/pytest" -c "$root/pyproject.toml" --rootdir "$root" -p no:cacheprovider -rs \
  "$root/tests/cpu_backend/test_ipex_backend.py" "$root/tests/cpu_backend/test_choose_backend.py"
