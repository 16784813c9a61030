#!/usr/bin/env bash
# Pretrains wav2vec 2.0 on any folder of audio (wav, flac, ogg, opus, mp3) and, given transcribed audio, too, fine-tunes it,
# decodes what was held out, and compares with training from scratch.
#
#   bash recipes/folder/run.sh --audio /data/recordings --nproc 8
#   bash recipes/folder/run.sh --audio /data/recordings --transcribed /data/labelled --finetune-conf ctc_10h
#   bash recipes/folder/run.sh --audio /data/recordings --conf tiny trainer.updates=2000   settings of pretraining follow
#
# What is done stays done: another folder or other settings want another --data or --exp.
set -euo pipefail

stage=0                 # first stage to run
stop_stage=10           # last stage to run
audio=                  # folder of recordings to pretrain on
transcribed=            # folder of utterances with a .txt of the same name beside each; empty: no fine-tuning
data=                   # where manifests go (default: data/ beside this script)
conf=base               # settings of pretraining: a preset or a YAML file
finetune_conf=ctc_1h    # and of fine-tuning
finetune_settings=      # SECTION.KEY=VALUE…, between spaces, that replace finetune_conf's
exp=                    # the run's folder (default: exp/ and conf's name beside this script)
segment_seconds=30      # split longer recordings into segments of this duration, in seconds
validation_share=0.02   # of the recordings, to validate on
test_share=0.1          # of the transcribed utterances, to decode
skip_unreadable=false   # leave out files that are not audio
lm=                     # an n-gram model to decode with, too
jobs=4                  # parallel jobs that prepare data
nproc=1                 # processes to train and decode with
launcher=local          # local, torchrun or slurm: see cmd.sh

. "$(dirname "${BASH_SOURCE[0]}")/../utils/parse_options.sh"
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
. "$here/../utils/log.sh"
if [[ -z $audio ]]; then echo "run.sh: --audio names no folder of recordings" >&2 && exit 2; fi
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
skip=()
if $skip_unreadable; then skip=(--skip-unreadable); fi

prepare() {
  w2vscale data prepare folder "$audio" "$manifests" --segment-seconds "$segment_seconds" \
    --validation-share "$validation_share" --jobs "$jobs" "${skip[@]}"
}
index() {
  w2vscale data index "${train_cuts[@]}" "$held_out"
  w2vscale data stats "${train_cuts[@]}" --config "$conf"
}
export_pretrained() { w2vscale export "$exp" "$exp/huggingface"; }
prepare_transcribed() {
  w2vscale data prepare folder "$transcribed" "$data/transcribed" --validation-share "$test_share" --jobs "$jobs" \
    "${skip[@]}"
  w2vscale data index "$labels" "${test_cuts[@]}"
}
fine_tune_transcribed() {
  held_out=${test_cuts[0]}
  fine_tune "$finetune_conf" "$labels"
}

# 0 is for corpora that are fetched, 3 for those that are streamed.
run_stage 1 "write Lhotse manifests" "$manifests" prepare
run_stage 2 "index them for O(1) access" "$manifests" index
run_stage 4 "pretrain with $conf" "$exp" pretrain "$conf" "$@"
run_stage 5 "evaluate on held-out recordings and draw the curves" "$exp" evaluate_pretraining
if [[ -n $transcribed ]]; then
  run_stage 6 "write manifests of the transcribed utterances" "$data/transcribed" prepare_transcribed
  run_stage 7 "fine-tune on them with $finetune_conf, and train from scratch" "${exp}_$amount" fine_tune_transcribed
  run_stage 8 "decode" "${exp}_$amount" decode
  if [[ -n $lm ]]; then run_stage 8 "decode with ${lm##*/}" "${exp}_$amount" decode_with_lm; fi
  run_stage 9 "compare" "${exp}_$amount" results "${audio##*/}"
  run_stage 10 "export for Transformers" "${exp}_$amount" export_models
else
  run_stage 10 "export for Transformers" "$exp" export_pretrained
fi
made "manifests" "$manifests"
made_all
