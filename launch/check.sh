#!/usr/bin/env bash
# Check every file without running it: lint, format, types, import contracts.
#   launch/check.sh
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
launch/install.sh test dev
export PATH=$PWD/.venv/bin:$PATH
ruff check
ruff format --check
lint-imports
pyright
