#!/usr/bin/env bash
# Train on all GPUs of this machine (without any: on its CPU): finds them, picks the engine, goes on where it was.
#   launch/local.sh --config RUN.yaml [--section.key VALUE ...]
# Settings, by environment:
#   LAUNCH_CONFIG   an Accelerate launch config, or the name of one in configs/accelerate   [auto: what fits]
#   NUM_PROCESSES   processes                                                               [one for each GPU]
#   RESUME          auto, none, hub or a path                                               [auto]
#   DRY_RUN         1: print the command line, and start nothing
# Ctrl-C stops after the step that is being done, with a checkpoint; the same command goes on from there.
set -euo pipefail
project=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
if [ ! -x "$project/.venv/bin/qa-dist" ] && ! command -v qa-dist >/dev/null; then
    (cd "$project" && launch/install.sh)
fi
[ -x "$project/.venv/bin/qa-dist" ] && export PATH=$project/.venv/bin:$PATH
launch=(qa-dist launch --config_file "${LAUNCH_CONFIG:-auto}")
[ -n "${NUM_PROCESSES:-}" ] && launch+=(--num_processes "$NUM_PROCESSES")
[ "${DRY_RUN:-0}" = 1 ] && launch+=(--dry_run)
exec "${launch[@]}" train --resume "${RESUME:-auto}" "$@"
