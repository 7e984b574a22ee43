#!/usr/bin/env bash
# Install qa_dist with the tested versions into .venv, which is made if it isn't there.
#   launch/install.sh [EXTRA ...]        extras: test, dev
# Does nothing when that has been done before and neither pyproject.toml nor the constraints have changed since.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

extras=$(IFS=,; echo "$*")
venv=.venv
stamp=$venv/.installed-${extras:-none}
wanted=$(cat pyproject.toml launch/constraints.txt | cksum)
if [ -x "$venv/bin/accelerate" ] && [ "$(cat "$stamp" 2>/dev/null)" = "$wanted" ]; then
    exit 0
fi

python=${PYTHON:-}
for candidate in python3 python3.11 python3.12 python3.13 python; do
    [ -n "$python" ] && break
    if "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then python=$candidate; fi
done
if [ -z "$python" ]; then
    echo "launch/install.sh: no Python 3.11 or newer was found; install one, or name it: PYTHON=/path/to/python $0" >&2
    exit 2
fi
if ! command -v g++ >/dev/null; then
    echo "launch/install.sh: g++ was not found; DeepSpeed compiles a small extension at first use. Install g++" >&2
    exit 2
fi

# an interrupted attempt may have left a directory without a working Python
"$venv/bin/python" -c 'import pip' 2>/dev/null || "$python" -m venv --clear "$venv"
pip() { "$venv/bin/python" -m pip install --quiet --quiet --disable-pip-version-check --constraint launch/constraints.txt "$@"; }

echo "installing qa_dist into $venv …"
# PyPI's torch for Linux brings gigabytes of CUDA packages. Without an NVIDIA GPU, take the CPU build: from the
# package sources that pip is set up with, if they have it, else from PyTorch's own index.
torch=$(grep '^torch==' launch/constraints.txt)
if [ "$(uname -s)" = Linux ] && ! nvidia-smi -L >/dev/null 2>&1; then
    "$venv/bin/python" -c "import importlib.metadata as m, sys; sys.exit(m.version('torch').split('+')[0] != '${torch#torch==}')" 2>/dev/null ||
        pip "$torch+cpu" 2>/dev/null ||
        pip "$torch" --index-url "${TORCH_CPU_INDEX:-https://download.pytorch.org/whl/cpu}"
fi
# DeepSpeed comes as source: its build must see the pinned versions too
export PIP_CONSTRAINT=$PWD/launch/constraints.txt
pip "$torch" setuptools wheel
# As an entry of the path: setuptools' default would be looked at after the current directory, in which a clone named
# qa_dist would be taken for the package.
pip --no-build-isolation --config-settings editable_mode=compat --editable ".${extras:+[$extras]}"
# Compile DeepSpeed's communication extension now, in one process, rather than in all ranks of the first run. It
# depends on the environment's path, so one shared by several would be compiled again and again.
export TORCH_EXTENSIONS_DIR=$PWD/$venv/torch_extensions
"$venv/bin/python" -W ignore - >/dev/null 2>&1 <<'PYTHON' || true
import os
os.environ["DS_ACCELERATOR"] = "cpu"
os.environ["PATH"] = os.path.join(os.getcwd(), ".venv", "bin") + os.pathsep + os.environ["PATH"]
from deepspeed.ops.op_builder.cpu import ShareMemCommBuilder
ShareMemCommBuilder().load()
PYTHON
echo "$wanted" >"$stamp"
