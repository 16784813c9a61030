#!/usr/bin/env bash
# Pretrains `tiny` on mini LibriSpeech (train-clean-5) and evaluates it on dev-clean-2.
#
#   bash recipes/mini_librispeech/run.sh                                  downloads the corpus
#   bash recipes/mini_librispeech/run.sh --corpus DIR --quick true        at most 8 minutes on two cores
#   bash recipes/mini_librispeech/run.sh --exp exp/other optim.lr=1e-3    words after the options change settings
#
# What is done stays done: another corpus or other settings want another --data or --exp.
set -euo pipefail

stage=0           # first stage to run
stop_stage=5      # last stage to run
corpus=           # folder with train-clean-5 and dev-clean-2; empty: download it
data=             # where downloads and manifests go (default: data/ beside this script)
exp=              # the run's folder (default: exp/tiny or exp/quick beside this script)
quick=false       # few updates: conf/quick.yaml
jobs=2            # parallel jobs that prepare data
nproc=1           # processes to train with
launcher=local    # local, torchrun or slurm: see cmd.sh

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
. "$here/../utils/parse_options.sh"
. "$here/../utils/log.sh"
conf=tiny
if $quick; then conf=quick; fi
data=$(absolute "${data:-$here/data}")
exp=$(absolute "${exp:-$here/exp/$conf}")
corpus=$(absolute "$corpus")
. "$here/path.sh"
. "$here/cmd.sh"

train=$data/manifests/cuts_train-clean-5.jsonl
validation=$data/manifests/cuts_dev-clean-2.jsonl

download() { lhotse download librispeech --mini "$data"; }
prepare() {
  w2vscale data prepare mini_librispeech "${corpus:-$data/LibriSpeech}" "$data/manifests" --jobs "$jobs"
  w2vscale data validate "$train" "$validation"
}
index() {
  w2vscale data index "$train" "$validation"
  w2vscale data stats "$train" --config "$here/conf/$conf.yaml"
}
pretrain() {
  "${train_cmd[@]}" "$here/conf/$conf.yaml" data.train="$train" data.validation="$validation" --exp "$exp" "$@"
}
evaluate() {
  w2vscale evaluate "$exp" --cuts "$validation" --output "$exp/evaluation.json"
  w2vscale report "$exp"
}

if [[ -z $corpus ]]; then run_stage 0 "download mini LibriSpeech" "$data" download; fi
run_stage 1 "write and validate Lhotse manifests" "$data/manifests" prepare
run_stage 2 "index them for O(1) access" "$data/manifests" index
# 3 is for corpora that are streamed.
run_stage 4 "pretrain with conf/$conf.yaml" "$exp" pretrain "$@"
run_stage 5 "evaluate on dev-clean-2 and draw the curves" "$exp" evaluate
made "training manifest" "$train" "validation manifest" "$validation" \
  "settings" "$exp/config.yaml" "newest checkpoint" "$exp/checkpoints/latest" "metrics" "$exp/metrics.jsonl" \
  "TensorBoard" "$exp/tb" "evaluation" "$exp/evaluation.json" "curves" "$exp/curves.png"
