#!/usr/bin/env bash
# Installs the project the ways users do, each into an empty environment, and tries it from another
# directory: `pip install .`, the wheel, the sdist, and --no-build-isolation --no-deps.
#
#     scripts/check_install.sh [PYTHON]        default: python3
#
# torch comes first, from TORCH (default torch==2.13.0), so that the project must accept what is
# installed. Fails when anything of it changes afterwards, when `moeserve --version` imports torch
# or takes 0.3 s (best of five), or when a model does not generate.
set -euo pipefail

python=${1:-python3}
torch=${TORCH:-torch==2.13.0}
source_dir=$(cd "$(dirname "$0")/.." && pwd)
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

check() { # NAME VENV: what must hold after an install
  local name=$1 bin=$2/bin
  cd /
  "$bin/python" -c "
import subprocess, sys, time
command = [sys.argv[1], '--version']
def timed():
    started_s = time.perf_counter()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - started_s
best_s = min(timed() for _ in range(5))
print(f'{sys.argv[2]}: moeserve --version in {best_s:.3f} s')
sys.exit(best_s >= 0.3)
" "$bin/moeserve" "$name"
  "$bin/moeserve" generate -p "Once upon a time" -n 12 --temperature 0 >"$work/answer"
  test -s "$work/answer"
  echo "$name: $(head -c 60 "$work/answer" | tr '\n' ' ')"
  test "$("$bin/python" -c 'import torch; print(torch.__version__)')" = "$torch_version"
  if [[ $torch_version == *+cpu ]] && "$bin/pip" list 2>/dev/null | grep -qi '^nvidia-'; then
    echo "$name: CUDA packages were pulled in beside a CPU build of torch" >&2
    exit 1
  fi
}

new_venv() { # VENV
  "$python" -m venv "$1"
  "$1/bin/pip" install -q "$torch"
}

new_venv "$work/plain"
torch_version=$("$work/plain/bin/python" -c 'import torch; print(torch.__version__)')
echo "torch $torch_version, $("$python" --version)"
"$work/plain/bin/pip" install -q "$source_dir"
check "pip install ." "$work/plain"

"$work/plain/bin/pip" install -q build "scikit-build-core>=0.11" "nanobind>=2.4" "cmake>=3.18" ninja
"$work/plain/bin/python" -m build --no-isolation --outdir "$work/dist" "$source_dir" >"$work/log" ||
  { cat "$work/log"; exit 1; }

# The other ways differ in where the files come from, not in what they need: the same packages serve.
"$work/plain/bin/pip" uninstall -q -y moeserve
"$work/plain/bin/pip" install -q --no-deps "$work"/dist/*.whl
check "wheel" "$work/plain"
"$work/plain/bin/pip" uninstall -q -y moeserve
"$work/plain/bin/pip" install -q --no-deps "$work"/dist/*.tar.gz
check "sdist" "$work/plain"
"$work/plain/bin/pip" uninstall -q -y moeserve
"$work/plain/bin/pip" install -q --no-build-isolation --no-deps "$source_dir"
check "--no-build-isolation --no-deps" "$work/plain"
echo "all installs work"
