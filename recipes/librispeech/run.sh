#!/usr/bin/env bash
# Pretrains wav2vec 2.0 BASE or LARGE on the 960 hours of LibriSpeech (or on whatever of it is there).
#
#   bash recipes/librispeech/run.sh --corpus /corpora/LibriSpeech --nproc 8
#   bash recipes/librispeech/run.sh --conf large --launcher slurm
#   bash recipes/librispeech/run.sh --exp exp/small batch.micro_batches=16      words after the options change settings
#
# What is done stays done: another corpus or other settings want another --data or --exp.
set -euo pipefail

stage=0           # first stage to run
stop_stage=5      # last stage to run
corpus=           # folder with train-clean-100, …; empty: download all of it (60 GB)
data=             # where downloads and manifests go (default: data/ beside this script)
conf=base         # settings: conf/$conf.yaml
exp=              # the run's folder (default: exp/$conf beside this script)
jobs=8            # parallel jobs that prepare data
nproc=1           # processes (GPUs) to train with
launcher=local    # local, torchrun or slurm: see cmd.sh

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
. "$here/../utils/parse_options.sh"
. "$here/../utils/log.sh"
data=$(absolute "${data:-$here/data}")
exp=$(absolute "${exp:-$here/exp/$conf}")
corpus=$(absolute "$corpus")
. "$here/path.sh"
. "$here/cmd.sh"

manifests=$data/manifests

download() { lhotse download librispeech --full "$data"; }
prepare() {
  w2vscale data prepare librispeech "${corpus:-$data/LibriSpeech}" "$manifests" --jobs "$jobs"
  w2vscale data validate "$manifests"/cuts_*.jsonl --jobs "$jobs"
}
index() {
  w2vscale data index "$manifests"/cuts_*.jsonl
  w2vscale data stats "$manifests"/cuts_train-*.jsonl --config "$here/conf/$conf.yaml"
}
# The held-out part: dev-clean, or mini LibriSpeech's.
validation() {
  local part
  for part in dev-clean dev-clean-2; do
    if [[ -e $manifests/cuts_$part.jsonl ]]; then echo "$manifests/cuts_$part.jsonl" && return; fi
  done
  log "no cuts_dev-clean.jsonl or cuts_dev-clean-2.jsonl in $manifests: run stages 1 and 2"
  return 1
}
# [a,b,c] of all training manifests.
training() {
  local cuts=("$manifests"/cuts_train-*.jsonl) IFS=,
  echo "[${cuts[*]}]"
}
pretrain() {
  local held_out
  held_out=$(validation)
  "${train_cmd[@]}" "$here/conf/$conf.yaml" data.train="$(training)" data.validation="$held_out" --exp "$exp" "$@"
}
evaluate() {
  local held_out
  held_out=$(validation)
  w2vscale evaluate "$exp" --cuts "$held_out" --output "$exp/evaluation.json"
  w2vscale report "$exp"
}

if [[ -z $corpus ]]; then run_stage 0 "download LibriSpeech" "$data" download; fi
run_stage 1 "write and validate Lhotse manifests" "$manifests" prepare
run_stage 2 "index them for O(1) access" "$manifests" index
# 3 is for corpora that are streamed.
run_stage 4 "pretrain with conf/$conf.yaml" "$exp" pretrain "$@"
run_stage 5 "evaluate on held-out speech and draw the curves" "$exp" evaluate
made "manifests" "$manifests" \
  "settings" "$exp/config.yaml" "newest checkpoint" "$exp/checkpoints/latest" "metrics" "$exp/metrics.jsonl" \
  "TensorBoard" "$exp/tb" "evaluation" "$exp/evaluation.json" "curves" "$exp/curves.png"
