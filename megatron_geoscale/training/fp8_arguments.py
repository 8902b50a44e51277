"""Megatron's flags for Transformer Engine: FP8 in linear layers, and which kernels compute attention.

Names and defaults are Megatron-LM's, and what they set are fields of megatron-core's `TransformerConfig`. FP8 attention
under a recipe of ours needs none of them: linear layers keep any FP8 recipe, or run in BF16.
"""

from __future__ import annotations

import argparse
from typing import Any

import torch

from megatron_geoscale.attention.backend import resolve_attention
from megatron_geoscale.attention.obstacles import installed_te
from megatron_geoscale.training.model_arguments import flag, require

FORMATS = ("e4m3", "hybrid")
RECIPES = ("delayed", "tensorwise", "mxfp8", "blockwise")
BACKENDS = ("flash", "fused", "unfused", "local", "auto")
_FIELDS = ("fp8_recipe", "fp8_margin", "fp8_amax_history_len", "fp8_amax_compute_algo", "fp8_wgrad",
           "fp8_dot_product_attention", "tp_only_amax_red", "first_last_layers_bf16",
           "num_layers_at_start_in_bf16", "num_layers_at_end_in_bf16")


def add_fp8_args(parser: argparse.ArgumentParser) -> None:
    """The flags; `args.fp8` is --fp8-format."""
    add = parser.add_argument_group("Transformer Engine").add_argument
    add("--transformer-impl", default="local", choices=("local", "transformer_engine"))
    add("--attention-backend", default="auto", choices=BACKENDS, help="what TE may compute attention with")
    add("--fp8-format", dest="fp8", choices=FORMATS, help="linear layers in FP8; hybrid: gradients in E5M2")
    add("--fp8-recipe", default="delayed", choices=RECIPES, help="scales of the linear layers")
    add("--fp8-margin", type=int, default=0)
    add("--fp8-amax-history-len", type=int, default=1)
    add("--fp8-amax-compute-algo", default="most_recent", choices=("most_recent", "max"))
    add("--no-fp8-wgrad", dest="fp8_wgrad", action="store_false", help="weight gradients of linear layers not in FP8")
    add("--fp8-dot-product-attention", action="store_true",
        help="attention too; under a recipe with scales from the weights it is in FP8 without this flag")
    add("--tp-only-amax-red", action="store_true", help="reduce amax over tensor-parallel ranks only")
    add("--first-last-layers-bf16", action="store_true")
    add("--num-layers-at-start-in-bf16", type=int, default=1)
    add("--num-layers-at-end-in-bf16", type=int, default=1)


def check_fp8(args: argparse.Namespace) -> None:
    """Check the flags; `args.geoscale` must be there. Sets `args.te_attention`, whether Transformer Engine computes the
    attention. Raises ValueError naming the flag, for a missing Transformer Engine too."""
    geoscale = args.geoscale
    scaled = geoscale.recipe != "none"
    te_layers = args.transformer_impl == "transformer_engine"
    args.te_attention = resolve_attention(geoscale) == "te" if scaled else te_layers
    for what, present in (
        ("--transformer-impl transformer_engine", te_layers),
        (f"--fp8-format {args.fp8}", args.fp8 is not None),
        ("--geoscale-attention te", scaled and geoscale.attention == "te"),
        ("--context-parallel-size above 1", args.context_parallel_size > 1),
    ):
        if present:
            version, problem = installed_te()
            require(version is not None, f"{what} needs Transformer Engine, and {problem}: install "
                                         "megatron-geoscale[gpu]")
            require(torch.cuda.is_available(), f"{what} needs a CUDA GPU, and there is none")
    require(args.fp8 is None or te_layers, "--fp8-format needs --transformer-impl transformer_engine")
    require(
        not args.fp8_dot_product_attention or args.fp8 is not None or (args.te_attention and geoscale.is_geometric),
        "--fp8-dot-product-attention needs --fp8-format, or a --geoscale-recipe with scales from the weights",
    )
    require(
        args.context_parallel_size == 1 or args.te_attention,
        "--context-parallel-size above 1 is not for --geoscale-attention emulated",
    )
    require(
        args.attention_backend in ("auto", "fused") or not (scaled and args.te_attention),
        f"--attention-backend {args.attention_backend} has no FP8 attention: use auto or fused",
    )
    require(
        not (args.geoscale_log_sqnr and scaled and args.te_attention),
        "--geoscale-log-sqnr is for --geoscale-attention emulated: kernels do not compute attention twice",
    )
    if scaled and args.te_attention and geoscale.recipe == "delayed":  # Transformer Engine's own attention
        for name, value in (("fp8", "hybrid"), ("fp8_recipe", "delayed"), ("fp8_dot_product_attention", True)):
            text = {"fp8": "--fp8-format hybrid", "fp8_recipe": "--fp8-recipe delayed"}.get(name, flag(name))
            require(getattr(args, name) == value,
                    f"--geoscale-recipe delayed with --geoscale-attention te needs {text}")
    require(args.fp8_amax_history_len > 0, f"--fp8-amax-history-len must be positive, not {args.fp8_amax_history_len}")


def fp8_fields(args: argparse.Namespace) -> dict[str, Any]:
    """Fields of megatron-core's config. FP8 attention of our own is none of Megatron's business."""
    from megatron.core.transformer.enums import AttnBackend

    fields = {name: getattr(args, name) for name in _FIELDS} if args.fp8 is not None else {}
    return {**fields, "fp8": args.fp8, "attention_backend": AttnBackend[args.attention_backend],
            "transformer_impl": args.transformer_impl}
