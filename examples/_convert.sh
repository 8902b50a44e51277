# What the convert.sh share: a Hugging Face directory becomes a checkpoint that the train script beside goes on from.
# shellcheck shell=bash
#
#   convert.sh HF_DIR CHECKPOINT_PATH [convert_hf.py's flags, which win]
#
# HF_DIR holds config.json, safetensors and the tokenizer's files; CHECKPOINT_PATH is new. The weights load under any
# layout, the sizes in convert.sh decide how the vocabulary is padded.
set -euo pipefail
if (($# < 2)); then
    echo "usage: ${0##*/} HF_DIR CHECKPOINT_PATH [FLAG...]" >&2
    exit 2
fi
FROM_AND_TO=("$1" "$2") MORE_ARGS=("${@:3}")
ROOT=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd)

# convert FLAG...: the last line of a convert script.
convert() {
    exec "${PYTHON:-python3}" "$ROOT/tools/convert_hf.py" import "${FROM_AND_TO[@]}" --dtype bf16 "$@" "${MORE_ARGS[@]}"
}
