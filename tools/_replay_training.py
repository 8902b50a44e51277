"""The four transients of THEORY 7 on a model that has really been trained: what pretrain.py is run with.

All replays are of `STEPS` steps, with the weights' jump before the forward of step `TRANSIENT`:

    pretrained_load   a run from random weights; before step 9 the trained weights are loaded into it, its history stays
    resume            the trained checkpoint is resumed; a history, which is in no checkpoint, is empty at step 1
    lr_spike          resumed; the learning rate of update 8 is multiplied
    weight_spike      resumed; W_Q, W_K and W_V of every layer are multiplied before step 9
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from _demo_data import VOCAB_SIZE, prepare_data

SCENARIOS = ("pretrained_load", "resume", "lr_spike", "weight_spike")
RECIPES = ("certified", "rank_aware", "calibrated", "paper", "delayed", "current")
REFERENCE = "none"
"""The recipe without casts, which every replay is compared with."""
STEPS, TRANSIENT, BURN_IN = 16, 9, 4
FACTORS = {"lr_spike": 30.0, "weight_spike": 4.0}
"""By what is multiplied, unless the user says."""
MODEL = """
    --num-layers 4 --hidden-size 256 --num-attention-heads 8 --group-query-attention --num-query-groups 4
    --seq-length 256 --position-embedding-type rope --normalization RMSNorm --swiglu
    --untie-embeddings-and-output-weights --disable-bias-linear --attention-dropout 0 --hidden-dropout 0
    --make-vocab-size-divisible-by 64
"""
TRAINING = """
    --micro-batch-size 4 --global-batch-size 4 --lr 1e-3 --lr-decay-style constant --weight-decay 0.1
    --adam-beta2 0.95 --split 100,0,0 --eval-iters 0 --num-workers 0 --log-interval 1
"""


def data_flags(data: Path, inputs: Sequence[str | Path]) -> list[object]:
    """Flags of tokenizer and text under `data`, which are made if they are not there."""
    prepare_data(data, inputs)
    return ["--tokenizer-type", "SentencePieceTokenizer", "--tokenizer-model", data / "tokenizer.model",
            "--data-path", data / "corpus_text_document", "--data-cache-path", data / "cache"]  # fmt: skip


def training_flags(steps: int, seed: int = 1234, model: Sequence[object] | None = None) -> list[object]:
    """Of a run of `steps` steps from random weights, without data and recipe. `model`: flags of another model."""
    shape = [*MODEL.split(), "--vocab-size", VOCAB_SIZE] if model is None else model
    return [*shape, *TRAINING.split(), "--train-iters", steps, "--seed", seed]


def replay_flags(
    scenario: str, recipe: str, *, base: Path, base_steps: int, factor: float, logits_dtype: str, overflow: str,
    model: Sequence[object] | None = None,
) -> list[object]:  # fmt: skip
    """Of one replay: `base` holds the trained checkpoint of `base_steps` steps; `model`: its flags, if not `MODEL`."""
    first = 0 if scenario == "pretrained_load" else base_steps
    flags = [
        *training_flags(first + STEPS, model=model), "--geoscale-recipe", recipe, "--geoscale-log-sqnr",
        "--geoscale-burn-in-steps", BURN_IN, "--geoscale-logits-dtype", logits_dtype, "--geoscale-overflow", overflow,
        # The run is to go on, and show what becomes of its loss.
        "--no-check-for-nan-in-loss-and-grad",
    ]  # fmt: skip
    if first:
        flags += ["--load", base, "--override-opt_param-scheduler"]  # the training warmed up, the replay does not
    fault = {
        "pretrained_load": f"load_weights:{TRANSIENT}:{base}",
        "lr_spike": f"lr_spike:{first + TRANSIENT - 1}:{factor}",
        "weight_spike": f"weight_spike:{first + TRANSIENT}:{factor}",
    }.get(scenario)
    return flags if fault is None else [*flags, "--geoscale-fault-injection", fault]


def transient_of(scenario: str) -> int:
    """The step, from 1, whose forward is the first with the new weights, or with the new history."""
    return 1 if scenario == "resume" else TRANSIENT
