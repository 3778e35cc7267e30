#!/bin/bash
# Run a stage under SLURM; it saves and asks to be started again when its time is nearly up.
#   sbatch configs/launch/slurm.sh configs/ppo.yaml runs/ppo
#SBATCH --job-name=lit-palm
#SBATCH --nodes=8
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --time=24:00:00
#SBATCH --signal=USR1@300
#SBATCH --requeue
#SBATCH --output=%x-%j.log
set -euo pipefail
stage=${1:?a configuration, such as configs/ppo.yaml}
run=${2:?the folder of the run, where last.ckpt is kept}
resume=()
if [ -e "$run/last.ckpt" ]; then resume=(--ckpt_path="$run/last.ckpt"); fi
srun lit-palm fit --config "$stage" --config configs/strategy/multi-node.yaml \
  --config configs/callbacks/guards.yaml "${resume[@]}"
