#!/usr/bin/env bash
# Run the tests.
#   launch/test.sh [PYTEST ARGUMENT ...]
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
launch/install.sh test
export TORCH_EXTENSIONS_DIR=$PWD/.venv/torch_extensions
exec .venv/bin/python -m pytest "$@"
