"""What `attention.transformer_engine` relies on in Transformer Engine beyond its documentation, checked in one place.

Each check names what is missing, so that a release of TE that renames or rebuilds it stops a run when scales are
attached, instead of leaving attention on scales that nobody sets.
"""

from __future__ import annotations

import importlib
from typing import Any

import torch

from megatron_geoscale.scaling.slots import BACKWARD_SLOTS

SENTINEL = (0, "geoscale", 0, "geoscale")
"""Stands where TE keeps a module's places in its global amax buffers, in the shape that TE's own code takes apart."""
SLOT_INDICES = {"qkv": "META_QKV", "s": "META_S", "o": "META_O",
                "do": "META_DO", "dp": "META_DP", "dqkv": "META_DQKV"}
"""Our slots by TE's names for their places among a module's quantizers."""
NAMES = {
    "transformer_engine.pytorch": ("autocast",),
    "transformer_engine.pytorch.quantization:FP8GlobalStateManager": (
        "get_buffer_info", "add_fp8_tensors_to_global_buffer", "is_fp8_enabled",
        "copy_forward_fp8_meta_tensors_for_recompute", "get_old_fp8_meta_tensors_for_recompute",
        "restore_fp8_meta_tensors"),
    "transformer_engine.pytorch.distributed": ("in_fp8_activation_recompute_phase",),
    "transformer_engine.pytorch.cpp_extensions.fused_attn": tuple(SLOT_INDICES.values()),
    "transformer_engine.pytorch.attention.dot_product_attention.utils": ("get_attention_quantizers",),
    "transformer_engine.pytorch.tensor.float8_tensor": ("Float8Quantizer",),
    "transformer_engine.pytorch:DotProductAttention": ("init_fp8_metadata", "adjust_amax_history_length"),
}
"""What must exist, by `module` or `module:class`."""


def _find(path: str) -> Any:
    module, _, name = path.partition(":")
    found = importlib.import_module(module)
    return getattr(found, name) if name else found


def _require(condition: object, what: str) -> None:
    if not condition:
        import transformer_engine

        version = getattr(transformer_engine, "__version__", "of unknown version")
        raise RuntimeError(
            f"Transformer Engine {version} is not built as --geoscale-attention te needs it: {what}; "
            "use a version from 2.9 to 2.20, or --geoscale-attention emulated"
        )


def fill_empty_stash(attention: Any) -> None:
    """Let the second pass of TE's activation checkpoint find what it takes from the module's stash.

    The first pass fills it where FP8 is on round the checkpoint, and ours may be off there. What is stashed, scales and
    amaxes of TE's own memory, no kernel of ours reads.
    """
    if _stashed(attention) == 0:
        manager = _find("transformer_engine.pytorch.quantization:FP8GlobalStateManager")
        manager.copy_forward_fp8_meta_tensors_for_recompute(attention.fp8_meta)


def _stashed(attention: Any) -> int:
    place = attention.fp8_meta.get("global_fp8_buffer_pos_fwd_recompute")
    if place is None:
        return 0
    manager = _find("transformer_engine.pytorch.quantization:FP8GlobalStateManager")
    state = getattr(manager, "quantization_state", manager)  # later versions keep it in an object
    return len(state.fp8_tensors_recompute_buffer[place])


def buffer_key() -> str:
    """Where TE keeps a module's places in its global amax buffers, among `fp8_meta`."""
    key: str = _find("transformer_engine.pytorch.quantization:FP8GlobalStateManager").get_buffer_info()
    return key


def attention_quantizers(attention: Any) -> dict[str, Any]:
    """Quantizers of an attention module whose FP8 state is made, by our slots."""
    indices = _find("transformer_engine.pytorch.cpp_extensions.fused_attn")
    found = {}
    for slot, name in SLOT_INDICES.items():
        direction = "scaling_bwd" if slot in BACKWARD_SLOTS else "scaling_fwd"
        found[slot] = attention.quantizers[direction][int(getattr(indices, name))]
    return found


def require_names(attention: Any) -> None:
    """Raises RuntimeError, naming it, for one of `NAMES` that this Transformer Engine lacks, or for what an attention
    module of it lacks."""
    for path, names in NAMES.items():
        try:
            owner = _find(path)
        except (ImportError, AttributeError):
            owner = None
        for name in names:
            _require(hasattr(owner, name), f"{path.replace(':', '.')} has no {name}")
    for name in ("fp8_meta", "quantizers"):
        _require(isinstance(getattr(attention, name, None), dict), f"an attention module has no {name}")


def require_slots(attention: Any) -> None:
    """That TE's attention casts with the quantizers that `attention_quantizers` finds, and leaves them alone.

    `attention`: a module whose FP8 state has been made, with `SENTINEL` in its place. Raises RuntimeError, naming what
    is different.
    """
    try:
        quantizers = attention_quantizers(attention)
    except (KeyError, IndexError):
        quantizers = {}
    _require(quantizers, "the quantizers of an attention module are kept elsewhere")
    kind = _find("transformer_engine.pytorch.tensor.float8_tensor").Float8Quantizer
    for slot, quantizer in quantizers.items():
        _require(isinstance(quantizer, kind), f"its {slot} slot holds a {type(quantizer).__name__}")
        for name in ("scale", "amax"):
            tensor = getattr(quantizer, name, None)
            fits = isinstance(tensor, torch.Tensor) and tensor.numel() == 1 and tensor.dtype == torch.float32
            _require(fits, f"the {name} of its {slot} quantizer is not one float32 number")
    used = _find("transformer_engine.pytorch.attention.dot_product_attention.utils").get_attention_quantizers(
        True, attention.quantizers
    )
    expected = [quantizers[slot] for slot in ("qkv", "o", "s", "dqkv", "do", "dp")]
    _require(all(a is b for a, b in zip(used, expected)) and len(used) == len(expected),
             "get_attention_quantizers takes other quantizers")

    manager, meta = _find("transformer_engine.pytorch.quantization:FP8GlobalStateManager"), attention.fp8_meta
    manager.copy_forward_fp8_meta_tensors_for_recompute(meta)
    _require(_stashed(attention) == 1, "activation checkpoints stash the state of FP8 elsewhere")
    manager.get_old_fp8_meta_tensors_for_recompute(meta)
    manager.restore_fp8_meta_tensors(meta)
    _require(_stashed(attention) == 0, "activation checkpoints leave what they have stashed")

    known = set(meta)
    manager.add_fp8_tensors_to_global_buffer(meta)
    _require(meta[buffer_key()] is SENTINEL and set(meta) == known,
             "add_fp8_tensors_to_global_buffer registers a module that says it is registered")
