#!/usr/bin/env bash
# Pretrains Mistral-7B-v0.3 (7.25 B parameters, no sliding window) on one node: TP 2 x DP 4.
# Usage, environment and smoke mode: ../_common.sh. README.md says what it needs and costs.
set -euo pipefail
# shellcheck source=examples/_common.sh
source "$(dirname -- "${BASH_SOURCE[0]}")/../_common.sh" "$@"

DEFAULT_NODES=1
MOCK_VOCAB_SIZE=32767 # one token less than the model's: the tokenizer of mock data adds one
SMOKE_RANKS=2
SMOKE_ARGS=(--num-query-groups 2)

MODEL_ARGS=(
    --num-layers 32
    --hidden-size 4096
    --ffn-hidden-size 14336
    --num-attention-heads 32
    --group-query-attention
    --num-query-groups 8
    --seq-length 4096
    --max-position-embeddings 32768
    --position-embedding-type rope
    --rotary-base 1000000
    --normalization RMSNorm
    --norm-epsilon 1e-5
    --swiglu
    --disable-bias-linear
    --untie-embeddings-and-output-weights
)
TRAINING_ARGS=(
    --micro-batch-size 1
    --global-batch-size 1024
    --train-iters 500000
    --lr 3e-4
    --min-lr 3e-5
    --lr-decay-style cosine
    --lr-warmup-fraction 0.004
    --weight-decay 0.1
    --adam-beta2 0.95
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
    --tensor-model-parallel-size 2
    --sequence-parallel
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
