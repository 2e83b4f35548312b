#!/usr/bin/env bash
# One command on a machine with a GPU: install, parity tests, short decode benchmark.
#
#   scripts/gpu_check.sh OUT [--device cuda|cpu] [--budget-s 500]
#
# Writes OUT/gpu_check.json and OUT/gpu_check.md; exits 0 when everything ran and passed.
# Needs Python >= 3.10 with a CUDA build of torch and the packages that the first step names where
# one is missing; downloads nothing. Packages may come through PYTHONPATH. PYTHON chooses the
# interpreter. `--device cpu` is a dry run of the same steps, and its results say so.
set -euo pipefail

if [[ $# -lt 1 || $1 == -* ]]; then
  sed -n '2,9s/^# \{0,1\}//p' "$0" >&2
  exit 2
fi
out=$1
shift
python=${PYTHON:-python3}
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
mkdir -p "$out"
out=$(cd "$out" && pwd)
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

"$python" "$root/scripts/gpu_check.py" needs "$@"

# The package is tested as installed: nothing below runs in the checkout's root, where Python would
# find the sources first. Extra packages in PYTHONPATH stay visible behind it.
started=$SECONDS
"$python" -m pip install --quiet --no-build-isolation --no-deps --no-index \
  --config-settings=build-dir="$work/build" --target "$work/site" "$root"
export PYTHONPATH=$work/site${PYTHONPATH:+:$PYTHONPATH}
cd "$work"
"$python" "$root/scripts/gpu_check.py" run "$@" \
  --out "$out" --work "$work" --install-s $((SECONDS - started))
