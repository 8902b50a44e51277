# What the train_*.sh share: positional arguments, how processes find each other, data, smoke mode, and the launch.
# shellcheck shell=bash
#
#   train_MODEL.sh CHECKPOINT_PATH TENSORBOARD_PATH TOKENIZER|MOCK DATA|MOCK [pretrain.py's flags, which win]
#
# TOKENIZER: a SentencePiece model (*.model) or a Hugging Face directory. DATA: the prefix of .bin and .idx.
# Environment, all optional: GPUS_PER_NODE, NUM_NODES, MASTER_ADDR, MASTER_PORT, NODE_RANK, LOCAL_ADDR (of this node),
# MAX_RESTARTS, TORCHRUN; SMOKE=1 trains a toy of the same flags on the CPU; DRY_RUN=1 prints the command, an argument
# a line.

if (($# < 4)); then
    echo "usage: ${0##*/} CHECKPOINT_PATH TENSORBOARD_PATH TOKENIZER|MOCK DATA|MOCK [FLAG...]" >&2
    exit 2
fi
CHECKPOINT_PATH=$1 TENSORBOARD_PATH=$2 TOKENIZER=$3 DATA=$4
shift 4
MORE_ARGS=("$@")
ROOT=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd)
SMOKE=${SMOKE:-0}

# launch: the last line of a train script. It has set MODEL_ARGS, TRAINING_ARGS, MODEL_PARALLEL_ARGS,
# EVAL_AND_LOGGING_ARGS, GEOSCALE_ARGS, PRECISION_ARGS, MOCK_VOCAB_SIZE, DEFAULT_NODES, SMOKE_RANKS and SMOKE_ARGS.
launch() {
    local nodes=${NUM_NODES:-$DEFAULT_NODES} ranks=${GPUS_PER_NODE:-8} vocabulary=$MOCK_VOCAB_SIZE
    if [[ $SMOKE == 1 ]]; then
        nodes=${NUM_NODES:-1}
        ranks=${GPUS_PER_NODE:-$((SMOKE_RANKS / nodes))}
        vocabulary=255
        smoke_environment "$nodes"
    else
        SMOKE_ARGS=()
    fi

    DISTRIBUTED_ARGS=(--nnodes "$nodes" --nproc-per-node "$ranks" --max-restarts "${MAX_RESTARTS:-0}" --rdzv-backend c10d)
    if ((nodes == 1)); then
        # An address of its own: torchrun would otherwise look up the host's name, which need not resolve.
        DISTRIBUTED_ARGS+=(--rdzv-endpoint localhost:0 --local-addr "${LOCAL_ADDR:-127.0.0.1}")
    else
        : "${MASTER_ADDR:?with NUM_NODES $nodes, MASTER_ADDR must name the node of NODE_RANK 0}"
        NODE_RANK=${NODE_RANK:-${SLURM_NODEID:-}}
        : "${NODE_RANK:?with NUM_NODES $nodes, NODE_RANK must say which node this is, from 0}"
        local host=false
        if [[ $NODE_RANK == 0 ]]; then host=true; fi
        DISTRIBUTED_ARGS+=(--rdzv-endpoint "$MASTER_ADDR:${MASTER_PORT:-29500}" --rdzv-id "${SLURM_JOB_ID:-${0##*/}}")
        DISTRIBUTED_ARGS+=(--rdzv-conf "is_host=$host")
        if [[ -n ${LOCAL_ADDR:-} ]]; then DISTRIBUTED_ARGS+=(--local-addr "$LOCAL_ADDR"); fi
    fi

    DATA_ARGS=()
    case $TOKENIZER in
        MOCK) DATA_ARGS+=(--tokenizer-type NullTokenizer --vocab-size "$vocabulary") ;;
        *.model) DATA_ARGS+=(--tokenizer-type SentencePieceTokenizer --tokenizer-model "$TOKENIZER") ;;
        *) DATA_ARGS+=(--tokenizer-type HuggingFaceTokenizer --tokenizer-model "$TOKENIZER") ;;
    esac
    case $DATA in
        MOCK) DATA_ARGS+=(--mock-data) ;;
        *) DATA_ARGS+=(--data-path "$DATA" --split "99,1,0") ;;
    esac

    # shellcheck disable=SC2153 # MODEL_ARGS is the train script's
    local command=(
        "${TORCHRUN:-torchrun}" "${DISTRIBUTED_ARGS[@]}" "$ROOT/pretrain.py"
        "${MODEL_ARGS[@]}" "${TRAINING_ARGS[@]}" "${PRECISION_ARGS[@]}" "${MODEL_PARALLEL_ARGS[@]}" "${DATA_ARGS[@]}"
        "${EVAL_AND_LOGGING_ARGS[@]}" "${GEOSCALE_ARGS[@]}" "${SMOKE_ARGS[@]}" "${MORE_ARGS[@]}"
    )
    if [[ ${DRY_RUN:-0} == 1 ]]; then
        printf '%s\n' "${command[@]}"
        return
    fi
    mkdir -p -- "$CHECKPOINT_PATH" "$TENSORBOARD_PATH"
    # For the overlap of communication and computation, as Megatron demands; and torchrun's shared store would keep a
    # restarted job from meeting again.
    export CUDA_DEVICE_MAX_CONNECTIONS=${CUDA_DEVICE_MAX_CONNECTIONS:-1}
    export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=${TORCH_DISABLE_SHARE_RDZV_TCP_STORE:-1}
    exec "${command[@]}"
}

# smoke_environment NODES: the CPU, and what does not depend on the model at toy size. What is given twice counts as given
# last.
smoke_environment() {
    export CUDA_VISIBLE_DEVICES='' OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
    if (($1 == 1)) && [[ -d /sys/class/net/lo ]]; then # gloo would look up the host's name
        export GLOO_SOCKET_IFNAME=${GLOO_SOCKET_IFNAME:-lo}
    fi
    PRECISION_ARGS=(--bf16 --transformer-impl local --geoscale-attention emulated)
    SMOKE_ARGS=(
        --num-layers 4 --hidden-size 64 --ffn-hidden-size 128 --num-attention-heads 8
        --seq-length 32 --max-position-embeddings 32
        --micro-batch-size 1 --global-batch-size 4 --train-iters 2 --log-interval 1 --eval-interval 2 --eval-iters 1
        --num-workers 0 "${SMOKE_ARGS[@]}"
    )
}
