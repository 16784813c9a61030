#!/usr/bin/env bash
# Compares settings of pretraining: a run for each line of a list, all with the same speech, and one table of them. Its
# default list is that of the ablations. Four of the speakers in train-clean-5 are held out, and the runs are compared on
# them. run.sh tests on the speakers of dev-clean-2, so it can report what is chosen here.
#
#   bash recipes/evidence/trials.sh --corpus DIR --audio DIR                   the ablations, in conf/ablations.txt
#   bash recipes/evidence/trials.sh --corpus DIR --audio DIR --list FILE       other settings
#   bash recipes/evidence/trials.sh --exp exp/long --hours 32 trainer.seed=1   settings of all runs follow the options
#
# Every run sees the same hours of speech: a run with larger batches or longer crops has fewer updates. Finished runs are
# skipped.
set -euo pipefail

stage=0                          # first stage to run
stop_stage=6                     # last stage to run
corpus=                          # folder with train-clean-5 and dev-clean-2 (default: download it)
audio=                           # folder of speech for pretraining, instead of train-clean-5
data=                            # folder for downloads and manifests (default: data/ beside this script)
exp=                             # folder for all runs (default: exp/trials beside this script)
list=                            # file with a line NAME OBJECTIVE [SETTING…] for each run (default: conf/ablations.txt)
hours=8                          # hours of speech that each run sees
speakers=4                       # number of speakers to hold out
probe_updates=500                # updates of each probe
jobs=2                           # parallel jobs for data preparation
nproc=1                          # processes for training
launcher=local                   # local, torchrun, slurm or deepspeed: see cmd.sh and docs/launching.md
print_command=false              # print the commands that would start processes, and run nothing

. "$(dirname "${BASH_SOURCE[0]}")/../utils/parse_options.sh"
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
. "$here/../utils/log.sh"
data=$(absolute "${data:-$here/data}")
exp=$(absolute "${exp:-$here/exp/trials}")
list=$(given --list "${list:-$here/conf/ablations.txt}")
. "$here/path.sh"
. "$here/cmd.sh"
. "$here/../utils/stages.sh"
. "$here/local/pretrain.sh"

split=$data/manifests/trials
transcribed=$data/manifests/cuts_train-clean-5.jsonl
train_cuts=("$split/cuts_train.jsonl")
labels=$split/cuts_labelled.jsonl
held_out=("$split/cuts_held_out.jsonl")
speech=$transcribed
if [[ -n $audio ]]; then speech=$data/manifests/audio/cuts_train.jsonl; fi

# prepare is stages 0 to 2 of run.sh, which skips what is done.
prepare() {
  bash "$here/run.sh" --stop-stage 2 --corpus "$corpus" --audio "$audio" --data "$data" --jobs "$jobs"
}
hold_out() {
  python "$here/local/hold_out.py" "$split" --train "$speech" --transcribed "$transcribed" --speakers "$speakers"
  w2vscale data index "${train_cuts[@]}" "$labels" "${held_out[@]}"
}
evaluate_and_probe() {
  evaluate_on_held_out "$run" "$run/evaluation.json"
  w2vscale probe "$run" --train "$labels" --test "${held_out[0]}" --updates "$probe_updates" --no-baselines -o "$run/probe"
}
write_table() {
  w2vscale results "${runs[@]/%//evaluation.json}" "${runs[@]/%//probe/probe.json}" \
    --output "$exp/RESULTS.md" --title "Trials of $hours hours"
  w2vscale report "${runs[@]}" -o "$exp/report.html"
}

# Read first: a program in the loop, such as srun, could read the rest of the list.
mapfile -t lines < <(grep -Ev '^[[:space:]]*(#|$)' "$list")
for line in "${lines[@]}"; do
  read -ra words <<<"$line"
  if [[ ! -f $here/conf/${words[1]:-}.yaml ]]; then
    die "--list $list: $line: the second word is no objective with settings in $here/conf"
  fi
done

if in_range 1 && ! $print_command; then prepare; fi
run_stage 2 "hold $speakers of the speakers out" "$split" --options "speakers" --reads "speech transcribed" hold_out
runs=()
for line in "${lines[@]}"; do
  read -ra words <<<"$line"
  name=${words[0]} run=$exp/${words[0]}
  train_stage 4 "pretrain $name" "$run" --options "hours" --reads "train_cuts held_out" \
    pretrain_for_hours "${words[@]:1}" "$@"
  run_stage 5 "evaluate and probe $name" "$run" --options "probe_updates" --reads "run labels held_out" \
    evaluate_and_probe
  runs+=("$run")
done
run_stage 6 "write the table" "$exp" --reads "runs" write_table
made "results" "$exp/RESULTS.md" "report" "$exp/report.html"
