#!/usr/bin/env bash
# Prints the utterance ids of the limited-supervision subsets of Libri-light, one per line:
#   librilight_ids.sh DIR 10min|1h|10h
# DIR is the unpacked librispeech_finetuning.tgz: 1h/0 … 1h/5 have ten minutes each, and 1h and 9h together are the ten
# hours (https://github.com/facebookresearch/libri-light, data_preparation).
set -euo pipefail
dir=$1
case $2 in
  10min) parts=(1h/0) ;;
  1h) parts=(1h) ;;
  10h) parts=(1h 9h) ;;
  *) echo "librilight_ids.sh: $2: choose 10min, 1h or 10h" >&2 && exit 2 ;;
esac
for part in "${parts[@]}"; do
  if [[ ! -d $dir/$part ]]; then echo "librilight_ids.sh: no folder $dir/$part" >&2 && exit 2; fi
  find "$dir/$part" -name '*.flac' -exec basename {} .flac \;
done | sort
