# shellcheck shell=bash
# The inputs of a stage as lines of text, and what differs between two of them. log.sh sources this file.

# inputs_of OPTIONS READS [ARGUMENT…] prints the inputs of a stage, one per line:
#   corpus=/data/LibriSpeech (9 files, 99 bytes)            an option: the value of the variable
#   optim.lr=1e-3                                           a setting among the arguments; a file with its checksum
#   arguments=/recipes/demo/conf/pretrain.yaml (checksum …) all other arguments
#   reads labels=cuts_1h.jsonl (checksum …)                 files and run folders that earlier stages made
# The variables are looked up here, so local ones have names that no recipe uses.
# What a stage reads is left out if it does not exist (any more), because then there is nothing to compare.
inputs_of() {
  local _name _argument _value _arguments=''
  for _name in $1; do printf '%s=%s\n' "$_name" "$(_option_of "${!_name}")"; done
  for _argument in "${@:3}"; do
    if _is_setting "$_argument"; then printf '%s=%s\n' "${_argument%%=*}" "$(_value_of "${_argument#*=}")"; fi
  done | tac | awk -F= '!seen[$1]++' | tac # the last value of a repeated setting counts
  for _argument in "${@:3}"; do
    if ! _is_setting "$_argument"; then _arguments+=" $(_value_of "$_argument")"; fi
  done
  if [[ -n $_arguments ]]; then printf 'arguments=%s\n' "${_arguments# }"; fi
  for _name in $2; do
    if _value=$(_contents_of "$_name"); then printf 'reads %s=%s\n' "$_name" "$_value"; fi
  done
}

# difference MARK INPUTS KIND prints "with A, now B": the lines of KIND that differ between INPUTS and the file MARK. KIND
# is options (and arguments), reads, or names of options. It prints nothing if there is no difference.
difference() {
  local pattern old new was now
  case $3 in
    options) pattern='^[^ =]+=' ;;
    reads) pattern='^reads ' ;;
    *) pattern="^(${3// /|})=" ;;
  esac
  old=$(sed -En "/$pattern/p" "$1")
  new=$(sed -En "/$pattern/p" <<<"$2")
  was=$(_lines_only_in "$old" "$new")
  now=$(_lines_only_in "$new" "$old")
  # What a stage has read and is gone does not count as changed.
  if [[ -z $was$now || ($3 == reads && -z $now) ]]; then return; fi
  if [[ -n $was ]]; then was="with $was"; else was="without ${now%%=*}"; fi
  printf '%s, now %s' "$was" "${now:-without}"
}

# _lines_only_in A B prints the lines of A that are not in B, joined by commas.
_lines_only_in() {
  local lines
  lines=$({ grep -Fxv -f <(printf '%s\n' "$2") <<<"$1" || true; } | sed -e '/^$/d' -e 's/^reads //')
  printf '%s' "${lines//$'\n'/, }"
}

_is_setting() { [[ $1 =~ ^[a-z_]+(\.[a-z0-9_]+)+= ]]; }

# _option_of VALUE is _value_of, but prints a folder by its real path and how much is in it.
_option_of() {
  if [[ -d $1 ]]; then printf '%s (%s)' "$(realpath "$1")" "$(_extent "$1")"; else _value_of "$1"; fi
}

# _value_of VALUE prints it on one line, and a file by its absolute path and content.
_value_of() {
  if [[ -f $1 ]]; then
    printf '%s (%s)' "$(absolute "$1")" "$(_checksum "$1")"
  else
    printf '%s' "${1//$'\n'/ }"
  fi
}

# _extent DIR prints the number and the size of the files below it, without those of the recipe: its $data, $exp and
# ${exp}_* may be there, too. A loop of links is no reason to stop.
_extent() {
  local _own _without=()
  for _own in "${data-}" "${exp-}"; do
    if [[ $_own -ef $1 ]]; then continue; fi
    _own=$(realpath -m "${_own:-/}" | sed 's/[][*?\\]/\\&/g') # not a pattern
    _without+=(-path "$_own" -prune -o -path "${_own}_*" -prune -o)
  done
  { find -L "$(realpath "$1")" "${_without[@]}" -type f -printf '%s\n' 2>/dev/null || true; } |
    awk '{ bytes += $1 } END { printf "%d files, %.0f bytes", NR, bytes }'
}

# _contents_of NAME prints the content of the files and run folders in the variable or array NAME, without their place,
# so that a folder can be moved. It fails if one of them does not exist.
_contents_of() {
  local -n _paths=$1
  local _path _contents=''
  for _path in "${_paths[@]}"; do
    if [[ -f $_path ]]; then
      _contents+=" ${_path##*/} ($(_checksum "$_path"))"
    elif [[ -f $_path/checkpoints/latest/train_state.json ]]; then
      # This file has the checksums of all others in the checkpoint.
      _contents+=" ${_path##*/} at $(readlink "$_path/checkpoints/latest") ($(_checksum "$_path/checkpoints/latest/train_state.json"))"
    else
      return 1
    fi
  done
  printf '%s' "${_contents# }"
}

_checksum() { cksum <"$1" | awk '{ print "checksum " $1 ", " $2 " bytes" }'; }
