# shellcheck shell=bash disable=SC2154
# The stages after indexing, shared by all recipes. Source this file below cmd.sh. A recipe sets:
#   exp          folder of the pretraining run
#   tuned        array of the folders of fine-tuned runs: from the pretrained model and, if there are two, a baseline
#   imported     model to fine-tune for the baseline (default: it is trained from scratch)
#   train_cuts   array of manifests for pretraining
#   labels       manifest for fine-tuning, or an array
#   held_out     manifest for validation, or an array
#   test_cuts    array of manifests to decode
#   finetune_settings   SECTION.KEY=VALUE, separated by spaces, to override settings of fine-tuning
#   lm           n-gram language model for decode_with_lm
#   decode_best  true: decode and export the checkpoint that was best in validation (needs checkpoint.keep_best)

# listed PATH… prints paths as the value of a setting: one as it is, several as a list.
listed() {
  local paths=$1
  if (($# > 1)); then
    printf -v paths '%s,' "$@"
    paths="[${paths%,}]"
  fi
  printf '%s' "$paths"
}

# pretrain CONF [SETTING…] pretrains on train_cuts.
pretrain() {
  local conf=$1 cuts
  shift
  printf -v cuts '%s,' "${train_cuts[@]}"
  on_ranks train "$conf" data.train="[${cuts%,}]" data.validation="$(listed "${held_out[@]}")" --exp "$exp" "$@"
}

# evaluate_on_held_out MODEL OUT.json [SETTING…]
evaluate_on_held_out() {
  local cuts words=()
  for cuts in "${held_out[@]}"; do words+=(--cuts "$cuts"); done
  w2vscale evaluate "$1" "${@:3}" "${words[@]}" --output "$2"
}

evaluate_pretraining() {
  evaluate_on_held_out "$exp" "$exp/evaluation.json"
  w2vscale report "$exp"
}

# subset OUT OPTION… writes a subset of all training data to OUT, with options of `w2vscale data subset`.
subset() {
  local out=$1 all=${train_cuts[0]}
  shift
  if ((${#train_cuts[@]} > 1)); then
    all=$out.all.jsonl
    cat "${train_cuts[@]}" >"$all"
    w2vscale data index "$all"
  fi
  w2vscale data subset "$all" "$out" "$@"
  w2vscale data index "$out"
}

# hours MINUTES converts minutes to hours.
hours() { awk -v minutes="$1" 'BEGIN { print minutes / 60 }'; }

# setting_of RUN SECTION.KEY prints a setting of a run.
setting_of() {
  python - "$@" <<'END'
import functools
import sys

from w2vscale.config import load_config
from w2vscale.errors import UserError

try:
    print(functools.reduce(getattr, sys.argv[2].split("."), load_config(sys.argv[1])))
except UserError as error:
    print(f"error: {error}", file=sys.stderr)
    sys.exit(2)
END
}

# fine_tune CONF [SETTING…] fine-tunes the pretrained model on labels and trains the baseline, if there is one.
fine_tune() {
  local conf=$1 baseline=${tuned[1]:-} settings
  if [[ -n $baseline && ! -e ${tuned[0]}/checkpoints && -e $baseline/checkpoints ]]; then
    die "$baseline was compared with an earlier ${tuned[0]}: rm -r $baseline to train it again, too"
  fi
  read -ra settings <<<"$finetune_settings"
  local common=(data.train="$(listed "${labels[@]}")" data.validation="$(listed "${held_out[@]}")" "${@:2}" "${settings[@]}")
  on_ranks finetune "$conf" trainer.init_from="$exp" "${common[@]}" --exp "${tuned[0]}"
  if [[ -n $baseline && -n ${imported:-} ]]; then
    on_ranks finetune "$conf" trainer.init_from="$imported" "${common[@]}" --exp "$baseline"
  elif [[ -n $baseline ]]; then
    on_ranks finetune "$conf" trainer.init_from="$exp" "${common[@]}" --scratch --exp "$baseline"
  fi
  on_first_machine w2vscale report "${tuned[@]}" -o "${tuned[0]}/report.html"
}

# best_of RUN prints its checkpoint with the lowest trainer.best_metric in validation if $decode_best is true, or else RUN.
best_of() {
  if ! ${decode_best:-false}; then
    echo "$1"
    return
  fi
  if ${print_command:-false} && [[ ! -e $1/checkpoints/latest ]]; then
    log "which checkpoint of $1 was best is known after training: run stage 7 first"
    return 1
  fi
  python - "$1" <<'END'
import sys
from pathlib import Path

from w2vscale.checkpoint.format import committed
from w2vscale.checkpoint.reader import best_first
from w2vscale.config import load_config

run = Path(sys.argv[1])
metric = load_config(run).trainer.best_metric
found = best_first(committed(run / "checkpoints"), metric)
print(found[0] if found else sys.exit(f"error: {run}: no checkpoint has the validation metric {metric}"))
END
}

# decode [SUFFIX OPTION…] decodes test_cuts with all tuned runs: greedily, or with options of `w2vscale evaluate --wer`.
decode() {
  local suffix=${1:-} run name cuts checkpoint
  # Results with a language model are of the earlier models. They must not be compared with the new ones.
  for run in "${tuned[@]}"; do
    if [[ -z $suffix ]]; then on_first_machine rm -f "$run"/{.decode_with_lm.done,wer_*_lm.*}; fi
    if ! checkpoint=$(best_of "$run"); then
      if ${print_command:-false}; then continue; fi # best_of has said why
      return 1
    fi
    for cuts in "${test_cuts[@]}"; do
      name=${cuts##*/cuts_}
      name=${name%.jsonl}$suffix
      on_ranks evaluate "$checkpoint" --cuts "$cuts" --wer --output "$run/wer_$name.json" "${@:2}"
    done
  done
}

# decode_with_lm [OPTION…] is separate from decode, so that it can be run later.
decode_with_lm() { decode _lm --lm "$lm" "$@"; }

# find_scores sets the array scores to the files that `results` compares.
find_scores() {
  local run
  scores=("$exp/evaluation.json")
  for run in "${tuned[@]}"; do scores+=("$run"/wer_*.json); done
}

# results TITLE writes RESULTS.md, and the report again, which now has the error rates.
results() {
  w2vscale results "${scores[@]}" --output "${tuned[0]}/RESULTS.md" --title "$1"
  w2vscale report "${tuned[@]}" -o "${tuned[0]}/report.html"
}

# export_model CHECKPOINT DIR exports to DIR. Files of an earlier export are replaced; other files in DIR stay.
export_model() {
  rm -rf "$2.new"
  w2vscale export "$1" "$2.new"
  mkdir -p "$2"
  mv -f "$2.new"/* "$2"
  rmdir "$2.new"
}
export_models() {
  local checkpoint
  export_model "$exp" "$exp/huggingface"
  checkpoint=$(best_of "${tuned[0]}")
  export_model "$checkpoint" "${tuned[0]}/huggingface"
}

made_all() {
  made "settings" "$exp/config.yaml" "pretrained" "$exp/checkpoints/latest" "its evaluation" "$exp/evaluation.json" \
    "its report" "$exp/report.html" "TensorBoard" "$exp/tb" "fine-tuned" "${tuned[0]}/checkpoints/latest" \
    "its report" "${tuned[0]}/report.html" "baseline" "${tuned[1]:-none}/checkpoints/latest" \
    "for Transformers" "${tuned[0]}/huggingface" "results" "${tuned[0]}/RESULTS.md"
}
