#!/usr/bin/env bash
# Converts a Hugging Face GPT-2 XL into a checkpoint that train_gpt2_xl.sh goes on from. Usage: ../_convert.sh.
set -euo pipefail
# shellcheck source=examples/_convert.sh
source "$(dirname -- "${BASH_SOURCE[0]}")/../_convert.sh" "$@"

convert --seq-length 1024
