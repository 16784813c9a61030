#!/usr/bin/env bash
# Pretrains `tiny` on mini LibriSpeech (train-clean-5), fine-tunes it on its transcripts, and compares it on dev-clean-2
# with the same model trained from scratch.
#
#   bash recipes/mini_librispeech/run.sh                                  downloads the corpus
#   bash recipes/mini_librispeech/run.sh --corpus DIR --quick true        at most 8 minutes on two cores
#   bash recipes/mini_librispeech/run.sh --exp exp/other optim.lr=1e-3    settings of pretraining follow the options
#
# What is done stays done: another corpus or other settings want another --data or --exp.
set -euo pipefail

stage=0           # first stage to run
stop_stage=10     # last stage to run
corpus=           # folder with train-clean-5 and dev-clean-2; empty: download it
data=             # where downloads and manifests go (default: data/ beside this script)
exp=              # the run's folder (default: exp/tiny or exp/quick beside this script)
quick=false       # few updates: conf/quick.yaml, conf/finetune_quick.yaml
minutes=20        # of transcripts to fine-tune on
finetune_settings= # SECTION.KEY=VALUE…, between spaces, that replace conf/finetune.yaml's
lm=               # an n-gram model to decode with, too
jobs=2            # parallel jobs that prepare data
nproc=1           # processes to train and decode with
launcher=local    # local, torchrun or slurm: see cmd.sh

. "$(dirname "${BASH_SOURCE[0]}")/../utils/parse_options.sh"
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
. "$here/../utils/log.sh"
conf=tiny finetune_conf=finetune
if $quick; then conf=quick finetune_conf=finetune_quick; fi
data=$(absolute "${data:-$here/data}")
exp=$(absolute "${exp:-$here/exp/$conf}")
corpus=$(given --corpus "$corpus")
lm=$(given --lm "$lm")
. "$here/path.sh"
. "$here/cmd.sh"
. "$here/../utils/stages.sh"

manifests=$data/manifests
train_cuts=("$manifests/cuts_train-clean-5.jsonl")
held_out=$manifests/cuts_dev-clean-2.jsonl
test_cuts=("$held_out")
amount=${minutes}min
labels=$manifests/cuts_$amount.jsonl

download() { lhotse download librispeech --mini "$data"; }
prepare() {
  w2vscale data prepare mini_librispeech "${corpus:-$data/LibriSpeech}" "$manifests" --jobs "$jobs"
  w2vscale data validate "${train_cuts[@]}" "$held_out"
}
index() {
  w2vscale data index "${train_cuts[@]}" "$held_out"
  w2vscale data stats "${train_cuts[@]}" --config "$here/conf/$conf.yaml"
}

if [[ -z $corpus ]]; then run_stage 0 "download mini LibriSpeech" "$data" download; fi
run_stage 1 "write and validate Lhotse manifests" "$manifests" prepare
run_stage 2 "index them for O(1) access" "$manifests" index
# 3 is for corpora that are streamed.
run_stage 4 "pretrain with conf/$conf.yaml" "$exp" pretrain "$here/conf/$conf.yaml" "$@"
run_stage 5 "evaluate on dev-clean-2 and draw the curves" "$exp" evaluate_pretraining
run_stage 6 "choose $minutes minutes to have transcripts" "${exp}_$amount" \
  subset "$labels" --hours "$(hours "$minutes")" --balanced-speakers
run_stage 7 "fine-tune on them, and train from scratch" "${exp}_$amount" \
  fine_tune "$here/conf/$finetune_conf.yaml" "$labels"
run_stage 8 "decode dev-clean-2" "${exp}_$amount" decode
if [[ -n $lm ]]; then run_stage 8 "decode with ${lm##*/}" "${exp}_$amount" decode_with_lm; fi
run_stage 9 "compare" "${exp}_$amount" results "Mini LibriSpeech"
run_stage 10 "export for Transformers" "${exp}_$amount" export_models
made "manifests" "$manifests"
made_all
