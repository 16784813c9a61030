#!/usr/bin/env bash
# Downloads the 4-gram language model of LibriSpeech (OpenSLR 11): fetch_lm.sh DIR
# A repetition continues an interrupted download.
set -euo pipefail
dir=$1
model=$dir/4-gram.arpa.gz
from=${OPENSLR:-https://www.openslr.org/resources/11}/4-gram.arpa.gz
if [[ -s $model ]]; then exit; fi
mkdir -p "$dir"
# It gives up if less than 1 kB/s arrives for a minute.
if ! curl --fail --location --progress-bar --connect-timeout 30 --speed-limit 1000 --speed-time 60 --retry 3 \
  --continue-at - --output "$model.part" "$from"; then
  echo "fetch_lm.sh: cannot download $from (see above): repeat the command to continue, or give a model with --lm" >&2
  exit 1
fi
if ! gzip --test "$model.part"; then
  rm "$model.part" # so that the next call does not continue a damaged download
  echo "fetch_lm.sh: $from: the file was damaged and is deleted: repeat the command, or give a model with --lm" >&2
  exit 1
fi
mv "$model.part" "$model"
