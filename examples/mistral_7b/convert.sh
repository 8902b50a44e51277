#!/usr/bin/env bash
# Converts a Hugging Face Mistral-7B-v0.3 into a checkpoint that train_mistral_7b.sh goes on from. Usage: ../_convert.sh.
set -euo pipefail
# shellcheck source=examples/_convert.sh
source "$(dirname -- "${BASH_SOURCE[0]}")/../_convert.sh" "$@"

convert --tensor-model-parallel-size 2 --seq-length 4096
