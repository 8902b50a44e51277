"""A CPU stand-in for Transformer Engine's compiled module, so that TE's own Python runs in tests.

    te_stub.install("2.16.1")               # before megatron-core is imported, once per process
    import transformer_engine.pytorch as te

TE's Python comes from `pip install --no-deps transformer-engine==X`: `make install` puts every version of `VERSIONS`
under `<venv>/te/`, and GEOSCALE_TE_DIR names another folder. What the compiled module computes is computed here in
plain torch, as far as attention and delayed scaling ask for it: casts that saturate and keep the largest amax, FP8
attention forward and backward, TE's update of delayed scales. Anything else raises NotImplementedError by name.

`run(version, function, *args)` calls a function in a forked process with that version installed and returns its
result: the parent stays without TE, and megatron-core is imported anew, over TE.
"""

from __future__ import annotations

import contextlib
import enum
import functools
import math
import os
import sys
import types
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from harness import run_ranks

VERSIONS = ("2.9.0", "2.11.0", "2.16.1", "2.20.2")
"""First and last that we support, and two between: state held in class attributes and in an object, functions and
classes as autocast, positional and packed arguments."""


def folder(version: str) -> Path:
    """Where that version's Python is. Fails, saying what installs it, where it is not."""
    place = Path(os.environ.get("GEOSCALE_TE_DIR", Path(sys.prefix) / "te")) / version
    assert (place / "transformer_engine").is_dir(), (
        f"transformer-engine {version} is not in {place.parent}: run make install, or "
        f"pip install --no-deps --target {place} transformer-engine=={version}"
    )
    return place


def run(version: str, function: Callable[..., Any], *args: Any, ranks: int = 1, timeout: float = 120) -> Any:
    """`function(rank, *args)` on `ranks` forked gloo processes that have TE `version`; rank 0's result."""
    place = folder(version)

    def body(rank: int, world_size: int) -> Any:
        for name in [name for name in sys.modules if name.split(".")[0] in ("megatron", "megatron_geoscale")]:
            del sys.modules[name]  # megatron-core looked for TE when the parent imported it
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
        install(version, place)
        from megatron_geoscale import cpu

        cpu.quieten()
        cpu.install()
        return function(rank, *args)

    return run_ranks(body, ranks, timeout=timeout)[0]


def install(version: str, place: Path | None = None, *, capability: tuple[int, int] = (9, 0)) -> types.ModuleType:
    """Make TE `version` importable in this process, on a GPU of that compute capability as far as TE's Python asks.

    Returns the stand-in, `transformer_engine_torch`. Touches torch: every tensor says that it is on CUDA.
    """
    assert "transformer_engine_torch" not in sys.modules, "another version of TE was imported in this process"
    sys.path.insert(0, str(place or folder(version)))
    module = types.ModuleType("transformer_engine_torch")
    public = (DType, _backends(version), FP8FwdTensors, FP8BwdTensors, quantize, dequantize, fused_attn_fwd,
              fused_attn_bwd, get_fused_attn_backend, get_cublasLt_version, get_cudnn_version,
              fused_amax_and_scale_update_after_reduction)
    for entry in public:
        setattr(module, entry.__name__, entry)
    module.__getattr__ = _stand_in  # type: ignore[method-assign]
    sys.modules[module.__name__] = module

    os.environ["NVTE_PROJECT_BUILDING"] = "1"  # TE then does not look for its shared library
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import transformer_engine.common
    transformer_engine.common.load_framework_extension = lambda framework: None
    for name in ("triton", "triton.mhc", "triton.permutation", "triton.cross_entropy", "triton.pad",
                 "triton.grouped_dbias_dscales", "onnx_extensions"):
        sys.modules[f"transformer_engine.pytorch.{name}"] = _Absent(name)
    # TE asks in many places whether it is on a GPU.
    torch.Tensor.is_cuda = True  # type: ignore[assignment]
    torch.cuda.device = lambda device: contextlib.nullcontext()  # type: ignore[assignment,misc]
    torch.cuda.is_current_stream_capturing = lambda: False
    torch.cuda.get_device_capability = lambda device=None: capability
    torch.cuda.get_device_properties = lambda device=None: types.SimpleNamespace(  # type: ignore[assignment]
        major=capability[0], minor=capability[1], multi_processor_count=132, name="stand-in")
    import transformer_engine.pytorch.quantization as quantization
    import transformer_engine.pytorch.utils as utils

    quantization._FP8_SUPPORT = (True, "")
    utils.get_device_compute_capability = quantization.get_device_compute_capability = lambda: capability
    import transformer_engine.pytorch.distributed as distributed
    from transformer_engine.pytorch.module.base import TransformerEngineBaseModule

    distributed._get_cuda_rng_state = lambda *args, **kwargs: torch.get_rng_state()
    distributed._set_cuda_rng_state = lambda state, *args, **kwargs: torch.set_rng_state(state)

    TransformerEngineBaseModule.__init__ = _where_cuda_is(TransformerEngineBaseModule.__init__)
    return module


def _where_cuda_is(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function`, during which torch says that CUDA is there."""

    @functools.wraps(function)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        with mock.patch("torch.cuda.is_available", lambda: True):
            return function(*args, **kwargs)

    return wrapper


class _Absent(types.ModuleType):
    """A module of TE's that needs triton or onnxscript: every name is a function that does nothing."""

    __path__ = ()

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return lambda *args, **kwargs: None


class _Name(str):
    def __int__(self) -> int:
        return sum(self.encode())


class _Names(type):
    """An enumeration that nothing computes with: each member is its own name."""

    def __getattr__(cls, name: str) -> str:
        if name.startswith("__"):
            raise AttributeError(name)
        return _Name(name)


def _stand_in(name: str) -> Any:
    if name.startswith("__"):
        raise AttributeError(name)
    if name[0].isupper():
        return _Names(name, (), {})

    def missing(*args: Any, **kwargs: Any) -> Any:
        raise NotImplementedError(f"transformer_engine_torch.{name} has no CPU stand-in")

    return missing


class DType(enum.IntEnum):
    kByte = 0
    kInt32 = 2
    kFloat32 = 4
    kFloat16 = 5
    kBFloat16 = 6
    kFloat8E4M3 = 7
    kFloat8E5M2 = 8
    kFloat4E2M1 = 10


_TORCH_DTYPE = {DType.kFloat8E4M3: torch.float8_e4m3fn, DType.kFloat8E5M2: torch.float8_e5m2}


def _backends(version: str) -> type[enum.IntEnum]:
    members = {"NVTE_No_Backend": -1, "NVTE_F16_max512_seqlen": 0, "NVTE_F16_arbitrary_seqlen": 1, "NVTE_FP8": 2}
    if tuple(map(int, version.split(".")[:2])) >= (2, 16):
        del members["NVTE_F16_max512_seqlen"]
    return enum.IntEnum("NVTE_Fused_Attn_Backend", members)




def _numbered(name: str, kinds: str, count: int) -> Any:
    members = [f"GEMM{i + 1}_{kind}" if "WEIGHT" in kinds else f"{kind}{i + 1}"
               for i in range(count) for kind in kinds.split()]
    return enum.IntEnum(name, members, start=0)


FP8FwdTensors = _numbered("FP8FwdTensors", "INPUT WEIGHT OUTPUT", 3)
FP8BwdTensors = _numbered("FP8BwdTensors", "GRAD_OUTPUT GRAD_INPUT", 3)


def get_cublasLt_version() -> int:
    return 130100


def get_cudnn_version() -> int:
    return 91900


def get_fused_attn_backend(*args: Any) -> Any:
    """FP8 inputs get the FP8 backend. TE <= 2.19 passes values and wants a backend; later ones pass one object and want
    a message as well."""
    packed = len(args) == 1
    dtype = args[1] if not packed else getattr(args[0], "q_dtype", getattr(args[0], "qkv_dtype", 0))
    fp8 = int(dtype) in (DType.kFloat8E4M3, DType.kFloat8E5M2)
    known = sys.modules["transformer_engine_torch"].NVTE_Fused_Attn_Backend
    backend = known.NVTE_FP8 if fp8 else known.NVTE_F16_arbitrary_seqlen
    return (backend, "") if packed else backend


def quantize(source: torch.Tensor, quantizer: Any, output: Any = None, noop: Any = None) -> Any:
    """A saturating cast; the quantizer's amax keeps the largest magnitude since it was zeroed."""
    dtype = _TORCH_DTYPE[DType(int(quantizer.dtype))]
    largest = torch.finfo(dtype).max
    quantizer.amax.copy_(torch.maximum(quantizer.amax, source.detach().abs().amax().float()))
    data = (source.detach().float() * quantizer.scale).clamp(-largest, largest).to(dtype).view(torch.uint8)
    made = quantizer.create_tensor_from_data(data, fake_dtype=source.dtype)
    made._scale_inv = 1.0 / quantizer.scale.clone()
    return made


def dequantize(tensor: Any, dtype: Any) -> torch.Tensor:
    values = tensor._data.view(_TORCH_DTYPE[DType(int(tensor._fp8_dtype))]).float() * tensor._scale_inv
    return values.to(getattr(tensor, "dtype", None) or torch.bfloat16)


def _values(tensor: Any) -> torch.Tensor:
    """[s, b, h, d] -> [b, h, s, d], float32."""
    plain = dequantize(tensor, None) if hasattr(tensor, "_data") else tensor
    return plain.detach().float().permute(1, 2, 0, 3)


def _arguments(args: tuple[Any, ...]) -> tuple[list[Any], list[Any], bool]:
    """The [s, b, h, d] tensors, the quantizers and whether the mask is causal: their order has not changed since 2.9,
    their positions have. No cross attention, window, bias or dropout."""
    assert "NVTE_SBHD_SBHD_SBHD" in args, "the stand-in computes the layout sbhd_sbhd_sbhd"
    tensors = [arg for arg in args if isinstance(arg, torch.Tensor) and arg.dim() == 4]
    quantizers = [arg for arg in args if hasattr(arg, "amax") and hasattr(arg, "scale") and hasattr(arg, "dtype")
                  and not isinstance(arg, torch.Tensor)]
    return tensors, quantizers, "NVTE_CAUSAL_MASK" in args


def _probabilities(query: torch.Tensor, key: torch.Tensor, scale: float, causal: bool) -> torch.Tensor:
    logits = query @ key.repeat_interleave(query.size(1) // key.size(1), 1).transpose(2, 3) * scale
    if causal:
        logits = logits.masked_fill(torch.ones(logits.shape[2:], dtype=torch.bool).triu(1), -math.inf)
    return torch.softmax(logits, dim=-1)


def _cast(values: torch.Tensor, quantizer: Any) -> torch.Tensor:
    return values if quantizer is None else dequantize(quantize(values, quantizer), None).float()


def fused_attn_fwd(*args: Any) -> list[Any]:
    """FP8 attention where there are quantizers (S, O), else plain. Returns [out, softmax statistics, RNG state]."""
    (query, key, value), quantizers, causal = _arguments(args)
    s_quantizer, o_quantizer = quantizers or (None, None)
    assert args[4] == 0.0, "the stand-in drops nothing out"
    nominal = query.dtype
    query, key, value = (_values(tensor) for tensor in (query, key, value))
    probs = _cast(_probabilities(query, key, args[3], causal), s_quantizer)
    out = (probs @ value.repeat_interleave(query.size(1) // value.size(1), 1)).permute(2, 0, 1, 3).contiguous()
    out = out.to(nominal) if o_quantizer is None else quantize(out.to(nominal), o_quantizer)
    known = sys.modules["transformer_engine_torch"].NVTE_Fused_Attn_Backend.__members__
    old = s_quantizer is not None and "NVTE_F16_max512_seqlen" in known  # up to 2.15 FP8 has two softmax statistics
    statistics = [torch.zeros(*query.shape[:3], 1)] * (2 if old else 1)
    return [out, *statistics, torch.zeros(2, dtype=torch.int64)]


def fused_attn_bwd(*args: Any) -> list[Any]:
    """dQ, dK, dV of `fused_attn_fwd`, quantizers S, dP (of dS * softmax scale) and dQKV."""
    (query, key, value, _, grad), quantizers, causal = _arguments(args)
    s_quantizer, dp_quantizer, dqkv_quantizer = quantizers or (None, None, None)
    nominal, scale, groups = query.dtype, args[2], key.size(2)
    query, key, value, grad = (_values(tensor) for tensor in (query, key, value, grad))
    heads = query.size(1)
    probs = _probabilities(query, key, scale, causal)
    key, value = (x.repeat_interleave(heads // groups, 1) for x in (key, value))
    dvalue = _cast(probs, s_quantizer).transpose(2, 3) @ grad
    dprobs = grad @ value.transpose(2, 3)
    dlogits = probs * (dprobs - (probs * dprobs).sum(-1, keepdim=True)) * scale
    dlogits = _cast(dlogits, dp_quantizer)
    dquery, dkey = dlogits @ key, dlogits.transpose(2, 3) @ query
    dkey, dvalue = (x.unflatten(1, (groups, -1)).sum(2) for x in (dkey, dvalue))
    grads = [x.permute(2, 0, 1, 3).contiguous().to(nominal) for x in (dquery, dkey, dvalue)]
    return grads if dqkv_quantizer is None else [quantize(x, dqkv_quantizer) for x in grads]


def fused_amax_and_scale_update_after_reduction(
    amax: torch.Tensor,
    histories: list[torch.Tensor],
    scales: list[torch.Tensor],
    algorithm: str,
    dtype: Any,
    margin: int,
) -> None:
    """Delayed scaling's update, in place."""
    largest, taken = torch.finfo(_TORCH_DTYPE[DType(int(dtype))]).max, 0
    for history, scale in zip(histories, scales, strict=True):
        history[0].copy_(amax[taken : taken + scale.numel()])
        taken += scale.numel()
        seen = history.amax(0) if algorithm == "max" else history[0].clone()
        scale.copy_(torch.where((seen > 0) & seen.isfinite(), largest / seen / 2**margin, scale))
        history.copy_(history.roll(-1, 0))
        history[0].zero_()
