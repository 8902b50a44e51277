"""What install() changes in torch and megatron-core, what it leaves alone, and what is refused without CUDA."""

import os
import signal
import subprocess
import sys
import textwrap
import threading
import time

import pytest
import torch
import torch.distributed as dist

from megatron_geoscale import cpu
from tests.harness import ROOT, RankFailure, run_ranks

SNAPSHOT = textwrap.dedent(
    """
    import pkgutil, sys, types, warnings
    warnings.simplefilter("ignore")
    import torch, torch._dynamo
    import megatron.core.models.gpt, megatron.core.optimizer, megatron.core.pipeline_parallel
    from megatron_geoscale import cpu

    def attributes():
        # Of each module and class: {id of the owner: (owner, its attributes)}
        modules = [m for name, m in list(sys.modules.items()) if name.split(".")[0] in ("torch", "megatron")]
        owners = [*modules, *(v for m in modules for v in list(vars(m).values()) if isinstance(v, type))]
        return {id(owner): (owner, dict(vars(owner))) for owner in owners}

    def changes(before):
        missing, found = object(), set()
        for key, (owner, old) in before.items():
            for name, value in vars(owner).items():
                if value is not old.get(name, missing) and not isinstance(value, types.ModuleType):
                    found.add((key, name))
        return found

    before = attributes()
    torch.cuda.is_available, available = (lambda: True), torch.cuda.is_available
    assert cpu.install() is False
    torch.cuda.is_available = available
    assert changes(before) == set(), "where CUDA is, nothing changes"

    assert cpu.install() is True
    expected = set()
    for name in (*cpu.CHANGES, "torch._dynamo.eval_frame._stance"):
        owner, _, attribute = name.rpartition(".")
        expected.add((id(pkgutil.resolve_name(owner)), attribute))
    found = changes(before)
    name_of = lambda pair: (getattr(before[pair[0]][0], "__name__", "?"), pair[1])
    assert found == expected, (sorted(map(name_of, found - expected)), sorted(map(name_of, expected - found)))

    after = attributes()
    assert cpu.install() is True
    assert changes(after) == set(), "a second call changes nothing"
    assert torch.cuda.is_available() is False
    """
)


def test_install_changes_what_it_says_and_nothing_else():
    """In a fresh interpreter, and with megatron-core imported before install()."""
    command = [sys.executable, "-c", SNAPSHOT]
    run = subprocess.run(command, cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr


def test_cuda_means_the_cpu(megatron):
    assert torch.zeros(2, device=torch.cuda.current_device()).device.type == "cpu"
    for constructor in (torch.zeros, torch.ones, torch.empty, torch.randn):
        assert constructor(2, device="cuda").device.type == "cpu"
        assert constructor(2, device=torch.device("cuda", 0)).device.type == "cpu"
        assert constructor(2, device="meta").device.type == "meta"
    x = torch.tensor([1.0], device="cuda", dtype=torch.bfloat16)
    assert x.cuda() is x and x.type() == "torch.cuda.BFloat16Tensor"
    assert x.type(torch.float64).dtype is torch.float64
    assert torch.nn.Linear(1, 1).cuda(0).weight.device.type == "cpu"


def test_cuda_means_the_cpu_in_other_threads_and_in_backward(megatron):
    devices = []

    class Backward(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, grad):
            devices.append(torch.zeros(1, device="cuda").device.type)
            return grad

    thread = threading.Thread(target=lambda: devices.append(torch.zeros(1, device="cuda").device.type))
    thread.start()
    thread.join()
    Backward.apply(torch.ones(1, requires_grad=True)).backward()
    assert devices == ["cpu", "cpu"]
    assert torch._C._len_torch_function_stack() == 0  # no mode that would cost a Python frame per operator


def test_one_generator_plays_both_parts(megatron):
    torch.cuda.manual_seed(7)
    state = torch.cuda.get_rng_state()
    drawn = torch.rand(3)
    torch.manual_seed(7)
    assert torch.equal(torch.rand(3), drawn)
    torch.cuda.set_rng_state(state)
    assert torch.equal(torch.rand(3), drawn)
    torch.cuda.random.set_rng_state(state, "cuda")
    assert torch.equal(torch.rand(3), drawn)


def test_named_rng_states_differ_by_seed_and_leave_the_default_alone(megatron):
    from megatron.core.tensor_parallel.random import CudaRNGStatesTracker

    tracker = CudaRNGStatesTracker()
    torch.manual_seed(0)
    tracker.add("one", 1)
    tracker.add("two", 2)
    with tracker.fork("one"):
        one = torch.rand(4)
    with tracker.fork("two"):
        two = torch.rand(4)
    with tracker.fork("one"):
        again = torch.rand(4)
    default = torch.rand(4)
    torch.manual_seed(0)
    assert torch.equal(torch.rand(4), default)
    torch.manual_seed(1)
    assert torch.equal(torch.rand(8), torch.cat([one, again]))
    assert not torch.equal(one, two)


def test_streams_events_and_ranges_do_nothing(megatron):
    stream, event = torch.cuda.Stream(), torch.cuda.Event(enable_timing=False)
    with torch.cuda.stream(stream):
        torch.cuda.nvtx.range_push("here")
        torch.cuda.current_stream().wait_stream(torch.cuda.default_stream())
        event.record(stream)
        stream.wait_event(event)
        stream.record_event().wait()
        torch.cuda.nvtx.range_pop()
    torch.cuda.synchronize()
    assert stream.query() and event.query() and stream == torch.cuda.current_stream()
    assert torch.cuda.memory_allocated() == torch.cuda.max_memory_allocated() == 0


def configs(**fields):
    """A TransformerConfig and a DDP config that run on the CPU, but for `fields`: set afterwards, past their checks."""
    from megatron.core.distributed import DistributedDataParallelConfig
    from megatron.core.transformer import TransformerConfig

    config = TransformerConfig(num_layers=4, hidden_size=8, num_attention_heads=2, gradient_accumulation_fusion=False)
    ddp = DistributedDataParallelConfig()
    for name, value in fields.items():
        owner = config if hasattr(config, name) else ddp
        assert hasattr(owner, name)
        setattr(owner, name, value)
    return config, ddp


INTERLEAVED = {"pipeline_model_parallel_size": 2, "virtual_pipeline_model_parallel_size": 2}
SELECTIVE = {"recompute_granularity": "selective"}
REFUSED = [
    ("--no-gradient-accumulation-fusion", {"gradient_accumulation_fusion": True}),
    ("--no-masked-softmax-fusion", {"masked_softmax_fusion": True}),
    ("--no-rope-fusion", {"apply_rope_fusion": True}),
    ("--fp8-format", {"fp8": "hybrid"}),
    ("--fp4-format", {"fp4": "e2m1"}),
    ("enable_autocast", {"enable_autocast": True}),
    ("--cuda-graph-impl", {"cuda_graph_impl": "local"}),
    ("--context-parallel-size", {"context_parallel_size": 2}),
    ("moe_grouped_gemm", {"num_moe_experts": 4, "moe_grouped_gemm": True}),
    ("moe_router_fusion", {"num_moe_experts": 4, "moe_router_fusion": True}),
    ("--expert-tensor-parallel-size 1", {
        "num_moe_experts": 4, "expert_model_parallel_size": 2, "expert_tensor_parallel_size": 2,
        "moe_token_dispatcher_type": "alltoall",
    }),
    ("--recompute-modules", SELECTIVE | {"recompute_modules": ["layernorm"]}),
    ("--disable-bias-linear", SELECTIVE | {"recompute_modules": ["core_attn", "mlp"]}),
    ("--no-overlap-p2p-communication", INTERLEAVED | {"batch_p2p_comm": True}),
    ("deallocate_pipeline_outputs", INTERLEAVED | {"batch_p2p_comm": False, "deallocate_pipeline_outputs": True}),
    ("--use-ring-exchange-p2p", {"use_ring_exchange_p2p": True}),
    ("--use-nccl-ub", {"nccl_ub": True}),
    ("--use-megatron-fsdp", {"use_megatron_fsdp": True}),
]


@pytest.mark.parametrize(("flag", "fields"), REFUSED, ids=[f"{flag}-{len(fields)}" for flag, fields in REFUSED])
def test_refusals_name_the_flag(megatron, flag, fields):
    with pytest.raises(ValueError, match=f"^Without CUDA, [^.]*{flag}.*[^.]\\.$"):
        cpu.refuse_unsupported(*configs(**fields))


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"num_moe_experts": 4, "expert_model_parallel_size": 2, "moe_token_dispatcher_type": "alltoall"},
        SELECTIVE | {"recompute_modules": ["core_attn"]},
        SELECTIVE | {"recompute_modules": ["mlp"], "add_bias_linear": False},
        INTERLEAVED | cpu.CPU_PIPELINE_FIELDS,
        INTERLEAVED | {"pipeline_model_parallel_size": 4, "deallocate_pipeline_outputs": True},
    ],
)
def test_what_works_is_not_refused(megatron, fields):
    cpu.refuse_unsupported(*configs(**fields))


def test_harness_returns_results_by_rank():
    def total(rank, world_size, offset):
        x = torch.tensor([float(rank)])
        dist.all_reduce(x)
        return rank, x.item() + offset

    assert run_ranks(total, 3, 10) == [(0, 13.0), (1, 13.0), (2, 13.0)]


def test_harness_raises_what_the_rank_raised():
    def fail(rank, world_size):
        if rank == 1:
            raise KeyError("of rank 1")
        dist.barrier()

    with pytest.raises(KeyError, match="of rank 1") as caught:
        run_ranks(fail, 2)
    assert 'raise KeyError("of rank 1")' in str(caught.value.__cause__)


def test_harness_survives_a_killed_rank_and_a_hang():
    def die(rank, world_size):
        if rank == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        dist.barrier()

    def hang(rank, world_size):
        time.sleep(60 * rank)

    with pytest.raises(RankFailure, match="rank 0 of 2 failed: it exited with -9"):
        run_ranks(die, 2)
    started = time.monotonic()
    with pytest.raises(RankFailure, match="nothing had come from rank 1 of 2"):
        run_ranks(hang, 2, timeout=3)
    assert time.monotonic() - started < 30


def test_a_device_context_counts_after_install():
    """transformers builds models under `torch.device("meta")`: without effect, buffers would stay uninitialised."""
    code = (
        "from megatron_geoscale import cpu; cpu.install(); import torch\n"
        "with torch.device('meta'): assert torch.empty(1).is_meta and torch.zeros(1).is_meta\n"
        "assert not torch.empty(1).is_meta"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)
