#!/usr/bin/env bash
# Pretrains GPT-2 XL (1.56 B parameters) on one node: every GPU a data-parallel replica, the optimizer's state in shares.
# Its heads have 64 channels, which FP8 attention trains on Blackwell and not on Hopper (README.md).
# Usage, environment and smoke mode: ../_common.sh. README.md says what it needs and costs.
set -euo pipefail
# shellcheck source=examples/_common.sh
source "$(dirname -- "${BASH_SOURCE[0]}")/../_common.sh" "$@"

DEFAULT_NODES=1
MOCK_VOCAB_SIZE=50256 # one token less than the model's: the tokenizer of mock data adds one
SMOKE_RANKS=2
SMOKE_ARGS=(--tensor-model-parallel-size 1)

MODEL_ARGS=(
    --num-layers 48
    --hidden-size 1600
    --num-attention-heads 25
    --seq-length 1024
    --max-position-embeddings 1024
    --position-embedding-type learned_absolute
    --openai-gelu
)
TRAINING_ARGS=(
    --micro-batch-size 8
    --global-batch-size 512
    --train-iters 600000
    --lr 1.5e-4
    --min-lr 1.5e-5
    --lr-decay-style cosine
    --lr-warmup-fraction 0.01
    --weight-decay 0.1
    --adam-beta2 0.95
    --init-method-std 0.02
    --attention-dropout 0
    --hidden-dropout 0
)
PRECISION_ARGS=(
    --bf16
    --transformer-impl transformer_engine
    --fp8-format hybrid
    --fp8-amax-history-len 1024
    --fp8-amax-compute-algo max
    --fp8-dot-product-attention
)
MODEL_PARALLEL_ARGS=(
    --use-distributed-optimizer
    --overlap-grad-reduce
    --overlap-param-gather
)
EVAL_AND_LOGGING_ARGS=(
    --save "$CHECKPOINT_PATH"
    --load "$CHECKPOINT_PATH"
    --save-interval 1000
    --eval-interval 1000
    --eval-iters 10
    --log-interval 10
    --log-throughput
    --tensorboard-dir "$TENSORBOARD_PATH"
)
GEOSCALE_ARGS=(
    --geoscale-recipe certified
    --geoscale-log-jsonl "$TENSORBOARD_PATH/geoscale.jsonl"
)

launch
