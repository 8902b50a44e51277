"""Why Transformer Engine would not compute attention in fused FP8 here, known before the first step.

TE itself falls back in silence: its `get_attention_backend` (pytorch/attention/dot_product_attention/utils.py) picks
another backend, or FP8 attention turns into BF16 attention, and only a debug log says so. The rules below are those of
that function for a training step under delayed-scaling slots, and of what it asks the compiled module
(`nvte_get_fused_attn_backend` in common/fused_attn/fused_attn.cpp), in TE 2.9 to 2.20. They may refuse more than TE
does, where TE's own tests leave a combination out, and never less.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

OLDEST_TE = (2, 9)
NEWEST_TE = (2, 20)
"""Versions whose Python the contract tests run. The scales are put into slots with semi-private names."""
OLDEST_CUDNN = (9, 7, 0)
"""Since then any sequence length, also with padding masks."""
BROKEN_CUDNN = (9, 10, 0)
_DETERMINISTIC_TE = (2, 13)
"""From here on TE knows that cuDNN 9.19 has a deterministic FP8 backward pass."""
_MASKS = ("causal", "no_mask", "padding", "padding_causal")


@dataclass(frozen=True)
class AttentionFacts:
    """What decides whether one attention layer runs in fused FP8. The defaults have no obstacle."""

    te_version: tuple[int, ...] | None = (2, 16, 1)
    """None where Transformer Engine cannot be imported; `te_problem` then says why."""
    te_problem: str = "it is not installed"
    capability: tuple[int, int] | None = (9, 0)
    """Compute capability of the GPU, None without one."""
    cudnn_version: tuple[int, int, int] = (9, 19, 0)
    dtype: torch.dtype = torch.bfloat16
    """Of Q, K and V."""
    head_dim_qk: int = 128
    head_dim_v: int = 128
    num_heads: int = 32
    """Query heads of one tensor-parallel rank."""
    num_groups: int = 32
    """Key/value groups of one tensor-parallel rank."""
    layout: str = "sbhd"
    attention_type: str = "self"
    mask: str = "causal"
    bias: bool = False
    window: tuple[int, int] | None = None
    softmax_type: str = "vanilla"
    dropout: float = 0.0
    max_logit: bool = False
    """Whether the kernel is to return the largest logit: --qk-clip, --log-max-attention-logit."""
    deterministic: bool = False
    context_parallel_size: int = 1
    cp_comm_type: str = "p2p"
    fp8_backward: bool = True
    """Whether the backward pass is to run in FP8 too."""
    environment: Mapping[str, str] = field(default_factory=dict)


def fp8_attention_obstacles(facts: AttentionFacts) -> list[str]:
    """One sentence for each thing that keeps TE from fused FP8 attention in training; empty where it will be used."""
    found = [*_of_the_machine(facts), *_of_the_environment(facts), *_of_the_layer(facts)]
    return [sentence for present, sentence in found if present]


def _of_the_machine(facts: AttentionFacts) -> list[tuple[bool, str]]:
    te, capability = facts.te_version, facts.capability
    found = [(capability is None, "there is no CUDA GPU")]
    if te is None:
        found.append((True, f"Transformer Engine cannot be used: {facts.te_problem}"))
    else:
        name, span = f"Transformer Engine {_dotted(te)}", f"{_dotted(OLDEST_TE)} to {_dotted(NEWEST_TE)}"
        found += [
            (te[:2] < OLDEST_TE, f"{name} is too old: install {span}"),
            (te[:2] > NEWEST_TE, f"{name} is too new: install {span}"),
        ]
    if capability is None:
        return found
    cudnn = _dotted(facts.cudnn_version)
    return [
        *found,
        (capability < (9, 0), f"the GPU is sm{_digits(capability)}: FP8 attention needs sm90 (Hopper) or newer"),
        (capability >= (12, 0), f"the GPU is sm{_digits(capability)}, where TE has no FP8 attention"),
        (facts.cudnn_version < OLDEST_CUDNN, f"cuDNN {cudnn} is too old: install {_dotted(OLDEST_CUDNN)} or newer"),
        (facts.cudnn_version == BROKEN_CUDNN, f"cuDNN {cudnn} computes FP8 attention wrongly: install another"),
    ]


def _of_the_environment(facts: AttentionFacts) -> list[tuple[bool, str]]:
    environment = facts.environment
    recipe = environment.get("NVTE_DPA_FP8_RECIPE", "")
    return [
        (
            environment.get("NVTE_FUSED_ATTN", "1") == "0",
            "NVTE_FUSED_ATTN=0 turns TE's fused attention off: unset it, or use --attention-backend fused or auto",
        ),
        # dot_product_attention.py, init_fp8_metadata: it replaces the recipe that surrounds the attention.
        (
            recipe not in ("", "DelayedScaling"),
            f"NVTE_DPA_FP8_RECIPE={recipe} makes TE replace the recipe of attention: unset it",
        ),
        # backends.py, FusedAttnFunc.forward.
        (
            facts.fp8_backward and environment.get("NVTE_FP8_DPA_BWD", "1") == "0",
            "NVTE_FP8_DPA_BWD=0 makes TE's backward pass BF16: unset it, or say --geoscale-backward bf16",
        ),
    ]


def _of_the_layer(facts: AttentionFacts) -> list[tuple[bool, str]]:
    return [*_of_its_shape(facts), *_of_its_softmax(facts), *_of_context_parallelism(facts)]


def _of_its_shape(facts: AttentionFacts) -> list[tuple[bool, str]]:
    qk, v = facts.head_dim_qk, facts.head_dim_v
    hopper = facts.capability is None or facts.capability < (10, 0)
    return [
        (
            facts.dtype not in (torch.bfloat16, torch.float16),
            f"attention runs in {str(facts.dtype).removeprefix('torch.')}: FP8 attention needs --bf16 or --fp16",
        ),
        # fused_attn.cpp: in training 128 alone on sm90, on sm100 multiples of 16 up to it.
        (
            qk != v,
            f"keys have {qk} channels a head and values {v} (--multi-latent-attention): they must be equal",
        ),
        (
            qk == v and hopper and qk != 128,
            f"--kv-channels {qk}: on sm90 FP8 attention trains with 128 channels a head only",
        ),
        (
            qk == v and not hopper and (qk > 128 or qk % 16 != 0),
            f"--kv-channels {qk}: FP8 attention needs a multiple of 16 up to 128",
        ),
        (facts.layout not in ("sbhd", "bshd"), f"sequences are packed ({facts.layout}): FP8 attention needs sbhd"),
        (facts.attention_type != "self", f"{facts.attention_type} attention gets no scales from its weights"),
    ]


def _of_its_softmax(facts: AttentionFacts) -> list[tuple[bool, str]]:
    te = facts.te_version or NEWEST_TE
    deterministic = te >= _DETERMINISTIC_TE and facts.cudnn_version >= (9, 19, 0)
    return [
        (facts.mask not in _MASKS, f"the attention mask is {facts.mask}: FP8 attention needs {', '.join(_MASKS)}"),
        (facts.bias, "there is an attention bias, which FP8 attention cannot add"),
        # Newer TE allows the next two on sm100 with cuDNN 9.21.
        (
            facts.window not in (None, (-1, -1), (-1, 0)),
            f"--window-size {facts.window}: FP8 attention has no sliding window",
        ),
        (facts.softmax_type != "vanilla", f"--softmax-type {facts.softmax_type}: FP8 attention has no softmax sinks"),
        # TE would select it, but has no test of FP8 attention with dropout that runs.
        (facts.dropout != 0.0, f"--attention-dropout {facts.dropout}: FP8 attention needs 0"),
        (facts.max_logit, "--qk-clip and --log-max-attention-logit need logits that FP8 attention does not return"),
        (
            facts.deterministic and not deterministic,
            "--deterministic-mode (or NVTE_ALLOW_NONDETERMINISTIC_ALGO=0): the FP8 backward pass is deterministic from "
            f"Transformer Engine {_dotted(_DETERMINISTIC_TE)} with cuDNN 9.19 on only",
        ),
    ]


def _of_context_parallelism(facts: AttentionFacts) -> list[tuple[bool, str]]:
    if facts.context_parallel_size == 1:
        return []
    kind = facts.cp_comm_type
    odd = facts.num_heads % 2 or facts.num_groups % 2
    return [
        (
            facts.mask not in ("causal", "no_mask"),
            f"--context-parallel-size {facts.context_parallel_size}: the attention mask must be causal, not "
            f"{facts.mask}",
        ),
        # Up to TE 2.14 it does not hand FP8 on (context_parallel.py, attn_forward_func_with_cp) and attention is BF16
        # without a word; later its steps have bottom-right causal masks, for which sm90 has no FP8 kernel.
        (kind == "all_gather", "--cp-comm-type all_gather: FP8 attention needs p2p or a2a"),
        (
            kind in ("a2a", "a2a+p2p") and bool(odd),
            f"--cp-comm-type {kind} needs an even number of heads and of query groups on each tensor-parallel rank, "
            f"not {facts.num_heads} and {facts.num_groups}",
        ),
    ]


def facts_here(config: Any, *, layer_number: int = 1, fp8_backward: bool = True, **changes: Any) -> AttentionFacts:
    """The facts of layer `layer_number` (from 1) of a model of megatron-core's `config`, on this machine.

    `changes` replace what `config` does not say, such as the mask.
    """
    te_version, te_problem = installed_te()
    heads, tensor_parallel = config.num_attention_heads, config.tensor_model_parallel_size
    kind, qk, v = config.cp_comm_type, config.kv_channels, config.kv_channels
    if config.multi_latent_attention:
        qk, v = config.qk_head_dim + config.qk_pos_emb_head_dim, config.v_head_dim
    facts: dict[str, Any] = {
        "te_version": te_version,
        "te_problem": te_problem,
        "capability": gpu_capability(),
        "cudnn_version": cudnn_version(),
        "dtype": torch.bfloat16 if config.bf16 else torch.float16 if config.fp16 else config.params_dtype,
        "head_dim_qk": qk,
        "head_dim_v": v,
        "num_heads": heads // tensor_parallel,
        "num_groups": max(1, (config.num_query_groups or heads) // tensor_parallel),
        "window": _window(config, layer_number),
        "softmax_type": config.softmax_type,
        "dropout": config.attention_dropout,
        "max_logit": bool(config.qk_clip or config.log_max_attention_logit),
        "deterministic": bool(config.deterministic_mode)
        or os.environ.get("NVTE_ALLOW_NONDETERMINISTIC_ALGO", "1") == "0"
        or torch.are_deterministic_algorithms_enabled(),
        "context_parallel_size": config.context_parallel_size,
        "cp_comm_type": (kind[layer_number - 1] if isinstance(kind, list) else kind) or "p2p",
        "fp8_backward": fp8_backward,
        "environment": {name: value for name, value in os.environ.items() if name.startswith("NVTE_")},
    }
    return AttentionFacts(**(facts | changes))


def _window(config: Any, layer_number: int) -> tuple[int, int] | None:
    from megatron.core.transformer.utils import is_layer_window_attention

    windowed = is_layer_window_attention(config.window_size, config.window_attn_skip_freq, layer_number)
    return tuple(config.window_size) if windowed else None  # type: ignore[return-value]


def installed_te() -> tuple[tuple[int, ...] | None, str]:
    """Version of the Transformer Engine that this process can import, and, where it is None, why it cannot."""
    try:
        import transformer_engine
        import transformer_engine.pytorch  # loads the compiled module
    except ModuleNotFoundError as error:
        if error.name == "transformer_engine":
            return None, "it is not installed"
        return None, f"it lacks {error.name}"
    except Exception as error:  # a broken installation raises what it likes
        return None, f"its import fails with {type(error).__name__}: {_first_line(error)}"
    return parse_version(transformer_engine.__version__), ""


def gpu_capability() -> tuple[int, int] | None:
    """Compute capability of this process's GPU, as Transformer Engine sees it where it is there; None without one."""
    if installed_te()[0] is not None:
        from transformer_engine.pytorch.utils import get_device_compute_capability

        try:
            return tuple(get_device_compute_capability())
        except (RuntimeError, AssertionError):  # what torch raises where there is no GPU, or no CUDA in its build
            return None
    return torch.cuda.get_device_capability() if torch.cuda.is_available() else None


def cudnn_version() -> tuple[int, int, int]:
    """Version of cuDNN, as Transformer Engine sees it where it is there; (0, 0, 0) without one."""
    if installed_te()[0] is not None:
        from transformer_engine.pytorch.utils import get_cudnn_version

        return tuple(get_cudnn_version())
    number = torch.backends.cudnn.version() or 0
    return number // 10000, number // 100 % 100, number % 100


def parse_version(text: str) -> tuple[int, ...]:
    """The release numbers of a version: (2, 16, 1) of "2.16.1+4d3a"."""
    match = re.match(r"\d+(\.\d+)*", text)
    return tuple(map(int, match[0].split("."))) if match else ()


def _dotted(version: tuple[int, ...]) -> str:
    return ".".join(map(str, version))


def _digits(capability: tuple[int, int]) -> str:
    return "".join(map(str, capability))


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [""])[0]
