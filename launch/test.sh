#!/usr/bin/env bash
# Run the tests.
#   launch/test.sh [--fast | --all] [PYTEST ARGUMENT ...]
# By default all tests but those marked `slow`; --all adds these (whole matrices, kill loops, SLURM, a browser, the wheel);
# --fast runs the unit tests alone. WORKERS: tests that run at a time [one for each core, at least 2, at most 8].
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
selection=(-m "not slow")
case ${1:-} in
    --all) selection=(); shift ;;
    --fast) selection=(-m "not slow" tests/unit); shift ;;
esac
launch/install.sh test
cores=$(getconf _NPROCESSORS_ONLN)
workers=${WORKERS:-$((cores < 2 ? 2 : cores > 8 ? 8 : cores))}
export PATH=$PWD/.venv/bin:$PATH TORCH_EXTENSIONS_DIR=$PWD/.venv/torch_extensions
# The tests of a file share runs, so each file goes to one worker, in the order of conftest.py: the longest ones first.
exec python -m pytest -n "$workers" --dist loadfile --no-loadscope-reorder ${selection[@]+"${selection[@]}"} "$@"
