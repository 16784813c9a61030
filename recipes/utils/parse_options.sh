# shellcheck shell=bash
# Command-line options for a recipe script, as in Kaldi. Source this file below the variables of the script:
#
#   stage=1         # first stage to run
#   train_cuts=     # manifest to train on
#   . ../utils/parse_options.sh
#
# Every lower-case variable that is assigned above that line, without indentation, is an option: `--train-cuts FILE` or
# `--train-cuts=FILE` sets train_cuts. (`readonly name=…` does not define an option.) If the default is true or false,
# the option accepts only these two. It means true if no value follows: as the last word, or before another option.
# `--help` prints the first comment block of the script and the options, with their defaults and the comments beside
# them. Parsing stops at `--` or at the first word that is not an option; the remaining words stay in "$@". A wrong
# option prints one line and ends the script with exit code 2. given_options holds the names of the variables that were
# set, separated by spaces.

_po_name=${0##*/}
# The line of the calling script that sources this file, which is also the last line that can define an option.
_po_line=${BASH_LINENO[0]}

_po_die() {
  printf '%s: %s\n' "$_po_name" "$1" >&2
  exit 2
}

# Finds the file of the calling script, whose path may be relative to a directory that it has left with `cd`.
_po_find_script() {
  local path
  for path in "$1" "${OLDPWD:-.}/$1" "./${1##*/}"; do
    if [[ -r $path && $(sed -n "${_po_line}p" "$path") == *parse_options.sh* ]]; then
      _po_script=$path
      return
    fi
  done
  _po_die "cannot find the script $1 to read its options; call it by its absolute path"
}

# Fills _po_options with one option's variable per line, and _po_table with the lines that --help prints.
_po_scan() {
  local text name comment number=0
  _po_options='' _po_table=''
  while IFS= read -r text && ((++number < _po_line)); do
    [[ $text =~ ^([a-z][a-z0-9_]*)=[^\(] || $text =~ ^([a-z][a-z0-9_]*)=$ ]] || continue
    name=${BASH_REMATCH[1]}
    # Skip lines that only look like an assignment (the variable is not set) and second assignments.
    if [[ -z ${!name+set} || $'\n'$_po_options == *$'\n'"$name"$'\n'* ]]; then continue; fi
    comment=
    if [[ $text =~ [[:space:]]#[[:space:]]+([^#]*)$ ]]; then comment=${BASH_REMATCH[1]}; fi
    _po_options+=$name$'\n'
    printf -v text '  --%-28s %s' "${name//_/-} ${!name:-\"\"}" "$comment"
    _po_table+=${text%"${text##*[! ]}"}$'\n' # without trailing blanks
  done <"$_po_script"
}

_po_help() {
  # Print the first comment block without the #! line and shellcheck directives.
  awk '
    NR == 1 && /^#!/ || /^# shellcheck / { next }
    /^#/ { sub(/^# ?/, ""); print; seen = 1; next }
    seen || NF { exit }
  ' "$_po_script"
  printf '\nOptions and their defaults:\n%s' "$_po_table"
}

_po_is_option() { [[ $'\n'$_po_options == *$'\n'"$1"$'\n'* ]]; }

# Whether the default of an option is true or false.
_po_is_flag() { [[ ${!1} == true || ${!1} == false ]]; }

# Turns --foo-bar or --foo-bar=x into foo_bar.
_po_variable() {
  local word=${1#--}
  word=${word%%=*}
  printf '%s' "${word//-/_}"
}

# Sets the variable of one option to one value.
_po_set() {
  local option=$1 variable=$2 value=$3
  if _po_is_flag "$variable" && [[ $value != true && $value != false ]]; then
    _po_die "$option takes true or false, not '$value'"
  fi
  printf -v "$variable" '%s' "$value"
  given_options+="$variable "
}

_po_find_script "${BASH_SOURCE[1]}"
_po_scan
given_options=

while (($#)); do
  case $1 in
    --)
      shift
      break
      ;;
    --help | -h)
      _po_help
      exit 0
      ;;
    --*)
      _po_key=$(_po_variable "$1")
      _po_is_option "$_po_key" ||
        _po_die "unknown option ${1%%=*} (valid:$(printf '%s' "$_po_options" | sed -e 's/_/-/g' -e 's/^/ --/' | tr -d '\n'))"
      if [[ $1 == *=* ]]; then
        _po_set "${1%%=*}" "$_po_key" "${1#*=}"
        shift
      elif _po_is_flag "$_po_key" && [[ $# == 1 || $2 == -* ]]; then
        _po_set "$1" "$_po_key" true
        shift
      elif (($# == 1)); then
        _po_die "$1 needs a value"
      elif [[ $2 == --* ]] && _po_is_option "$(_po_variable "$2")"; then
        _po_die "$1 needs a value; the next word is the option $2 (write $1=$2 if that is the value)"
      else
        _po_set "$1" "$_po_key" "$2"
        shift 2
      fi
      ;;
    *) break ;;
  esac
done

unset -f _po_die _po_find_script _po_scan _po_help _po_is_option _po_is_flag _po_variable _po_set
unset _po_name _po_line _po_script _po_options _po_table _po_key
