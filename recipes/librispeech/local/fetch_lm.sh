#!/usr/bin/env bash
# Downloads the 4-gram language model of LibriSpeech (OpenSLR 11): fetch_lm.sh DIR
set -euo pipefail
dir=$1
model=$dir/4-gram.arpa.gz
if [[ -s $model ]]; then exit; fi
mkdir -p "$dir"
curl --fail --location --retry 5 --continue-at - --output "$model.part" \
  "${OPENSLR:-https://www.openslr.org/resources/11}/4-gram.arpa.gz"
if ! gzip --test "$model.part"; then
  rm "$model.part" # so that the next call does not continue a damaged download
  exit 1
fi
mv "$model.part" "$model"
