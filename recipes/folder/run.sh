#!/usr/bin/env bash
# Pretrains wav2vec 2.0 on any folder of audio. With --transcribed, also fine-tunes it, decodes held-out utterances, and
# compares the error rate with training from scratch.
#
#   bash recipes/folder/run.sh --audio /data/recordings --nproc 8
#   bash recipes/folder/run.sh --audio /data/recordings --transcribed /data/labelled --finetune-conf ctc_10h
#   bash recipes/folder/run.sh --audio /data/recordings trainer.updates=2000    settings of pretraining follow the options
#
# Finished stages are skipped. Another folder or other settings are refused: choose another --data or --exp for them.
set -euo pipefail

stage=0                 # first stage to run
stop_stage=10           # last stage to run
audio=                  # folder of recordings for pretraining (required)
transcribed=            # folder of utterances, each with a .txt file of the same name (default: no fine-tuning)
data=                   # folder for manifests (default: data/ beside this script)
conf=base               # preset or YAML file for pretraining
finetune_conf=ctc_1h    # preset or YAML file for fine-tuning
finetune_settings=      # SECTION.KEY=VALUE, separated by spaces, to override settings of --finetune-conf
exp=                    # folder of the run (default: exp/ and the name of --conf, beside this script)
segment_seconds=30      # split longer recordings into segments of this duration, in seconds
validation_share=0.02   # fraction of the recordings to use for validation
test_share=0.1          # fraction of the transcribed utterances to use for testing
vad=false               # cut recordings at pauses, and leave pauses out
max_bad_fraction=0.05   # stop if more of the files cannot be used
lm=                     # n-gram language model for a second decoding
jobs=4                  # parallel jobs for data preparation
nproc=1                 # processes for training and decoding
launcher=local          # local, torchrun, slurm or deepspeed: see cmd.sh and docs/launching.md
print_command=false     # print the commands that would start processes, and run nothing

. "$(dirname "${BASH_SOURCE[0]}")/../utils/parse_options.sh"
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
. "$here/../utils/log.sh"
if [[ -z $audio ]]; then echo "run.sh: --audio is required: give a folder of recordings" >&2 && exit 2; fi
name=${conf##*/}
data=$(absolute "${data:-$here/data}")
exp=$(absolute "${exp:-$here/exp/${name%.yaml}}")
audio=$(given --audio "$audio")
transcribed=$(given --transcribed "$transcribed")
lm=$(given --lm "$lm")
. "$here/path.sh"
. "$here/cmd.sh"
. "$here/../utils/stages.sh"

manifests=$data/manifests
train_cuts=("$manifests/cuts_train.jsonl")
held_out=$manifests/cuts_validation.jsonl
amount=transcribed
labels=$data/transcribed/cuts_train.jsonl
test_cuts=("$data/transcribed/cuts_validation.jsonl")
tuned=("${exp}_$amount" "${exp}_${amount}_scratch")
cutting=()
if $vad; then cutting=(--vad); fi

prepare() {
  w2vscale data prepare folder "$audio" "$manifests" --segment-seconds "$segment_seconds" \
    --validation-share "$validation_share" --max-bad-fraction "$max_bad_fraction" --jobs "$jobs" "${cutting[@]}"
}
index() {
  w2vscale data index "${train_cuts[@]}" "$held_out"
  w2vscale data stats "${train_cuts[@]}" --config "$conf"
}
export_pretrained() { export_model "$exp" "$exp/huggingface"; }
prepare_transcribed() {
  w2vscale data prepare folder "$transcribed" "$data/transcribed" --validation-share "$test_share" --jobs "$jobs" \
    --max-bad-fraction "$max_bad_fraction"
  w2vscale data index "$labels" "${test_cuts[@]}"
}
# fine_tune_transcribed CONF
fine_tune_transcribed() {
  local held_out=${test_cuts[0]}
  fine_tune "$@"
}

# This recipe has no stage 0, which downloads a corpus, and no stage 3, which writes shards for streaming.
run_stage 1 "write Lhotse manifests" "$manifests" --options "audio segment_seconds vad validation_share" prepare
run_stage 2 "index them for O(1) access" "$manifests" --reads "train_cuts held_out" index
train_stage 4 "pretrain with $conf" "$exp" --reads "train_cuts held_out" pretrain "$conf" "$@"
run_stage 5 "evaluate on held-out recordings and draw the curves" "$exp" --reads "exp held_out" evaluate_pretraining
if [[ -n $transcribed ]]; then
  run_stage 6 "write manifests of the transcribed utterances" "$data/transcribed" \
    --options "transcribed test_share" prepare_transcribed
  train_stage 7 "fine-tune on them with $finetune_conf, and train from scratch" "${tuned[0]}" \
    --options "finetune_settings" --reads "exp labels test_cuts" fine_tune_transcribed "$finetune_conf"
  run_stage 8 "decode" "${tuned[0]}" --reads "tuned test_cuts" --ranks decode
  if [[ -n $lm ]]; then
    run_stage 8 "decode with ${lm##*/}" "${tuned[0]}" --options "lm" --reads "tuned test_cuts" --ranks decode_with_lm
  fi
  find_scores
  run_stage 9 "compare" "${tuned[0]}" --reads "scores" results "${audio##*/}"
  run_stage 10 "export for Transformers" "${tuned[0]}" --reads "exp tuned" export_models
else
  run_stage 10 "export for Transformers" "$exp" --reads "exp" export_pretrained
fi
made "manifests" "$manifests"
made_all
