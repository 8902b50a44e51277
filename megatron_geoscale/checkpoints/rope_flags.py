"""Rotary position embedding as pretrain.py's flags, and back: what transformers and megatron-core both compute.

transformers' names and formulas: https://github.com/huggingface/transformers/blob/main/src/transformers/modeling_rope_utils.py
"""

from __future__ import annotations

import argparse
import math
from typing import Any

from megatron_geoscale.checkpoints.families import Rope
from megatron_geoscale.scaling.folding import yarn_scale

LLAMA3_ROPE: dict[str, Any] = {
    "rope_type": "llama3",
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
"""What megatron-core's RotaryEmbedding has built in; only `factor` is a flag."""
_YARN = {"beta_fast": 32.0, "beta_slow": 1.0}
"""transformers' defaults."""


def rope_flags(rope: Rope, max_positions: int) -> list[Any]:
    """The flags of `rope` in a model that takes `max_positions`. ValueError for what megatron-core has no flag for."""
    if not rope.theta.is_integer():
        raise ValueError(f"rope_theta must be an integer, as --rotary-base is, not {rope.theta}")
    base = ["--rotary-base", int(rope.theta)]
    if rope.kind == "default":
        return ["--position-embedding-type", "rope", *base]
    if rope.kind == "yarn":
        return ["--position-embedding-type", "yarn", *base, *_yarn_flags(rope, max_positions)]
    if rope.kind == "llama3":
        return ["--position-embedding-type", "rope", *base, *_llama3_flags(rope, max_positions)]
    if rope.kind == "linear":
        factor = _number(rope, "factor")
        if not factor.is_integer():
            raise ValueError("factor of the linear rotary embedding must be an integer, as "
                             f"--rotary-seq-len-interpolation-factor is, not {factor}")
        return ["--position-embedding-type", "rope", *base, "--rotary-seq-len-interpolation-factor", int(factor)]
    raise ValueError(f"rope_type {rope.kind} is not converted, only default, linear, llama3 and yarn are")


def _llama3_flags(rope: Rope, max_positions: int) -> list[Any]:
    settings = {"original_max_position_embeddings": max_positions, **rope.settings}
    for name, built_in in LLAMA3_ROPE.items():
        if name != "rope_type" and settings.get(name) != built_in:
            raise ValueError(f"{name} of the llama3 rotary embedding is {settings.get(name)}, and megatron-core has "
                             f"{built_in} built in")
    return ["--use-rope-scaling", "--rope-scaling-factor", _number(rope, "factor")]


def _yarn_flags(rope: Rope, max_positions: int) -> list[Any]:
    if rope.settings.get("truncate", True) is not True:
        raise ValueError("truncate false of the yarn rotary embedding is not supported: megatron-core truncates")
    factor, original = _number(rope, "factor"), _number(rope, "original_max_position_embeddings", max_positions)
    if factor < 1 or not original.is_integer():
        raise ValueError("factor of the yarn rotary embedding must be at least 1, and original_max_position_embeddings "
                         f"an integer, not {factor} and {original}")
    # Megatron has no attention_factor: the weight of the logarithm in it gives every one (families._yarn_scale).
    weights = [rope.settings.get(name) for name in ("mscale", "mscale_all_dim")]
    if rope.settings.get("attention_factor") is not None or not all(weights):
        if factor == 1 and rope.scale != 1:
            raise ValueError(f"attention_factor {rope.scale} of the yarn rotary embedding needs a factor above 1")
        plain = factor == 1 or rope.scale == yarn_scale(factor)
        weights = [1.0 if plain else (rope.scale - 1.0) / (0.1 * math.log(factor)), 0.0]
    return ["--yarn-rotary-scaling-factor", factor, "--yarn-original-max-position-embeddings", int(original),
            *(word for name, default in _YARN.items()
              for word in ("--yarn-" + name.replace("_", "-"), _number(rope, name, default))),
            f"--yarn-mscale={weights[0]}", f"--yarn-mscale-all-dim={weights[1]}"]


def _number(rope: Rope, name: str, default: float | None = None) -> float:
    value = rope.settings.get(name)
    value = default if value is None else value
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
        raise ValueError(f"{name} of the {rope.kind} rotary embedding must be a positive number, not {value!r}")
    return float(value)


def rope_of(args: argparse.Namespace) -> Rope:
    """The embedding that the flags of a checkpoint describe, its settings complete. ValueError naming the flag."""
    theta, linear = float(args.rotary_base), getattr(args, "rotary_seq_len_interpolation_factor", None)
    if args.position_embedding_type == "yarn":
        names = ("rotary_scaling_factor", "original_max_position_embeddings", *_YARN, "mscale", "mscale_all_dim")
        values = {name: getattr(args, f"yarn_{name}", None) for name in names}
        if not all(isinstance(value, int | float) for value in values.values()):
            raise ValueError("it has no complete flags of YaRN: pretrain.py did not save it")
        factor, weights = values.pop("rotary_scaling_factor"), (values.pop("mscale"), values.pop("mscale_all_dim"))
        scale = yarn_scale(factor, mscale=weights[0], mscale_all_dim=weights[1])
        return Rope("yarn", theta, {"rope_type": "yarn", "factor": factor, **values, "attention_factor": scale}, scale)
    if linear is not None and args.use_rope_scaling:
        raise ValueError("--rotary-seq-len-interpolation-factor and --use-rope-scaling together have no counterpart in "
                         "the supported families")
    if linear is not None:
        return Rope("linear", theta, {"rope_type": "linear", "factor": float(linear)})
    if args.use_rope_scaling:
        return Rope("llama3", theta, {**LLAMA3_ROPE, "factor": args.rope_scaling_factor})
    return Rope("default", theta, {})
