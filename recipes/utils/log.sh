# shellcheck shell=bash
# Logging, stages and paths for recipes. Source it after `set -euo pipefail`.

# log MESSAGE… prints the time, the place in the recipe and the message to stderr, because stdout is for results.
log() {
  local frame=1
  # Messages about a stage show the line that calls run_stage.
  while [[ ${BASH_SOURCE[frame]:-} == "${BASH_SOURCE[0]}" ]]; do frame=$((frame + 1)); done
  printf '%s (%s:%s) %s\n' \
    "$(date '+%Y-%m-%d %H:%M:%S')" "${BASH_SOURCE[frame]##*/}" "${BASH_LINENO[frame - 1]}" "$*" >&2
}

# run_stage NUMBER TITLE DIR FUNCTION [ARGUMENT…] runs FUNCTION if NUMBER is between $stage and $stop_stage and the
# stage has not been finished before. DIR is the folder for the output of the stage. If FUNCTION succeeds, the file
# DIR/.FUNCTION.done marks the stage as finished; it is in DIR so that deleting the output also deletes the mark.
#
# Call it on a line of its own: in `run_stage … || …` or `if run_stage …`, bash ignores `set -e` inside FUNCTION.
run_stage() {
  local number=$1 title=$2 dir=$3 mark=$3/.${4##*/}.done
  shift 3
  local first=${stage?} last=${stop_stage?} whole='(0|-?[1-9][0-9]*)'
  if [[ ! $first,$last =~ ^$whole,$whole$ ]]; then
    printf "%s: --stage and --stop-stage take whole numbers, not '%s' and '%s'\n" "${0##*/}" "$first" "$last" >&2
    exit 2
  fi
  if ((number < first || number > last)); then return 0; fi
  # An empty mark does not count: a full disk or a crash has left it.
  if [[ -s $mark ]]; then
    log "stage $number: done already (rm $mark to redo)"
    return 0
  fi

  log "stage $number: $title"
  local start=$SECONDS status
  "$@" # on a line of its own, so that `set -e` works inside
  status=$?
  if ((status)); then return "$status"; fi # only reached if the recipe does not use `set -e`

  mkdir -p "$dir"
  date '+%Y-%m-%d %H:%M:%S' >"$mark.new"
  mv "$mark.new" "$mark"
  log "stage $number: done in $((SECONDS - start)) s"
}

# absolute PATH prints it as an absolute path; an empty one stays empty.
absolute() { if [[ -z $1 || $1 == /* ]]; then echo "$1"; else echo "$PWD/$1"; fi; }

# given OPTION PATH prints the path given to an option as an absolute path, and fails if it does not exist. An empty one
# stays empty.
given() {
  if [[ -n $2 && ! -e $2 ]]; then
    printf '%s: %s %s: no such file or folder\n' "${0##*/}" "$1" "$2" >&2
    return 2
  fi
  absolute "$2"
}

# made NAME PATH [NAME PATH …] prints a table of the outputs that exist, for the end of a recipe.
made() {
  printf '\n'
  while (($# >= 2)); do
    if [[ -e $2 ]]; then printf '%-22s %s\n' "$1" "$2"; fi
    shift 2
  done
}
