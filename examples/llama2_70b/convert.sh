#!/usr/bin/env bash
# Converts a Hugging Face Llama-2-70B into a checkpoint that train_llama2_70b.sh goes on from. Usage: ../_convert.sh.
set -euo pipefail
# shellcheck source=examples/_convert.sh
source "$(dirname -- "${BASH_SOURCE[0]}")/../_convert.sh" "$@"

convert --tensor-model-parallel-size 8 --pipeline-model-parallel-size 4 --seq-length 4096
