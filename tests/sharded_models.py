"""Small models of transformers under FSDP2 and DeepSpeed, for tests that fork their ranks."""

import contextlib
import functools
import gc
import importlib
import io
import os

import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode

from tests.functional.hf_models import FAMILIES, make_model, random_model

SMALL = dict(vocab_size=150, num_hidden_layers=2, max_position_embeddings=48, intermediate_size=24)
NO_DROPOUT = dict(attn_pdrop=0.0, resid_pdrop=0.0, embd_pdrop=0.0)
AWKWARD = {
    # Two ranks cut inside of a row, inside of heads, and where one head is all there is.
    "gpt2, odd": ("GPT2", dict(vocab_size=150, n_embd=57, n_layer=2, n_head=3, n_positions=48) | NO_DROPOUT),
    "llama, odd": ("Llama", SMALL | dict(hidden_size=48, num_attention_heads=3, num_key_value_heads=3)),
    "llama, one key": ("Llama", SMALL | dict(hidden_size=36, num_attention_heads=6, num_key_value_heads=1, head_dim=2)),
    "qwen2, odd": ("Qwen2", SMALL | dict(hidden_size=36, num_attention_heads=6, num_key_value_heads=3)),
}


@functools.cache
def preload():
    """Import once what the ranks will use."""
    for name in ("deepspeed", "fsdp"):
        importlib.import_module(f"megatron_geoscale.integrations.{name}")
    for name in ("torch.distributed.fsdp", "deepspeed.runtime.zero.stage3", "transformers.models.gpt2.modeling_gpt2",
                 "transformers.models.llama.modeling_llama", "transformers.models.qwen2.modeling_qwen2"):
        importlib.import_module(name)
    gc.freeze()


def model_of(name):
    """A random model in training mode without dropout, one of `FAMILIES` or of `AWKWARD`."""
    if name in FAMILIES:
        return make_model(name, **(NO_DROPOUT if name == "gpt2" else {})).train()
    kind, fields = AWKWARD[name]
    return random_model(kind, fields, seed=name).train()


def fully_sharded(model):
    """`model` under FSDP2, each layer of its own."""
    from torch.distributed.fsdp import fully_shard

    for layer in model.transformer.h if hasattr(model, "transformer") else model.model.layers:
        fully_shard(layer)
    return fully_shard(model)


def deepspeed_engine(model, stage, **changes):
    """DeepSpeed's engine of `model` on this rank's process group, with AdamW; `changes` of its configuration."""
    import deepspeed

    from megatron_geoscale.integrations.deepspeed import compile_nothing

    compile_nothing()
    ranks = {"RANK": dist.get_rank(), "LOCAL_RANK": dist.get_rank(), "WORLD_SIZE": dist.get_world_size()}
    os.environ.update({name: str(value) for name, value in ranks.items()}, DS_ACCELERATOR="cpu")
    settings = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": 0.0,  # DeepSpeed would clip at 1
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-3, "weight_decay": 0.01, "torch_adam": True}},
        "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0},
    }
    with contextlib.redirect_stdout(io.StringIO()):
        deepspeed.init_distributed(dist_backend="gloo", auto_mpi_discovery=False, verbose=False)
        engine, *_ = deepspeed.initialize(model=model, model_parameters=model.parameters(), config=settings | changes)
    return engine


def attach(road, model, config, **changes):
    """(what to call, scales, optimizer or engine) of `model` on a road: "plain", "fsdp2", or the stage of ZeRO."""
    from megatron_geoscale.integrations import deepspeed, fsdp

    if road in (0, 1, 2, 3):
        engine = deepspeed_engine(model, road, **changes)
        return engine, deepspeed.attach(engine, config), engine
    if road == "fsdp2":
        model = fully_sharded(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.01)
    return model, fsdp.attach(model, config, optimizer=optimizer), optimizer


def train_step(call, optimizer, tokens):
    """One step on `tokens`; the loss before it."""
    loss = call(input_ids=tokens, labels=tokens, use_cache=False).loss
    if optimizer is call:
        call.backward(loss)
        call.step()
    else:
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return float(loss.detach())


def local(parameter):
    """What this rank holds of a parameter, live."""
    if hasattr(parameter, "ds_tensor"):
        return parameter.ds_tensor.detach()
    return parameter.detach().to_local() if hasattr(parameter, "to_local") else parameter.detach()


class Traffic(TorchDispatchMode):
    """`seen`: every collective while it is on, whoever calls it, as (operation, bytes that this rank gives)."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.namespace in ("c10d", "_c10d_functional"):
            name = function.__name__.split(".")[0].rstrip("_")
            given = args[1] if name == "alltoall_base" else args[0]
            tensors = given if isinstance(given, (list, tuple)) else [given]
            self.seen.append((name, sum(t.numel() * t.element_size() for t in tensors)))
        return function(*args, **(kwargs or {}))
