#!/usr/bin/env bash
# Fine-tune and evaluate a small model from scratch: two processes on CPU, DeepSpeed ZeRO-2 (DDP where DeepSpeed is not
# installed), no network.
#   launch/demo.sh [--section.key VALUE ...]
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
launch/install.sh
export PATH=$PWD/.venv/bin:$PATH TORCH_EXTENSIONS_DIR=$PWD/.venv/torch_extensions
export HF_HUB_OFFLINE=1 DS_ACCELERATOR=cpu

# Nothing is ever overwritten: the second demo goes to runs/demo-2.
output_dir=runs/demo
for ((n = 2; ; n++)); do
    [ -e "$output_dir" ] || break
    output_dir=runs/demo-$n
done
# One process per core, so that the two do not fight over them.
cores=$(getconf _NPROCESSORS_ONLN)
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((cores > 2 ? cores / 2 : 1))}
config=cpu_zero2
python -c 'import sys; from qa_dist.installed import has_deepspeed; sys.exit(not has_deepspeed())' || config=cpu_ddp
exec accelerate launch --config_file configs/accelerate/$config.yaml \
    -m qa_dist train --config configs/demo.yaml --run.output_dir "$output_dir" "$@"
