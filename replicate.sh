#!/usr/bin/env bash
# Every command behind the tables of the README, one a cell.
#   bash replicate.sh quick            the main table at CPU scale: all arms, 3 seeds, 2 and 8 labelled episodes
#   bash replicate.sh paper            the same arms at the paper's scale (GPU; DAVIS is downloaded)
#   bash replicate.sh quick --list     prints the commands instead, one a line, in order
# What is finished is skipped, what was cut off goes on: run the same line again.
set -euo pipefail
cd "$(dirname "$0")"
scale=${1:-quick}
[[ $scale == quick || $scale == paper ]] || { echo "replicate.sh: unknown scale '$scale'; quick or paper" >&2; exit 1; }
list=${2:-}
preset=$([[ $scale == paper ]] && echo "paper " || true)
data=data/$scale
tasks=${TASKS:-drawer-open}
[[ $scale == paper ]] && tasks=${TASKS:-reach push pick-place door-open drawer-open drawer-close button-press-topdown peg-insert-side window-open window-close}
budgets=$([[ $scale == paper ]] && echo "16 32" || echo "2 8")

commands=("python collect.py ${preset}--tasks $tasks --prompt best blind --out $data")
for task in $tasks; do
  for seed in 0 1 2; do
    lam="python lam_vlm.py ${preset}--data $data --tasks $task --seed $seed --labelled-episodes"
    commands+=("$lam $budgets")                                  # LAPO + embedding (the oracle under the paper's best prompt)
    commands+=("$lam $budgets --target pixels")                  # LAPO
    commands+=("$lam all --method bc")                           # ceiling
    for budget in $budgets; do
      commands+=("$lam $budget --method bc")                     # floor
    done
    commands+=("$lam $budgets --target clean")                   # the twin frame as the target
    commands+=("$lam $budgets --encoder oracle_blind")           # control: a prompt that names nothing
    commands+=("$lam $budgets --target masked")                  # MaskLAM
  done
done
commands+=("python eval.py ${preset}--out results/$scale")

n=0
for command in "${commands[@]}"; do
  n=$((n + 1))
  if [[ $list == --list ]]; then echo "$command"; continue; fi
  echo "[$n/${#commands[@]}, $((SECONDS / 60)) min so far] $command"
  $command
done
