#!/usr/bin/env bash
# Every command behind the tables and figures of the README, one a cell.
#   bash replicate.sh screen           bc-all on MT10: the first three tasks that it solves in 80 % of 50 episodes are those of `quick`
#   bash replicate.sh quick            the main figure at CPU scale: 3 tasks, 3 seeds, 2, 4 and 8 labelled episodes
#   bash replicate.sh ablations        one-flag variants, most on drawer-open, 3 seeds, beside the runs of `quick`
#   bash replicate.sh encoders         targets ranked by the probes of stage 1
#   bash replicate.sh paper            the arms of the main figure at the paper's scale, Molmo's among them (GPU; DAVIS is downloaded)
#   bash replicate.sh quick --list     prints the commands instead, one a line, in order
# What is finished is skipped, what was cut off goes on: run the same line again. JOBS cells train at a time, with one thread each (default: as
# many as there are cores, one on a GPU); TASKS="push reach" picks other tasks; ENCODERS="llava-hf/llava-1.5-7b-hf ..." adds pretrained encoders to
# quick, paper (VLMs: best and blind prompt) and encoders (any), ENCODER_FLAGS="--trust-remote-code ..." goes with them.
set -euo pipefail
cd "$(dirname "$0")"
scale=${1:-quick}
[[ $scale =~ ^(screen|quick|ablations|encoders|paper)$ ]] || { echo "replicate.sh: unknown scale '$scale'; screen, quick, ablations, encoders or paper" >&2; exit 1; }
seeds="0 1 2"
lam="python lam_vlm.py" data=data/main
mt10="reach push pick-place door-open drawer-open drawer-close button-press-topdown peg-insert-side window-open window-close"

case $scale in
screen) tasks=${TASKS:-${mt10/peg-insert-side /}} data=data/screen ;; # the expert of peg-insert-side needs more than the 150 steps of quick
quick) tasks=${TASKS:-door-open drawer-open drawer-close} budgets="2 4 8" ;;
ablations) tasks=${TASKS:-door-open drawer-open drawer-close} budgets="2 8" ;; # the data of quick, so its tasks
encoders) tasks=${TASKS:-drawer-open} data=data/encoders ;;
paper)
  tasks=${TASKS:-$mt10}
  budgets="16 32" lam="python lam_vlm.py paper" data=data/paper
  ENCODERS=${ENCODERS-allenai/Molmo-7B-D-0924} ENCODER_FLAGS=${ENCODER_FLAGS---trust-remote-code} ;;
esac
preset=$([[ $scale == paper ]] && echo "paper " || true)

prompts=$([[ $scale == ablations || $scale == encoders ]] && echo "best positive arm object blind" || echo "best blind")

make_data=("python collect.py ${preset}--tasks $tasks --prompt $prompts --out $data")
make_clean="python collect.py ${preset}--tasks $tasks --videos none --encoder none --out $data-clean"
cells=()
if [[ $scale == ablations || $scale == encoders ]]; then
  for kept in 0.05 0.1 0.2 0.5 1; do make_data+=("python collect.py --tasks $tasks --background-kept $kept --out $data"); done
fi
if [[ $scale == ablations ]]; then
  on=$([[ " $tasks " == *" drawer-open "* ]] && echo drawer-open || echo "${tasks%% *}")
  make_data+=("python collect.py --tasks $on --video-step 0 --out $data-still" "python collect.py --tasks $on --clips 1 --out $data-1clip")
  for area in 25 50; do make_data+=("python collect.py --tasks $on --video-area 0.$area --out $data-${area}area"); done
  make_data+=("$make_clean")
  make_data+=("python collect.py --tasks ${tasks%% *} --camera-distance 0.6 --out $data-wide") # door-open, where LAPO does best
fi
if [[ $scale == encoders ]]; then
  make_data+=("python collect.py --tasks $tasks --encoder random --layers -1 -7 --pools cls mean --out $data") # a floor: weights never trained
elif [[ $scale == screen ]]; then
  make_data=("python collect.py --tasks $tasks --encoder none --out $data")
  for task in $tasks; do cells+=("$lam --data $data --tasks $task --labelled-episodes all --method bc --out runs/screen_$task"); done
elif [[ $scale == ablations ]]; then
  for seed in $seeds; do
    cell="$lam --data $data --tasks $on --seed $seed --labelled-episodes"
    for dim in 2 4 128; do cells+=("$cell $budgets --latent-dim $dim --arm z$dim"); done
    cells+=("$cell 2 4 8 16 32")                                                    # z 16, the reference, over the label budget
    for prompt in positive arm object blind; do cells+=("$cell $budgets --encoder oracle_$prompt"); done
    for kept in 0.05 0.1 0.2 0.5 1; do cells+=("$cell $budgets --encoder oracle-a${kept}_best"); done
    for k in 3 10; do cells+=("$cell $budgets --idm-horizon $k --arm k$k"); done
    for budget in $budgets; do
      cells+=("$cell $budget --target pixels --supervision 1")                      # laom: action supervision of stage 1
      cells+=("$cell $budget --supervision 1")                                      # the same beside the oracle's embedding
    done
    cells+=("$cell $budgets --fdm-dropout 0 --arm fdm-sees-target")                 # the paper's FDM
    cells+=("$cell $budgets --fdm-dropout 0 --fdm-input pixels --arm fdm-sees-pixels")
    cells+=("$cell $budgets --target pixels")                                       # lapo, as in quick
    for task in $tasks; do                                                          # LAPO's own FDM, on all tasks, also for the yardstick
      own="--tasks $task --seed $seed --labelled-episodes 2 4 8 --target pixels --fdm-dropout 0"
      cells+=("$lam --data $data $own --arm lapo-fdm-sees-frame" "$lam --data $data-clean $own --arm lapo-clean-data-fdm-sees-frame")
    done
    for amount in still 1clip 25area 50area; do                                     # amount of distraction
      cells+=("${cell/$data/$data-$amount} $budgets --arm lapo-oracle-$amount")
      cells+=("${cell/$data/$data-$amount} $budgets --target pixels --arm lapo-$amount")
    done
    wide="$lam --data $data-wide --tasks ${tasks%% *} --seed $seed --labelled-episodes $budgets"
    cells+=("$wide --arm lapo-oracle-wide" "$wide --target pixels --arm lapo-wide") # a camera farther away: more background
    cells+=("$wide --target pixels --fdm-dropout 0 --arm lapo-wide-fdm-sees-frame")
    for lr in 3e-4 3e-3; do                                                         # learning rates around 1e-3, judged by the probes alone
      cells+=("$cell 2 --stages lam --lr $lr --arm lapo-oracle-lr$lr" "$cell 2 --stages lam --lr $lr --target pixels --arm lapo-lr$lr")
    done
  done
  for task in $tasks; do # an FDM that sees the current frame in the other arms of quick, judged by the probes alone
    cell="$lam --data $data --tasks $task --labelled-episodes 2 --stages lam --fdm-dropout 0"
    cells+=("$cell --arm lapo-oracle-dropout0" "$cell --encoder oracle_blind --arm lapo-oracle-blind-dropout0")
    cells+=("$cell --target clean --arm lapo-clean-target-dropout0" "$cell --target masked --arm masklam-dropout0")
  done
else
  make_data+=("$make_clean")
  for seed in $seeds; do
    for task in $tasks; do
      cell="$lam --data $data --tasks $task --seed $seed --labelled-episodes"
      cells+=("$cell $budgets")                                    # lapo-oracle: the embedding under the paper's best prompt
      cells+=("$cell $budgets --target pixels")                    # lapo
      cells+=("$cell all --method bc")                             # bc-all, the ceiling
      for budget in $budgets; do
        cells+=("$cell $budget --method bc")                       # bc-few, the floor
      done
      cells+=("$cell $budgets --target clean")                     # lapo-clean-target: the twin frame as the target
      cells+=("${cell/$data/$data-clean} $budgets --target pixels") # lapo-clean-data: no distractors anywhere
      cells+=("$cell $budgets --encoder oracle_blind")             # control: a prompt that names nothing
      cells+=("$cell $budgets --target masked")                    # masklam
      for id in ${ENCODERS:-}; do                                  # lapo-<encoder>, and its control
        name=$(basename "$id" | tr -cs 'A-Za-z0-9.\n' '-')
        cells+=("$cell $budgets --encoder ${name}_best" "$cell $budgets --encoder ${name}_blind")
      done
    done
  done
fi

if [[ $scale =~ ^(quick|encoders|paper)$ ]]; then
  for id in ${ENCODERS:-}; do
    make_data+=("python collect.py ${preset}--tasks $tasks --encoder $id --prompt $prompts ${ENCODER_FLAGS:-} --out $data")
  done
fi

evaluate="python eval.py ${preset}--out results/$scale"
case $scale in
quick) evaluate+=" --labelled $budgets all" ;; # `ablations` adds budgets to some of its runs
ablations) evaluate+=" --media 0" ;;           # no films of some thirty arms
esac

probe_cells() { # stage 1 alone, two seeds, for every embedding that the data set has by now
  local lam="python lam_vlm.py --data $data --stages lam --lam-updates 400 --labelled-episodes 2" seed target file
  for seed in 0 1; do
    for target in pixels clean masked; do cells+=("$lam --seed $seed --target $target --arm probe-$target"); done
    for file in "$data/${tasks%% *}"/shard_00000/embeddings/*.json; do
      [[ ! -e $file ]] || cells+=("$lam --seed $seed --encoder $(basename "$file" .json) --arm probe-$(basename "$file" .json)")
    done
  done
}
[[ $scale != encoders ]] || probe_cells

if [[ ${2:-} == --list ]]; then
  printf '%s\n' "${make_data[@]}" "${cells[@]}" "$evaluate"
  exit
fi

if [[ -z ${VIRTUAL_ENV:-} ]] && ! python -c "import torch, metaworld" 2> /dev/null; then
  python3 -m venv .venv
  . .venv/bin/activate
  pip install --quiet -r requirements.txt
fi
for command in "${make_data[@]}"; do
  echo "+ $command"
  $command
done

[[ $scale != encoders ]] || { cells=() && probe_cells; }

jobs=${JOBS:-$(python -c "import os, torch; print(1 if torch.cuda.is_available() else os.cpu_count())")}
[[ $jobs == 1 ]] || export OMP_NUM_THREADS=1 # several processes with several threads each fight for the cores
mkdir -p runs
done_file=runs/.replicate.$$ begun=$(date +%s) total=${#cells[@]}
: > "$done_file"
trap 'rm -f "$done_file"' EXIT
export done_file begun total
train_cell() { # one cell, its progress bars left out; then what remains
  local facts
  facts=$($1 2>&1 | tr '\r' '\n' | tail -n 1; exit "${PIPESTATUS[0]}") || { echo "FAILED: $1: $facts" >&2; return 1; }
  echo "${facts%%:*} $1" >> "$done_file" # the run's folder, and its command
  local n passed
  n=$(wc -l < "$done_file") passed=$(($(date +%s) - begun))
  echo "[$n/$total, $((passed / 60)) min, about $((passed * (total - n) / n / 60)) min to go] $facts"
}
export -f train_cell
printf '%s\n' "${cells[@]}" | xargs -P "$jobs" -d '\n' -I '{}' bash -c 'train_cell "$1"' _ '{}' ||
  { echo "replicate.sh: some cells failed, see above; the same line goes on" >&2; exit 1; }

mapfile -t runs < <(cut -d' ' -f1 "$done_file" | sort)
OMP_NUM_THREADS=1 $evaluate --runs "${runs[@]}"
