"""What megatron-core does on CPU: each layout trains like one rank, from the same weights, on the same samples."""

import functools
import zlib
from dataclasses import dataclass, field

import pytest
import torch
import torch.distributed as dist

from megatron_geoscale import cpu
from megatron_geoscale.training.norm import use_torch_norm
from tests.harness import run_ranks

pytestmark = pytest.mark.usefixtures("megatron")

LAYERS, HIDDEN, VOCAB, LENGTH, SAMPLES, STEPS = 4, 32, 64, 16, 8, 3
STYLES = {
    "gpt": dict(normalization="LayerNorm", ffn_hidden_size=64),
    "llama": dict(
        normalization="RMSNorm",
        gated_linear_unit=True,
        activation_func=torch.nn.functional.silu,
        add_bias_linear=False,
        num_query_groups=2,
        ffn_hidden_size=48,
    ),
}
DROPOUT = dict(attention_dropout=0.1, hidden_dropout=0.1)
OVERLAP = dict(use_distributed_optimizer=True, overlap_grad_reduce=True, overlap_param_gather=True)


@dataclass(frozen=True)
class Case:
    """A run: its model's style, its layout (data parallel over what is left), and fields of megatron-core's configs."""

    style: str = "gpt"
    tp: int = 1
    pp: int = 1
    chunks: int | None = None
    micro_batch: int = 1
    dtype: torch.dtype = torch.float32
    config: dict = field(default_factory=dict)
    ddp: dict = field(default_factory=dict)
    optimizer: dict = field(default_factory=dict)


def build(case):
    """The model's chunks in DDP, with weights that depend on their global names only, and the optimizer."""
    from megatron.core import parallel_state
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec
    from megatron.core.models.gpt.gpt_model import GPTModel
    from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
    from megatron.core.transformer import TransformerConfig
    from megatron.core.transformer.module import Float16Module

    parallel_state.initialize_model_parallel(case.tp, case.pp, virtual_pipeline_model_parallel_size=case.chunks)
    model_parallel_cuda_manual_seed(1)
    half = dict(bf16=case.dtype is torch.bfloat16, fp16=case.dtype is torch.float16, params_dtype=case.dtype)
    fields = dict(
        num_layers=LAYERS,
        hidden_size=HIDDEN,
        num_attention_heads=4,
        attention_dropout=0.0,
        hidden_dropout=0.0,
        tensor_model_parallel_size=case.tp,
        pipeline_model_parallel_size=case.pp,
        virtual_pipeline_model_parallel_size=case.chunks,
        pipeline_dtype=case.dtype,
        gradient_accumulation_fusion=False,
        masked_softmax_fusion=False,
        deallocate_pipeline_outputs=True,
        finalize_model_grads_func=finalize_model_grads,
    )
    config = TransformerConfig(**(fields | half | STYLES[case.style] | case.config))
    ddp = DistributedDataParallelConfig(grad_reduce_in_fp32=True, **case.ddp)
    cpu.refuse_unsupported(config, ddp)
    chunks = []
    for stage in range(case.chunks or 1):
        stage = stage if case.chunks else None
        ends = dict(ignore_virtual=False, vp_stage=stage)
        model = GPTModel(
            config,
            use_torch_norm(get_gpt_decoder_block_spec(config, use_transformer_engine=False, vp_stage=stage)),
            VOCAB,
            LENGTH,
            pre_process=parallel_state.is_pipeline_first_stage(**ends),
            post_process=parallel_state.is_pipeline_last_stage(**ends),
            share_embeddings_and_output_weights=case.style == "gpt",
            position_embedding_type="learned_absolute" if case.style == "gpt" else "rope",
            vp_stage=stage,
        )
        set_weights(model, case)
        model = model if case.dtype is torch.float32 else Float16Module(config, model)
        chunks.append(DistributedDataParallel(config, ddp, model, disable_bucketing=bool(stage)))
    if ddp.overlap_grad_reduce:
        config.no_sync_func = [chunk.no_sync for chunk in chunks] if case.chunks else chunks[0].no_sync
    settings = dict(
        lr=1e-2,
        clip_grad=1.0,
        use_distributed_optimizer=ddp.use_distributed_optimizer,
        overlap_param_gather=ddp.overlap_param_gather,
    )
    optimizer = get_megatron_optimizer(OptimizerConfig(**(settings | half | case.optimizer)), chunks)
    config.grad_scale_func = optimizer.scale_loss
    return chunks, optimizer


def set_weights(model, case):
    """Each parameter drawn in full from a seed made of its global name, then cut as megatron-core cuts it over TP."""
    from megatron.core import parallel_state

    numbers = {f"layers.{i}.": f"layers.{layer.layer_number}." for i, layer in enumerate(model.decoder.layers)}
    for name, parameter in model.named_parameters():
        local = next((key for key in numbers if key in name), "")
        name = name.replace(local, numbers.get(local, ""))
        if case.style == "gpt" and name == "output_layer.weight":
            name = "embedding.word_embeddings.weight"
        shape, cut = list(parameter.shape), getattr(parameter, "tensor_model_parallel", False)
        if cut:
            shape[parameter.partition_dim] *= case.tp
        full = 0.1 * torch.randn(shape, generator=torch.Generator().manual_seed(zlib.crc32(name.encode())))
        if name.endswith("norm.weight"):
            full += 1
        if cut:
            dim, rank = parameter.partition_dim, parallel_state.get_tensor_model_parallel_rank()
            blocks = full.chunk(parameter.partition_stride, dim)
            full = torch.cat([block.chunk(case.tp, dim)[rank] for block in blocks], dim)
        parameter.data.copy_(full)


def train(rank, world_size, case, steps=STEPS):
    """`steps` steps; the loss and gradient norm of each, and what else the tests look at."""
    from megatron.core import parallel_state

    chunks, optimizer = build(case)
    curve = [step(chunks, optimizer, case, number) for number in range(steps)]
    group = parallel_state.get_data_parallel_group()
    losses = torch.tensor([loss for loss, _ in curve], dtype=torch.float64)
    dist.all_reduce(losses, group=group)
    return losses / group.size(), torch.tensor([norm for _, norm in curve], dtype=torch.float64)


def step(chunks, optimizer, case, number):
    """One step over SAMPLES samples; (loss, gradient norm)."""
    from megatron.core import parallel_state
    from megatron.core.pipeline_parallel import get_forward_backward_func

    tokens = torch.randint(VOCAB, (SAMPLES, LENGTH + 1), generator=torch.Generator().manual_seed(number))
    mine = tokens.chunk(parallel_state.get_data_parallel_world_size())[parallel_state.get_data_parallel_rank()]
    batches = mine.split(case.micro_batch)
    positions = torch.arange(LENGTH).expand(case.micro_batch, LENGTH)
    causal = torch.ones(LENGTH, LENGTH).triu(1).bool()[None, None]

    def forward(batches, model):
        batch = next(batches)
        output = model(batch[:, :-1], positions, causal, labels=batch[:, 1:])
        return output, lambda losses: (losses.float().mean(), {"loss": losses.detach().float().mean()})

    for chunk in chunks:
        chunk.zero_grad_buffer()
    optimizer.zero_grad()
    losses = get_forward_backward_func()(
        forward_step_func=forward,
        data_iterator=[iter(batches) for _ in chunks] if case.chunks else iter(batches),
        model=chunks,
        num_microbatches=len(batches),
        seq_length=LENGTH,
        micro_batch_size=case.micro_batch,
        forward_only=False,
    )
    applied, norm, _ = optimizer.step()
    assert applied
    return sum(entry["loss"].item() for entry in losses) / len(batches), norm


@functools.cache
def alone(**fields):
    """Losses and gradient norms of one rank."""
    return run_ranks(train, 1, Case(**fields))[0]


def same(result, expected, tolerance=1e-5):
    """Are losses and gradient norms equal, relatively?"""
    return all(torch.allclose(mine, theirs, rtol=tolerance, atol=0) for mine, theirs in zip(result, expected))


SP = dict(sequence_parallel=True)
LAYOUTS = {  # name: (ranks, fields of Case)
    "tp2": (2, dict(tp=2)),
    "tp2-sp": (2, dict(tp=2, config=SP)),
    "pp2": (2, dict(pp=2)),
    "dp2": (2, dict()),
    "dp2-overlap": (2, dict(ddp=dict(overlap_grad_reduce=True))),
    "dp2-distopt": (2, dict(ddp=dict(use_distributed_optimizer=True))),
    "dp2-distopt-overlap": (2, dict(ddp=OVERLAP)),
    "pp2-interleaved": (2, dict(pp=2, chunks=2, config=cpu.CPU_PIPELINE_FIELDS)),
    "tp2-pp2-sp": (4, dict(tp=2, pp=2, config=SP)),
    "tp2-pp2-interleaved-sp": (4, dict(tp=2, pp=2, chunks=2, config=SP | cpu.CPU_PIPELINE_FIELDS)),
    "tp2-dp2-sp-distopt-overlap": (4, dict(tp=2, config=SP, ddp=OVERLAP)),
    "pp2-dp2-interleaved-distopt-overlap": (4, dict(pp=2, chunks=2, config=cpu.CPU_PIPELINE_FIELDS, ddp=OVERLAP)),
}


@pytest.mark.parametrize(
    ("style", "layout"),
    [("gpt", name) for name in LAYOUTS] + [("llama", name) for name in LAYOUTS if name.startswith("tp2")],
)
def test_every_layout_trains_as_one_rank_does(style, layout):
    ranks, fields = LAYOUTS[layout]
    last_stage = run_ranks(train, ranks, Case(style, **fields))[-1]
    assert same(last_stage, alone(style=style))


def watch_dropout(rank, world_size, case):
    """Where the first sample's dropout hit, and the hidden states behind all of it."""
    chunks, optimizer = build(case)
    model, seen = chunks[0].module, {}

    def keep(name):
        def hook(module, args, output):
            seen.setdefault(name, output.detach().clone())

        return hook

    model.embedding.embedding_dropout.register_forward_hook(keep("embedding"))
    model.decoder.layers[0].self_attention.core_attention.attention_dropout.register_forward_hook(keep("attention"))
    model.decoder.register_forward_hook(keep("hidden"))
    step(chunks, optimizer, case, 0)
    return {name: (output, output == 0) for name, output in seen.items()}


@pytest.mark.parametrize("sequence_parallel", [False, True])
def test_dropout_differs_where_tensor_parallel_ranks_hold_different_values_only(sequence_parallel):
    case = Case(tp=2, config=DROPOUT | dict(sequence_parallel=sequence_parallel))
    one, other = run_ranks(watch_dropout, 2, case)
    heads_one, heads_other = one["attention"][1], other["attention"][1]
    future = torch.ones(LENGTH, LENGTH).triu(1).bool()
    assert 0.02 < heads_one[..., ~future].float().mean() < 0.25
    assert not torch.equal(heads_one, heads_other)
    assert one["embedding"][1].any()
    if sequence_parallel:  # each rank has its own tokens, and its own masks for them
        assert not torch.equal(one["embedding"][1], other["embedding"][1])
    else:  # the same values on both: were a mask not the same, the hidden states would part
        assert torch.equal(one["embedding"][0], other["embedding"][0])
        assert torch.equal(one["hidden"][0], other["hidden"][0])


RECOMPUTE = {
    "uniform": dict(recompute_granularity="full", recompute_method="uniform", recompute_num_layers=2),
    "block": dict(recompute_granularity="full", recompute_method="block", recompute_num_layers=1),
    "core_attn": dict(recompute_granularity="selective", recompute_modules=["core_attn"]),
}


@pytest.mark.parametrize("fields", [dict(), dict(tp=2), dict(tp=2, config=SP)], ids=["one", "tp2", "tp2-sp"])
def test_recomputed_activations_meet_the_same_dropout(fields):
    def run(**config):
        config = fields.get("config", {}) | DROPOUT | config
        return run_ranks(train, fields.get("tp", 1), Case(**(fields | dict(config=config))))[-1]

    kept = run()
    assert not same(kept, alone(style="gpt"), tolerance=1e-3)  # dropout is on
    for name, config in RECOMPUTE.items():
        assert same(run(**config), kept, tolerance=0), name


@pytest.mark.parametrize(
    ("dtype", "layout"),
    [("bfloat16", name) for name in ("dp2", "dp2-distopt", "dp2-distopt-overlap", "tp2-sp", "pp2-interleaved")]
    + [("float16", "dp2-distopt-overlap"), ("float16", "tp2-sp")],
)
def test_half_precision_stays_near_float32(dtype, layout):
    ranks, fields = LAYOUTS[layout]
    case = Case(dtype=getattr(torch, dtype), optimizer=dict(initial_loss_scale=1024.0), **fields)
    assert same(run_ranks(train, ranks, case)[-1], alone(style="gpt"), tolerance=1e-2)


def small_steps(rank, world_size, case):
    """Fractions of weights that moved in three tiny steps: the model's bf16 ones, and the optimizer's own."""
    chunks, optimizer = build(case)
    main = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    pairs = [(p, p.detach().clone()) for p in [*chunks[0].parameters(), *main]]
    for number in range(STEPS):
        step(chunks, optimizer, case, number)
    moved = {torch.bfloat16: [], torch.float32: []}
    for now, before in pairs:
        moved[now.dtype].append((now != before).flatten())
    return {dtype: torch.cat(flags).float().mean().item() for dtype, flags in moved.items()}


@pytest.mark.parametrize("ddp", [dict(), dict(use_distributed_optimizer=True)], ids=["plain", "distopt"])
def test_bf16_steps_too_small_for_bf16_are_kept_in_float32(ddp):
    moved = run_ranks(small_steps, 2, Case(dtype=torch.bfloat16, ddp=ddp, optimizer=dict(lr=2e-6)))[0]
    assert moved[torch.float32] > 0.9
    assert moved[torch.bfloat16] < 0.5


def interrupted(rank, world_size, case, folder, sharding, stop, steps):
    """The curve after `stop` steps: of a run that saved there and went on, and of one that loaded it."""
    from megatron.core import dist_checkpointing, parallel_state

    def state(chunks, optimizer, is_loading):
        metadata = {"distrib_optim_sharding_type": sharding}
        model = chunks[0].module.sharded_state_dict(metadata=metadata)
        return {
            "model": model,
            "optimizer": optimizer.sharded_state_dict(model, is_loading=is_loading, metadata=metadata),
        }

    chunks, optimizer = build(case)
    for number in range(stop):
        step(chunks, optimizer, case, number)
    dist_checkpointing.save(state(chunks, optimizer, False), folder)
    went_on = [step(chunks, optimizer, case, number) for number in range(stop, steps)]

    parallel_state.destroy_model_parallel()
    chunks, optimizer = build(case)
    loaded = dist_checkpointing.load(state(chunks, optimizer, True), folder)
    chunks[0].module.load_state_dict(loaded["model"])
    optimizer.load_state_dict(loaded["optimizer"])
    return went_on, [step(chunks, optimizer, case, number) for number in range(stop, steps)]


@pytest.mark.parametrize(
    ("sharding", "stop"), [("fully_reshardable", 0), ("fully_reshardable", 2), ("dp_reshardable", 2)]
)
def test_distributed_optimizer_resumes_bit_for_bit(tmp_path, sharding, stop):
    case = Case(ddp=dict(use_distributed_optimizer=True))
    for went_on, resumed in run_ranks(interrupted, 2, case, str(tmp_path), sharding, stop, stop + 3):
        assert resumed == went_on
