# shellcheck shell=bash
# Logging, stages and paths for recipes. Source it after `set -euo pipefail`.

. "$(dirname "${BASH_SOURCE[0]}")/inputs.sh"

# log MESSAGE… prints the time, the place in the recipe and the message to stderr, because stdout is for results.
log() {
  local frame=1
  # Messages about a stage show the line that calls run_stage.
  while [[ ${BASH_SOURCE[frame]:-} == "${BASH_SOURCE[0]}" ]]; do frame=$((frame + 1)); done
  printf '%s (%s:%s) %s\n' \
    "$(date '+%Y-%m-%d %H:%M:%S')" "${BASH_SOURCE[frame]##*/}" "${BASH_LINENO[frame - 1]}" "$*" >&2
}

# die MESSAGE… prints the name of the recipe and the message to stderr, and ends the recipe with exit code 2.
die() {
  printf '%s: %s\n' "${0##*/}" "$*" >&2
  exit 2
}

# in_range NUMBER tells whether the stage NUMBER is between $stage and $stop_stage.
in_range() {
  local first=${stage?} last=${stop_stage?} whole='(0|-?[1-9][0-9]*)'
  [[ $first,$last =~ ^$whole,$whole$ ]] || die "--stage and --stop-stage take whole numbers, not '$first' and '$last'"
  (($1 >= first && $1 <= last))
}

# run_stage NUMBER TITLE OUTPUT [--options NAMES] [--reads NAMES] [--ranks] FUNCTION [ARGUMENT…] runs FUNCTION if NUMBER is
# between $stage and $stop_stage and the stage has not been finished before with the same inputs. The inputs are
#   --options   names of variables whose values decide what the stage does, such as "corpus minutes"
#   --reads     names of variables (or arrays) with files and run folders that earlier stages made
#   ARGUMENT…   such as trainer.updates=2000
# With $print_command, FUNCTION runs only if --ranks says that it prints its commands then (see cmd.sh).
# If an option or an argument differs from the finished stage, the recipe ends with exit code 2 and one line that says
# what differs. If what the stage reads has changed since, because an earlier stage was redone, it runs again.
#
# OUTPUT is the folder for the output of the stage, or its one output file (.jsonl). If FUNCTION succeeds, the inputs are
# written to the mark OUTPUT/.FUNCTION.done, or .FILE.done beside the file. So deleting the folder deletes the mark.
#
# Call it on a line of its own: in `run_stage … || …` or `if run_stage …`, bash ignores `set -e` inside FUNCTION.
run_stage() { _run_stage repeat "$@"; }

# train_stage is run_stage --ranks for functions that train in the run folder OUTPUT. The trainer continues what it finds
# there, so a change of what the stage reads ends the recipe, too. OUTPUT/.FUNCTION.begun holds the inputs from the
# beginning: they are also compared if the training was interrupted or OUTPUT/.FUNCTION.done was deleted.
train_stage() { _run_stage continue "${@:1:3}" --ranks "${@:4}"; }

# The names of local variables begin with _, so that they are none of the recipe's.
_run_stage() {
  local _way=$1 _number=$2 _title=$3 _output=$4 _options='' _reads='' _ranks=false
  shift 4
  while [[ $1 == --* ]]; do
    case $1 in
      --options) _options=$2 && shift ;;
      --reads) _reads=$2 && shift ;;
      --ranks) _ranks=true ;;
    esac
    shift
  done
  local _mark=$_output/.${1##*/} _inputs _change
  if [[ $_output == *.jsonl ]]; then _mark=$(dirname "$_output")/.${_output##*/}; fi
  if ! in_range "$_number"; then
    _refuse_other_given_options
    return 0
  fi

  _inputs=$(inputs_of "$_options" "$_reads" "${@:2}")
  # An empty mark does not count: a full disk or a crash has left it.
  if [[ -s $_mark.done && ($_output != *.jsonl || -e $_output) ]]; then
    if [[ -n $_inputs ]] && ! _records_inputs "$_mark.done"; then
      log "stage $_number: done already, by an older version that did not record its inputs (rm $_mark.done to redo)"
      return 0
    fi
    _refuse_other_inputs "$_mark.done" "done"
    _change=$(difference "$_mark.done" "$_inputs" reads)
    if [[ -z $_change ]]; then
      log "stage $_number: done already (rm $_mark.done to redo)"
      return 0
    fi
    log "stage $_number: was done $_change; it is done again"
  elif [[ $_way == continue && -s $_mark.begun && -e $_output/checkpoints/latest ]]; then
    _refuse_other_inputs "$_mark.begun" begun
  fi

  if ${print_command:-false}; then
    _print_stage "$@"
    return
  fi
  if ! ${first_machine:-true}; then
    _join_stage "$@"
    return
  fi
  log "stage $_number: $_title"
  # An interrupted repetition must not leave the mark of the earlier one.
  rm -f "$_mark.done" "$_mark.failed"
  if [[ $_way == continue ]]; then _write_mark "$_mark.begun"; fi
  local _start=$SECONDS _status
  if ${others_wait:-false}; then _running_mark=$_mark && trap _note_failure EXIT; fi
  "$@" # on a line of its own, so that `set -e` works inside
  _status=$?
  _running_mark=
  if ((_status)); then return "$_status"; fi # only reached if the recipe does not use `set -e`

  _write_mark "$_mark.done"
  log "stage $_number: done in $((SECONDS - _start)) s"
}

# _print_stage FUNCTION [ARGUMENT…] has the function print its commands.
_print_stage() {
  if $_ranks; then
    log "stage $_number: $_title: these commands would run"
    "$@"
  else
    log "stage $_number: $_title: not run, because of --print-command"
  fi
}

# Tells machines that wait for a stage that it has failed. The text differs each time.
_note_failure() {
  if [[ -n ${_running_mark-} ]]; then
    mkdir -p "$(dirname "$_running_mark")"
    echo "on $(hostname) at $(date '+%Y-%m-%d %H:%M:%S.%N')" >"$_running_mark.failed"
  fi
}

# _join_stage FUNCTION [ARGUMENT…] is for a machine that is not the first of several (see cmd.sh): it takes part in a
# stage that starts processes on all of them, and waits until the first one has done the other stages.
_join_stage() {
  local _waited=0 _earlier _failure
  if $_ranks; then
    log "stage $_number: $_title"
    "$@"
    return
  fi
  log "stage $_number: $_title: waiting for the first machine, that of RDZV=${RDZV-} (if this is it, set FIRST_MACHINE=true)"
  _earlier=$(cat "$_mark.failed" 2>/dev/null) || true
  if [[ -n $_earlier ]]; then log "stage $_number: it has failed $_earlier; waiting until it is started there again"; fi
  # What the stage reads may have changed since, or appear here later (NFS).
  while _inputs=$(inputs_of "$_options" "$_reads" "${@:2}"); [[ ! -s $_mark.done || -n $(difference "$_mark.done" "$_inputs" reads) ]]; do
    _failure=$(cat "$_mark.failed" 2>/dev/null) || true
    if [[ -n $_failure && $_failure != "$_earlier" ]]; then die "stage $_number has failed $_failure"; fi
    sleep 2
    _waited=$((_waited + 2))
    if ((_waited % 300 == 0)); then log "stage $_number: waiting for its mark $_mark.done since $_waited s"; fi
  done
}

# _write_mark FILE writes the time and $_inputs.
_write_mark() {
  mkdir -p "$(dirname "$1")"
  { date '+%Y-%m-%d %H:%M:%S' && if [[ -n $_inputs ]]; then printf '%s\n' "$_inputs"; fi; } >"$1.new"
  mv "$1.new" "$1"
}

_records_inputs() { (($(wc -l <"$1") > 1)); }

# _refuse_other_inputs MARK done|begun ends the recipe if options differ from those in MARK or, for a training, what it
# reads.
_refuse_other_inputs() {
  local redo="rm $1 to redo it"
  if [[ $_way == continue ]]; then
    redo="rm $_mark.* to continue this training with the change"
    _change=$(difference "$1" "$_inputs" reads)
    if [[ -n $_change ]]; then _refuse "$2" "rm -r $_output to train again"; fi
  fi
  _change=$(difference "$1" "$_inputs" options)
  if [[ -n $_change ]]; then _refuse "$2" "$redo"; fi
}

# Ends the recipe if an option was given for a finished stage that comes before the first one to run, with another value.
_refuse_other_given_options() {
  local _name _given=''
  for _name in $_options; do
    if [[ " ${given_options-}" == *" $_name "* ]]; then _given+=" $_name"; fi
  done
  if ((_number < stage)) && [[ -n $_given && -s $_mark.done ]] && _records_inputs "$_mark.done"; then
    _inputs=$(inputs_of "$_given" '')
    _change=$(difference "$_mark.done" "$_inputs" "${_given# }")
    if [[ -n $_change ]]; then _refuse "done" "rm $_mark.done and begin with --stage $_number to redo it"; fi
  fi
}

# _refuse done|begun ADVICE ends the recipe with $_change and what to do.
_refuse() {
  local another=folder
  if [[ $_output == "${exp:-//}"* ]]; then another=--exp; elif [[ $_output == "${data:-//}"* ]]; then another=--data; fi
  die "stage $_number was $1 $_change: choose another $another, or $2"
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
  if ${print_command:-false}; then return; fi
  printf '\n'
  while (($# >= 2)); do
    if [[ -e $2 ]]; then printf '%-22s %s\n' "$1" "$2"; fi
    shift 2
  done
}
