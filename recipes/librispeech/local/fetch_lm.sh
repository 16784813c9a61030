#!/usr/bin/env bash
# Fetches LibriSpeech's 4-gram language model (OpenSLR 11): fetch_lm.sh DIR
set -euo pipefail
dir=$1
model=$dir/4-gram.arpa.gz
if [[ -s $model ]]; then exit; fi
mkdir -p "$dir"
curl --fail --location --retry 5 --continue-at - --output "$model.part" \
  "${OPENSLR:-https://www.openslr.org/resources/11}/4-gram.arpa.gz"
if ! gzip --test "$model.part"; then
  rm "$model.part" # what is damaged is not continued
  exit 1
fi
mv "$model.part" "$model"
