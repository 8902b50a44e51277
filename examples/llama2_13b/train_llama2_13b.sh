#!/usr/bin/env bash
# Pretrains Llama-2-13B (13.0 B parameters) on one node: TP 4 x DP 2.
# Usage, environment and smoke mode: ../_common.sh. README.md says what it needs and costs.
set -euo pipefail
# shellcheck source=examples/_common.sh
source "$(dirname -- "${BASH_SOURCE[0]}")/../_common.sh" "$@"

DEFAULT_NODES=1
MOCK_VOCAB_SIZE=31999 # one token less than the model's: the tokenizer of mock data adds one
SMOKE_RANKS=2
SMOKE_ARGS=(--tensor-model-parallel-size 2)

MODEL_ARGS=(
    --num-layers 40
    --hidden-size 5120
    --ffn-hidden-size 13824
    --num-attention-heads 40
    --seq-length 4096
    --max-position-embeddings 4096
    --position-embedding-type rope
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
    --tensor-model-parallel-size 4
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
