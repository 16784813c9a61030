# shellcheck shell=bash disable=SC2154
# The stages after indexing, shared by all recipes. Source this file below cmd.sh. A recipe sets:
#   exp          folder of the pretraining run; fine-tuned runs go to ${exp}_$amount and ${exp}_${amount}_scratch
#   amount       name of the fine-tuning data, e.g. 1h
#   train_cuts   array of manifests for pretraining
#   held_out     manifest for validation
#   test_cuts    array of manifests to decode
#   finetune_settings   SECTION.KEY=VALUE, separated by spaces, to override settings of fine-tuning
#   lm           n-gram language model for decode_with_lm
#   decode_best  true: decode and export the checkpoint that was best in validation (needs checkpoint.keep_best)

# pretrain CONF [SETTING…] pretrains on train_cuts.
pretrain() {
  local conf=$1 cuts
  shift
  printf -v cuts '%s,' "${train_cuts[@]}"
  on_ranks train "$conf" data.train="[${cuts%,}]" data.validation="$held_out" --exp "$exp" "$@"
}

evaluate_pretraining() {
  w2vscale evaluate "$exp" --cuts "$held_out" --output "$exp/evaluation.json"
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
  python -c 'import functools, sys; from w2vscale.config import load_config
print(functools.reduce(getattr, sys.argv[2].split("."), load_config(sys.argv[1])))' "$@"
}

# fine_tune CONF LABELS fine-tunes the pretrained model on the manifest LABELS and, as a baseline, trains from scratch.
fine_tune() {
  local conf=$1 labels=$2 settings
  read -ra settings <<<"$finetune_settings"
  local common=("$conf" trainer.init_from="$exp" data.train="$labels" data.validation="$held_out" "${settings[@]}")
  on_ranks finetune "${common[@]}" --exp "${exp}_$amount"
  on_ranks finetune "${common[@]}" --scratch --exp "${exp}_${amount}_scratch"
  w2vscale report "${exp}_$amount" "${exp}_${amount}_scratch" --output "${exp}_$amount/curves.png"
}

# best_of RUN prints its checkpoint with the lowest trainer.best_metric in validation if $decode_best is true, or else RUN.
best_of() {
  if ! ${decode_best:-false}; then
    echo "$1"
    return
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

# decode [SUFFIX OPTION…] decodes test_cuts with both runs: greedily, or with options of `w2vscale evaluate --wer`.
decode() {
  local suffix=${1:-} run name cuts checkpoint
  for run in "${exp}_$amount" "${exp}_${amount}_scratch"; do
    checkpoint=$(best_of "$run")
    for cuts in "${test_cuts[@]}"; do
      name=${cuts##*/cuts_}
      name=${name%.jsonl}$suffix
      on_ranks evaluate "$checkpoint" --cuts "$cuts" --wer --output "$run/wer_$name.json" --html "$run/wer_$name.html" "${@:2}"
    done
  done
}

# Separate from decode, so that it can be run later. Deletes the mark of `results`, so that the table is written again.
decode_with_lm() {
  decode _lm --lm "$lm"
  rm -f "${exp}_$amount/.results.done"
}

# results TITLE writes RESULTS.md.
results() {
  w2vscale results "$exp/evaluation.json" "${exp}_$amount"/wer_*.json "${exp}_${amount}_scratch"/wer_*.json \
    --output "${exp}_$amount/RESULTS.md" --title "$1"
}

export_models() {
  local run=${exp}_$amount checkpoint
  if [[ ! -e $exp/huggingface ]]; then w2vscale export "$exp" "$exp/huggingface"; fi
  checkpoint=$(best_of "$run")
  if [[ ! -e $run/huggingface ]]; then w2vscale export "$checkpoint" "$run/huggingface"; fi
}

made_all() {
  made "settings" "$exp/config.yaml" "pretrained" "$exp/checkpoints/latest" "its evaluation" "$exp/evaluation.json" \
    "its curves" "$exp/curves.png" "TensorBoard" "$exp/tb" "fine-tuned" "${exp}_$amount/checkpoints/latest" \
    "its curves" "${exp}_$amount/curves.png" "from scratch" "${exp}_${amount}_scratch/checkpoints/latest" \
    "for Transformers" "${exp}_$amount/huggingface" "results" "${exp}_$amount/RESULTS.md"
}
