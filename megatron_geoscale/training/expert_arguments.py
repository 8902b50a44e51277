"""The flags of a mixture of experts: Megatron-LM's names and defaults, and what they demand of each other.

Every layer has experts; each token goes through the --moe-router-topk of them that the router scores highest. The
flags in `add_expert_model_args` decide what the model computes and belong to a checkpoint; those in
`add_expert_training_args` belong to a run. https://docs.nvidia.com/megatron-core/developer-guide/latest/api-guide/moe.html
"""

from __future__ import annotations

import argparse
from typing import Any

from megatron_geoscale.training.model_arguments import flag, require

LOAD_BALANCING = ("aux_loss", "seq_aux_loss", "global_aux_loss", "sinkhorn", "none")
DISPATCHERS = ("allgather", "alltoall")
_MODEL = ("moe_ffn_hidden_size", "moe_router_topk", "moe_router_pre_softmax", "moe_router_score_function",
          "moe_router_topk_scaling_factor")
_TRAINING = ("moe_router_load_balancing_type", "moe_aux_loss_coeff", "moe_z_loss_coeff", "moe_router_dtype",
             "moe_token_dispatcher_type")


def add_expert_model_args(parser: argparse.ArgumentParser) -> None:
    """What the model computes."""
    add = parser.add_argument_group("mixture of experts").add_argument
    add("--num-experts", type=int, help="in every layer; default: none, one MLP")
    add("--moe-ffn-hidden-size", type=int, help="of an expert; default: --ffn-hidden-size")
    add("--moe-router-topk", type=int, default=2, help="experts that a token goes through")
    add("--moe-router-pre-softmax", action="store_true", help="softmax over all experts, before the top are chosen")
    add("--moe-router-score-function", choices=("softmax", "sigmoid"), default="softmax")
    add("--moe-router-topk-scaling-factor", type=float, help="of the weights of a token's experts")


def add_expert_training_args(parser: argparse.ArgumentParser) -> None:
    """How it is trained."""
    add = parser.add_argument_group("training of a mixture of experts").add_argument
    add("--moe-router-load-balancing-type", choices=LOAD_BALANCING, default="aux_loss")
    add("--moe-aux-loss-coeff", type=float, default=0.0, help="of the load-balancing loss; 1e-2 is a common choice")
    add("--moe-z-loss-coeff", type=float, help="of the router's z-loss; 1e-3 is a common choice")
    add("--moe-router-dtype", choices=("fp32", "fp64"), help="of the router's arithmetic; default: the model's")
    add("--moe-token-dispatcher-type", choices=DISPATCHERS, default="allgather")
    add("--moe-grouped-gemm", action="store_true", help="one kernel for all experts, where Transformer Engine is used")
    add("--expert-model-parallel-size", type=int, default=1, help="data-parallel ranks that share the experts")
    add("--expert-tensor-parallel-size", type=int, help="ranks that share an expert; default: tensor-parallel size")


def check_experts(args: argparse.Namespace) -> None:
    """Check the flags and fill in what follows from them; what the layers of the model are must be known. Raises
    ValueError naming the flag."""
    experts, tp = args.num_experts, args.tensor_model_parallel_size
    if experts is None:
        for name, neutral in (("moe_ffn_hidden_size", None), ("expert_model_parallel_size", 1),
                              ("expert_tensor_parallel_size", None)):
            require(getattr(args, name) == neutral, f"{flag(name)} is for a mixture of experts: give --num-experts")
        return
    for name in ("num_experts", "moe_ffn_hidden_size", "moe_router_topk", "expert_model_parallel_size",
                 "expert_tensor_parallel_size"):
        value = getattr(args, name)
        require(value is None or value > 0, f"{flag(name)} must be positive, not {value}")
    if args.moe_ffn_hidden_size is None:
        args.moe_ffn_hidden_size = args.ffn_hidden_size
    args.expert_tensor_parallel_size = args.expert_tensor_parallel_size or tp
    require(args.disable_bias_linear, "--num-experts needs --disable-bias-linear: experts have no biases here")
    require(not args.multi_latent_attention, "--num-experts is not for --multi-latent-attention")
    topk = args.moe_router_topk
    require(topk <= experts, f"--moe-router-topk {topk} exceeds --num-experts {experts}")
    softmax_of_one = topk == 1 and args.moe_router_score_function == "softmax" and not args.moe_router_pre_softmax
    require(
        not softmax_of_one or args.moe_router_load_balancing_type == "sinkhorn",
        "--moe-router-topk 1 needs --moe-router-pre-softmax: the softmax of one score is 1 and teaches the router "
        "nothing",
    )
    require(args.moe_aux_loss_coeff >= 0, f"--moe-aux-loss-coeff must not be negative, not {args.moe_aux_loss_coeff}")
    balances = args.moe_router_load_balancing_type.endswith("aux_loss")
    require(
        balances or args.moe_aux_loss_coeff == 0,
        f"--moe-aux-loss-coeff {args.moe_aux_loss_coeff} does nothing with --moe-router-load-balancing-type "
        f"{args.moe_router_load_balancing_type}",
    )
    require(tp == 1 or args.sequence_parallel,
             f"--num-experts with --tensor-model-parallel-size {tp} needs --sequence-parallel")
    _check_parallel(args)


def _check_parallel(args: argparse.Namespace) -> None:
    ep, etp, pp = args.expert_model_parallel_size, args.expert_tensor_parallel_size, args.pipeline_model_parallel_size
    tp = args.tensor_model_parallel_size
    # megatron-core then reduces the experts' gradients over the ranks of the other layers.
    require(
        ep > 1 or etp == tp,
        f"--expert-tensor-parallel-size {etp} with --tensor-model-parallel-size {tp} needs "
        "--expert-model-parallel-size above 1: without it megatron-core trains other experts",
    )
    require(
        args.num_experts % ep == 0,
        f"--num-experts {args.num_experts} is not divisible by --expert-model-parallel-size {ep}",
    )
    require(
        args.world_size % (etp * ep * pp) == 0,
        f"{args.world_size} processes cannot be split into --expert-tensor-parallel-size {etp} x "
        f"--expert-model-parallel-size {ep} x --pipeline-model-parallel-size {pp}",
    )
    require(
        args.moe_ffn_hidden_size % etp == 0,
        f"--moe-ffn-hidden-size {args.moe_ffn_hidden_size} is not divisible by --expert-tensor-parallel-size {etp}",
    )


def expert_fields(args: argparse.Namespace) -> dict[str, Any]:
    """Fields of megatron-core's TransformerConfig; none for a model without experts."""
    if args.num_experts is None:
        return {}
    return {
        "num_moe_experts": args.num_experts,
        "expert_model_parallel_size": args.expert_model_parallel_size,
        "expert_tensor_parallel_size": args.expert_tensor_parallel_size,
        # Without Transformer Engine the experts run one after the other: the same result, and the same checkpoint.
        "moe_grouped_gemm": args.moe_grouped_gemm and args.transformer_impl == "transformer_engine",
        **{name: getattr(args, name) for name in (*_MODEL, *_TRAINING)},
    }

