#!/usr/bin/env bash
# Pretrains `tiny` on mini LibriSpeech (train-clean-5), fine-tunes it on a transcribed subset, and compares its error
# rate on dev-clean-2 with that of the same model trained from scratch.
#
#   bash recipes/mini_librispeech/run.sh                                  downloads the corpus
#   bash recipes/mini_librispeech/run.sh --corpus DIR --quick true        at most 8 minutes on two cores
#   bash recipes/mini_librispeech/run.sh --exp exp/other optim.lr=1e-3    settings of pretraining follow the options
#
# Finished stages are skipped. For another corpus or other settings, choose another --data or --exp.
set -euo pipefail

stage=0            # first stage to run
stop_stage=10      # last stage to run
corpus=            # folder with train-clean-5 and dev-clean-2 (default: download it)
data=              # folder for downloads and manifests (default: data/ beside this script)
exp=               # folder of the run (default: exp/tiny or exp/quick beside this script)
quick=false        # run fewer updates, with conf/quick.yaml and conf/finetune_quick.yaml
minutes=20         # transcribed speech for fine-tuning, in minutes
finetune_settings= # SECTION.KEY=VALUE, separated by spaces, to override settings of conf/finetune.yaml
lm=                # n-gram language model for a second decoding
jobs=2             # parallel jobs for data preparation
nproc=1            # processes for training and decoding
launcher=local     # local, torchrun or slurm: see cmd.sh

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
# This recipe has no stage 3, which writes shards for streaming.
run_stage 4 "pretrain with conf/$conf.yaml" "$exp" pretrain "$here/conf/$conf.yaml" "$@"
run_stage 5 "evaluate on dev-clean-2 and draw the curves" "$exp" evaluate_pretraining
run_stage 6 "choose $minutes minutes of transcribed speech" "${exp}_$amount" \
  subset "$labels" --hours "$(hours "$minutes")" --balanced-speakers
run_stage 7 "fine-tune on this subset, and train from scratch" "${exp}_$amount" \
  fine_tune "$here/conf/$finetune_conf.yaml" "$labels"
run_stage 8 "decode dev-clean-2" "${exp}_$amount" decode
if [[ -n $lm ]]; then run_stage 8 "decode with ${lm##*/}" "${exp}_$amount" decode_with_lm; fi
run_stage 9 "compare" "${exp}_$amount" results "Mini LibriSpeech"
run_stage 10 "export for Transformers" "${exp}_$amount" export_models
made "manifests" "$manifests"
made_all
