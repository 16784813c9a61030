#!/usr/bin/env bash
# Continues the pretraining of an imported model (XLS-R, or any other wav2vec 2.0) on your own language, or pretrains on
# several languages. If there are transcripts, also fine-tunes the result and, to compare, the imported model itself.
#
#   bash recipes/xlsr/run.sh --model wav2vec2-xls-r-300m --audio /data/ainu --nproc 8
#   bash recipes/xlsr/run.sh --model exp/300m --audio "ain=/data/ainu ain=/data/more" trainer.updates=5000
#   bash recipes/xlsr/run.sh --manifests "de=/data/mls_german fr=/data/mls_french" --conf 1b --launcher slurm --nproc 8
#
# A folder is DIR, or LANGUAGE=DIR to set the language of all its utterances. The transcripts in a folder of --audio have
# the names of their audio files. A folder of --manifests is one that `w2vscale data prepare` has written. Settings of
# pretraining follow the options.
#
# Finished stages are skipped. Other folders or settings are refused: choose another --data or --exp for them.
set -euo pipefail

stage=0               # first stage to run
stop_stage=10         # last stage to run
model=                # model to continue: a Transformers folder, a .pt file of fairseq or fairseq2, or a run of w2vscale (default: none)
model_format=         # format of --model, as for w2vscale import (default: that of w2vscale import)
audio=                # folders of audio files, separated by spaces
manifests=            # folders of prepared manifests, separated by spaces
data=                 # folder for imported models and manifests (default: data/ beside this script)
conf=                 # name in conf/, preset or YAML file for pretraining (default: continued or continued_1b; without --model, 300m)
exp=                  # folder of the run (default: exp/MODEL_continued or, without --model, exp/CONF, beside this script)
segment_seconds=30    # split longer recordings of --audio into segments of this duration, in seconds
vad=false             # cut recordings of --audio at pauses, and leave pauses out
max_bad_fraction=0.05 # stop if more of the audio files cannot be used
dev_share=0.05        # fraction of the recordings for validation, where no manifest is for it
test_share=0.05       # fraction of the recordings for testing, where no manifest is for it
tune_on=              # language to fine-tune on (default: all transcripts)
vocabulary=           # file of symbols for fine-tuning (default: those of the transcripts for training, in lower case)
finetune_conf=        # name in conf/, preset or YAML file for fine-tuning (default: finetune, or finetune_2b)
finetune_settings=    # SECTION.KEY=VALUE, separated by spaces, to override settings of --finetune-conf
baseline=true         # also fine-tune --model itself or, without it, the same model from scratch
lm=                   # n-gram language model for a second decoding
jobs=4                # parallel jobs for data preparation
nproc=1               # processes (GPUs) for training and decoding
launcher=local        # local, torchrun, slurm or deepspeed: see cmd.sh and docs/launching.md
print_command=false   # print the commands that would start processes, and run nothing

. "$(dirname "${BASH_SOURCE[0]}")/../utils/parse_options.sh"
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
. "$here/../utils/log.sh"
if [[ -z $audio$manifests ]]; then die "--audio or --manifests is required: give folders of your speech"; fi
for option in dev_share test_share; do
  if [[ ! ${!option} =~ ^(0|0?\.[0-9]+)$ ]]; then die "--${option//_/-} takes a fraction below 1, not '${!option}'"; fi
done
data=$(absolute "${data:-$here/data}")
model=$(given --model "$model")
lm=$(given --lm "$lm")
vocabulary=$(given --vocabulary "$vocabulary")

# One corpus for each folder: its name, its language (may be empty), its folder, and the option that names it.
names=() languages=() folders=() kinds=()
# add_corpora OPTION 'FOLDER…'
add_corpora() {
  local words word language folder name number=2
  read -ra words <<<"$2"
  for word in "${words[@]}"; do
    language='' folder=$word
    if [[ $word == *=* && ! -e $word ]]; then language=${word%%=*} folder=${word#*=}; fi
    folder=$(given "--$1" "$folder")
    name=${language:-$(basename "$folder")}
    if [[ " ${names[*]} " == *" $name "* ]]; then
      while [[ " ${names[*]} " == *" $name-$number "* ]]; do number=$((number + 1)); done
      name+=-$number
    fi
    names+=("$name") languages+=("$language") folders+=("$folder") kinds+=("$1")
  done
}
add_corpora audio "$audio"
add_corpora manifests "$manifests"
title=${names[*]}
# The settings that follow the options also decide the buckets and the shares of languages that stage 2 shows.
settings_of_stats=()
for setting in "$@"; do settings_of_stats+=(--set "$setting"); done
. "$here/path.sh"
. "$here/cmd.sh"
. "$here/../utils/stages.sh"

# in_conf NAME prints the path of conf/NAME.yaml if it exists, or else NAME, which is a preset or file.
in_conf() { if [[ -e $here/conf/$1.yaml ]]; then echo "$here/conf/$1.yaml"; else echo "$1"; fi; }

# width_of RUN prints the width of a model, or 0 before it exists.
width_of() { if [[ -e $1/checkpoints/latest ]]; then setting_of "$1" model.dim; else echo 0; fi; }

import_model() {
  rm -rf "$imported/checkpoints"
  w2vscale import "$model" "$imported" ${model_format:+--format "$model_format"}
}

# Writes the manifests of the corpus $name.
prepare() {
  local prepared=$manifests cutting=()
  if [[ $kind == audio ]]; then
    prepared=$corpus/prepared
    if $vad; then cutting=(--vad); fi
    w2vscale data prepare folder "$audio" "$prepared" --segment-seconds "$segment_seconds" \
      --max-bad-fraction "$max_bad_fraction" --jobs "$jobs" "${cutting[@]}"
  fi
  rm -f "$corpus"/cuts_*
  python "$here/local/cuts.py" split "$prepared" "$corpus" --name "$name" --language "$language" \
    --dev-share "$dev_share" --test-share "$test_share"
  w2vscale data validate "$corpus"/cuts_*.jsonl --jobs "$jobs"
}

index() {
  w2vscale data index "${train_cuts[@]}" "${held_out[@]}" --jobs "$jobs"
  w2vscale data stats "${train_cuts[@]}" --config "$conf" "${settings_of_stats[@]}"
}

# find_settings KIND OTHER SOURCE sets the array settings to those of SOURCE that differ in OTHER: see local/settings.py.
find_settings() {
  local found
  settings=()
  found=$(python "$here/local/settings.py" "$@")
  if [[ -n $found ]]; then mapfile -t settings <<<"$found"; fi
}

# pretrain_xlsr CONF [SETTING…] pretrains from the imported model, if there is one, with its architecture.
pretrain_xlsr() {
  local settings=()
  if [[ -n $imported && ! -e $imported/checkpoints/latest ]]; then
    log "the settings of the architecture are those of $imported: run stage 0 first"
    settings=(trainer.init_from="$imported")
  elif [[ -n $imported ]]; then
    find_settings architecture "$1" "$imported"
    settings+=(trainer.init_from="$imported")
  fi
  pretrain "$1" "${settings[@]}" "${@:2}"
}
dry_run() { pretrain_xlsr "$@" --dry-run; }

# Also evaluates the imported model on the same masked frames, which shows what continued pretraining has changed.
evaluate_xlsr() {
  local settings
  evaluate_pretraining
  if [[ -n $imported && $(setting_of "$imported" objective.name) == "$(setting_of "$exp" objective.name)" ]]; then
    find_settings evaluation "$imported" "$exp"
    evaluate_on_held_out "$imported" "$before" "${settings[@]}"
  fi
}

# Selects the transcribed utterances, and counts their symbols.
choose_transcripts() {
  rm -rf "$transcripts"
  python "$here/local/cuts.py" transcribed "$transcripts" "${all_cuts[@]}" --language "$tune_on"
  find_transcripts
  if ((!${#labels[@]})); then
    if [[ -n $tune_on ]]; then die "--tune-on $tune_on: no utterance for training in this language has a transcript"; fi
    mkdir -p "$transcripts"
    return
  fi
  if ((!${#tuning_held_out[@]})); then die "no utterance for validation has a transcript: give other --manifests"; fi
  w2vscale data index "$transcripts"/cuts_*.jsonl
  w2vscale data vocabulary "${labels[@]}" --case lower --output "$transcripts/vocabulary.txt" --jobs "$jobs"
}

# existing PATH… prints those that exist.
existing() {
  local path
  for path in "$@"; do
    if [[ -e $path ]]; then echo "$path"; fi
  done
}
# Sets labels, tuning_held_out and test_cuts to what stage 6 has written.
find_transcripts() {
  local name path=$transcripts/cuts_
  mapfile -t labels < <(for name in "${names[@]}"; do existing "$path${name}_train.jsonl"; done)
  mapfile -t tuning_held_out < <(for name in "${names[@]}"; do existing "$path${name}_dev.jsonl"; done)
  mapfile -t test_cuts < <(for name in "${names[@]}"; do existing "$path${name}"_{dev,test}.jsonl; done)
}

# fine_tune_xlsr CONF fine-tunes on the engine of pretraining. It keeps the checkpoint with the lowest word error rate in
# validation, too.
fine_tune_xlsr() {
  local held_out=("${tuning_held_out[@]}") settings=()
  find_settings placement "$1" "$exp"
  fine_tune "$1" objective.vocabulary="$vocabulary" "${settings[@]}" checkpoint.keep_best=1
}
export_pretrained() { export_model "$exp" "$exp/huggingface"; }

imported=
if [[ -n $model && -e $model/checkpoints ]]; then
  imported=$model # a run of w2vscale
elif [[ -n $model ]]; then
  imported=$(basename "$model" .pt)
  imported=$data/imported/$imported
  run_stage 0 "import $model" "$imported" --options "model model_format" import_model
fi
if [[ -n $imported ]]; then
  width=$(width_of "$imported")
  if [[ -z $conf ]] && ((width > 1024)); then conf=continued_1b; fi
  conf=$(in_conf "${conf:-continued}")
  exp=$(absolute "${exp:-$here/exp/$(basename "$imported")_continued}")
  if [[ $exp -ef $imported ]]; then die "--exp $exp: is the folder of --model; choose another one"; fi
else
  conf=$(in_conf "${conf:-300m}")
  exp=$(absolute "${exp:-$here/exp/$(basename "$conf" .yaml)}")
fi

train_cuts=() held_out=() all_cuts=()
for ((i = 0; i < ${#names[@]}; i++)); do
  name=${names[i]} language=${languages[i]} kind=${kinds[i]} corpus=$data/corpora/${names[i]}
  # The mark records the value of the variable that has the name of the option: here, this folder alone.
  printf -v "$kind" '%s' "${folders[i]}"
  options="$kind language dev_share test_share"
  if [[ $kind == audio ]]; then options+=" segment_seconds vad"; fi
  run_stage 1 "write manifests of $name" "$corpus" --options "$options" prepare
  train_cuts+=("$corpus/cuts_${name}_train.jsonl")
  held_out+=("$corpus/cuts_${name}_dev.jsonl")
  mapfile -t -O ${#all_cuts[@]} all_cuts < <(existing "$corpus/cuts_$name"_{train,dev,test}.jsonl)
done
run_stage 2 "index them for O(1) access" "$data/corpora" --reads "train_cuts held_out" index
run_stage 3 "try the largest forward" "$exp" --reads "imported train_cuts held_out" --ranks dry_run "$conf" "$@"
train_stage 4 "pretrain with $(basename "$conf")" "$exp" --reads "imported train_cuts held_out" pretrain_xlsr "$conf" "$@"
before=$exp/$(basename "$imported")/evaluation.json
run_stage 5 "evaluate on held-out speech and draw the curves" "$exp" --reads "exp imported held_out" evaluate_xlsr

amount=${tune_on:-transcribed}
transcripts=${exp}_${amount}_data
tuned=("${exp}_$amount")
if $baseline && [[ -n $imported ]]; then
  tuned+=("${tuned[0]}_imported")
elif $baseline; then
  tuned+=("${tuned[0]}_scratch")
fi
run_stage 6 "choose transcripts" "$transcripts" --options "tune_on" --reads "all_cuts" choose_transcripts
find_transcripts
vocabulary=${vocabulary:-$transcripts/vocabulary.txt}
width=$(width_of "$exp")
if [[ -z $finetune_conf ]] && ((width >= 1920)); then finetune_conf=finetune_2b; fi
finetune_conf=$(in_conf "${finetune_conf:-finetune}")
# shellcheck disable=SC2034 # stages.sh reads it
decode_best=true
if ((${#labels[@]})); then
  train_stage 7 "fine-tune with $(basename "$finetune_conf")" "${tuned[0]}" --options "finetune_settings baseline" \
    --reads "exp imported labels tuning_held_out vocabulary" fine_tune_xlsr "$finetune_conf"
  run_stage 8 "decode" "${tuned[0]}" --reads "tuned test_cuts" --ranks decode
  if [[ -n $lm ]]; then
    run_stage 8 "decode with ${lm##*/}" "${tuned[0]}" --options "lm" --reads "tuned test_cuts" --ranks decode_with_lm
  fi
  find_scores
  if [[ -e $before ]]; then scores+=("$before"); fi
  run_stage 9 "compare" "${tuned[0]}" --reads "scores" results "$title"
  run_stage 10 "export for Transformers" "${tuned[0]}" --reads "exp tuned" export_models
else
  if [[ -e $transcripts/.choose_transcripts.done ]]; then
    log "there are no transcripts: nothing is fine-tuned"
  elif in_range 7; then
    log "whether there are transcripts to fine-tune on is known after stage 6"
    if ! $print_command; then exit 1; fi
  fi
  run_stage 10 "export for Transformers" "$exp" --reads "exp" export_pretrained
fi
made "manifests" "$data/corpora" "imported" "$imported"
made_all
