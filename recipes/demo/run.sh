#!/usr/bin/env bash
# From nothing to a wav2vec 2.0 that learns, in minutes on two cores and without a download: synthesises English speech,
# prepares and indexes it, pretrains `tiny` on it and evaluates the result on other speakers.
#
#   bash recipes/demo/run.sh
#   bash recipes/demo/run.sh --exp exp/longer trainer.updates=1000     words after the options change settings
set -euo pipefail

stage=0                 # first stage to run
stop_stage=5            # last stage to run
data=                   # where audio and manifests go (default: data/ beside this script)
exp=                    # the run's folder (default: exp/tiny beside this script)
train_minutes=16        # synthetic speech to train on
validation_minutes=2    # and to validate on, of other speakers
nproc=1                 # processes to train with
launcher=local          # local, torchrun or slurm: see cmd.sh

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
. "$here/../utils/parse_options.sh"
. "$here/../utils/log.sh"
data=$(absolute "${data:-$here/data}")
exp=$(absolute "${exp:-$here/exp/tiny}")
. "$here/path.sh"
. "$here/cmd.sh"

train=$data/manifests/cuts_train-clean-5.jsonl
validation=$data/manifests/cuts_dev-clean-2.jsonl

synthesise() {
  w2vscale data synth "$data" --train-minutes "$train_minutes" --validation-minutes "$validation_minutes" --jobs 2
}
prepare() { w2vscale data prepare mini_librispeech "$data/LibriSpeech" "$data/manifests"; }
index() { w2vscale data index "$train" "$validation"; }
pretrain() {
  "${train_cmd[@]}" "$here/conf/tiny.yaml" data.train="$train" data.validation="$validation" --exp "$exp" "$@"
}
evaluate() {
  w2vscale evaluate "$exp" --cuts "$validation" --output "$exp/evaluation.json"
  w2vscale report "$exp"
}

run_stage 0 "synthesise $train_minutes + $validation_minutes minutes of speech" "$data" synthesise
run_stage 1 "write Lhotse manifests" "$data/manifests" prepare
run_stage 2 "index them for O(1) access" "$data/manifests" index
# 3 is for corpora that are streamed.
run_stage 4 "pretrain" "$exp" pretrain "$@"
run_stage 5 "evaluate on other speakers and draw the curves" "$exp" evaluate
made "speech" "$data/LibriSpeech" "training manifest" "$train" "validation manifest" "$validation" \
  "settings" "$exp/config.yaml" "newest checkpoint" "$exp/checkpoints/latest" "metrics" "$exp/metrics.jsonl" \
  "TensorBoard" "$exp/tb" "evaluation" "$exp/evaluation.json" "curves" "$exp/curves.png"
