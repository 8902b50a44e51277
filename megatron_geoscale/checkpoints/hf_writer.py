"""Writes a Hugging Face directory: safetensors shards with their index, config.json, the tokenizer's files.

safetensors' own writer wants all tensors of a file in memory. The format is a header, JSON behind its length, and the
tensors' bytes; here each is written when it comes. https://huggingface.co/docs/safetensors
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from megatron_geoscale.checkpoints.families import Experts, Family
from megatron_geoscale.checkpoints.safetensors_dir import DTYPES, INDEX, SINGLE

SHARD_BYTES = 5_000_000_000
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
                   "vocab.json", "merges.txt", "tokenizer.model", "chat_template.jinja")
GENERATION = "generation_config.json"
_DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_ARCHITECTURES = {"gpt2": "GPT2LMHeadModel", "llama": "LlamaForCausalLM", "mistral": "MistralForCausalLM",
                  "qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM", "mixtral": "MixtralForCausalLM",
                  "qwen3_moe": "Qwen3MoeForCausalLM"}


@dataclass(frozen=True)
class Entry:
    """A tensor to be written."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def num_bytes(self) -> int:
        return torch.Size(self.shape).numel() * self.dtype.itemsize


def write_safetensors(
    directory: Path, entries: Sequence[Entry], tensors: Iterable[torch.Tensor], *, shard_bytes: int = SHARD_BYTES
) -> None:
    """Write `model.safetensors`, or shards of at most `shard_bytes` (a larger tensor has one alone) and their index.

    `tensors`: contiguous, on the CPU, one for each of `entries`, in their order. They are taken one at a time.
    RuntimeError where one is not what its entry says.
    """
    shards = _shards(entries, shard_bytes)
    names = [SINGLE] if len(shards) == 1 else [
        f"model-{number:05d}-of-{len(shards):05d}.safetensors" for number in range(1, len(shards) + 1)
    ]
    source = iter(tensors)
    for name, shard in zip(names, shards, strict=True):
        _write_file(directory / name, shard, source)
    if len(shards) > 1:
        weight_map = {entry.name: name for name, shard in zip(names, shards, strict=True) for entry in shard}
        total = sum(entry.num_bytes for entry in entries)
        _write_json(directory / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})


def _shards(entries: Sequence[Entry], shard_bytes: int) -> list[list[Entry]]:
    shards: list[list[Entry]] = [[]]
    size = 0
    for entry in entries:
        if shards[-1] and size + entry.num_bytes > shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append(entry)
        size += entry.num_bytes
    return shards


def _write_file(path: Path, entries: Sequence[Entry], tensors: Iterator[torch.Tensor]) -> None:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for entry in entries:
        start, end = end, end + entry.num_bytes
        header[entry.name] = {"dtype": _DTYPE_NAMES[entry.dtype], "shape": entry.shape, "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # tensors begin where any dtype may
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for entry in entries:
            tensor = next(tensors)
            if tuple(tensor.shape) != entry.shape or tensor.dtype != entry.dtype:
                raise RuntimeError(f"{entry.name} is {tensor.dtype} {list(tensor.shape)}, not {entry.dtype} "
                                   f"{list(entry.shape)}")
            file.write(tensor.reshape(-1).view(torch.uint8).numpy().data)
            del tensor  # before the next one is read
        file.flush()
        os.fsync(file.fileno())


def write_config(path: Path, family: Family, dtype: torch.dtype, base: Mapping[str, Any]) -> None:
    """Write `config.json` of `family`, weights in `dtype`. `base` is a configuration of the same model: keys that
    weights and flags say nothing of, such as the ids of special tokens, are taken from it."""
    stale = ("rope_parameters", "rope_scaling", "rope_theta", "dtype", "layer_types", "max_window_layers")
    kept = {key: value for key, value in base.items() if key not in stale}
    own = _gpt2_config(family) if family.is_fused else _llama_config(family)
    no_tokens = {"bos_token_id": None, "eos_token_id": None}  # transformers' defaults are those of another vocabulary
    _write_json(path, {**no_tokens, **kept, **own, "torch_dtype": str(dtype).removeprefix("torch.")})


def _gpt2_config(family: Family) -> dict[str, Any]:
    return {
        "architectures": [_ARCHITECTURES["gpt2"]],
        "model_type": "gpt2",
        "n_layer": family.num_layers,
        "n_embd": family.hidden_size,
        "n_head": family.num_heads,
        "n_inner": family.ffn_hidden_size,
        "n_positions": family.max_positions,
        "vocab_size": family.vocab_size,
        "activation_function": family.activation,
        "layer_norm_epsilon": family.norm_epsilon,
        "attn_pdrop": family.attention_dropout,
        "resid_pdrop": family.hidden_dropout,
        "tie_word_embeddings": family.tied_embeddings,
    }


def _llama_config(family: Family) -> dict[str, Any]:
    rope = family.rope
    assert rope is not None, "only GPT-2 has none"
    config: dict[str, Any] = {
        "architectures": [_ARCHITECTURES[family.model_type]],
        "model_type": family.model_type,
        "num_hidden_layers": family.num_layers,
        "hidden_size": family.hidden_size,
        "intermediate_size": family.ffn_hidden_size,
        "num_attention_heads": family.num_heads,
        "num_key_value_heads": family.num_groups,
        "max_position_embeddings": family.max_positions,
        "vocab_size": family.vocab_size,
        "hidden_act": family.activation,
        "rms_norm_eps": family.norm_epsilon,
        "attention_dropout": family.attention_dropout,
        "tie_word_embeddings": family.tied_embeddings,
        # In the form that transformers 4 and 5 both read.
        "rope_theta": rope.theta,
        "rope_scaling": dict(rope.settings) or None,
    }
    implied = family.head_dim * family.num_heads == family.hidden_size
    # Otherwise the quotient is what transformers takes, except that its YaRN finds none in a Mixtral.
    if family.model_type == "qwen3" or not implied or (family.model_type, rope.kind) == ("mixtral", "yarn"):
        config["head_dim"] = family.head_dim
    if family.experts is not None:
        config |= _expert_config(family, family.experts)
        if family.model_type == "qwen3_moe":
            del config["intermediate_size"]  # of layers without experts, and there are none
    if family.model_type in ("mistral", "mixtral"):
        config["sliding_window"] = family.sliding_window
    elif family.model_type.startswith("qwen"):
        config["use_sliding_window"] = False
    return config


def _expert_config(family: Family, experts: Experts) -> dict[str, Any]:
    if family.model_type == "mixtral":
        return {"num_local_experts": experts.count, "num_experts_per_tok": experts.per_token}
    return {
        # Both names: transformers 4 reads the first, and transformers 5 writes the second.
        "num_experts": experts.count,
        "num_local_experts": experts.count,
        "num_experts_per_tok": experts.per_token,
        "moe_intermediate_size": family.ffn_hidden_size,
        "norm_topk_prob": experts.sums_to_one,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
    }


def copy_tokenizer(source: Path, target: Path, *, also: Sequence[str] = ()) -> bool:
    """Copy the tokenizer's files of the directory `source`, and those named in `also`, to the directory `target`;
    returns whether there is a tokenizer."""
    found = [name for name in (*TOKENIZER_FILES, *also) if (source / name).is_file()]
    for name in found:
        shutil.copyfile(source / name, target / name)  # the content: a download's cache is made of links
    return any(name in TOKENIZER_FILES for name in found)


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    with path.open("w", encoding="utf-8") as file:
        file.write(json.dumps(content, indent=2) + "\n")
        file.flush()
        os.fsync(file.fileno())
