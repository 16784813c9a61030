# shellcheck shell=bash
# Getting LibriSpeech and mini LibriSpeech, and checking a copy of it before any work. Source this file below log.sh.

# Utterances in each part, from https://www.openslr.org/12 and https://www.openslr.org/31.
declare -A utterances_of=(
  [train-clean-100]=28539 [train-clean-360]=104014 [train-other-500]=148688
  [dev-clean]=2703 [dev-other]=2864 [test-clean]=2620 [test-other]=2939
  [train-clean-5]=1519 [dev-clean-2]=1089
)

# download_librispeech DIR mini|full downloads to DIR/LibriSpeech. A repetition continues an interrupted download.
download_librispeech() { python "$(dirname "${BASH_SOURCE[0]}")/download_librispeech.py" "$@"; }

# parts_of CORPUS prints the folder that holds the parts: CORPUS, or CORPUS/LibriSpeech.
parts_of() {
  local part
  for part in "${!utterances_of[@]}"; do
    if [[ -d $1/$part ]]; then echo "$1" && return; fi
  done
  if [[ -d $1/LibriSpeech ]]; then echo "$1/LibriSpeech"; else echo "$1"; fi
}

# need_parts CORPUS 'PART|PART…' … ends the recipe if one of the parts in each word is not in CORPUS, or if a part that
# is there was unpacked by half: with transcripts without audio, or audio without transcripts.
need_parts() {
  local folder choice part
  folder=$(parts_of "$1")
  for choice in "${@:2}"; do
    for part in ${choice//|/ }; do
      if [[ -d $folder/$part ]]; then continue 2; fi
    done
    die "--corpus $1: has no folder ${choice//|/ or }; unpack it there, or leave out --corpus to download the corpus"
  done
  for part in "${!utterances_of[@]}"; do
    if [[ -d $folder/$part ]]; then _check_part "$folder/$part"; fi
  done
}

_check_part() {
  local part=$1 audio transcripts only found expected=${utterances_of[${1##*/}]}
  local unpack="unpack ${part##*/}.tar.gz again"
  audio=$(find -L "$part" -name '*.flac' | sed -e 's:.*/::' -e 's/\.flac$//' | sort)
  transcripts=$(find -L "$part" -name '*.trans.txt' -exec cat {} + | cut -d ' ' -f 1 | sort)
  if [[ -z $audio || -z $transcripts ]]; then die "$part: no .flac or no .trans.txt files; $unpack"; fi
  only=$(comm -13 <(echo "$audio") <(echo "$transcripts"))
  if [[ -n $only ]]; then
    die "$part: $(wc -l <<<"$only") transcripts without audio, such as ${only%%$'\n'*}; $unpack"
  fi
  only=$(comm -23 <(echo "$audio") <(echo "$transcripts"))
  if [[ -n $only ]]; then
    die "$part: $(wc -l <<<"$only") .flac files without a transcript, such as ${only%%$'\n'*}.flac; $unpack"
  fi
  found=$(wc -l <<<"$audio")
  if ((found < expected)); then
    log "warning: $part: $found of the $expected utterances of LibriSpeech; if you did not choose them, $unpack"
  fi
}
