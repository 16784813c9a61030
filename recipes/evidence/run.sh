#!/usr/bin/env bash
# Measures what pretraining learns, and whether it is worth it. Pretrains `tiny` with wav2vec 2.0 and with BEST-RQ, on
# the same speech for the same number of hours. Then, on other speakers: a linear probe of every layer against log-mel
# features and random weights; fine-tuning on 31 and 10 minutes with transcripts against training from scratch, also
# with three times the updates. Writes one page of tables with 95 % intervals, and a picture.
#
#   bash recipes/evidence/run.sh                                       downloads mini LibriSpeech
#   bash recipes/evidence/run.sh --quick true                          the same with less training
#   bash recipes/evidence/run.sh --corpus DIR --audio DIR              pretrains on the speech in --audio
#   bash recipes/evidence/run.sh --exp exp/short objective.mask_length=5     settings of pretraining follow the options
#
# Finished stages are skipped. Another corpus or other settings are refused: choose another --data or --exp for them.
set -euo pipefail

stage=0                          # first stage to run
stop_stage=9                     # last stage to run
corpus=                          # folder with train-clean-5 and dev-clean-2 (default: download it)
audio=                           # folder of speech for pretraining, instead of train-clean-5
data=                            # folder for downloads and manifests (default: data/ beside this script)
exp=                             # folder for all runs (default: exp/full or exp/quick beside this script)
quick=false                      # train less
objectives="wav2vec2 best_rq"    # objectives of pretraining: names of settings in conf/
hours=                           # hours of speech that pretraining sees (default: 20, or 2 with --quick true)
probe_updates=                   # updates of each probe (default: 1000, or 200 with --quick true)
minutes="31 10"                  # amounts of transcribed speech for fine-tuning, in minutes
finetune_updates=                # updates of fine-tuning (default: 400, or 100 with --quick true)
finetune_settings=               # SECTION.KEY=VALUE, separated by spaces, to override settings of conf/finetune.yaml
jobs=2                           # parallel jobs for data preparation
nproc=1                          # processes for training and decoding
launcher=local                   # local, torchrun, slurm or deepspeed: see cmd.sh and docs/launching.md
print_command=false              # print the commands that would start processes, and run nothing

. "$(dirname "${BASH_SOURCE[0]}")/../utils/parse_options.sh"
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
. "$here/../utils/log.sh"
if $quick; then
  : "${hours:=2}" "${probe_updates:=200}" "${finetune_updates:=100}"
  exp=${exp:-$here/exp/quick}
fi
: "${hours:=20}" "${probe_updates:=1000}" "${finetune_updates:=400}"
data=$(absolute "${data:-$here/data}")
exp=$(absolute "${exp:-$here/exp/full}")
corpus=$(given --corpus "$corpus")
audio=$(given --audio "$audio")
. "$here/../utils/librispeech.sh"
if [[ -n $corpus && ! -s $data/manifests/.prepare.done ]] && in_range 1; then
  need_parts "$corpus" train-clean-5 dev-clean-2
fi
. "$here/path.sh"
. "$here/cmd.sh"
. "$here/../utils/stages.sh"
. "$here/local/pretrain.sh"

manifests=$data/manifests
transcribed=$manifests/cuts_train-clean-5.jsonl
held_out=$manifests/cuts_dev-clean-2.jsonl
test_cuts=("$held_out")
train_cuts=("$transcribed")
if [[ -n $audio ]]; then train_cuts=("$manifests/audio/cuts_train.jsonl"); fi
lm=$manifests/lm/3-gram.arpa

prepare() {
  w2vscale data prepare mini_librispeech "$corpus" "$manifests" --jobs "$jobs"
  w2vscale data validate "$transcribed" "$held_out"
  if [[ -n $audio ]]; then w2vscale data prepare folder "$audio" "$manifests/audio" --jobs "$jobs"; fi
}
index() {
  w2vscale data index "$transcribed" "$held_out" "${train_cuts[@]}"
  w2vscale data stats "${train_cuts[@]}" --config "$here/conf/wav2vec2.yaml"
}
# labels_of MINUTES prints the manifest of this amount of transcribed speech.
labels_of() { echo "$manifests/cuts_$1min.jsonl"; }
choose_labels() {
  local train_cuts=("$transcribed")
  subset "$labels" --hours "$(hours "$amount")" --balanced-speakers
}
estimate_lm() { python "$here/local/ngram.py" "$lm" "$transcribed"; }
evaluate_and_probe() {
  local run
  for run in "${pretrained[@]}"; do
    evaluate_on_held_out "$run" "$run/evaluation.json"
    w2vscale probe "$run" --train "$labels" --test "$held_out" --updates "$probe_updates" -o "$run/probe"
  done
  w2vscale report "${pretrained[@]}" -o "$exp/pretraining.html"
}
# fine_tune_one RUN UPDATES OPTION… fine-tunes in the folder RUN, on $labels.
fine_tune_one() {
  local settings
  read -ra settings <<<"$finetune_settings"
  on_ranks finetune "$here/conf/finetune.yaml" data.train="$labels" data.validation="$held_out" \
    trainer.updates="$2" "${settings[@]}" --exp "$1" "${@:3}"
}
# One page: pretraining and probes, then a table for each amount of transcribed speech.
write_tables() {
  local amount page scores run
  local all=("${pretrained[@]/%//probe/probe.json}")
  w2vscale results "${pretrained[@]/%//evaluation.json}" "${all[@]}" --output "$exp/RESULTS.md" --title "Evidence"
  for amount in $minutes; do
    page=$exp/${amount}min/RESULTS.md scores=()
    for run in $objectives scratch scratch_x3; do scores+=("$exp/${amount}min/$run"/wer_*.json); done
    all+=("${scores[@]}")
    w2vscale results "${scores[@]}" --baseline scratch --baseline scratch_x3 \
      --output "$page" --title "$amount minutes with transcripts"
    { echo && sed 's/^# /## /' "$page"; } >>"$exp/RESULTS.md"
  done
  python "$here/local/picture.py" "$exp/evidence.png" "${all[@]}"
  w2vscale report "${runs[@]}" -o "$exp/finetuning.html"
}

if [[ -z $corpus ]]; then
  corpus=$data/LibriSpeech
  run_stage 0 "download mini LibriSpeech" "$corpus" download_librispeech "$data" mini
fi
run_stage 1 "write and validate Lhotse manifests" "$manifests" --options "corpus audio" prepare
run_stage 2 "index them for O(1) access" "$manifests" --reads "transcribed held_out train_cuts" index
for amount in $minutes; do
  labels=$(labels_of "$amount")
  run_stage 3 "choose $amount minutes of transcribed speech" "$labels" --reads "transcribed" choose_labels
done
run_stage 3 "estimate a 3-gram" "$manifests/lm" --reads "transcribed" estimate_lm
pretrained=()
for objective in $objectives; do
  run=$exp/$objective
  train_stage 4 "pretrain with $objective" "$run" --options "hours" --reads "train_cuts held_out" \
    pretrain_for_hours "$objective" "$@"
  pretrained+=("$run")
done
labels=$(labels_of "${minutes%% *}")
run_stage 5 "evaluate on other speakers, and probe every layer" "$exp" \
  --options "probe_updates" --reads "pretrained labels held_out" evaluate_and_probe
runs=()
for amount in $minutes; do
  labels=$(labels_of "$amount")
  tuned=()
  for source in "${pretrained[@]}"; do
    run=$exp/${amount}min/${source##*/}
    train_stage 7 "fine-tune ${source##*/} on $amount minutes" "$run" --options "finetune_updates finetune_settings" \
      --reads "source labels held_out" fine_tune_one "$run" "$finetune_updates" trainer.init_from="$source"
    tuned+=("$run")
  done
  for times in 1 3; do
    run=$exp/${amount}min/scratch
    if ((times > 1)); then run+=_x$times; fi
    train_stage 7 "train from scratch on $amount minutes, $times times the updates" "$run" \
      --options "finetune_updates finetune_settings" --reads "labels held_out" \
      fine_tune_one "$run" $((times * finetune_updates)) trainer.init_from="${pretrained[0]}" --scratch
    tuned+=("$run")
  done
  run_stage 8 "decode what was trained on $amount minutes" "${tuned[0]}" --reads "tuned test_cuts" --ranks decode
  # With these weights, the word error rate of held-out speakers of train-clean-5 was lowest.
  run_stage 8 "decode it with the 3-gram" "${tuned[0]}" --options "lm" --reads "tuned test_cuts" --ranks \
    decode_with_lm --lm-weight 0.5 --word-score 1
  runs+=("${tuned[@]}")
done
run_stage 9 "write the tables" "$exp" --reads "pretrained runs" write_tables
made "manifests" "$manifests" "pretraining" "$exp/pretraining.html" "fine-tuning" "$exp/finetuning.html" \
  "results" "$exp/RESULTS.md" "picture" "$exp/evidence.png"
