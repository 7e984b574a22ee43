#!/usr/bin/env bash
# Install qa_dist with the tested versions into .venv, which is made if it isn't there.
#   launch/install.sh [EXTRA ...]        extras: test, dev
# Prints a line for each stage, with its duration. Does nothing when that has been done before and neither pyproject.toml
# nor the constraints have changed since; goes on where an interrupted attempt has stopped. Without g++ it leaves out
# DeepSpeed, and the next call with g++ adds it.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

extras=$(IFS=,; echo "$*")
venv=.venv
stamp=$venv/.installed-${extras:-none}
compiler=$(command -v g++ || true)
wanted="$(cat pyproject.toml launch/constraints.txt | cksum)${compiler:+ with DeepSpeed}"
for done in "$venv"/.installed-*; do # by this call or one with more extras
    [ -x "$venv/bin/accelerate" ] && [ -f "$done" ] || continue
    case $(cat "$done") in "$wanted" | "$wanted with DeepSpeed") ;; *) continue ;; esac
    for extra in "$@"; do
        case ",${done##*.installed-}," in *",$extra,"*) ;; *) continue 2 ;; esac
    done
    exit 0
done

python=${PYTHON:-}
for candidate in python3 python3.11 python3.12 python3.13 python; do
    [ -n "$python" ] && break
    if "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then python=$candidate; fi
done
if [ -z "$python" ]; then
    echo "launch/install.sh: no Python 3.11 or newer was found; install one, or name it: PYTHON=/path/to/python $0" >&2
    exit 2
fi
if [ -z "$compiler" ]; then
    echo "launch/install.sh: g++ was not found, and DeepSpeed is left out, which is compiled with it. DDP and FSDP2 work" >&2
    echo "without DeepSpeed. To add it, install g++ and run the same command again" >&2
fi

log=$(mktemp "${TMPDIR:-/tmp}/qa_dist-install-XXXXXX.log")
exec 3>&2 # a signal may come while the output goes into the log
trap 'printf "\nlaunch/install.sh: interrupted; the same command goes on from here\n" >&3; rm -f "$log"; exit 130' INT TERM

stage() { # NAME COMMAND [ARGUMENT ...]
    local name=$1 start=$SECONDS
    shift
    printf '  %-42s' "$name …"
    echo "--- $name" >>"$log"
    if "$@" >>"$log" 2>&1 </dev/null; then
        printf '%4d s\n' $((SECONDS - start))
        return
    fi
    printf 'failed after %d s\n' $((SECONDS - start))
    {
        sed -n "/^--- $name/,\$p" "$log" | tail -n 15 | sed 's/^/    /'
        echo "launch/install.sh: failed at \"$name\"; all of the output is in $log"
        echo "If packages cannot be downloaded, check the network, the proxy (HTTPS_PROXY) and pip's index (pip config list);"
        echo "if a disk is full, make room (TMPDIR names another place for temporary files). Then run the same command again:"
        echo "it goes on with what is missing. To start from nothing, remove $venv first."
    } >&2
    exit 1
}

make_environment() {
    # an interrupted attempt may have left a directory without a working Python
    "$venv/bin/python" -c 'import pip' 2>/dev/null || "$python" -m venv --clear "$venv"
}

# For builds too, such as DeepSpeed's. Wheels only: a source package could need, to be built, what is not pinned.
export PIP_CONSTRAINT=$PWD/launch/constraints.txt
pip() { "$venv/bin/python" -m pip install --quiet --no-input --disable-pip-version-check --no-build-isolation "$@"; }
wheels() { pip --only-binary :all: "$@"; }

# PyPI's torch for Linux brings gigabytes of CUDA packages. Without an NVIDIA GPU, take the CPU build: from the package
# sources that pip is set up with, if they have it, else from PyTorch's own index, which lacks what torch needs.
torch=$(grep '^torch==' launch/constraints.txt)
install_torch() {
    if [ "$(uname -s)" = Linux ] && ! nvidia-smi -L >/dev/null 2>&1; then
        "$venv/bin/python" -c "import importlib.metadata as m, sys; sys.exit(m.version('torch').split('+')[0] != '${torch#torch==}')" 2>/dev/null ||
            wheels --no-deps "$torch+cpu" ||
            wheels --no-deps "$torch" --index-url "${TORCH_CPU_INDEX:-https://download.pytorch.org/whl/cpu}" || return
    fi
    wheels "$torch"
}

install_package() { wheels --editable ".${extras:+[$extras]}"; }

# Compile DeepSpeed's communication extension now, in one process, rather than in all ranks of the first run. It
# depends on the environment's path, so one shared by several would be compiled again and again.
compile_extension() {
    export TORCH_EXTENSIONS_DIR=$PWD/$venv/torch_extensions
    # of a compilation that was interrupted, for whose end the next one would wait for ever
    [ ! -d "$TORCH_EXTENSIONS_DIR" ] || find "$TORCH_EXTENSIONS_DIR" -name lock -delete
    DS_ACCELERATOR=cpu PATH=$PWD/$venv/bin:$PATH "$venv/bin/python" -W ignore -c \
        'from deepspeed.ops.op_builder.cpu import ShareMemCommBuilder; ShareMemCommBuilder().load()'
}

echo "installing qa_dist${extras:+ with extras $extras} into $venv"
stage "virtual environment" make_environment
stage "build tools" wheels pip setuptools wheel hatchling
stage "PyTorch" install_torch
[ -z "$compiler" ] || stage "DeepSpeed (built from source)" pip --no-deps "$(grep '^deepspeed==' launch/constraints.txt)"
[ -z "$compiler" ] || extras=deepspeed${extras:+,$extras}
stage "qa_dist and its other dependencies" install_package
[ -z "$compiler" ] || stage "compiling DeepSpeed's extension" compile_extension
echo "$wanted" >"$stamp"
rm -f "$log"
