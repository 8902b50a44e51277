# What both sbatch files share: variables, and how a job that runs out of time or is preempted saves and comes back.
# shellcheck shell=bash
#
# Slurm sends USR1 to the batch script 90 s before the time limit (--signal=B:USR1@90). The script passes SIGTERM on to
# the job's steps, training finishes its step, saves, and writes why it ended into CHECKPOINT_PATH/exit_reason.txt; the
# job is then put back into the queue. torchrun kills its workers TORCH_ELASTIC_SHUTDOWN_TIMEOUT seconds after SIGTERM,
# so a step and a save must fit into it; --signal's 90 s in turn must be more than that.

: "${TRAIN_SCRIPT:?must name the launch script, such as examples/llama2_70b/train_llama2_70b.sh}"
: "${CHECKPOINT_PATH:?must name the directory of the checkpoints, on a file system that all nodes share}"
: "${TENSORBOARD_PATH:?must name the directory of the logs, on a file system that all nodes share}"
: "${TOKENIZER:?must name the tokenizer: a *.model, a Hugging Face directory, or MOCK}"
: "${DATA:?must name the data: the prefix of .bin and .idx, or MOCK}"
for name in CHECKPOINT_PATH TENSORBOARD_PATH; do
    # torchrun's working directory in a container is another one
    if [[ ${!name} != /* ]]; then
        echo "$name: must be an absolute path, not ${!name}" >&2
        exit 2
    fi
done

export NUM_NODES=$SLURM_JOB_NUM_NODES
if [[ -z ${MASTER_ADDR:-} ]]; then
    MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
fi
export MASTER_ADDR
export MASTER_PORT=${MASTER_PORT:-$((20000 + SLURM_JOB_ID % 10000))} # jobs that share a node must not share a port
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-75}

# run_job [FLAG...]: one torchrun a node, by srun with SRUN_ARGS; FLAG... goes to pretrain.py.
run_job() {
    local warned=0 reason_file=$CHECKPOINT_PATH/exit_reason.txt
    rm -f -- "$reason_file"
    trap 'warned=1; echo "USR1: training is asked to save"; scancel --signal=TERM "$SLURM_JOB_ID"' USR1
    # A torchrun that ends first after SIGTERM must not take down the others, which may still save.
    srun --ntasks-per-node=1 --label --kill-on-bad-exit=0 "${SRUN_ARGS[@]}" \
        "$TRAIN_SCRIPT" "$CHECKPOINT_PATH" "$TENSORBOARD_PATH" "$TOKENIZER" "$DATA" "$@" &
    local step=$! interrupted=$((128 + $(kill -l USR1)))
    local status=$interrupted
    while ((status == interrupted)); do # by the trap: srun goes on
        status=0
        wait "$step" || status=$?
    done
    local reason=''
    if [[ -f $reason_file ]]; then reason=$(<"$reason_file"); fi
    echo "training ended: ${reason:-without a word, status of srun $status}"
    if ((warned)) && [[ $reason == *SIGTERM ]]; then
        echo "back into the queue"
        scontrol requeue "$SLURM_JOB_ID"
        return
    fi
    return "$status"
}
