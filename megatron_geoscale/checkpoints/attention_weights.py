"""The attention weights of a checkpoint, layer by layer, in the layout that `scaling.folding` wants.

`open_checkpoint(path)` gives an `AttentionSource`, whatever wrote the checkpoint. Every tensor's shape is checked when
it is opened, before anything is read; each call of `layer` reads one layer.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch

from megatron_geoscale.bounds.qk_norm import HeadNorm
from megatron_geoscale.checkpoints import torch_dist
from megatron_geoscale.checkpoints.families import Family, Stored, read_family
from megatron_geoscale.checkpoints.iterations import TRACKER
from megatron_geoscale.checkpoints.safetensors_dir import SafetensorsDirectory
from megatron_geoscale.scaling.folding import (
    Projection,
    drop_output_gates,
    effective_gain,
    fold_head_norm,
    yarn_scale,
)
from megatron_geoscale.scaling.geometry import AttentionGeometry
from megatron_geoscale.spectral.projections import split_linear_qkv

CONFIG = "config.json"


@dataclass(frozen=True)
class AttentionWeights:
    """What stands in front of one layer's attention, as stored; heads of a group contiguous."""

    number: int
    """Of the layer, from 1."""
    query: Projection
    """[num_heads, head_dim, d]; `key` and `value` [num_groups, head_dim, d]."""
    key: Projection
    value: Projection
    gain: torch.Tensor
    """[d] float64, of the norm in front; a zero-centred one as 1 + weight."""
    shift: torch.Tensor | None
    head_norms: tuple[HeadNorm, HeadNorm] | None
    """Of queries and keys, where they are normalised."""
    geometry: AttentionGeometry
    """For sequences as long as the model takes, and the arithmetic of the stored dtype."""


class AttentionSource(Protocol):
    """A checkpoint's attention."""

    name: str
    """What kind of model, for a title."""
    num_layers: int

    def layer(self, number: int) -> AttentionWeights:
        """Of layer `number`, from 1. ValueError where it cannot be read."""
        ...


def open_checkpoint(path: Path) -> AttentionSource:
    """The attention weights of a Hugging Face directory, or of a Megatron checkpoint in torch_dist format (the
    directory of --save, or one iteration's).

    Raises ValueError in one sentence for anything else, for weights that do not fit their description, and for models
    that the bounds do not cover.
    """
    if not path.exists():
        raise ValueError(f"{path} does not exist")
    if not path.is_dir():
        raise ValueError(f"{path} is a file: give the directory that holds {CONFIG}, or a Megatron checkpoint's")
    if torch_dist.is_checkpoint(path):
        return MegatronAttention(path)
    if (path / CONFIG).exists():
        return HuggingFaceAttention(path)
    raise ValueError(f"{path} holds neither {CONFIG}, as a Hugging Face model, nor {TRACKER}, as a Megatron "
                     "checkpoint")


class HuggingFaceAttention:
    """Attention of a Hugging Face directory."""

    def __init__(self, path: Path) -> None:
        self.family = read_family(path / CONFIG)
        self._tensors = SafetensorsDirectory(path)
        self._prefix = self.family.prefix(self._tensors)
        self.name, self.num_layers = self.family.model_type, self.family.num_layers
        for number in range(1, self.num_layers + 1):
            for stored in self.family.attention(number, self._prefix).values():
                _check_shape(stored, self._tensors.shape(stored.name), path / CONFIG)

    def layer(self, number: int) -> AttentionWeights:
        """As `AttentionSource.layer`."""
        family, named = self.family, self.family.attention(number, self._prefix)
        tensors = {what: _as_float(stored.name, self._tensors.tensor(stored.name)) for what, stored in named.items()}
        geometry = huggingface_geometry(family, number, max(_roundoff(tensor) for tensor in tensors.values()))
        if family.is_fused:  # Conv1D holds the transpose
            weights = tensors["qkv"].t().chunk(3)
            biases = tensors["qkv_bias"].chunk(3)
        else:
            weights = tuple(tensors[letter] for letter in "qkv")
            biases = tuple(tensors.get(letter + "_bias") for letter in "qkv")
        query, key, value = (
            (weight.unflatten(0, (-1, family.head_dim)), None if bias is None else bias.view(-1, family.head_dim))
            for weight, bias in zip(weights, biases)
        )
        return AttentionWeights(
            number, query, key, value, tensors["gain"].double(), tensors.get("shift"),
            head_norms(tensors, geometry, zero_centered=False), geometry,
        )


def huggingface_geometry(family: Family, number: int, unit_roundoff: float) -> AttentionGeometry:
    """Of layer `number`, from 1, of a Hugging Face model whose arithmetic has this unit roundoff."""
    return AttentionGeometry(
        hidden_size=family.hidden_size,
        num_heads=family.num_heads,
        num_groups=family.num_groups,
        head_dim=family.head_dim,
        softmax_scale=family.softmax_scale(number),
        max_sequence_length=family.max_positions,
        rotary_dim=0 if family.rope is None else family.head_dim,
        rotary_scale=1.0 if family.rope is None else family.rope.scale,
        dropout=family.attention_dropout,
        unit_roundoff=unit_roundoff,
    )


class MegatronAttention:
    """Attention of a GPT that pretrain.py saved."""

    _WEIGHT = "decoder.layers.self_attention.linear_qkv.weight"

    def __init__(self, path: Path) -> None:
        self.directory = torch_dist.latest_directory(path)
        self._tensors = torch_dist.TorchDistDirectory(self.directory)
        self._args = args = argparse.Namespace(**{**_LATER, **vars(self._tensors.args())})
        if args.multi_latent_attention:
            raise ValueError(f"{self.directory} was trained with --multi-latent-attention, which only a run can bound")
        needed = _FLAGS | (_YARN_FLAGS if getattr(args, "position_embedding_type", None) == "yarn" else {})
        for name, kind in needed.items():
            value = getattr(args, name, None)
            if type(value) is not kind or (kind is int and value < 1):
                raise ValueError(f"{self.directory / torch_dist.COMMON} has {value!r} for "
                                 f"--{name.replace('_', '-')}: pretrain.py did not save it")
        if args.position_embedding_type not in _ROTARY:
            raise ValueError(f"{self.directory}: --position-embedding-type {args.position_embedding_type} has no "
                             "certified bound")
        self.name, self.num_layers = f"Megatron GPT, {self.directory.name}", args.num_layers
        self._named = self._names()
        for stored in self._named.values():
            _check_shape(stored, self._tensors.shape(stored.name), self.directory / torch_dist.COMMON)

    def _names(self) -> dict[str, Stored]:
        """Tensors of all layers, by what they are."""
        args, attention = self._args, "decoder.layers.self_attention."
        heads = args.num_attention_heads * (2 if args.attention_output_gate else 1) + 2 * args.num_query_groups
        shapes = {
            "qkv": (self._WEIGHT, (heads * args.kv_channels, args.hidden_size)),
            "gain": (attention + "linear_qkv.layer_norm_weight", (args.hidden_size,)),
        }
        if args.normalization == "LayerNorm":
            shapes["shift"] = (attention + "linear_qkv.layer_norm_bias", (args.hidden_size,))
        if args.add_qkv_bias or not args.disable_bias_linear:
            shapes["qkv_bias"] = (attention + "linear_qkv.bias", (heads * args.kv_channels,))
        if args.qk_layernorm and not args.qk_l2_norm:
            for letter in ("q", "k"):
                shapes[f"{letter}_norm"] = (f"{attention}{letter}_layernorm.weight", (args.kv_channels,))
                if args.normalization == "LayerNorm":
                    shapes[f"{letter}_norm_shift"] = (f"{attention}{letter}_layernorm.bias", (args.kv_channels,))
        return {what: Stored(name, (args.num_layers, *shape)) for what, (name, shape) in shapes.items()}

    def layer(self, number: int) -> AttentionWeights:
        """As `AttentionSource.layer`."""
        args = self._args
        tensors = {
            what: _as_float(stored.name, self._tensors.layer(stored.name, number - 1))
            for what, stored in self._named.items()
        }
        geometry = _megatron_geometry(args, number, _roundoff(tensors["qkv"]))
        size = {"heads_per_group": geometry.heads_per_group, "head_dim": geometry.head_dim}
        weight, bias = tensors["qkv"], tensors.get("qkv_bias")
        if args.attention_output_gate:
            weight, bias = (None if rows is None else drop_output_gates(rows, **size) for rows in (weight, bias))
        w_q, b_q, w_k, b_k, w_v, b_v = split_linear_qkv(weight, bias, num_groups=geometry.num_groups, **size)
        if args.qk_l2_norm:
            tensors |= {f"{letter}_norm": torch.ones(geometry.head_dim, dtype=torch.float64) for letter in "qk"}
        gain = effective_gain(tensors["gain"], zero_centered=args.apply_layernorm_1p)
        zero_centered = args.apply_layernorm_1p and not args.qk_l2_norm
        return AttentionWeights(
            number, (w_q, b_q), (w_k, b_k), (w_v, b_v), gain, tensors.get("shift"),
            head_norms(tensors, geometry, zero_centered=zero_centered), geometry,
        )


_LATER = dict.fromkeys(
    ("qk_l2_norm", "attention_output_gate", "multi_latent_attention", "apply_query_key_layer_scaling"), False
)
"""Flags that a checkpoint may be older than, and what it means then."""
_FLAGS: dict[str, type] = {
    **dict.fromkeys(("num_layers", "hidden_size", "num_attention_heads", "num_query_groups", "kv_channels",
                     "max_position_embeddings"), int),
    **dict.fromkeys(("position_embedding_type", "normalization"), str),
    **dict.fromkeys(("rotary_percent", "attention_dropout"), float),
    **dict.fromkeys(("rotary_interleaved", "apply_layernorm_1p", "disable_bias_linear", "add_qkv_bias",
                     "qk_layernorm", *_LATER), bool),
}
_YARN_FLAGS = dict.fromkeys(("yarn_rotary_scaling_factor", "yarn_mscale", "yarn_mscale_all_dim"), float)
_ROTARY = {"rope": True, "yarn": True, "learned_absolute": False, "none": False}


def _megatron_geometry(args: argparse.Namespace, number: int, unit_roundoff: float) -> AttentionGeometry:
    rotary, rotary_scale = _ROTARY[args.position_embedding_type], 1.0
    if args.position_embedding_type == "yarn":
        rotary_scale = yarn_scale(
            args.yarn_rotary_scaling_factor, mscale=args.yarn_mscale, mscale_all_dim=args.yarn_mscale_all_dim
        )
    multiplier = float(number) if args.apply_query_key_layer_scaling else 1.0
    return AttentionGeometry(
        hidden_size=args.hidden_size,
        num_heads=args.num_attention_heads,
        num_groups=args.num_query_groups,
        head_dim=args.kv_channels,
        softmax_scale=1.0 / math.sqrt(args.kv_channels) / multiplier,
        max_sequence_length=args.max_position_embeddings,
        rotary_dim=int(args.kv_channels * min(1.0, args.rotary_percent)) if rotary else 0,
        rotary_interleaved=args.rotary_interleaved,
        rotary_scale=rotary_scale,
        logit_multiplier=multiplier,
        dropout=args.attention_dropout,
        unit_roundoff=unit_roundoff,
    )


def head_norms(
    tensors: Mapping[str, torch.Tensor], geometry: AttentionGeometry, *, zero_centered: bool
) -> tuple[HeadNorm, HeadNorm] | None:
    """Of queries and keys, from `q_norm` and `k_norm` of a layer's tensors and, where they shift, `q_norm_shift` and
    `k_norm_shift`; None where they are not normalised."""
    if "q_norm" not in tensors:
        return None
    rotary = {"rotary_dim": geometry.rotary_dim, "rotary_scale": geometry.rotary_scale}
    query, key = (
        fold_head_norm(
            effective_gain(tensors[f"{letter}_norm"], zero_centered=zero_centered),
            tensors.get(f"{letter}_norm_shift"),
            **rotary,
        )
        for letter in ("q", "k")
    )
    return query, key


def _check_shape(stored: Stored, shape: tuple[int, ...], described_by: Path) -> None:
    if shape != stored.shape:
        raise ValueError(f"{stored.name} has shape {list(shape)}, and {described_by} makes it {list(stored.shape)}")


def _as_float(name: str, tensor: torch.Tensor) -> torch.Tensor:
    """`tensor`, of a dtype that holds weights as they are. FP8 and integers need scales that this does not know."""
    if tensor.dtype not in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
        raise ValueError(f"{name} is stored as {str(tensor.dtype).removeprefix('torch.')}: quantized weights are not "
                         "supported")
    return tensor


def _roundoff(tensor: torch.Tensor) -> float:
    return torch.finfo(tensor.dtype).eps / 2
