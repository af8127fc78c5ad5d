#!/usr/bin/env bash
# Every command behind every table and figure. A scale is a few loops below, and a `train` in them is one run.
#   bash replicate.sh near | main | univla | latbot | motion | ablations | views | encoders | hard | mt10 | paper
#   bash replicate.sh main --list     prints the commands instead, one a line: collect.py's first, eval.py last
# A run is trained and rolled out; its small files are then kept in results/SCALE/runs/NAME. A run that has them
# is skipped, on another machine too: delete them to run it again. What was cut off goes on. JOBS=4: runs at a time,
# one thread each (default: as many as cores; with CUDA one). SEEDS=0 TASKS=door-open: train these alone, where a
# scale trains a model for each seed or task.
# ENCODERS="llava-hf/llava-1.5-7b-hf" ENCODER_FLAGS="...": more encoders, for near, main, encoders and paper.
set -euo pipefail
cd "$(dirname "$0")"
scale=${1:-none} list=${2:-} preset="" seeds=${SEEDS:-0 1 2}

. common/grid.sh

main_data() { collect --tasks $six $far --prompt best blind --out data/main; } # also of univla, latbot and mt10
clean_data() { collect --tasks $six $far --videos none --encoder none --out data/main-clean; }

far="--camera-distance 0.6 --size 96"
tasks="door-open drawer-open drawer-close" six="$tasks button-press-topdown window-open window-close"
case $scale in
near | main | paper) # every method: three tasks and 64 px; six, 96 px, the camera 0.6 m farther away; all of MT10
  view="" budgets="2 4 8" data=data/$scale batch=""
  if [[ $scale == main ]]; then tasks=$six view=$far batch="--batch-size 64"; fi
  if [[ $scale == paper ]]; then
    preset=paper evaluate="eval.py paper --media 0" budgets="16 32" tasks="$six reach push pick-place peg-insert-side"
    ENCODERS=${ENCODERS-allenai/Molmo-7B-D-0924} ENCODER_FLAGS=${ENCODER_FLAGS---trust-remote-code}
  fi
  collect --tasks $tasks $view --prompt best blind --out $data
  embed --tasks $tasks $view --prompt best blind --out $data
  collect --tasks $tasks $view --videos none --encoder none --out $data-clean
  if [[ $scale == paper ]]; then # what each encoder's FDM is to see: by probes on the labelled episodes of one task
    for id in oracle ${ENCODERS:-}; do for sees in z target frame; do
      on="--data $data --tasks drawer-open --stages lam --lam-updates 5000 --labelled-episodes ${budgets%% *}"
      on+=" --encoder $(named $id)_best --fdm-sees $sees"
      train view-$(named $id)-$sees $on --variant view-$(named $id)-$sees
    done; done
    work
  fi
  for seed in $seeds; do for task in ${TASKS:-$tasks}; do
    run=${task}_s$seed on="--tasks $task --seed $seed $batch --labelled-episodes"
    for id in oracle ${ENCODERS:-}; do for prompt in best blind; do # blind: a prompt that names nothing
      to="--encoder $(named $id)_$prompt"
      [[ $scale != paper ]] || to+=" --fdm-sees $(best_view view-$(named $id))"
      train lapo-$(named $id)-${prompt}_$run --data $data $on $budgets $to
    done; done
    for sees in z frame; do # LAPO's own FDM sees the frame o_t
      train lapo-${sees}_$run --data $data $on $budgets --target pixels --fdm-sees $sees
      train lapo-clean-data-${sees}_$run --data $data-clean $on $budgets --target pixels --fdm-sees $sees
    done
    train lapo-clean-target_$run --data $data $on $budgets --target clean
    train masklam_$run --data $data $on $budgets --target masked
    for budget in $budgets all; do train bc-${budget}_$run --data $data $on $budget --method bc; done
  done; done ;;
univla) # one model of the six tasks of main, of each method; 20 test episodes a task
  main_data; clean_data; evaluate+=" --episodes 20" updates="--lam-updates 2000 --bc-updates 6000 --batch-size 64"
  for seed in $seeds; do
    on="--data data/main --seed $seed $updates --labelled-episodes"
    script=univla.py
    train univla_s$seed $on 2 4 8
    train univla-z_s$seed $on 2 4 8 --fdm-sees z
    train univla-no-language_s$seed $on 2 4 8 --text none
    train univla-ti_s$seed $on 2 4 8 --cloned ti
    script=lam_vlm.py
    train lapo-oracle-pooled_s$seed $on 2 4 8 --variant lapo-oracle-pooled
    train lapo-pooled_s$seed $on 2 4 8 --target pixels --variant lapo-pooled
    for few in 2 4 8; do train bc-few-pooled-${few}_s$seed $on $few --method bc --variant bc-few-pooled; done
  done
  on="--data data/main-clean --seed 0 $updates --labelled-episodes 2 4 8"
  for z in "" -z512; do for of in "" -untrained; do # of one update: what a random view of the change is worth
    name=lapo-pooled$z$of-clean-data
    train ${name}_s0 $on ${of:+--lam-updates 1} --target pixels ${z:+--latent-dim 512} --variant $name
  done; done
  script=univla.py
  train univla-clean-data_s0 $on
  train univla-code-clean-data_s0 $on --clone-as code
  train univla-ti-code-clean-data_s0 $on --cloned ti --clone-as code
  train univla-untrained-clean-data_s0 $on --lam-updates 1 --variant univla-untrained-clean-data
  train univla-untrained_s0 ${on/-clean/} --lam-updates 1 --variant univla-untrained
  train univla-code_s0 ${on/-clean/} --clone-as code
  train univla-long_s0 ${on/-clean/} --lam-updates 6000 --stages tc --variant univla-long ;; # its probes alone
latbot) # the same tasks; its labels train all stages, so that each budget is a run
  main_data; clean_data; evaluate+=" --episodes 20" script=latbot.py stem="--stem 6" # feature maps as of 64 px
  all="--data data/main --seed 0 $stem --labelled-episodes all"
  train no-latents-all $all --latents none --variant no-latents-all # can this policy do the tasks at all?
  train latbot-all $all --variant latbot-all
  train latbot-trains-all $all --student trains --variant latbot-trains-all
  for seed in $seeds; do for budget in 2 8; do for clean in "" -clean; do
    [[ ! $clean || $seed == 0 ]] || continue
    on="--data data/main$clean --seed $seed $stem --labelled-episodes $budget" run=$clean-${budget}_s$seed
    train no-latents$run $on --latents none
    if [[ ! $clean ]]; then
      train latbot-text-all-trains$run $on --text all --student trains
      for text in all none; do train no-latents-text-$text$run $on --latents none --text $text; done
    fi
    for trains in "" "--student trains"; do # in stage 3 the student as well, as without latents
      run=${trains:+-trains}$clean-${budget}_s$seed
      train latbot$run $on $trains
      [[ $clean || $trains && $seed != 0 ]] || train latbot-oracle$run $on $trains --target embedding
      [[ $trains || $seed == 0 ]] || continue
      train undivided$run $on $trains --latents undivided --action-weight 0
      train split$run $on $trains --action-weight 0
      train actions$run $on $trains --latents undivided
    done
  done; done; done ;;
motion) # theorem T7: what the latents of latbot.py's teacher leak, drawer-open
  collect --out data/motion
  script=latbot.py
  for seed in ${SEEDS:-0}; do for budget in all 8; do
    on="--data data/motion --seed $seed --labelled-episodes $budget --stages teacher" run=-${budget}_s$seed
    for dim in 2 4 8 32; do # of the motion latent beside 64 of the scene; of either; of one undivided latent
      train motion$dim$run $on --motion-dim $dim --variant motion$dim-$budget
      train alone$dim$run $on --motion-dim $dim --actions-see motion --variant alone$dim-$budget # as T7 assumes
      train equal$dim$run $on --motion-dim $dim --scene-dim $dim --variant equal$dim-$budget
      half="--motion-dim $((dim / 2)) --scene-dim $((dim / 2))"
      train undivided$dim$run $on --latents undivided $half --variant undivided$dim-$budget
    done
    train undivided72$run $on --latents undivided --variant undivided72-$budget
    for w in 0 0.1 10; do train weight$w$run $on --action-weight $w --variant weight$w-$budget; done
  done; done
  work
  run_now linear_lam.py --teachers results/motion/runs/* --out results/motion ;;
views) # what the FDM may see (DETAIL 4), by probes; 512 and 64 episodes with the same held-out ones
  corners='embedding-(z|frame)-(64-noise0|512-noise0.3)-gap1_drawer-open' # four of the runs, also by success
  tasks=${TASKS:-drawer-open door-open}
  for noise in 0 0.3; do collect --tasks $tasks --episodes-per-task 640 --noise $noise --out data/views$noise; done
  for noise in 0 0.3; do for task in $tasks; do for episodes in 64 512; do for gap in 1 4; do
    on="--data data/views$noise --tasks $task --train-episodes $episodes --frame-gap $gap"
    run_now linear_lam.py $on --out results/views/linear/$episodes-noise$noise-gap${gap}_$task
    for sees in z target frame; do for target in embedding clean; do
      run=$target-$sees-$episodes-noise$noise-gap$gap stages="--stages lam"
      [[ ! ${run}_$task =~ $corners ]] || stages="--labelled-episodes 2 4 8"
      train ${run}_$task $on --fdm-sees $sees --target $target --batch-size 64 --lam-updates 2000 $stages --variant $run
    done; done
  done; done; done; done ;;
ablations) # one-flag variants on drawer-open
  data=data/near
  collect --tasks $tasks --prompt best positive arm object blind --out $data
  for kept in 0.05 0.1 0.2 0.5 1; do collect --tasks $tasks --background-kept $kept --out $data; done
  collect --video-step 0 --out $data-still
  collect --clips 1 --out $data-1clip
  for area in 0.25 0.5; do collect --video-area $area --out $data-area$area; done
  for seed in $seeds; do
    on="--data $data --tasks drawer-open --seed $seed --labelled-episodes"
    train lapo-oracle_s$seed $on 2 4 8 16 32
    train lapo_s$seed $on 2 8 --target pixels
    for dim in 2 4 128; do train z${dim}_s$seed $on 2 8 --latent-dim $dim --variant z$dim; done
    for k in 3 10; do train k${k}_s$seed $on 2 8 --idm-horizon $k --variant k$k; done
    for sees in target frame; do train fdm-sees-${sees}_s$seed $on 2 8 --fdm-sees $sees; done
    for prompt in positive arm object blind; do train ${prompt}_s$seed $on 2 8 --encoder oracle_$prompt; done
    for kept in 0.05 0.1 0.2 0.5 1; do train kept${kept}_s$seed $on 2 8 --encoder oracle-a${kept}_best; done
    for target in pixels embedding; do
      for budget in 2 8; do train laom-$target-${budget}_s$seed $on $budget --target $target --supervision 1; done
      for lr in 3e-4 3e-3; do
        train $target-lr${lr}_s$seed $on 2 --stages lam --target $target --lr $lr --variant $target-lr$lr
      done
      for less in still 1clip area0.25 area0.5; do # less distraction
        flags="--seed $seed --labelled-episodes 2 8 --target $target --variant $target-$less"
        train $target-${less}_s$seed --data $data-$less $flags
      done
    done
  done
  for task in $tasks; do for sees in z target; do # DETAIL 4, probes alone
    on="--data $data --tasks $task --stages lam --fdm-sees $sees --variant"
    for target in clean masked; do train $target-${sees}_$task $on $target-$sees --target $target; done
    for prompt in best blind; do train $prompt-${sees}_$task $on $prompt-$sees --encoder oracle_$prompt; done
  done; done ;;
encoders) # targets by the probes of stage 1, and what they must deliver
  data=data/encoders prompts="best positive arm object blind" keys="" steady="oracle oracle-bf16"
  collect --prompt $prompts --out $data
  embed --prompt $prompts --out $data
  collect --encoder random --layers -1 -7 --pools cls mean --out $data # a floor: weights never trained
  collect --encoder random --layers -1 -7 --pools cls mean --blank oracle --out $data
  collect --bfloat16 --out $data
  for kept in 0.05 0.1 0.2 0.5 1; do
    collect --background-kept $kept --out $data
    keys+=" oracle-a${kept}_best"
  done
  for level in 0.25 0.5 1 2 4; do
    collect --noise-std $level --out $data
    collect --tremble $level --out $data
    steady+=" oracle-noise$level oracle-tremble$level"
  done
  keys+=" $(echo random{_noprompt,-blank_best}_L-{1,7}_{cls,mean})"
  for id in oracle ${ENCODERS:-}; do for prompt in $prompts; do keys+=" $(named $id)_$prompt"; done; done
  run_now linear_lam.py --data $data --out results/encoders
  for seed in ${SEEDS:-0 1}; do
    on="--data $data --seed $seed --stages lam --lam-updates 400 --variant"
    for target in pixels clean masked; do train ${target}_s$seed $on $target --target $target; done
    for key in $keys; do train ${key}_s$seed $on $key --encoder $key; done
  done
  for seed in $seeds; do # trained to the end: how steady a target must be, and whether a longer gap helps
    on="--data $data --seed $seed --labelled-episodes 2 8"
    for key in $steady; do train lapo-${key}_s$seed $on --encoder ${key}_best; done
    for gap in 2 4; do for key in oracle oracle-tremble1 oracle-tremble4; do
      train $key-gap${gap}_s$seed $on --encoder ${key}_best --frame-gap $gap --variant $key-gap$gap
    done; done
    for key in random_noprompt random-blank_best; do train lapo-${key}_s$seed $on --encoder ${key}_L-7_mean; done
  done ;;
hard | mt10) # bc-all on all of MT10; hard: what the four tasks that main leaves out need, judged on other goals
  hard="reach push pick-place peg-insert-side" bc="--method bc --labelled-episodes all --batch-size 64"
  collect --tasks $hard $far --episodes-per-task 400 --max-steps 250 --encoder none --out data/mt10
  collect --tasks pick-place $far --episodes-per-task 1600 --max-steps 250 --encoder none --out data/mt10-1600
  few="--data data/mt10 $bc --bc-updates 5000 --train-episodes 320 --tasks"
  many="--data data/mt10-1600 $bc --bc-updates 5000 --train-episodes 1280 --tasks pick-place"
  if [[ $scale == hard ]]; then
    evaluate+=" --seed 1"
    for task in ${TASKS:-$hard}; do
      train 64_$task ${few/320/64} $task --variant 64
      train 320_$task $few $task --variant 320
      train 320-stack2_$task $few $task --frame-stack 2 --variant 320-stack2
      [[ $task != reach ]] || train 320-shift12_$task $few $task --max-shift 12 --variant 320-shift12
      [[ $task != peg-insert-side ]] || train 320-long_$task ${few/5000/15000} $task --variant 320-long
      [[ $task == pick-place ]] || continue
      train 1280_$task $many --variant 1280
      train 1280-stack2_$task $many --frame-stack 2 --variant 1280-stack2
    done
  else
    main_data
    for seed in $seeds; do for task in ${TASKS:-$six $hard}; do
      case $task in
      reach | push) on="$few $task --variant bc-all-320" ;;
      peg-insert-side) on="$few $task --frame-stack 2 --variant bc-all-320-stack2" ;;
      pick-place) on="$many --variant bc-all-1280" ;;
      *) on="--data data/main --tasks $task $bc" ;;
      esac
      train bc-all_${task}_s$seed $on --seed $seed
    done; done
  fi ;;
*) echo "replicate.sh: unknown scale '$scale'; see its head" >&2 && exit 1 ;;
esac

if [[ $list ]]; then echo "python $evaluate --out results/$scale --runs runs/$scale/*" && exit; fi
work
python $evaluate --out "results/$scale" --runs "results/$scale"/runs/*
