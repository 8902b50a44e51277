"""Unmodified megatron-core (0.16.1 or newer) without CUDA, over gloo: for development, tests and CI.

`install()` makes what megatron-core calls "cuda" mean the CPU. It replaces the callables listed in `CHANGES` once;
there is no TorchFunctionMode, so an operator costs what it costs without us, in every thread and inside backward.

* `torch.cuda.current_device` answers `torch.device("cpu")`; `device="cuda"` in the tensor constructors that
  megatron-core uses, `Tensor.cuda` and `Module.cuda` mean the CPU too.
* `Tensor.type()` says "torch.cuda.FloatTensor": the optimizers sort parameters and check gradients by that name.
* The seed and the state of the CUDA generator are those of the CPU's default generator. Without CUDA torch ignores
  `torch.cuda.manual_seed` in silence, and the RNG tracker's named states would be equal on all tensor-parallel ranks.
* Streams, events, `synchronize` and NVTX ranges do nothing: the CPU computes in order. (`torch.cuda.memory_allocated`
  and its like answer 0 without our help.)
* torch.compile runs eagerly, for megatron-core's `jit_fuser` would call a C++ compiler.
* The router of a mixture of experts multiplies by torch, not by Transformer Engine, and the sizes of what experts send
  each other are numbers for gloo too.
* The distributed optimizer's checkpoints take care of torch's Adam, which counts steps per parameter; megatron-core
  0.16.1 expects the optimizers of Transformer Engine or Apex there, and would resume with wrong step counts.

Everything else in torch stays as it was; in particular `torch.cuda.is_available()` stays False. One thing to know as a
user: dropout draws from the CPU's default generator here, so code that draws from it on some tensor-parallel ranks only
(a DataLoader without `generator=` does, for its workers' seed) makes the masks of replicated regions differ.

Call `install()` before megatron-core is imported. Called later it does the same for modules already imported, except
for functions that another module took from torch.cuda by name.

What megatron-core can do only with CUDA is refused by `refuse_unsupported`.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import warnings
from typing import TYPE_CHECKING, Any

import torch
from torch.utils._device import _device_constructors

if TYPE_CHECKING:
    from megatron.core.distributed import DistributedDataParallelConfig
    from megatron.core.transformer import TransformerConfig

CONSTRUCTORS = ("arange", "empty", "empty_like", "full", "ones", "ones_like", "randn", "tensor", "zeros", "zeros_like")
"""The constructors of torch in which `device="cuda"` means the CPU."""

_RNG = ("get_rng_state", "manual_seed", "manual_seed_all", "set_rng_state")
_STREAMS = ("Event", "Stream", "current_stream", "default_stream", "stream", "synchronize")

CHANGES = (
    *(f"torch.{name}" for name in CONSTRUCTORS),
    "torch.Tensor.cuda",
    "torch.Tensor.type",
    "torch.nn.Module.cuda",
    "torch.cuda.current_device",
    *(f"torch.cuda.{name}" for name in _STREAMS),
    *(f"torch.cuda.{name}" for name in _RNG),
    *(f"torch.cuda.random.{name}" for name in _RNG),
    "torch.cuda.nvtx.range_push",
    "torch.cuda.nvtx.range_pop",
    "megatron.core.tensor_parallel.random._set_cuda_rng_state",
    "megatron.core.transformer.moe.moe_utils.te_general_gemm",
    "megatron.core.transformer.moe.token_dispatcher.maybe_move_tensor_to_cpu",
    "megatron.core.optimizer.distrib_optimizer.DistributedOptimizer._set_main_param_and_optimizer_states",
    "megatron.core.optimizer.distrib_optimizer.DistributedOptimizer.sharded_state_dict",
    "megatron.core.optimizer.distrib_optimizer.DistributedOptimizer.load_state_dict",
)
"""Everything that `install` replaces. Beyond these it sets torch.compiler's stance to "force_eager" and silences the
RNG tracker's warning that the CPU generator moved while a CUDA state was forked: here they are one."""

CPU_PIPELINE_FIELDS = {"deallocate_pipeline_outputs": False, "overlap_p2p_comm": True, "batch_p2p_comm": False}
"""Fields of TransformerConfig with which an interleaved pipeline is right over gloo, for any number of stages. With the
first one on, an activation is freed while gloo still sends it; without the others, two stages confuse activations with
gradients, for both travel between the same two ranks in one batch. The gradients would be wrong without a word."""

_CPU = torch.device("cpu")
_installed = False


def quieten() -> None:
    """Leave out megatron-core's words on what is not installed, and torch's on older sharded tensors."""
    warnings.filterwarnings("ignore", module=r"megatron\.core")
    warnings.filterwarnings("ignore", module=r"torch\.distributed\.checkpoint")
    logging.getLogger("megatron").setLevel(logging.ERROR)


def install() -> bool:
    """Make megatron-core run on the CPU: True if it does now, False (and nothing changed) where CUDA is available.

    A second call does nothing. Imports megatron-core, which takes some seconds.

    Raises ModuleNotFoundError when megatron-core is not installed.
    """
    global _installed
    if torch.cuda.is_available():
        return False
    if not _installed:
        torch.compiler.set_stance("force_eager")
        _replace_devices()
        _replace_streams()
        _replace_rng()
        mend_distributed_optimizer()
        _mend_experts()
        _installed = True
    return True


def _replace_devices() -> None:
    def on_cpu(constructor: Any) -> Any:
        @functools.wraps(constructor)
        def wrapper(*args: Any, **kwargs: Any) -> torch.Tensor:
            device = kwargs.get("device")
            if device is not None and torch.device(device).type == "cuda":
                kwargs["device"] = _CPU
            return constructor(*args, **kwargs)

        return wrapper

    # `with torch.device(...)` looks the constructors up when it is first used, and must find torch's own: with ours it
    # would change nothing, and transformers' from_pretrained would leave buffers uninitialised.
    _device_constructors()
    for name in CONSTRUCTORS:
        setattr(torch, name, on_cpu(getattr(torch, name)))

    tensor_type = torch.Tensor.type

    def cuda_type(self: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        answer = tensor_type(self, *args, **kwargs)
        if not isinstance(answer, str) or answer.startswith("torch.cuda."):
            return answer
        return answer.replace("torch.", "torch.cuda.", 1)

    def itself(self: Any, *args: Any, **kwargs: Any) -> Any:
        return self

    torch.Tensor.type = cuda_type
    torch.Tensor.cuda = itself
    torch.nn.Module.cuda = itself
    torch.cuda.current_device = lambda: _CPU


class _Event:
    """An event that has happened. No time passes on a stream, so there is no `elapsed_time`."""

    def __init__(self, *args: Any, **kwargs: Any) -> None: ...

    def record(self, stream: Any = None) -> None: ...

    def wait(self, stream: Any = None) -> None: ...

    def synchronize(self) -> None: ...

    def query(self) -> bool:
        return True


class _Stream:
    """The one stream, on which everything has already happened: all its objects are equal."""

    def __init__(self, *args: Any, **kwargs: Any) -> None: ...

    def wait_stream(self, stream: Any) -> None: ...

    def wait_event(self, event: Any) -> None: ...

    def synchronize(self) -> None: ...

    def record_event(self, event: _Event | None = None) -> _Event:
        return event or _Event()

    def query(self) -> bool:
        return True

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Stream)

    def __hash__(self) -> int:
        return hash(_Stream)


def _replace_streams() -> None:
    def nothing(*args: Any, **kwargs: Any) -> int:
        return 0

    for name, value in {
        "Stream": _Stream,
        "Event": _Event,
        "current_stream": _Stream,
        "default_stream": _Stream,
        "stream": lambda stream: contextlib.nullcontext(),
        "synchronize": nothing,
    }.items():
        setattr(torch.cuda, name, value)
    torch.cuda.nvtx.range_push = torch.cuda.nvtx.range_pop = nothing


def _replace_rng() -> None:
    def manual_seed(seed: int) -> None:
        torch.default_generator.manual_seed(int(seed))

    def get_rng_state(device: Any = "cuda") -> torch.Tensor:
        return torch.get_rng_state()

    def set_rng_state(new_state: torch.Tensor, device: Any = "cuda", graph_safe: bool = False) -> None:
        torch.set_rng_state(new_state)

    for module in (torch.cuda, torch.cuda.random):
        module.manual_seed = module.manual_seed_all = manual_seed
        module.get_rng_state = get_rng_state
        module.set_rng_state = set_rng_state

    from megatron.core.tensor_parallel import random

    random._set_cuda_rng_state = set_rng_state
    logging.getLogger(random.__name__).addFilter(lambda record: "CPU RNG state changed" not in record.getMessage())


def mend_distributed_optimizer() -> None:
    """Let the distributed optimizer resume torch's Adam rightly, on a GPU too; nothing where Adam is a fused one.

    torch's keeps a tensor `step` in each parameter's state; DistributedOptimizer forgets it in three places.
    """
    from megatron.core.optimizer import Adam
    from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer as Optimizer

    if not issubclass(Adam, torch.optim.Adam) or hasattr(Optimizer.sharded_state_dict, "__wrapped__"):
        return
    set_states = Optimizer._set_main_param_and_optimizer_states
    sharded_state_dict, load_state_dict = Optimizer.sharded_state_dict, Optimizer.load_state_dict

    @functools.wraps(set_states)
    @torch.no_grad()  # float32 main parameters are views of the model's; one of the three loaders forgets it
    def set_with_step(self: Any, model_param: Any, tensors: dict[str, torch.Tensor]) -> None:
        # The checkpoint holds one step for all parameters, and load_state_dict has put it into the state by now. What
        # `tensors` may have under that name is the step from before loading.
        step = self._get_main_param_and_optimizer_states(model_param)["step"]
        set_states(self, model_param, {**tensors, "step": step})

    @functools.wraps(sharded_state_dict)
    def sharded_with_state(self: Any, *args: Any, **kwargs: Any) -> Any:
        # Before the first step Adam has no state, and there would be nothing to save or to load into.
        for param in (param for group in self.optimizer.param_groups for param in group["params"]):
            state = self.optimizer.state[param]
            if not state:
                state.update(step=torch.zeros(()), exp_avg=torch.zeros_like(param), exp_avg_sq=torch.zeros_like(param))
        return sharded_state_dict(self, *args, **kwargs)

    @functools.wraps(load_state_dict)
    def load_with_own_steps(self: Any, state_dict: dict[str, Any]) -> None:
        # All parameters get the same tensor, and Adam then advances it once for each of them.
        load_state_dict(self, state_dict)
        for state in self.optimizer.state.values():
            state["step"] = state["step"].clone()

    Optimizer._set_main_param_and_optimizer_states = set_with_step
    Optimizer.sharded_state_dict = sharded_with_state
    Optimizer.load_state_dict = load_with_own_steps


def _mend_experts() -> None:
    from megatron.core.transformer.moe import moe_utils, token_dispatcher

    moe_utils.te_general_gemm = None  # what the router asks for; the name is missing without Transformer Engine

    def as_numbers(tensor: Any, as_numpy: bool = False, record_stream: bool = False) -> Any:
        # A tensor that is on the CPU already would stay one, and be no split size for all_to_all_single.
        return tensor.numpy() if as_numpy and torch.is_tensor(tensor) else tensor

    token_dispatcher.maybe_move_tensor_to_cpu = as_numbers


def refuse_unsupported(config: TransformerConfig, ddp_config: DistributedDataParallelConfig) -> None:
    """Raise ValueError, in one sentence that names the flag, for what megatron-core cannot do without CUDA.

    Call it where `install()` answered True. What it lets pass trains as it would on one rank, to rounding.
    """
    two_stages = config.pipeline_model_parallel_size == 2
    interleaved = config.virtual_pipeline_model_parallel_size is not None
    recomputed = config.recompute_modules if config.recompute_granularity == "selective" else []
    fields = "(cpu.CPU_PIPELINE_FIELDS has what works)"
    refusals = (
        (config.gradient_accumulation_fusion, "add --no-gradient-accumulation-fusion: that fusion is a CUDA kernel"),
        (config.masked_softmax_fusion, "add --no-masked-softmax-fusion: that fusion is a CUDA kernel"),
        (config.apply_rope_fusion, "add --no-rope-fusion: that fusion is Transformer Engine's"),
        # Left alone, the next three would be left out by megatron-core or torch without a word.
        (config.fp8 or config.fp4, "remove --fp8-format and --fp4-format: FP8 and FP4 linear layers are CUDA kernels"),
        (config.enable_autocast, "unset enable_autocast and use --bf16: torch.autocast('cuda') does nothing here"),
        (config.cuda_graph_impl != "none", "remove --cuda-graph-impl: there are no CUDA graphs"),
        (config.context_parallel_size > 1, "remove --context-parallel-size: it needs Transformer Engine's attention"),
        (config.moe_grouped_gemm, "unset moe_grouped_gemm: the experts' one product is a CUDA kernel"),
        (
            config.moe_permute_fusion or config.moe_router_fusion,
            "unset moe_permute_fusion and moe_router_fusion: those fusions are Transformer Engine's",
        ),
        (
            config.moe_token_dispatcher_type == "alltoall"
            and config.expert_model_parallel_size > 1
            and (config.expert_tensor_parallel_size or 1) > 1,
            "add --expert-tensor-parallel-size 1 or --moe-token-dispatcher-type allgather: gloo gathers no tensors of "
            "different sizes",
        ),
        ("layernorm" in recomputed, "remove layernorm from --recompute-modules: it calls Transformer Engine"),
        (
            "mlp" in recomputed and config.add_bias_linear,
            "remove mlp from --recompute-modules or add --disable-bias-linear: with biases its backward never ends",
        ),
        (
            interleaved and two_stages and config.batch_p2p_comm,
            f"remove --no-overlap-p2p-communication: an interleaved pipeline of 2 stages needs the overlap {fields}",
        ),
        (
            interleaved and not config.batch_p2p_comm and config.deallocate_pipeline_outputs,
            f"unset deallocate_pipeline_outputs: the interleaved pipeline frees what gloo still sends {fields}",
        ),
        (config.use_ring_exchange_p2p, "remove --use-ring-exchange-p2p: only NVIDIA's own torch has ring_exchange"),
        (ddp_config.nccl_ub, "remove --use-nccl-ub: there is no NCCL"),
        (
            ddp_config.use_megatron_fsdp,
            "replace --use-megatron-fsdp by --use-distributed-optimizer: it is not for gloo",
        ),
    )
    for refused, sentence in refusals:
        if refused:
            raise ValueError(f"Without CUDA, {sentence}.")
