"""What the GPU benchmark and the GPU tests share: one attention layer in three ways, transients, timing on the device.

Everything runs on the CPU too, over tests/te_stub.py, to try the code: it then measures nothing.
"""

from __future__ import annotations

import contextlib
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
import transformer_engine
import transformer_engine.pytorch as te
from megatron.core.extensions.transformer_engine import TEDotProductAttention
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.transformer.transformer_config import TransformerConfig
from transformer_engine.common.recipe import DelayedScaling, Format

from megatron_geoscale.attention.spec import attach_scaling, use_te_attention
from megatron_geoscale.attention.te_contract import attention_quantizers
from megatron_geoscale.config import GeoScaleConfig
from megatron_geoscale.scaling.engine import GeoScaleEngine
from megatron_geoscale.scaling.formats import E4M3, sqnr_db
from megatron_geoscale.training.norm import use_torch_norm

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
KINDS = ("bf16", "delayed", "geoscale")
"""TE's attention in BF16, in FP8 under delayed scaling, and ours."""


@dataclass(frozen=True)
class Shape:
    """Attention of a model, as one GPU holds it."""

    hidden_size: int = 4096
    heads: int = 32
    groups: int = 32
    head_dim: int = 128
    length: int = 2048
    batch: int = 1
    layers: int = 1


LLAMA_2_7B = Shape()
LLAMA_2_70B_SHARD = Shape(hidden_size=8192, heads=8, groups=1, layers=80)
"""One of 8 tensor-parallel ranks."""


def delayed_recipe() -> DelayedScaling:
    """Delayed scaling as users of Megatron set it."""
    return DelayedScaling(fp8_format=Format.HYBRID, amax_history_len=1024, amax_compute_algo="max", fp8_dpa=True)


class Model:
    """A GPT of `shape` with nearly no MLP, whose core attention is of `kind`; bfloat16, on DEVICE."""

    def __init__(self, shape: Shape, kind: str, *, backward: str = "bound") -> None:
        torch.manual_seed(0)
        self.shape, self.kind = shape, kind
        self.config = TransformerConfig(
            num_layers=shape.layers, hidden_size=shape.hidden_size, ffn_hidden_size=128,
            num_attention_heads=shape.heads, num_query_groups=shape.groups, kv_channels=shape.head_dim, bf16=True,
            params_dtype=torch.bfloat16, attention_dropout=0.0, hidden_dropout=0.0, add_bias_linear=False,
            normalization="RMSNorm", attention_softmax_in_fp32=True, gradient_accumulation_fusion=False,
            masked_softmax_fusion=False, bias_dropout_fusion=False,
        )
        spec = use_torch_norm(
            get_gpt_decoder_block_spec(self.config, use_transformer_engine=False, normalization="RMSNorm")
        )
        if kind == "geoscale":
            use_te_attention(spec)
        else:
            for layer in spec.layer_specs:
                layer.submodules.self_attention.submodules.core_attention = TEDotProductAttention
        model = GPTModel(config=self.config, transformer_layer_spec=spec, vocab_size=128,
                         max_sequence_length=shape.length, position_embedding_type="rope")
        self.model = model.to(DEVICE).bfloat16()
        self.engine: GeoScaleEngine | None = None
        if kind == "geoscale":
            scaling = attach_scaling([self.model], GeoScaleConfig(attention="te", backward=backward))
            assert isinstance(scaling, GeoScaleEngine)
            self.engine = scaling
            scaling.refresh()

    @property
    def core_attention(self) -> Any:
        return self.model.decoder.layers[0].self_attention.core_attention

    def autocast(self) -> Any:
        """What stands round the layer: TE's recipe, or nothing."""
        delayed = self.kind == "delayed"
        return te.autocast(enabled=True, recipe=delayed_recipe()) if delayed else contextlib.nullcontext()

    def attend(self, qkv: list[torch.Tensor]) -> torch.Tensor:
        """Core attention of the first layer, [s, b, heads, d] each."""
        from megatron.core.transformer.enums import AttnMaskType

        with self.autocast():
            out: torch.Tensor = self.core_attention(*qkv, None, AttnMaskType.causal)
        return out

    def forward(self, seed: int = 0) -> torch.Tensor:
        """A whole forward pass; hidden states of random tokens do not matter to what is measured."""
        generator = torch.Generator().manual_seed(seed)
        tokens = torch.randint(0, 128, (self.shape.batch, self.shape.length), generator=generator).to(DEVICE)
        positions = torch.arange(self.shape.length, device=DEVICE)[None].expand(self.shape.batch, -1)
        with self.autocast():
            out: torch.Tensor = self.model(tokens, positions, None, labels=tokens).mean()
        return out

    def scale_weights(self, queries_and_keys: float, values: float) -> None:
        """Multiply W_Q and W_K, and W_V."""
        rows = self.shape.head_dim * (self.shape.heads // self.shape.groups)
        with torch.no_grad():
            for layer in self.model.decoder.layers:
                weight = layer.self_attention.linear_qkv.weight.view(self.shape.groups, -1, self.shape.hidden_size)
                weight[:, : rows + self.shape.head_dim].mul_(queries_and_keys)
                weight[:, rows + self.shape.head_dim :].mul_(values)

    def qkv_scale(self) -> float:
        """What the next forward pass casts Q, K and V with."""
        if not self.core_attention.fp8_initialized:
            return 1.0  # before its first forward pass TE has no scale, and begins at 1
        return float(attention_quantizers(self.core_attention)["qkv"].scale)


@dataclass(frozen=True)
class Outcome:
    """The first step after a transient, in the first layer."""

    saturated: int
    """Values of Q, K and V beyond the range under the scale that they were cast with."""
    overrange: float
    """Largest |x| * scale / 448."""
    sqnr_db: float
    """Of the attention output, against float32."""
    finite: bool


def observe(model: Model, seed: int) -> Outcome:
    """One training step, and what its casts lost."""
    seen: dict[str, torch.Tensor] = {}

    def before(_: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        seen.update(zip(("q", "k", "v"), (tensor.detach() for tensor in inputs[:3]), strict=True))

    def after(_: torch.nn.Module, __: tuple[Any, ...], out: torch.Tensor) -> None:
        seen["out"] = out.detach()

    hooks = [model.core_attention.register_forward_pre_hook(before), model.core_attention.register_forward_hook(after)]
    if model.engine is not None:
        model.engine.refresh()
    scale = model.qkv_scale()
    loss = model.forward(seed)
    loss.backward()
    for hook in hooks:
        hook.remove()
    if model.engine is not None:
        model.engine.end_step()
    scaled = [seen[name].float().abs() * scale for name in ("q", "k", "v")]
    repeat = model.shape.heads // model.shape.groups
    q, k, v = (seen[name].float().permute(1, 2, 0, 3) for name in ("q", "k", "v"))
    reference = F.scaled_dot_product_attention(
        q, k.repeat_interleave(repeat, 1), v.repeat_interleave(repeat, 1), is_causal=True
    )
    finite = bool(torch.isfinite(seen["out"]).all()) and all(
        bool(torch.isfinite(parameter.grad).all())
        for parameter in model.model.parameters() if parameter.grad is not None
    )
    model.model.zero_grad(set_to_none=True)
    return Outcome(
        saturated=sum(int((x > E4M3.max).sum()) for x in scaled),
        overrange=max(float(x.amax()) for x in scaled) / E4M3.max,
        sqnr_db=sqnr_db(reference.permute(2, 0, 1, 3).flatten(2), seen["out"]),
        finite=finite,
    )


def _after_steps(model: Model, steps: int) -> None:
    for seed in range(steps):
        observe(model, seed)


def pretrained_load(model: Model) -> Outcome:
    """Larger weights, as those of a trained model, into one that has taken four steps."""
    _after_steps(model, 4)
    model.scale_weights(4.0, 40.0)
    return observe(model, 4)


def resume(model: Model) -> Outcome:
    """The first step of a process that has large weights and no history."""
    model.scale_weights(2.0, 1000.0)
    return observe(model, 0)


def lr_spike(model: Model) -> Outcome:
    """A step that changes the weights by half."""
    _after_steps(model, 4)
    model.scale_weights(1.5, 1.5)
    return observe(model, 4)


def weight_spike(model: Model) -> Outcome:
    """W_Q and W_K times 16."""
    _after_steps(model, 4)
    model.scale_weights(16.0, 1.0)
    return observe(model, 4)


SCENARIOS: dict[str, Callable[[Model], Outcome]] = {
    "pretrained_load": pretrained_load, "resume": resume, "lr_spike": lr_spike, "weight_spike": weight_spike,
}


def device_milliseconds(work: Callable[[], Any], times: int) -> float:
    """Mean time of `work` on the device over `times` calls in a row, the host's waits included."""
    if DEVICE.type == "cpu":
        start = time.perf_counter()
        for _ in range(times):
            work()
        return (time.perf_counter() - start) * 1e3 / times
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize()
    begin.record()
    for _ in range(times):
        work()
    end.record()
    torch.cuda.synchronize()
    return begin.elapsed_time(end) / times


def step_times(shape: Shape, *, rounds: int, inner: int, warm_up: int) -> dict[str, list[float]]:
    """Milliseconds of core attention, forward and backward, by kind: one number a round, the kinds in turn."""
    generator = torch.Generator().manual_seed(0)
    sizes = [(shape.length, shape.batch, heads, shape.head_dim) for heads in (shape.heads, shape.groups, shape.groups)]
    qkv = [torch.randn(size, generator=generator).bfloat16().to(DEVICE).requires_grad_() for size in sizes]
    grad = torch.randn(shape.length, shape.batch, shape.heads * shape.head_dim, generator=generator)
    grad = (grad * 1e-3).bfloat16().to(DEVICE)

    def step(model: Model) -> None:
        for tensor in qkv:
            tensor.grad = None
        model.attend(qkv).backward(grad)

    models = {kind: Model(shape, kind) for kind in KINDS}
    for model in models.values():
        for _ in range(warm_up):
            step(model)
    found: dict[str, list[float]] = {kind: [] for kind in KINDS}
    for _ in range(rounds):
        for kind, model in models.items():
            found[kind].append(device_milliseconds(lambda model=model: step(model), inner))
    return found


def refresh_times(shape: Shape, *, rounds: int) -> dict[str, float]:
    """Milliseconds: `refresh` of all layers' scales; `floor`, reading W_Q, W_K, W_V once at the measured bandwidth."""
    model = Model(shape, "geoscale")
    assert model.engine is not None
    engine = model.engine
    engine.refresh(check=False)
    refresh = statistics.median(device_milliseconds(lambda: engine.refresh(check=False), 1) for _ in range(rounds))
    weights = sum(layer.self_attention.linear_qkv.weight.nbytes for layer in model.model.decoder.layers)
    source = torch.empty(max(1, weights // 2), dtype=torch.bfloat16, device=DEVICE)
    target = torch.empty_like(source)
    copy = min(device_milliseconds(lambda: target.copy_(source), 5) for _ in range(3))
    return {"refresh": refresh, "floor": copy / 2.0, "gigabytes": weights / 1e9}


def graph_of_attention(shape: Shape) -> dict[str, Any]:
    """Capture attention, forward and backward, once; then refresh after a change of the weights and replay.

    `follows`: whether the replay is bit by bit what runs eagerly on the new scales (its output; the gradients of Q to
    40 dB); `refresh_captured`: empty, or why a refresh cannot be captured.
    """
    model = Model(shape, "geoscale")
    assert model.engine is not None
    # Nothing is dropped out, so the graph needs none of Megatron's random states, which no graph can capture.
    model.core_attention.rng_states_tracker = None
    model.core_attention.fused_attention.attention_dropout_ctx = contextlib.nullcontext
    sizes = [(shape.length, shape.batch, heads, shape.head_dim) for heads in (shape.heads, shape.groups, shape.groups)]
    qkv = [torch.randn(size, device=DEVICE, dtype=torch.bfloat16).requires_grad_() for size in sizes]
    grad = torch.randn(shape.length, shape.batch, shape.heads * shape.head_dim, device=DEVICE) * 1e-3
    grad = grad.bfloat16()

    def step() -> tuple[torch.Tensor, torch.Tensor]:
        out = model.attend(qkv)
        return out, torch.autograd.grad(out, qkv, grad)[0]

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    model.scale_weights(8.0, 8.0)
    before = model.qkv_scale()
    model.engine.refresh()
    graph.replay()
    torch.cuda.synchronize()
    eager = step()
    follows = torch.equal(captured[0], eager[0]) and sqnr_db(eager[1], captured[1]) > 40.0
    problem = ""
    try:
        with torch.cuda.graph(torch.cuda.CUDAGraph()):
            model.engine.refresh(check=False)
    except Exception as error:  # whatever a kernel of the refresh that cannot be captured raises
        problem = f"{type(error).__name__}: {str(error).splitlines()[0]}"
    return {"follows": follows, "scale_moved": before / model.qkv_scale(), "refresh_captured": problem}


def machine() -> str:
    """GPU and versions, for the note that goes with the numbers."""
    gpu = torch.cuda.get_device_name() if DEVICE.type == "cuda" else "no GPU"
    cudnn = torch.backends.cudnn.version()
    return f"{gpu}, torch {torch.__version__}, Transformer Engine {transformer_engine.__version__}, cuDNN {cudnn}"
