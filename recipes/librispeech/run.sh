#!/usr/bin/env bash
# Pretrains wav2vec 2.0 BASE or LARGE on the 960 hours of LibriSpeech (or the parts of it that exist), fine-tunes it on
# one of the published amounts of transcripts, and compares its word error rates with training from scratch. It decodes
# with the checkpoint that had the lowest word error rate in validation.
#
#   bash recipes/librispeech/run.sh --corpus /corpora/LibriSpeech --nproc 8
#   bash recipes/librispeech/run.sh --conf fairseq_base                      with the recipe of fairseq, also masks in fine-tuning
#   bash recipes/librispeech/run.sh --conf large --launcher slurm --amount 10h
#   bash recipes/librispeech/run.sh --stage 6 --amount 100h                  fine-tunes the same model on more data
#   bash recipes/librispeech/run.sh --exp exp/small batch.micro_batches=16   settings of pretraining follow the options
#
# Finished stages are skipped. Another corpus or other settings are refused: choose another --data or --exp for them.
set -euo pipefail

stage=0             # first stage to run
stop_stage=10       # last stage to run
corpus=             # folder with train-clean-100, … (default: download all parts, 60 GB)
data=               # folder for downloads, manifests and shards (default: data/ beside this script)
conf=base           # name of the pretraining settings: conf/$conf.yaml
exp=                # folder of the run (default: exp/$conf beside this script)
shar=false          # write Lhotse Shar in stage 3 and pretrain from it, for storage that needs sequential reads
amount=1h           # transcripts: 10min, 1h, 10h, 100h (train-clean-100) or 960h; preset ctc_$amount, or ctc_large_$amount for LARGE
librilight=         # librispeech_finetuning folder of Libri-light, to use its 10min, 1h and 10h (default: sample them)
finetune_settings=  # SECTION.KEY=VALUE, separated by spaces, to override settings of the preset
fetch_lm=false      # download the 4-gram language model of OpenSLR 11 in stage 0 (1.3 GB)
lm=                 # n-gram language model for a second decoding (default: the 4-gram, if downloaded)
jobs=8              # parallel jobs for data preparation
nproc=1             # processes (GPUs) for training and decoding
launcher=local      # local, torchrun, slurm or deepspeed: see cmd.sh and docs/launching.md
print_command=false # print the commands that would start processes, and run nothing

. "$(dirname "${BASH_SOURCE[0]}")/../utils/parse_options.sh"
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
. "$here/../utils/log.sh"
case $amount in
  10min | 1h | 10h | 100h | 960h) ;;
  *) echo "run.sh: --amount takes 10min, 1h, 10h, 100h or 960h, not $amount" >&2 && exit 2 ;;
esac
data=$(absolute "${data:-$here/data}")
exp=$(absolute "${exp:-$here/exp/$conf}")
corpus=$(given --corpus "$corpus")
. "$here/../utils/librispeech.sh"
if [[ -n $corpus && ! -s $data/manifests/.prepare.done ]] && in_range 1; then
  need_parts "$corpus" "train-clean-100|train-clean-360|train-other-500|train-clean-5" "dev-clean|dev-clean-2"
fi
librilight=$(given --librilight "$librilight")
lm=$(given --lm "$lm")
. "$here/path.sh"
. "$here/cmd.sh"
. "$here/../utils/stages.sh"

manifests=$data/manifests
labels=$manifests/cuts_$amount.jsonl
tuned=("${exp}_$amount" "${exp}_${amount}_scratch")
decode_best=true

# manifests_of PART… prints the manifests that exist. Parts of mini LibriSpeech are accepted, too.
manifests_of() {
  local part
  for part in "$@"; do
    if [[ -e $manifests/cuts_$part.jsonl ]]; then echo "$manifests/cuts_$part.jsonl"; fi
  done
}
find_manifests() {
  mapfile -t train_cuts < <(manifests_of train-clean-100 train-clean-360 train-other-500 train-clean-5)
  mapfile -t test_cuts < <(manifests_of dev-clean dev-other test-clean test-other dev-clean-2)
  held_out=$(manifests_of dev-clean dev-clean-2 | head -n 1)
}

fetch_4gram() { bash "$here/local/fetch_lm.sh" "$data/lm"; }
prepare() {
  rm -f "${train_cuts[@]}" "${test_cuts[@]}" # of another corpus, which may have had other parts
  w2vscale data prepare librispeech "$corpus" "$manifests" --jobs "$jobs"
  find_manifests
  w2vscale data validate "${train_cuts[@]}" "${test_cuts[@]}" --jobs "$jobs"
}
index() {
  w2vscale data index "${train_cuts[@]}" "${test_cuts[@]}"
  w2vscale data stats "${train_cuts[@]}" --config "$here/conf/$conf.yaml"
}
# shards_of MANIFEST prints the folder of its shards.
shards_of() {
  local name=${1##*/cuts_}
  echo "$data/shar/${name%.jsonl}"
}
write_shards() {
  local cuts
  for cuts in "${train_cuts[@]}"; do w2vscale data shar "$cuts" "$(shards_of "$cuts")" --jobs "$jobs"; done
}
# pretrain_librispeech CONF [SETTING…]
pretrain_librispeech() {
  if $shar; then
    local cuts folders=
    for cuts in "${train_cuts[@]}"; do folders+=$(shards_of "$cuts"),; done
    set -- "$1" data.mode=stream data.train="[${folders%,}]" "${@:2}"
  fi
  pretrain "$@"
}
# Writes the manifest that stage 7 fine-tunes on.
choose_labels() {
  case $amount in
    100h) cp "$manifests/cuts_train-clean-100.jsonl" "$labels" && w2vscale data index "$labels" ;;
    960h) cat "${train_cuts[@]}" >"$labels" && w2vscale data index "$labels" ;;
    *)
      if [[ -n $librilight ]]; then
        bash "$here/local/librilight_ids.sh" "$librilight" "$amount" >"$manifests/$amount.ids"
        subset "$labels" --ids "$manifests/$amount.ids"
      else
        local -A minutes=([10min]=10 [1h]=60 [10h]=600)
        subset "$labels" --hours "$(hours "${minutes[$amount]}")" --balanced-speakers
      fi
      ;;
  esac
}

# Fine-tunes with the published settings for the amount of transcripts and the size of the pretrained model, keeps the
# checkpoint with the lowest word error rate in validation, and trims masks if pretraining did.
fine_tune_librispeech() {
  local width size=
  if ${print_command:-false} && [[ ! -f $exp/config.yaml ]]; then
    log "the preset for fine-tuning depends on the size of the model in $exp: run stage 4 first"
    return
  fi
  width=$(setting_of "$exp" model.dim)
  if ((width >= 1024)); then size=large_; fi
  finetune_settings="objective.mask_trim=$(setting_of "$exp" objective.mask_trim) checkpoint.keep_best=1 $finetune_settings"
  log "settings: the preset ctc_$size$amount, $finetune_settings"
  fine_tune "ctc_$size$amount"
}

find_manifests
if [[ -z $corpus ]]; then
  corpus=$data/LibriSpeech
  run_stage 0 "download LibriSpeech" "$corpus" download_librispeech "$data" full
fi
if $fetch_lm; then run_stage 0 "fetch the 4-gram" "$data/lm" fetch_4gram; fi
fetched=$data/lm/4-gram.arpa.gz
if [[ -z $lm && -e $fetched ]]; then lm=$fetched; fi
run_stage 1 "write and validate Lhotse manifests" "$manifests" --options "corpus" prepare
find_manifests
if ((stop_stage >= 2)) && [[ -z $held_out || -z ${train_cuts[*]} ]]; then
  log "no cuts_train-*.jsonl, or no cuts_dev-clean.jsonl or cuts_dev-clean-2.jsonl in $manifests: run stage 1"
  exit 1
fi
run_stage 2 "index them for O(1) access" "$manifests" --reads "train_cuts test_cuts" index
if $shar; then run_stage 3 "write Lhotse Shar" "$data/shar" --reads "train_cuts" write_shards; fi
train_stage 4 "pretrain with conf/$conf.yaml" "$exp" --options "shar" --reads "train_cuts held_out" \
  pretrain_librispeech "$here/conf/$conf.yaml" "$@"
run_stage 5 "evaluate on held-out speech and draw the curves" "$exp" --reads "exp held_out" evaluate_pretraining
run_stage 6 "choose $amount of transcribed speech" "$labels" --options "librilight" --reads "train_cuts" choose_labels
train_stage 7 "fine-tune on it, and train from scratch" "${tuned[0]}" \
  --options "finetune_settings" --reads "exp labels held_out" fine_tune_librispeech
run_stage 8 "decode" "${tuned[0]}" --reads "tuned test_cuts" --ranks decode
if [[ -n $lm ]]; then
  run_stage 8 "decode with ${lm##*/}" "${tuned[0]}" --options "lm" --reads "tuned test_cuts" --ranks decode_with_lm
fi
find_scores
run_stage 9 "compare" "${tuned[0]}" --reads "scores" results "LibriSpeech, $conf, $amount"
run_stage 10 "export for Transformers" "${tuned[0]}" --reads "exp tuned" export_models
made "manifests" "$manifests"
made_all
