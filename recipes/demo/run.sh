#!/usr/bin/env bash
# Pretrains and fine-tunes a small wav2vec 2.0 for speech recognition, in minutes on two cores and without a download:
# synthesises spoken digits, writes and indexes manifests, pretrains on all speech, fine-tunes on a transcribed subset,
# trains the same model from scratch on this subset, and compares the error rates of both on other speakers.
#
#   bash recipes/demo/run.sh
#   bash recipes/demo/run.sh --exp exp/longer trainer.updates=1000     settings of pretraining follow the options
set -euo pipefail

stage=0                 # first stage to run
stop_stage=10           # last stage to run
data=                   # folder for audio and manifests (default: data/ beside this script)
exp=                    # folder of the run (default: exp/demo beside this script)
train_minutes=20        # synthetic speech for training, in minutes
validation_minutes=4    # synthetic speech for validation, in minutes, by other speakers
speakers=8              # speakers for training, and as many others for validation
label_minutes=10        # transcribed speech for fine-tuning, in minutes
finetune_settings=      # SECTION.KEY=VALUE, separated by spaces, to override settings of conf/finetune.yaml
lm=                     # n-gram language model for a second decoding
nproc=1                 # processes for training and decoding
launcher=local          # local, torchrun, slurm or deepspeed: see cmd.sh and docs/launching.md
print_command=false     # print the commands that would start processes, and run nothing

. "$(dirname "${BASH_SOURCE[0]}")/../utils/parse_options.sh"
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
. "$here/../utils/log.sh"
data=$(absolute "${data:-$here/data}")
exp=$(absolute "${exp:-$here/exp/demo}")
lm=$(given --lm "$lm")
. "$here/path.sh"
. "$here/cmd.sh"
. "$here/../utils/stages.sh"

manifests=$data/manifests
train_cuts=("$manifests/cuts_train-clean-5.jsonl")
held_out=$manifests/cuts_dev-clean-2.jsonl
test_cuts=("$held_out")
amount=${label_minutes}min
labels=$manifests/cuts_$amount.jsonl
tuned=("${exp}_$amount" "${exp}_${amount}_scratch")
# shellcheck disable=SC2034 # stage 1 names it
synthesis=$data/LibriSpeech/synthesis.json # how the speech was made

synthesise() {
  python "$here/local/synthesise.py" "$data" --text digits --no-hum --speakers "$speakers" --jobs 2 \
    --train-minutes "$train_minutes" --validation-minutes "$validation_minutes"
}
prepare() { w2vscale data prepare mini_librispeech "$data/LibriSpeech" "$manifests"; }
index() { w2vscale data index "${train_cuts[@]}" "$held_out"; }
choose_labels() { subset "$labels" --hours "$(hours "$label_minutes")" --balanced-speakers; }

run_stage 0 "synthesise $train_minutes + $validation_minutes minutes of speech" "$data" \
  --options "train_minutes validation_minutes speakers" synthesise
run_stage 1 "write Lhotse manifests" "$manifests" --reads "synthesis" prepare
run_stage 2 "index them for O(1) access" "$manifests" --reads "train_cuts held_out" index
# This recipe has no stage 3, which writes shards for streaming.
train_stage 4 "pretrain" "$exp" --reads "train_cuts held_out" pretrain "$here/conf/pretrain.yaml" "$@"
run_stage 5 "evaluate on other speakers and draw the curves" "$exp" --reads "exp held_out" evaluate_pretraining
run_stage 6 "choose $label_minutes minutes of transcribed speech" "$labels" \
  --options "label_minutes" --reads "train_cuts" choose_labels
train_stage 7 "fine-tune on this subset, and train from scratch" "${tuned[0]}" \
  --options "finetune_settings" --reads "exp labels held_out" fine_tune "$here/conf/finetune.yaml"
run_stage 8 "decode" "${tuned[0]}" --reads "tuned test_cuts" --ranks decode
if [[ -n $lm ]]; then
  run_stage 8 "decode with ${lm##*/}" "${tuned[0]}" --options "lm" --reads "tuned test_cuts" --ranks decode_with_lm
fi
find_scores
run_stage 9 "compare" "${tuned[0]}" --reads "scores" results "Demo: spoken digits"
run_stage 10 "export for Transformers" "${tuned[0]}" --reads "exp tuned" export_models
made "speech" "$data/LibriSpeech" "manifests" "$manifests"
made_all
