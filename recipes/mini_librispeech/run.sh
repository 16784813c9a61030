#!/usr/bin/env bash
# Pretrains `tiny` on mini LibriSpeech (train-clean-5), fine-tunes it on a transcribed subset, and compares its error
# rate on dev-clean-2 with that of the same model trained from scratch.
#
#   bash recipes/mini_librispeech/run.sh                                  downloads the corpus
#   bash recipes/mini_librispeech/run.sh --corpus DIR --quick true        at most 8 minutes on two cores
#   bash recipes/mini_librispeech/run.sh --exp exp/other optim.lr=1e-3    settings of pretraining follow the options
#
# Finished stages are skipped. Another corpus or other settings are refused: choose another --data or --exp for them.
set -euo pipefail

stage=0             # first stage to run
stop_stage=10       # last stage to run
corpus=             # folder with train-clean-5 and dev-clean-2 (default: download it)
data=               # folder for downloads and manifests (default: data/ beside this script)
exp=                # folder of the run (default: exp/tiny or exp/quick beside this script)
quick=false         # run fewer updates, with conf/quick.yaml and conf/finetune_quick.yaml
minutes=20          # transcribed speech for fine-tuning, in minutes
finetune_settings=  # SECTION.KEY=VALUE, separated by spaces, to override settings of conf/finetune.yaml
lm=                 # n-gram language model for a second decoding
jobs=2              # parallel jobs for data preparation
nproc=1             # processes for training and decoding
launcher=local      # local, torchrun, slurm or deepspeed: see cmd.sh and docs/launching.md
print_command=false # print the commands that would start processes, and run nothing

. "$(dirname "${BASH_SOURCE[0]}")/../utils/parse_options.sh"
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
. "$here/../utils/log.sh"
conf=tiny finetune_conf=finetune
if $quick; then conf=quick finetune_conf=finetune_quick; fi
data=$(absolute "${data:-$here/data}")
exp=$(absolute "${exp:-$here/exp/$conf}")
corpus=$(given --corpus "$corpus")
. "$here/../utils/librispeech.sh"
if [[ -n $corpus && ! -s $data/manifests/.prepare.done ]] && in_range 1; then
  need_parts "$corpus" train-clean-5 dev-clean-2
fi
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
tuned=("${exp}_$amount" "${exp}_${amount}_scratch")

prepare() {
  w2vscale data prepare mini_librispeech "$corpus" "$manifests" --jobs "$jobs"
  w2vscale data validate "${train_cuts[@]}" "$held_out"
}
index() {
  w2vscale data index "${train_cuts[@]}" "$held_out"
  w2vscale data stats "${train_cuts[@]}" --config "$here/conf/$conf.yaml"
}
choose_labels() { subset "$labels" --hours "$(hours "$minutes")" --balanced-speakers; }

if [[ -z $corpus ]]; then
  corpus=$data/LibriSpeech
  run_stage 0 "download mini LibriSpeech" "$corpus" download_librispeech "$data" mini
fi
run_stage 1 "write and validate Lhotse manifests" "$manifests" --options "corpus" prepare
run_stage 2 "index them for O(1) access" "$manifests" --reads "train_cuts held_out" index
# This recipe has no stage 3, which writes shards for streaming.
train_stage 4 "pretrain with conf/$conf.yaml" "$exp" --reads "train_cuts held_out" \
  pretrain "$here/conf/$conf.yaml" "$@"
run_stage 5 "evaluate on dev-clean-2 and draw the curves" "$exp" --reads "exp held_out" evaluate_pretraining
run_stage 6 "choose $minutes minutes of transcribed speech" "$labels" \
  --options "minutes" --reads "train_cuts" choose_labels
train_stage 7 "fine-tune on this subset, and train from scratch" "${tuned[0]}" \
  --options "finetune_settings" --reads "exp labels held_out" fine_tune "$here/conf/$finetune_conf.yaml"
run_stage 8 "decode dev-clean-2" "${tuned[0]}" --reads "tuned test_cuts" --ranks decode
if [[ -n $lm ]]; then
  run_stage 8 "decode with ${lm##*/}" "${tuned[0]}" --options "lm" --reads "tuned test_cuts" --ranks decode_with_lm
fi
find_scores
run_stage 9 "compare" "${tuned[0]}" --reads "scores" results "Mini LibriSpeech"
run_stage 10 "export for Transformers" "${tuned[0]}" --reads "exp tuned" export_models
made "manifests" "$manifests"
made_all
