# shellcheck shell=bash disable=SC2034,SC2154
# Source this file below stages.sh.

# pretrain_for_hours OBJECTIVE [SETTING…] pretrains in the folder $run until $hours of speech are seen: larger batches
# mean fewer updates.
pretrain_for_hours() {
  local exp=$run conf=$here/conf/$1.yaml updates
  if ${print_command:-false} && [[ ! -e ${train_cuts[0]} ]]; then
    log "the number of updates depends on the speech: run stages 0 to 2 first"
    return
  fi
  updates=$(python "$here/local/updates_for.py" "$hours" "$conf" data.train="${train_cuts[0]}" "${@:2}")
  pretrain "$conf" trainer.updates="$updates" schedule.warmup_updates=$((updates / 20 + 1)) "${@:2}"
}
