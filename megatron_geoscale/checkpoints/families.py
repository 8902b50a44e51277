"""What a Hugging Face `config.json` says of a model, and how its family names and stores its tensors.

Families: GPT-2, Llama (2, 3, 3.1), Mistral, Qwen2 and 2.5, Qwen3, and with a mixture of experts Mixtral and Qwen3-MoE.
The keys of `config.json` are those of https://huggingface.co/docs/transformers; where a key is absent, transformers'
default counts. Every wrong value is a ValueError in one sentence that names the file and the key.
"""

from __future__ import annotations

import math
from collections.abc import Container, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_geoscale.checkpoints.safetensors_dir import read_json
from megatron_geoscale.scaling.folding import yarn_scale

ROPE_KINDS = ("default", "linear", "dynamic", "llama3", "yarn")
"""Kinds of rotary embedding that turn pairs and, apart from YaRN's factor, do nothing else."""
_LLAMA_LIKE = ("llama", "mistral", "qwen2", "qwen3", "mixtral", "qwen3_moe")
MODEL_TYPES = ("gpt2", *_LLAMA_LIKE)
_FFN_HIDDEN_SIZE = dict(zip(_LLAMA_LIKE, (11008, 14336, 22016, 22016, 14336, 768)))
_RMS_NORM_EPS = dict(zip(_LLAMA_LIKE, (1e-6, 1e-6, 1e-6, 1e-6, 1e-5, 1e-6)))


@dataclass(frozen=True)
class Rope:
    """Rotary position embedding, half-split pairs over the whole head."""

    kind: str
    """One of `ROPE_KINDS`."""
    theta: float
    settings: Mapping[str, Any]
    """As in the file: `factor`, `original_max_position_embeddings`, ..."""
    scale: float = 1.0
    """What cosines and sines are multiplied by, transformers' `attention_factor`."""


@dataclass(frozen=True)
class Experts:
    """What every layer has for an MLP in a mixture of experts."""

    count: int
    per_token: int
    sums_to_one: bool
    """Whether the weights of a token's experts are divided by their sum, which a softmax over their scores alone does
    too; else they are a share of the softmax over all experts."""


@dataclass(frozen=True)
class Stored:
    """A tensor as a checkpoint holds it."""

    name: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Family:
    """A model of one of the families, as its `config.json` describes it."""

    model_type: str
    num_layers: int
    hidden_size: int
    num_heads: int
    num_groups: int
    """Key and value heads."""
    head_dim: int
    vocab_size: int
    max_positions: int
    norm: str
    """`LayerNorm` (with a shift) or `RMSNorm`."""
    rope: Rope | None
    """None: learned absolute positions."""
    qkv_bias: bool
    output_bias: bool
    qk_norm: bool
    tied_embeddings: bool
    sliding_window: int | None
    attention_dropout: float
    hidden_dropout: float
    """Of embeddings and of what layers add, GPT-2's `resid_pdrop`."""
    ffn_hidden_size: int
    """Of an expert, in a mixture of experts."""
    norm_epsilon: float
    activation: str
    """transformers' name of what the MLP applies, gated in all families but GPT-2."""
    mlp_bias: bool
    scales_logits: bool = True
    """Whether logits are divided by sqrt(head_dim), and by the layer number too (`scales_by_layer`)."""
    scales_by_layer: bool = False
    experts: Experts | None = None

    @property
    def is_fused(self) -> bool:
        """Whether one transposed tensor holds queries, keys and values (GPT-2's Conv1D)."""
        return self.model_type == "gpt2"

    def softmax_scale(self, layer: int) -> float:
        """What q.k is multiplied by in layer `layer`, from 1."""
        scale = 1.0 / math.sqrt(self.head_dim) if self.scales_logits else 1.0
        return scale / layer if self.scales_by_layer else scale

    def prefix(self, names: Container[str]) -> str:
        """What stands before the decoder's tensor names in a checkpoint that holds `names`: a model saved without its
        head has no prefix."""
        prefix = "transformer." if self.is_fused else "model."
        return prefix if self.layer_stem(1, prefix) + _norm_name(self) + ".weight" in names else ""

    def layer_stem(self, layer: int, prefix: str = "") -> str:
        """What the tensor names of layer `layer`, from 1, begin with."""
        return f"{prefix}h.{layer - 1}." if self.is_fused else f"{prefix}layers.{layer - 1}."

    def attention(self, layer: int, prefix: str = "") -> dict[str, Stored]:
        """The tensors in front of attention in layer `layer`, from 1, by what they are.

        `gain`, and under LayerNorm `shift`; then `qkv` and `qkv_bias` where `is_fused`, else `q`, `k`, `v` and their
        `_bias` where there are biases; `q_norm` and `k_norm` where queries and keys are normalised.
        """
        stem = self.layer_stem(layer, prefix)
        d, norm = self.hidden_size, stem + _norm_name(self)
        found = {"gain": Stored(norm + ".weight", (d,))}
        if self.is_fused:
            found["shift"] = Stored(norm + ".bias", (d,))
            found["qkv"] = Stored(stem + "attn.c_attn.weight", (d, 3 * d))
            found["qkv_bias"] = Stored(stem + "attn.c_attn.bias", (3 * d,))
            return found
        for letter, heads in (("q", self.num_heads), ("k", self.num_groups), ("v", self.num_groups)):
            rows = heads * self.head_dim
            found[letter] = Stored(f"{stem}self_attn.{letter}_proj.weight", (rows, d))
            if self.qkv_bias:
                found[letter + "_bias"] = Stored(f"{stem}self_attn.{letter}_proj.bias", (rows,))
        if self.qk_norm:
            for letter in ("q", "k"):
                found[letter + "_norm"] = Stored(f"{stem}self_attn.{letter}_norm.weight", (self.head_dim,))
        return found


def _norm_name(family: Family) -> str:
    return "ln_1" if family.is_fused else "input_layernorm"


def read_family(path: Path) -> Family:
    """The model that the file `path`, a `config.json`, describes. ValueError in one sentence for one that is refused.
    """
    return family_from(read_json(path), path)


def family_from(content: Mapping[str, Any], path: Path) -> Family:
    """As `read_family`, of what such a file holds; `path` is what messages call it."""
    config = _Config(path, content)
    model_type = config.get("model_type")
    if model_type not in MODEL_TYPES:
        named = config.get("architectures")
        architecture = named[0] if isinstance(named, list) and named else "no architecture"
        raise ValueError(f"{path} describes {architecture} (model_type {model_type}), and only "
                         f"{', '.join(MODEL_TYPES)} are supported")
    if config.get("quantization_config") is not None:
        raise ValueError(f"{path} has a quantization_config: quantized weights are not supported")
    family = _gpt2(config) if model_type == "gpt2" else _llama_like(config, model_type)
    if family.num_heads % family.num_groups:
        raise ValueError(f"{path}: {family.num_heads} attention heads cannot share {family.num_groups} key/value heads")
    if family.rope is not None and family.head_dim % 2:
        raise ValueError(f"{path}: RoPE rotates pairs, and head_dim is {family.head_dim}")
    return family


def _gpt2(config: _Config) -> Family:
    hidden, heads = config.size("n_embd", 768), config.size("n_head", 12)
    if config.flag("add_cross_attention", False):
        raise ValueError(f"{config.path}: add_cross_attention is not supported")
    return Family(
        model_type="gpt2",
        num_layers=config.size("n_layer", 12),
        hidden_size=hidden,
        num_heads=heads,
        num_groups=heads,
        head_dim=config.quotient(hidden, heads, "n_embd", "n_head"),
        vocab_size=config.size("vocab_size", 50257),
        max_positions=config.size("n_positions", 1024),
        norm="LayerNorm",
        rope=None,
        qkv_bias=True,
        output_bias=True,
        qk_norm=False,
        tied_embeddings=config.flag("tie_word_embeddings", True),
        sliding_window=None,
        attention_dropout=config.probability("attn_pdrop", 0.1),
        hidden_dropout=config.probability("resid_pdrop", 0.1),
        ffn_hidden_size=4 * hidden if config.get("n_inner") is None else config.size("n_inner"),
        norm_epsilon=config.positive("layer_norm_epsilon", config.get("layer_norm_epsilon", 1e-5)),
        activation=config.get("activation_function", "gelu_new"),
        mlp_bias=True,
        scales_logits=config.flag("scale_attn_weights", True),
        scales_by_layer=config.flag("scale_attn_by_inverse_layer_idx", False),
    )


def _llama_like(config: _Config, model_type: str) -> Family:
    hidden, heads = config.size("hidden_size"), config.size("num_attention_heads")
    if config.get("head_dim") is not None or model_type == "qwen3":
        head_dim = config.size("head_dim", 128)
    else:
        head_dim = config.quotient(hidden, heads, "hidden_size", "num_attention_heads")
    with_bias = model_type in ("llama", "qwen3", "qwen3_moe") and config.flag("attention_bias", False)
    ffn_key = "moe_intermediate_size" if model_type == "qwen3_moe" else "intermediate_size"
    groups = config.get("num_key_value_heads")
    if groups is not None or model_type != "llama":  # Llama's first files, older than grouped queries, lack it
        groups = config.size("num_key_value_heads")
    max_positions = config.size("max_position_embeddings")
    return Family(
        model_type=model_type,
        num_layers=config.size("num_hidden_layers"),
        hidden_size=hidden,
        num_heads=heads,
        num_groups=groups or heads,
        head_dim=head_dim,
        vocab_size=config.size("vocab_size"),
        max_positions=max_positions,
        norm="RMSNorm",
        rope=_rope(config, max_positions, default_theta=1e6 if model_type == "mixtral" else 1e4),
        qkv_bias=with_bias or model_type == "qwen2",
        output_bias=with_bias,
        qk_norm=model_type.startswith("qwen3"),
        tied_embeddings=config.flag("tie_word_embeddings", False),
        sliding_window=_sliding_window(config, model_type),
        attention_dropout=config.probability("attention_dropout", 0.0),
        hidden_dropout=0.0,
        ffn_hidden_size=config.size(ffn_key, _FFN_HIDDEN_SIZE[model_type]),
        norm_epsilon=config.positive("rms_norm_eps", config.get("rms_norm_eps", _RMS_NORM_EPS[model_type])),
        activation=config.get("hidden_act", "silu"),
        mlp_bias=model_type == "llama" and config.flag("mlp_bias", False),
        experts=_EXPERTS[model_type](config) if model_type in _EXPERTS else None,
    )


def _mixtral_experts(config: _Config) -> Experts:
    jitter = config.get("router_jitter_noise", 0.0)
    if jitter != 0.0:
        raise ValueError(f"{config.path}: router_jitter_noise {jitter} is not supported, only 0 is")
    count = config.size("num_local_experts", 8)
    return _experts(config, count, config.size("num_experts_per_tok", 2), sums_to_one=True)


def _qwen3_experts(config: _Config) -> Experts:
    if config.get("mlp_only_layers") or config.size("decoder_sparse_step", 1) != 1:
        raise ValueError(f"{config.path}: mlp_only_layers and decoder_sparse_step are not supported: every layer must "
                         "have experts")
    former = config.get("num_experts") is not None  # the name before transformers 5
    count = config.size("num_experts" if former else "num_local_experts", 128)
    return _experts(config, count, config.size("num_experts_per_tok", 8),
                    sums_to_one=config.flag("norm_topk_prob", False))


def _experts(config: _Config, count: int, per_token: int, *, sums_to_one: bool) -> Experts:
    if per_token > count:
        raise ValueError(f"{config.path}: num_experts_per_tok {per_token} exceeds the number of experts, {count}")
    return Experts(count, per_token, sums_to_one)


_EXPERTS = {"mixtral": _mixtral_experts, "qwen3_moe": _qwen3_experts}


def _sliding_window(config: _Config, model_type: str) -> int | None:
    """Of the layers that have one."""
    if model_type == "llama" or (model_type.startswith("qwen") and not config.flag("use_sliding_window", False)):
        return None
    default = 4096 if model_type == "mistral" else None
    return None if config.get("sliding_window", default) is None else config.size("sliding_window", default)


def _rope(config: _Config, max_positions: int, *, default_theta: float) -> Rope:
    """From `rope_parameters` (transformers 5), or from `rope_scaling` and `rope_theta` (before)."""
    settings = config.get("rope_parameters") or config.get("rope_scaling") or {}
    if not isinstance(settings, dict):
        raise ValueError(f"{config.path}: rope_parameters must be an object, not {settings!r}")
    kind = settings.get("rope_type", settings.get("type", "default"))
    if kind not in ROPE_KINDS:
        raise ValueError(f"{config.path}: rope_type {kind!r} is not supported, only {', '.join(ROPE_KINDS)} are")
    partial = settings.get("partial_rotary_factor", config.get("partial_rotary_factor"))
    if partial not in (None, 1):
        raise ValueError(f"{config.path}: partial_rotary_factor {partial} is not supported")
    theta = settings.get("rope_theta", config.get("rope_theta", default_theta))
    return Rope(
        kind=kind,
        theta=config.positive("rope_theta", theta),
        settings=settings,
        scale=_yarn_scale(config, settings, max_positions) if kind == "yarn" else 1.0,
    )


def _yarn_scale(config: _Config, settings: Mapping[str, Any], max_positions: int) -> float:
    """transformers' `attention_factor` of YaRN: as given, else from `factor` and the two `mscale`, if both are there.
    """
    if settings.get("attention_factor") is not None:
        return config.positive("attention_factor", settings["attention_factor"])
    factor = settings.get("factor")
    if factor is None:
        factor = max_positions / config.positive(
            "original_max_position_embeddings", settings.get("original_max_position_embeddings")
        )
    factor = config.positive("factor", factor)
    names = ("mscale", "mscale_all_dim")
    weights = {name: config.positive(name, settings[name]) for name in names if settings.get(name)}
    return yarn_scale(factor, **weights) if len(weights) == 2 else yarn_scale(factor)


class _Config:
    """The keys of a `config.json`, checked as they are read."""

    def __init__(self, path: Path, content: Mapping[str, Any]) -> None:
        self.path, self._content = path, content

    def get(self, key: str, default: Any = None) -> Any:
        return self._content.get(key, default)

    def size(self, key: str, default: int | None = None) -> int:
        value = self._content.get(key, default)
        if value is None:
            raise ValueError(f"{self.path} has no {key}")
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"{self.path}: {key} must be a positive integer, not {value!r}")
        return value

    def flag(self, key: str, default: bool) -> bool:
        value = self._content.get(key, default)
        if not isinstance(value, bool):
            raise ValueError(f"{self.path}: {key} must be true or false, not {value!r}")
        return value

    def probability(self, key: str, default: float) -> float:
        value = self._content.get(key, default)
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0.0 <= value < 1.0:
            raise ValueError(f"{self.path}: {key} must lie in [0, 1), not {value!r}")
        return float(value)

    def positive(self, key: str, value: Any) -> float:
        """`value` of `key`, which may lie in an object of its own, as a positive finite number."""
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0.0 < value < math.inf:
            raise ValueError(f"{self.path}: {key} must be a positive number, not {value!r}")
        return float(value)

    def quotient(self, whole: int, parts: int, name: str, of: str) -> int:
        if whole % parts:
            raise ValueError(f"{self.path}: {name} {whole} is not divisible by {of} {parts}")
        return whole // parts
