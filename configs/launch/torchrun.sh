#!/bin/bash
# Run a stage with torchrun; start it on each machine with the address of the first one.
#   bash configs/launch/torchrun.sh configs/ppo.yaml runs/ppo NUM_NODES FIRST_MACHINE
set -euo pipefail
stage=${1:?a configuration, such as configs/ppo.yaml}
run=${2:?the folder of the run, where last.ckpt is kept}
nodes=${3:-1}
first=${4:-localhost}
resume=()
if [ -e "$run/last.ckpt" ]; then resume=(--ckpt_path="$run/last.ckpt"); fi
torchrun --nnodes="$nodes" --nproc_per_node=8 --rdzv_backend=c10d --rdzv_endpoint="$first:29500" \
  -m lit_palm fit --config "$stage" --config configs/strategy/fsdp.yaml \
  --trainer.num_nodes="$nodes" --trainer.strategy.init_args.data_parallel_size=$((8 * nodes)) "${resume[@]}"
