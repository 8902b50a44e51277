#!/usr/bin/env bash
# Converts a Hugging Face GPT-2 XL into a checkpoint that train_gpt2_xl.sh goes on from.
#
#   convert.sh HF_DIR CHECKPOINT_PATH [convert_hf.py's flags, which win]
#
# HF_DIR holds config.json, safetensors and the tokenizer's files; CHECKPOINT_PATH is new. The weights load under any
# layout, the sizes here decide how the vocabulary is padded.
set -euo pipefail
if (($# < 2)); then
    echo "usage: ${0##*/} HF_DIR CHECKPOINT_PATH [FLAG...]" >&2
    exit 2
fi
ROOT=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/../.." && pwd)

exec "${PYTHON:-python3}" "$ROOT/tools/convert_hf.py" import "$1" "$2" --dtype bf16 \
    --seq-length 1024 "${@:3}"
