"""Save and resume with megatron-core's dist_checkpointing (torch_dist), in Megatron-LM's directory layout.

    DIR/latest_checkpointed_iteration.txt    the last complete checkpoint
    DIR/iter_0000010/                        model, optimizer, scheduler, RNG, flags, the scaler's state

A checkpoint is written beside its final name and renamed when it is whole, and only then does the tracker name it: a
directory called iter_* is complete at any moment, whenever a rank is killed.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import random
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing, parallel_state, tensor_parallel
from megatron.core.dist_checkpointing.mapping import ShardedObject
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from megatron.core.utils import unwrap_model
from torch.distributed.checkpoint.api import CheckpointException

from megatron_geoscale.checkpoints.torch_dist import TRACKER
from megatron_geoscale.scaling.engine import GeoScaleEngine
from megatron_geoscale.training.checkpoint_args import saveable

_METADATA = {
    "distrib_optim_sharding_type": "fully_reshardable",
    "singleton_local_shards": False,
    "chained_optim_avoid_prefix": True,
}
_SHAPE_FLAGS = (
    "num_layers",
    "hidden_size",
    "ffn_hidden_size",
    "num_attention_heads",
    "num_query_groups",
    "kv_channels",
    "position_embedding_type",
    "normalization",
    "swiglu",
    "disable_bias_linear",
    "add_qkv_bias",
    "qk_layernorm",
    "qk_l2_norm",
    "attention_output_gate",
    "softmax_type",
    "multi_latent_attention",
    "q_lora_rank",
    "kv_lora_rank",
    "qk_head_dim",
    "qk_pos_emb_head_dim",
    "v_head_dim",
    "apply_layernorm_1p",
    "norm_epsilon",
    "openai_gelu",
    "untie_embeddings_and_output_weights",
    "padded_vocab_size",
)
"""What a checkpoint and the model that loads it must agree on."""
_ROTARY_FLAGS = ("rotary_percent", "rotary_interleaved", "rotary_base")
"""The same, where queries and keys are rotated."""


@dataclass
class TrainState:
    """Where a run stands."""

    iteration: int = 0
    consumed_samples: int = 0
    skipped_iterations: int = 0


@dataclass
class Run:
    """What a checkpoint holds and a step needs."""

    args: argparse.Namespace
    chunks: list[torch.nn.Module]
    optimizer: MegatronOptimizer | None
    """None, like the scheduler, where a model is only evaluated."""
    scheduler: OptimizerParamScheduler | None
    scaling: Any
    """GeoScaleEngine, a baseline, or None under recipe `none`."""
    state: TrainState


def iteration_directory(directory: str, iteration: int) -> Path:
    """DIR/iter_0000010 for iteration 10."""
    return Path(directory) / f"iter_{iteration:07d}"


def latest_iteration(directory: str) -> int | None:
    """Iteration of the last complete checkpoint in `directory`, None where there is none.

    Raises ValueError naming the file where the tracker is not a number or names a checkpoint that is not there.
    """
    tracker = Path(directory) / TRACKER
    if not tracker.is_file():
        return None
    text = tracker.read_text().strip()
    if not text.isdigit():
        raise ValueError(f"{tracker} must hold an iteration number, not {text[:40]!r}")
    return int(text)


def save_checkpoint(run: Run) -> Path:
    """Write a checkpoint of the run's state to --save. Collective over the whole job; returns its directory."""
    final = iteration_directory(run.args.save, run.state.iteration)
    partial = final.with_name(final.name + ".partial")
    rank = dist.get_rank()
    if rank == 0:
        for killed in Path(run.args.save).glob("iter_*.partial"):
            shutil.rmtree(killed, ignore_errors=True)
        partial.mkdir(parents=True)
    dist.barrier()
    dist_checkpointing.save(_sharded_state(run), str(partial), content_metadata=dict(_METADATA))
    dist.barrier()
    if rank == 0:
        if final.exists():  # the same iteration again: keep the old one whole until the new one has its name
            stale = final.with_name(final.name + ".stale")
            shutil.rmtree(stale, ignore_errors=True)
            final.rename(stale)
        partial.rename(final)
        shutil.rmtree(final.with_name(final.name + ".stale"), ignore_errors=True)
        tracker = Path(run.args.save) / TRACKER
        fresh = tracker.with_suffix(".txt.partial")
        fresh.write_text(str(run.state.iteration))
        os.replace(fresh, tracker)
    dist.barrier()
    return final


def checkpoint_to_load(args: argparse.Namespace) -> Path | None:
    """Directory of the checkpoint that --load and --ckpt-step name; None where --load holds none yet.

    Raises ValueError where there must be one, or where it is not whole.
    """
    iteration = args.ckpt_step if args.ckpt_step is not None else latest_iteration(args.load)
    if iteration is None:
        if args.exit_on_missing_checkpoint or args.finetune:
            raise ValueError(f"--load {args.load} holds no checkpoint: {TRACKER} is not there")
        return None
    directory = iteration_directory(args.load, iteration)
    with _reading(directory):
        complete = dist_checkpointing.check_is_distributed_checkpoint(str(directory))
    if not complete:
        raise ValueError(f"{directory} is not a complete torch_dist checkpoint")
    return directory


@contextlib.contextmanager
def _reading(directory: Path) -> Iterator[None]:
    """One sentence that names `directory` for whatever goes wrong inside: a damaged file raises anything."""
    try:
        yield
    except (Exception, CheckpointException) as error:
        cause = next(iter(error.failures.values()))[0] if isinstance(error, CheckpointException) else error
        reason = (str(cause).strip().splitlines() or [""])[0][:200]
        raise ValueError(f"{directory} cannot be read as a checkpoint: {type(cause).__name__} {reason}") from error


def _common_state(directory: Path) -> dict[str, Any]:
    with _reading(directory):
        state: dict[str, Any] = dist_checkpointing.load_common_state_dict(str(directory))
        return state


def saved_vocabulary_padding(args: argparse.Namespace) -> int | None:
    """Padded vocabulary of the checkpoint to load, where this layout can split it too; else None.

    Megatron's padding depends on the tensor-parallel size, and the padding takes part in the softmax: a run that goes
    on under another layout must keep the one it began with.
    """
    directory = checkpoint_to_load(args)
    if directory is None:
        return None
    saved = _common_state(directory)["args"]
    same_tokenizer = saved.tokenizer_vocab_size == args.tokenizer_vocab_size
    divisible = saved.padded_vocab_size % args.tensor_model_parallel_size == 0
    return saved.padded_vocab_size if same_tokenizer and divisible else None


def load_checkpoint(run: Run) -> Path | None:
    """Take up the checkpoint in --load; None where there is none yet. Collective over the whole job.

    With --finetune only weights are taken. The RNG state and power-iteration vectors follow where the parallel layout
    allows, a calibration always, if it is the recipe's own. Raises ValueError in one sentence for a checkpoint of
    another shape, or one that cannot be read.
    """
    args = run.args
    directory = checkpoint_to_load(args)
    if directory is None:
        return None
    common = _common_state(directory)
    saved: argparse.Namespace = common["args"]
    _check_shape(args, saved, directory)

    # An optimizer that has taken no step has no state.
    with_optimizer = not args.finetune and not args.no_load_optim and common["iteration"] > 0
    if with_optimizer and saved.no_save_optim:
        raise ValueError(f"{directory} was saved with --no-save-optim: load it with --no-load-optim or --finetune")
    same_layout = all(
        getattr(saved, name) == getattr(args, name)
        for name in ("tensor_model_parallel_size", "pipeline_model_parallel_size")
    )
    with_rng = not args.finetune and not args.no_load_rng and not saved.no_save_rng and same_layout
    with _reading(directory):
        tensors = dist_checkpointing.load_tensors_metadata(str(directory))
    template = _sharded_state(run, loading=True, optimizer=with_optimizer, rng=with_rng)
    scaler_keys = template.get("geoscale", {})
    with_scaler = not args.finetune and bool(scaler_keys) and all(
        key in tensors and tuple(tensors[key].global_shape) == tuple(wanted.global_shape)
        for key, wanted in scaler_keys.items()
    )
    if not with_scaler:
        template.pop("geoscale", None)
    with _reading(directory):
        loaded = dist_checkpointing.load(template, str(directory))

    for key, chunk in _named_chunks(run.chunks):
        unwrap_model(chunk).load_state_dict(loaded[key])
    if with_optimizer:
        run.optimizer.load_state_dict(loaded["optimizer"])
        try:
            run.scheduler.load_state_dict(loaded["opt_param_scheduler"])
        except AssertionError as error:  # megatron-core's, about a value that the flags and the checkpoint give
            raise ValueError(
                f"{directory} was saved under another learning-rate schedule ({str(error).split(': ')[-1]}): give its "
                "flags, --use-checkpoint-opt_param-scheduler or --override-opt_param-scheduler"
            ) from error
    elif run.optimizer is not None:
        run.optimizer.reload_model_params()
    if not args.finetune:
        run.state = TrainState(**loaded["train_state"])
    if with_rng:
        _set_rng_state(loaded["rng_state"][0])
    if with_scaler:
        run.scaling.load_state_dict(loaded["geoscale"])
    return directory


def load_weights(run: Run, directory: str) -> None:
    """Replace the model's weights by those of the latest checkpoint in `directory`, and nothing else: optimizer, data,
    RNG and scaling state stay as they are. Collective over the whole job. Raises ValueError as `load_checkpoint`."""
    iteration = latest_iteration(directory)
    if iteration is None:
        raise ValueError(f"{directory} holds no checkpoint: {TRACKER} is not there")
    source = iteration_directory(directory, iteration)
    _check_shape(run.args, _common_state(source)["args"], source)
    models = [(key, unwrap_model(chunk)) for key, chunk in _named_chunks(run.chunks)]
    template = {key: model.sharded_state_dict(metadata=dict(_METADATA)) for key, model in models}
    with _reading(source):
        loaded = dist_checkpointing.load(template, str(source))
    for key, model in models:
        model.load_state_dict(loaded[key])
    run.optimizer.reload_model_params()


def _check_shape(args: argparse.Namespace, saved: argparse.Namespace, directory: Path) -> None:
    by_position = {"learned_absolute": ("max_position_embeddings",), "none": ()}
    position = by_position.get(args.position_embedding_type, _ROTARY_FLAGS)
    for name in (*_SHAPE_FLAGS, *position):
        ours = getattr(args, name)
        theirs = getattr(saved, name, ours)  # a flag that did not exist when it was saved changed nothing then
        if ours != theirs:
            flag = "--vocab-size, padded," if name == "padded_vocab_size" else "--" + name.replace("_", "-")
            raise ValueError(f"{directory} has another shape: {flag} was {theirs} when it was saved and is {ours} now")


def _named_chunks(chunks: list[torch.nn.Module]) -> list[tuple[str, torch.nn.Module]]:
    if len(chunks) == 1:
        return [("model", chunks[0])]
    return [(f"model{i}", chunk) for i, chunk in enumerate(chunks)]


def _sharded_state(run: Run, *, loading: bool = False, optimizer: bool = True, rng: bool = True) -> dict[str, Any]:
    args = run.args
    state: dict[str, Any] = {"checkpoint_version": 3.0, "iteration": run.state.iteration}
    for key, chunk in _named_chunks(run.chunks):
        state[key] = unwrap_model(chunk).sharded_state_dict(metadata=dict(_METADATA))
    if optimizer and (loading or (run.state.iteration > 0 and not args.no_save_optim)):
        state["optimizer"] = run.optimizer.sharded_state_dict(state, is_loading=loading, metadata=dict(_METADATA))
        state["opt_param_scheduler"] = run.scheduler.state_dict()
    if rng and (loading or not args.no_save_rng):
        state["rng_state"] = _rng_state()
    if isinstance(run.scaling, GeoScaleEngine):
        state["geoscale"] = run.scaling.sharded_state_dict()
    state["args"] = saveable(args)
    state["train_state"] = vars(run.state).copy()
    return state


def _rng_state() -> ShardedObject:
    """Generators of this rank; data-parallel replicas draw alike, so one of them is saved."""
    name, keys, position, has_gauss, cached = np.random.get_state()
    state = {
        "random": random.getstate(),
        "numpy": (name, torch.from_numpy(np.asarray(keys).astype(np.int64)), position, has_gauss, cached),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state(),
        "tracker": tensor_parallel.get_cuda_rng_tracker().get_states(),
    }
    pipeline, tensor = (
        parallel_state.get_pipeline_model_parallel_group(),
        parallel_state.get_tensor_model_parallel_group(),
    )
    return ShardedObject(
        "rng_state",
        [state],
        (pipeline.size(), tensor.size()),
        (pipeline.rank(), tensor.rank()),
        replica_id=parallel_state.get_data_parallel_rank(with_context_parallel=True),
    )


def _set_rng_state(state: dict[str, Any]) -> None:
    random.setstate(state["random"])
    name, keys, *rest = state["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), *rest))
    torch.set_rng_state(state["torch"])
    torch.cuda.set_rng_state(state["cuda"])
    tensor_parallel.get_cuda_rng_tracker().set_states(state["tracker"])
