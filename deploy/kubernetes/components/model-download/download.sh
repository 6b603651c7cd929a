#!/bin/sh
# Fetches every file of SHA256SUMS below $MODEL_URL into /models/checkpoint, and fails unless all hashes are right.
set -eu
cd /models/checkpoint
[ -s /files/SHA256SUMS ] || { echo "SHA256SUMS is empty: list the files of the model in it" >&2; exit 1; }
while read -r _ file; do
  case $file in */* | .*) echo "refused: $file" >&2; exit 1 ;; esac
  curl --fail --silent --show-error --location --retry 5 --continue-at - --output "$file" "$MODEL_URL/$file"
done </files/SHA256SUMS
sha256sum --check --strict --quiet /files/SHA256SUMS
