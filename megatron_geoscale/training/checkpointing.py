"""Resume with megatron-core's dist_checkpointing (torch_dist), in Megatron-LM's directory layout.

What a checkpoint holds (model, optimizer, scheduler, RNG, flags, the scaler's state) is here, and how it is loaded;
`saving` writes it, `checkpoint_files` knows where it lies. One that cannot be read makes way for the one before it.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from megatron.core.utils import unwrap_model

from megatron_geoscale.checkpoints.iterations import TRACKER, find_iteration, latest_iteration
from megatron_geoscale.scaling.engine import GeoScaleEngine
from megatron_geoscale.training.checkpoint_args import saveable
from megatron_geoscale.training.checkpoint_files import (
    DamagedCheckpointError,
    check_whole,
    complete_iterations,
    reading,
)
from megatron_geoscale.training.checkpoint_shape import check_shape
from megatron_geoscale.training.plain_pickles import check_extra_states, plain_pickles
from megatron_geoscale.training.rng_state import rng_state, set_rng_state

_Read = TypeVar("_Read")

CONTENT_METADATA = {
    "distrib_optim_sharding_type": "fully_reshardable",
    "singleton_local_shards": False,
    "chained_optim_avoid_prefix": True,
}


@dataclass
class TrainState:
    """Where a run stands."""

    iteration: int = 0
    consumed_samples: int = 0
    skipped_iterations: int = 0
    applied_since_refresh: int = 0
    """Optimizer steps applied since the last refresh that was due (--geoscale-refresh-interval)."""


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


def candidates(args: argparse.Namespace) -> list[Path]:
    """The checkpoint that --load and --ckpt-step name, and after it, unless it was named by its number, the complete
    older ones, newest first; none where --load holds none yet.

    Raises ValueError where there must be one, or where the one that is named is not there.
    """
    iteration = args.ckpt_step if args.ckpt_step is not None else latest_iteration(args.load)
    if iteration is None:
        if args.exit_on_missing_checkpoint or args.finetune:
            raise ValueError(f"--load {args.load} holds no checkpoint: {TRACKER} is not there")
        return []
    named = find_iteration(args.load, iteration)
    if not named.is_dir():
        who = TRACKER if args.ckpt_step is None else "--ckpt-step"
        raise ValueError(f"{named} is not there, though {who} names iteration {iteration}")
    if args.ckpt_step is not None:
        return [named]
    older = [path for number, path in complete_iterations(args.load).items() if number < iteration]
    return [named, *reversed(older)]


def _first_readable(args: argparse.Namespace, read: Callable[[Path], _Read], *, warn: bool = False) -> _Read | None:
    """What `read` makes of the first of the candidates that is not damaged; None where there are none.

    Raises DamagedCheckpointError about the first where all are. warn: rank 0 names those that are passed over.
    """
    damage: list[DamagedCheckpointError] = []
    for directory in candidates(args):
        try:
            found = read(directory)
        except DamagedCheckpointError as error:
            damage.append(error)
            continue
        if warn and dist.get_rank() == 0:
            for error in damage:
                print(f"warning: {error}; the checkpoint before it is loaded, {directory}", file=sys.stderr, flush=True)
        return found
    if damage:
        raise damage[0]
    return None


def checkpoint_to_load(args: argparse.Namespace) -> Path | None:
    """Directory of the first of `candidates` whose files are whole; None where --load holds none yet.

    Raises ValueError where there must be one, or where none is whole.
    """

    def read(directory: Path) -> Path:
        _common_state(directory, args)
        return directory

    return _first_readable(args, read)


def _trusted(args: argparse.Namespace) -> bool:
    return bool(getattr(args, "trust_checkpoint_pickles", False))  # tools ask with few flags


def _common_state(directory: Path, args: argparse.Namespace) -> dict[str, Any]:
    """Flags and counters of a checkpoint whose files are whole. Raises DamagedCheckpointError."""
    check_whole(directory, trusted=_trusted(args))
    with reading(directory, trusted=_trusted(args)):
        state: dict[str, Any] = dist_checkpointing.load_common_state_dict(str(directory))
        if not isinstance(state.get("args"), argparse.Namespace):
            raise TypeError("common.pt holds no flags (args)")
        return state


def take_saved_vocabulary(args: argparse.Namespace) -> None:
    """Keep the padded vocabulary of the checkpoint to load, if there is one and this layout can split it too, and the
    number of rows in it that are no padding.

    Megatron's padding depends on the tensor-parallel size, and with another one weights and optimizer state have
    another shape. A converted model may have more rows than its tokenizer has tokens.
    """
    common = _first_readable(args, lambda directory: _common_state(directory, args))
    if common is None:
        return
    saved = common["args"]
    same_tokenizer = saved.tokenizer_vocab_size == args.tokenizer_vocab_size
    if same_tokenizer and saved.padded_vocab_size % args.tensor_model_parallel_size == 0:
        args.padded_vocab_size = saved.padded_vocab_size
    if args.padded_vocab_size == saved.padded_vocab_size:
        rows = getattr(saved, "model_vocab_size", saved.tokenizer_vocab_size)
        args.model_vocab_size = max(rows, args.tokenizer_vocab_size)


@contextlib.contextmanager
def _agreed(directory: Path) -> Iterator[None]:
    """What one rank cannot read inside, none takes: DamagedCheckpointError on all. Collective over the whole job."""
    damage: DamagedCheckpointError | None = None
    try:
        yield
    except DamagedCheckpointError as error:
        damage = error
    failed = torch.tensor(damage is not None, dtype=torch.int32, device=torch.cuda.current_device())
    dist.all_reduce(failed, op=dist.ReduceOp.MAX)
    if damage is not None:
        raise damage
    if failed:
        raise DamagedCheckpointError(f"{directory} cannot be read as a checkpoint: another rank cannot read it")


def load_checkpoint(run: Run) -> Path | None:
    """Take up the checkpoint in --load; None where there is none yet. Collective over the whole job.

    With --finetune only weights are taken. The RNG state and power-iteration vectors follow where the parallel layout
    allows, a calibration always, if it is the recipe's own. One that is damaged makes way for the complete one before
    it, with a warning on stderr, unless --ckpt-step names it. Raises ValueError in one sentence for a checkpoint of
    another shape, or where none can be read.
    """
    return _first_readable(run.args, lambda directory: _load_from(run, directory), warn=True)


def _load_from(run: Run, directory: Path) -> Path:
    """`load_checkpoint` of one directory. Raises DamagedCheckpointError on every rank alike."""
    args = run.args
    trusted = _trusted(args)
    with _agreed(directory):
        common = _common_state(directory, args)
    saved: argparse.Namespace = common["args"]
    check_shape(args, saved, directory)

    # An optimizer that has taken no step has no state.
    with_optimizer = not args.finetune and not args.no_load_optim and common["iteration"] > 0
    if with_optimizer and saved.no_save_optim:
        raise ValueError(f"{directory} was saved with --no-save-optim: load it with --no-load-optim or --finetune")
    apart = [getattr(each, "expert_model_parallel_size", 1) > 1 for each in (saved, args)]
    if with_optimizer and apart[0] != apart[1]:  # megatron-core has an optimizer for experts that ranks share
        raise ValueError(f"{directory} was saved {'with' if apart[0] else 'without'} --expert-model-parallel-size "
                         "above 1, and so is its optimizer state: load it alike, or with --no-load-optim or --finetune")
    same_layout = all(
        getattr(saved, name) == getattr(args, name)
        for name in ("tensor_model_parallel_size", "pipeline_model_parallel_size")
    )
    with_rng = not args.finetune and not args.no_load_rng and not saved.no_save_rng and same_layout
    with reading(directory, trusted=trusted):
        tensors = dist_checkpointing.load_tensors_metadata(str(directory))
    template = sharded_state(run, loading=True, optimizer=with_optimizer, rng=with_rng)
    scaler_keys = template.get("geoscale", {})
    with_scaler = not args.finetune and bool(scaler_keys) and all(
        key in tensors and tuple(tensors[key].global_shape) == tuple(wanted.global_shape)
        for key, wanted in scaler_keys.items()
    )
    if not with_scaler:
        template.pop("geoscale", None)
    models = [(key, unwrap_model(chunk)) for key, chunk in _named_chunks(run.chunks)]
    with _agreed(directory), reading(directory, trusted=trusted):
        loaded = dist_checkpointing.load(template, str(directory))
        _check_extra_states(loaded, models, trusted)

    _put_weights(loaded, models, trusted)
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
        set_rng_state(loaded["rng_state"][0])
    if with_scaler:
        run.scaling.load_state_dict(loaded["geoscale"])
    return directory


def load_weights(run: Run, directory: str) -> None:
    """Replace the model's weights by those of the latest checkpoint in `directory`, and nothing else: optimizer, data,
    RNG and scaling state stay as they are. Collective over the whole job. Raises ValueError as `load_checkpoint`."""
    iteration = latest_iteration(directory)
    if iteration is None:
        raise ValueError(f"{directory} holds no checkpoint: {TRACKER} is not there")
    source = find_iteration(directory, iteration)
    check_shape(run.args, _common_state(source, run.args)["args"], source)
    models = [(key, unwrap_model(chunk)) for key, chunk in _named_chunks(run.chunks)]
    template = {key: model.sharded_state_dict(metadata=dict(CONTENT_METADATA)) for key, model in models}
    trusted = _trusted(run.args)
    with reading(source, trusted=trusted):
        loaded = dist_checkpointing.load(template, str(source))
        _check_extra_states(loaded, models, trusted)
    _put_weights(loaded, models, trusted)
    run.optimizer.reload_model_params()


def _check_extra_states(loaded: dict[str, Any], models: list[tuple[str, torch.nn.Module]], trusted: bool) -> None:
    if not trusted:
        for key, _ in models:
            check_extra_states(loaded[key])


def _put_weights(loaded: dict[str, Any], models: list[tuple[str, torch.nn.Module]], trusted: bool) -> None:
    with plain_pickles(trusted=trusted):
        for key, model in models:
            model.load_state_dict(loaded[key])


def _named_chunks(chunks: list[torch.nn.Module]) -> list[tuple[str, torch.nn.Module]]:
    if len(chunks) == 1:
        return [("model", chunks[0])]
    return [(f"model{i}", chunk) for i, chunk in enumerate(chunks)]


def sharded_state(run: Run, *, loading: bool = False, optimizer: bool = True, rng: bool = True) -> dict[str, Any]:
    """What a checkpoint holds, as megatron-core's save and load take it."""
    args = run.args
    state: dict[str, Any] = {"checkpoint_version": 3.0, "iteration": run.state.iteration}
    for key, chunk in _named_chunks(run.chunks):
        state[key] = unwrap_model(chunk).sharded_state_dict(metadata=dict(CONTENT_METADATA))
    if optimizer and (loading or (run.state.iteration > 0 and not args.no_save_optim)):
        metadata = dict(CONTENT_METADATA)
        state["optimizer"] = run.optimizer.sharded_state_dict(state, is_loading=loading, metadata=metadata)
        state["opt_param_scheduler"] = run.scheduler.state_dict()
    if rng and (loading or not args.no_save_rng):
        state["rng_state"] = rng_state()
    if isinstance(run.scaling, GeoScaleEngine):
        state["geoscale"] = run.scaling.sharded_state_dict()
    state["args"] = saveable(args)
    state["train_state"] = vars(run.state).copy()
    return state
