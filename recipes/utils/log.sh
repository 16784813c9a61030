# shellcheck shell=bash
# Logging, stages and paths for recipes. Source it after `set -euo pipefail`.

# log MESSAGE… prints the time, the place in the recipe and the message, on stderr: stdout is for results.
log() {
  local frame=1
  # A stage's messages name the line that asked for the stage.
  while [[ ${BASH_SOURCE[frame]:-} == "${BASH_SOURCE[0]}" ]]; do frame=$((frame + 1)); done
  printf '%s (%s:%s) %s\n' \
    "$(date '+%Y-%m-%d %H:%M:%S')" "${BASH_SOURCE[frame]##*/}" "${BASH_LINENO[frame - 1]}" "$*" >&2
}

# run_stage NUMBER TITLE DIR FUNCTION [ARGUMENT…] runs FUNCTION if NUMBER lies between $stage and $stop_stage and the
# stage was not finished before. DIR is the folder that the stage fills. The mark DIR/.FUNCTION.done depends on nothing
# but FUNCTION's success; it lies beside the output so that removing the one removes the other.
#
# Call it on a line of its own: in `run_stage … || …` or `if run_stage …` bash ignores `set -e` inside FUNCTION.
run_stage() {
  local number=$1 title=$2 dir=$3 mark=$3/.${4##*/}.done
  shift 3
  local first=${stage?} last=${stop_stage?} whole='(0|-?[1-9][0-9]*)'
  if [[ ! $first,$last =~ ^$whole,$whole$ ]]; then
    printf "%s: --stage and --stop-stage take whole numbers, not '%s' and '%s'\n" "${0##*/}" "$first" "$last" >&2
    exit 2
  fi
  if ((number < first || number > last)); then return 0; fi
  # An empty mark is no mark: a full disk or a crash left it.
  if [[ -s $mark ]]; then
    log "stage $number: done already (rm $mark to redo)"
    return 0
  fi

  log "stage $number: $title"
  local start=$SECONDS status
  "$@" # by itself, so that `set -e` holds inside
  status=$?
  if ((status)); then return "$status"; fi # reached where the recipe runs without `set -e`

  mkdir -p "$dir"
  date '+%Y-%m-%d %H:%M:%S' >"$mark.new"
  mv "$mark.new" "$mark"
  log "stage $number: done in $((SECONDS - start)) s"
}

# absolute PATH prints it as seen from anywhere; nothing for nothing.
absolute() { if [[ -z $1 || $1 == /* ]]; then echo "$1"; else echo "$PWD/$1"; fi; }

# given OPTION PATH prints the path as seen from anywhere, nothing for nothing; a recipe ends where nothing is there.
given() {
  if [[ -n $2 && ! -e $2 ]]; then
    printf '%s: %s %s: no such file or folder\n' "${0##*/}" "$1" "$2" >&2
    return 2
  fi
  absolute "$2"
}

# made NAME PATH [NAME PATH …] ends a recipe: a table of what is there, and where. What is missing is left out.
made() {
  printf '\n'
  while (($# >= 2)); do
    if [[ -e $2 ]]; then printf '%-22s %s\n' "$1" "$2"; fi
    shift 2
  done
}
