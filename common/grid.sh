# How replicate.sh runs: what is to be trained is queued, and trained by `work`, several at a time.
# Variables: scale, list (any text: print, do nothing), preset; script and evaluate are changed by a scale.

script=lam_vlm.py evaluate="eval.py --media 0" runs=()
[[ ! $list ]] || set -f # patterns are printed as they are
run_now() { echo python "$@" && { [[ $list ]] || python "$@"; }; }
collect() { run_now collect.py $preset "$@"; } # FLAGS: makes a data set, or adds embeddings to one
embed() { for id in ${ENCODERS:-}; do collect --encoder "$id" ${ENCODER_FLAGS:-} "$@"; done; }
named() { basename "$1" | tr -cs 'A-Za-z0-9.\n' '-'; } # as the embeddings of a hub id are
train() { # NAME FLAGS: queues a run of $script in runs/SCALE/NAME
  runs+=("$script $*")
  [[ ! $list ]] || echo python $script $preset "${@:2}" --out "runs/$scale/$1"
}
one_run() { # SCRIPT NAME FLAGS: trains, rolls out, keeps the scores; what it prints is in runs/SCALE/NAME.log
  local script=$1 name=$2 run=runs/$scale/$2 kept=results/$scale/runs/$2 && shift 2
  [[ ! -e $kept/summary.json ]] || return 0
  if ! { python $script $preset "$@" --out "$run" &&
    python $evaluate --runs "$run" --workers 1 --out "$run/results"; } > "$run.log" 2>&1; then
    echo "FAILED: $name: $(tail -n 1 "$run.log")" >&2 && return 1
  fi
  mkdir -p "$kept"
  [[ ! -e $run/rollouts.csv ]] || cp "$run/rollouts.csv" "$kept"
  cp "$run/args.json" "$run/summary.json" "$kept"
  echo "[$(count_kept)/$(wc -w <<< "$names"), $((($(date +%s) - begun) / 60)) min] $name"
}
count_kept() { # of the queue's $names, those whose files are in results/
  local name kept=0
  for name in $names; do [[ ! -e results/$scale/runs/$name/summary.json ]] || kept=$((kept + 1)); done
  echo $kept
}
work() { # trains what is queued
  local queue=("${runs[@]}") && runs=()
  [[ ! $list ]] && ((${#queue[@]})) || return 0
  jobs=${JOBS:-$(python -c "import os, torch; print(1 if torch.cuda.is_available() else os.cpu_count())")}
  ((jobs == 1)) || export OMP_NUM_THREADS=1 # several processes with several threads each fight for the cores
  mkdir -p "runs/$scale"
  names=$(printf '%s\n' "${queue[@]}" | cut -d " " -f 2)
  local kept=$(count_kept)
  ((kept == 0)) || echo "$kept of ${#queue[@]} runs are in results/$scale/runs already, and skipped"
  export scale preset evaluate names begun=$(date +%s) && export -f one_run count_kept
  printf '%s\n' "${queue[@]}" | xargs -P "$jobs" -L 1 bash -c 'one_run "$@"' _ ||
    { echo "replicate.sh: some runs failed, see above; the same line goes on" >&2 && exit 1; }
}
best_view() { # NAME: what the FDM sees in the best of NAME-{z,target,frame}, by the lowest budget's labels; or z
  python - {results/$scale/runs,runs/$scale}/$1- << 'EOF'
import json, pathlib, sys
def nmse(view):
    for beginning in sys.argv[1:]:
        path = pathlib.Path(beginning + view + "/summary.json")
        if path.exists():
            return next(iter(json.loads(path.read_text())["labelled_probe_nmse"].values()))
    return 2
print(min(("z", "target", "frame"), key=nmse))
EOF
}
