"""Command line of pretrain.py: Megatron-LM's flag names and defaults, and what the flags demand of each other.

Only flags that do something are accepted; an unknown one is an error, not a surprise later. The exceptions, listed in
`WITHOUT_EFFECT`, are flags of Megatron launch scripts that ask for what happens here anyway.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence

from megatron_geoscale.config import add_geoscale_args, geoscale_config_from_args
from megatron_geoscale.training.checkpoint_args import parse_with_checkpoint_args
from megatron_geoscale.training.checkpoint_arguments import add_checkpoint_args, check_checkpoint_args
from megatron_geoscale.training.expert_arguments import (
    add_expert_model_args,
    add_expert_training_args,
    check_experts,
)
from megatron_geoscale.training.fault_injection import parse_fault
from megatron_geoscale.training.fp8_arguments import add_fp8_args, check_fp8
from megatron_geoscale.training.model_arguments import add_model_args, check_model
from megatron_geoscale.training.model_arguments import flag as _flag
from megatron_geoscale.training.model_arguments import require as _require

TOKENIZER_TYPES = ("SentencePieceTokenizer", "Llama2Tokenizer", "HuggingFaceTokenizer", "ByteLevelTokenizer",
                   "NullTokenizer")
TOKENIZERS_WITHOUT_MODEL = ("ByteLevelTokenizer", "NullTokenizer")
WITHOUT_EFFECT = (
    "--use-mcore-models",
    "--exit-signal-handler",
    "--no-masked-softmax-fusion",
    "--no-gradient-accumulation-fusion",
    "--no-rope-fusion",
    "--no-bias-dropout-fusion",
    "--no-bias-swiglu-fusion",
    "--no-bias-gelu-fusion",
    "--moe-permute-fusion",
    "--use-cpu-initialization",
    "--no-create-attention-mask-in-dataloader",
)
"""Accepted and ignored: these fusions stay off where no kernel for them is installed, SIGTERM always saves."""


class _Parser(argparse.ArgumentParser):
    """Raises ValueError instead of exiting, so that one place decides how a user's mistake is printed."""

    def error(self, message: str) -> None:  # type: ignore[override]
        raise ValueError(message)


def build_parser() -> argparse.ArgumentParser:
    """The parser of pretrain.py."""
    parser = _Parser(
        prog="pretrain.py",
        description="Pretrain a Megatron-Core GPT whose FP8 attention is scaled from its weights.",
        allow_abbrev=False,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add_model_args(parser)
    add_expert_model_args(parser)
    _add_training_args(parser)
    add_expert_training_args(parser)
    _add_learning_rate_args(parser)
    add_checkpoint_args(parser)
    _add_distributed_args(parser)
    add_fp8_args(parser)
    _add_data_args(parser)
    _add_logging_args(parser)
    add_geoscale_args(parser)
    geoscale = parser.add_argument_group("geoscale, pretrain.py only")
    geoscale.add_argument("--geoscale-log-jsonl", metavar="PATH", help="append one JSON object per iteration to PATH")
    geoscale.add_argument(
        "--geoscale-fault-injection",
        metavar="FAULT",
        help="weight_spike:STEP:FACTOR multiplies W_Q, W_K and W_V of every layer by FACTOR before iteration STEP; "
        "lr_spike:STEP:FACTOR multiplies the learning rate of that one update; load_weights:STEP:DIR replaces all "
        "weights by those of a checkpoint before it; nan_weight:STEP writes one NaN into W_K of the last layer on one "
        "tensor-parallel rank; flip_bit:STEP[:RANK] flips a bit of one weight of RANK's last W_K (default: the last "
        "rank)",
    )
    geoscale.add_argument(
        "--geoscale-check-interval",
        type=int,
        default=100,
        metavar="N",
        help="compare the bits of the attention weights of data-parallel replicas every N iterations and before each "
        "checkpoint; 0 never does",
    )
    geoscale.add_argument(
        "--geoscale-log-sqnr",
        action="store_true",
        help="compare the attention output of every step with uncast attention: attention_sqnr_db in the JSONL",
    )
    ignored = parser.add_argument_group("accepted from Megatron launch scripts, without effect")
    for flag in WITHOUT_EFFECT:
        ignored.add_argument(flag, action="store_true", help=argparse.SUPPRESS)
    return parser


def _add_training_args(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("training")
    add = group.add_argument
    add("--micro-batch-size", type=int)
    add("--global-batch-size", type=int, help="default: micro batch size * data-parallel size")
    add("--rampup-batch-size", nargs=3, type=int, metavar=("START", "INCREMENT", "SAMPLES"))
    add("--train-iters", type=int)
    add("--exit-interval", type=int, help="save and exit after an iteration divisible by this")
    add("--exit-duration-in-mins", type=float, help="save and exit after this many minutes")
    add("--seed", type=int, default=1234)
    add("--optimizer", default="adam", choices=("adam",))
    add("--weight-decay", type=float, default=0.01)
    add("--clip-grad", type=float, default=1.0)
    add("--adam-beta1", type=float, default=0.9)
    add("--adam-beta2", type=float, default=0.999)
    add("--adam-eps", type=float, default=1e-8)
    add("--attention-dropout", type=float, default=0.1)
    add("--hidden-dropout", type=float, default=0.1)
    add("--bf16", action="store_true")
    add("--fp16", action="store_true")
    add("--attention-softmax-in-fp32", action="store_true")
    add("--accumulate-allreduce-grads-in-fp32", action="store_true", help="always on with --bf16 on CPU")
    add("--recompute-activations", action="store_true", help="recompute the core attention in the backward pass")
    add("--recompute-granularity", choices=("full", "selective"))
    add("--recompute-method", choices=("uniform", "block"))
    add("--recompute-num-layers", type=int)
    add("--no-check-for-nan-in-loss-and-grad", action="store_true", help="go on with gradients that are not finite")
    add("--eval-iters", type=int, default=100)
    add("--eval-interval", type=int, default=1000)


def _add_learning_rate_args(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("learning rate")
    add = group.add_argument
    add("--lr", type=float)
    add("--min-lr", type=float, default=0.0)
    add("--lr-decay-style", default="linear", choices=("constant", "linear", "cosine", "inverse-square-root"))
    add("--lr-decay-iters", type=int, help="default: train iterations")
    add("--lr-warmup-fraction", type=float)
    add("--lr-warmup-iters", type=int, default=0)
    add("--lr-warmup-init", type=float, default=0.0)
    add("--override-opt_param-scheduler", action="store_true")
    add("--use-checkpoint-opt_param-scheduler", action="store_true")


def _add_distributed_args(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("distributed")
    add = group.add_argument
    add("--tensor-model-parallel-size", type=int, default=1)
    add("--pipeline-model-parallel-size", type=int, default=1)
    add("--num-layers-per-virtual-pipeline-stage", type=int)
    add("--decoder-first-pipeline-num-layers", type=int, help="in the first stage; default: as many as in the others")
    add("--decoder-last-pipeline-num-layers", type=int, help="in the last stage; default: as many as in the others")
    add("--context-parallel-size", type=int, default=1)
    add("--sequence-parallel", action="store_true")
    add("--use-distributed-optimizer", action="store_true")
    add("--overlap-grad-reduce", action="store_true")
    add("--overlap-param-gather", action="store_true")
    add("--distributed-backend", choices=("nccl", "gloo"), help="default: nccl with CUDA, gloo without")
    add("--distributed-timeout-minutes", type=float, default=10)


def _add_data_args(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("data and tokenizer")
    add = group.add_argument
    add("--data-path", nargs="*", metavar="[WEIGHT] PREFIX", help="prefixes of .bin and .idx, weighted or not")
    add("--train-data-path", nargs="*", metavar="[WEIGHT] PREFIX")
    add("--valid-data-path", nargs="*", metavar="[WEIGHT] PREFIX")
    add("--split", help="train, validation, test weights of --data-path (default: 969, 30, 1)")
    add("--data-cache-path", metavar="DIR")
    add("--mock-data", action="store_true")
    add("--seq-length", type=int)
    add("--num-workers", type=int, default=2)
    add("--tokenizer-type", choices=TOKENIZER_TYPES)
    add("--tokenizer-model", metavar="PATH")
    add("--vocab-size", type=int, help="of NullTokenizer, and of ByteLevelTokenizer where it is not 512; for another, "
        "a check of what it must have")
    add("--reset-position-ids", action="store_true")
    add("--reset-attention-mask", action="store_true")
    add("--eod-mask-loss", action="store_true")


def _add_logging_args(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("logging")
    add = group.add_argument
    add("--log-interval", type=int, default=100)
    add("--log-throughput", action="store_true", help="tokens per second in the log line")
    add("--tensorboard-dir", metavar="DIR")
    add("--wandb-project", default="")
    add("--wandb-exp-name", default="")
    add("--wandb-save-dir", default="")


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse and check the flags; derived values are filled in. Raises ValueError naming the flag."""
    parser = build_parser()
    args = parser.parse_args(argv)
    if args.use_checkpoint_args:
        args = parse_with_checkpoint_args(parser, argv)
    args.geoscale = geoscale_config_from_args(args)
    args.world_size = int(os.environ.get("WORLD_SIZE", "1"))
    _check_required(args)
    check_model(args)
    _check_parallel(args)
    check_experts(args)
    _check_training(args)
    _check_data(args)
    _check_geoscale(args)
    return args


def _check_required(args: argparse.Namespace) -> None:
    for name in ("num_layers", "hidden_size", "num_attention_heads", "seq_length", "micro_batch_size", "train_iters",
                 "lr"):
        _require(getattr(args, name) is not None, f"{_flag(name)} is required")
    for name in ("num_layers", "hidden_size", "num_attention_heads", "seq_length", "micro_batch_size", "log_interval",
                 "tensor_model_parallel_size", "pipeline_model_parallel_size", "context_parallel_size",
                 "num_query_groups", "ffn_hidden_size", "kv_channels", "global_batch_size", "save_interval",
                 "exit_interval", "max_position_embeddings", "eval_interval", "make_vocab_size_divisible_by",
                 "num_layers_per_virtual_pipeline_stage", "decoder_first_pipeline_num_layers",
                 "decoder_last_pipeline_num_layers"):
        value = getattr(args, name)
        _require(value is None or value > 0, f"{_flag(name)} must be positive, not {value}")


def _check_parallel(args: argparse.Namespace) -> None:
    tp, pp = args.tensor_model_parallel_size, args.pipeline_model_parallel_size
    cp = args.context_parallel_size
    _require(
        args.world_size % (tp * pp * cp) == 0,
        f"{args.world_size} processes cannot be split into --tensor-model-parallel-size {tp} x "
        f"--pipeline-model-parallel-size {pp}" + (f" x --context-parallel-size {cp}" if cp > 1 else ""),
    )
    args.data_parallel_size = args.world_size // (tp * pp * cp)
    _require(
        args.seq_length % (2 * cp) == 0 or cp == 1,
        f"--seq-length {args.seq_length} is not divisible by twice --context-parallel-size {cp}",
    )
    for name in ("num_attention_heads", "ffn_hidden_size"):
        _require(
            getattr(args, name) % tp == 0,
            f"{_flag(name)} {getattr(args, name)} is not divisible by --tensor-model-parallel-size {tp}",
        )
    groups = args.num_query_groups
    _require(
        groups % tp == 0 or (tp % groups == 0 and 2 * groups * args.kv_channels % tp == 0),
        f"--num-query-groups {groups} must be divisible by --tensor-model-parallel-size {tp} or divide it, and then "
        f"the rows of keys and values, 2 x {groups} x {args.kv_channels}, must be divisible by {tp}",
    )
    _require(
        groups % tp == 0 or not args.attention_output_gate,
        f"--attention-output-gate needs --num-query-groups {groups} divisible by --tensor-model-parallel-size {tp}",
    )
    if args.sequence_parallel and tp == 1:
        args.sequence_parallel = False  # as Megatron does: there is nothing to split
    _require(
        not args.sequence_parallel or args.seq_length % tp == 0,
        f"--seq-length {args.seq_length} is not divisible by --tensor-model-parallel-size {tp}, which "
        "--sequence-parallel needs",
    )
    layers, per_chunk = args.num_layers, args.num_layers_per_virtual_pipeline_stage
    _check_stages(args)
    args.virtual_pipeline_model_parallel_size = None
    if per_chunk is not None:
        _require(pp > 1, "--num-layers-per-virtual-pipeline-stage needs --pipeline-model-parallel-size above 1")
        _require(
            (layers // pp) % per_chunk == 0,
            f"{layers // pp} layers a stage are not divisible by --num-layers-per-virtual-pipeline-stage {per_chunk}",
        )
        chunks = layers // pp // per_chunk
        args.virtual_pipeline_model_parallel_size = chunks if chunks > 1 else None
    _require(
        not args.overlap_param_gather or (args.use_distributed_optimizer and args.overlap_grad_reduce),
        "--overlap-param-gather needs --use-distributed-optimizer and --overlap-grad-reduce",
    )


def _check_stages(args: argparse.Namespace) -> None:
    """Layers that are no multiple of the stages need the number in the first or the last one."""
    layers, pp = args.num_layers, args.pipeline_model_parallel_size
    own = [args.decoder_first_pipeline_num_layers, args.decoder_last_pipeline_num_layers]
    given = [number for number in own if number is not None]
    names = "--decoder-first-pipeline-num-layers and --decoder-last-pipeline-num-layers"
    _require(
        not given or (pp > 1 and args.num_layers_per_virtual_pipeline_stage is None),
        f"{names} need --pipeline-model-parallel-size above 1, without --num-layers-per-virtual-pipeline-stage",
    )
    rest, stages = layers - sum(given), pp - len(given)
    _require(
        rest == 0 if stages == 0 else rest >= stages and rest % stages == 0,
        f"{rest} of {layers} layers cannot be shared by the {stages} stages that {names} leave"
        if given
        else f"--num-layers {layers} is not divisible by --pipeline-model-parallel-size {pp}: say with "
        f"{names.replace('and', 'or')} how many the first or the last stage has",
    )


def _check_training(args: argparse.Namespace) -> None:
    if args.global_batch_size is None:
        args.global_batch_size = args.micro_batch_size * args.data_parallel_size
    step = args.micro_batch_size * args.data_parallel_size
    _require(
        args.global_batch_size % step == 0,
        f"--global-batch-size {args.global_batch_size} is not divisible by --micro-batch-size {args.micro_batch_size} "
        f"x data-parallel size {args.data_parallel_size}",
    )
    _require(
        args.virtual_pipeline_model_parallel_size is None
        or (args.global_batch_size // step) % args.pipeline_model_parallel_size == 0,
        "an interleaved pipeline needs the number of micro batches divisible by --pipeline-model-parallel-size",
    )
    for name in ("train_iters", "eval_iters", "num_workers", "geoscale_check_interval"):
        _require(getattr(args, name) >= 0, f"{_flag(name)} must not be negative, not {getattr(args, name)}")
    _require(args.lr > 0, f"--lr must be positive, not {args.lr}")
    for name in ("attention_dropout", "hidden_dropout"):
        _require(0.0 <= getattr(args, name) < 1.0, f"{_flag(name)} must lie in [0, 1), not {getattr(args, name)}")
    if args.lr_decay_iters is None:
        args.lr_decay_iters = args.train_iters
    _require(
        args.lr_warmup_fraction is None or args.lr_warmup_iters == 0,
        "--lr-warmup-fraction and --lr-warmup-iters exclude each other",
    )
    if args.lr_warmup_fraction is not None:
        args.lr_warmup_iters = int(args.lr_warmup_fraction * args.lr_decay_iters)
    _require(
        args.lr_warmup_iters < max(1, args.lr_decay_iters),
        f"--lr-warmup-iters {args.lr_warmup_iters} must be below --lr-decay-iters {args.lr_decay_iters}",
    )
    check_checkpoint_args(args)
    if args.recompute_activations:
        _require(args.recompute_granularity in (None, "selective"),
                 "--recompute-activations means --recompute-granularity selective, not full")
        args.recompute_granularity = "selective"
    _require(
        args.recompute_granularity != "full" or args.recompute_method is not None,
        "--recompute-granularity full needs --recompute-method uniform or block",
    )


def _check_data(args: argparse.Namespace) -> None:
    sources = [name for name in ("data_path", "train_data_path") if getattr(args, name)]
    _require(
        len(sources) + args.mock_data == 1,
        "give exactly one source of data: --data-path, --train-data-path (with --valid-data-path) or --mock-data",
    )
    if args.split is None and args.data_path:
        args.split = "969, 30, 1"
    if args.split is not None:
        try:
            weights = [float(weight) for weight in args.split.split(",")]
        except ValueError:
            weights = []
        _require(1 <= len(weights) <= 3 and min(weights) >= 0 and sum(weights) > 0,
                 f"--split must be up to three weights like 969,30,1, not {args.split!r}")
    if args.tokenizer_type is None:
        _require(args.mock_data, "--tokenizer-type is required with real data")
        args.tokenizer_type = "NullTokenizer"
    if args.tokenizer_type == "NullTokenizer":
        _require(args.vocab_size is not None, "--vocab-size is required with NullTokenizer")
    elif args.tokenizer_type not in TOKENIZERS_WITHOUT_MODEL:
        _require(args.tokenizer_model is not None, f"--tokenizer-model is required with {args.tokenizer_type}")
    _require(args.vocab_size is None or args.vocab_size > 0, f"--vocab-size must be positive, not {args.vocab_size}")


def _check_geoscale(args: argparse.Namespace) -> None:
    check_fp8(args)
    fault = args.fault = parse_fault(args.geoscale_fault_injection)
    _require(
        fault is None or (fault.rank or 0) < args.world_size,
        f"--geoscale-fault-injection {args.geoscale_fault_injection} names a rank beyond the last of {args.world_size}",
    )
