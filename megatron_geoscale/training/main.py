"""Entry point of pretrain.py: parse, set up the processes, build, load, train; print mistakes in one sentence."""

from __future__ import annotations

import multiprocessing
import os
import random
import sys
import traceback
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch.distributed.checkpoint.api import CheckpointException

from megatron_geoscale import cpu
from megatron_geoscale.training.exit_request import ExitRequest
from megatron_geoscale.training.failures import FAILED, USER_ERROR, sentence_of

TRACEBACK_VARIABLE = "GEOSCALE_TRACEBACK"
EXIT_REASON = "exit_reason.txt"
"""File in --save that says why the last run ended, if it ended in order. torchrun exits with 1 after SIGTERM, even if
the run has saved: a launcher that is to start it again asks this file."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run pretrain.py on this rank; returns the exit status, 0 at the end or when asked to stop, else of `failures`.

    A mistake is one sentence on stderr, from every rank that saw it; GEOSCALE_TRACEBACK=1 adds the traceback.
    """
    exit_request = ExitRequest()
    for name, default in (("RANK", "0"), ("WORLD_SIZE", "1"), ("LOCAL_RANK", "0"), ("MASTER_ADDR", "localhost"),
                          ("MASTER_PORT", "0")):
        os.environ.setdefault(name, default)  # plain `python pretrain.py` is a job of one rank
    cpu.quieten()
    cpu.install()
    from megatron_geoscale.training.arguments import parse_args

    try:
        args = parse_args(argv)
    except ValueError as error:
        if os.environ["RANK"] == "0":  # all ranks have read the same flags
            _print_mistake(error)
        return USER_ERROR
    from megatron_geoscale.scaling.drift import ReplicaDriftError
    from megatron_geoscale.scaling.guard import NonFiniteWeightsError
    from megatron_geoscale.training.saving import CheckpointWriteError

    try:
        exit_request.limit(args.exit_duration_in_mins)
        _pretrain(args, exit_request)
    except (ReplicaDriftError, CheckpointWriteError) as error:
        _print_mistake(error)
        _leave(FAILED)
    except (ValueError, OSError, EOFError, RuntimeError, CheckpointException) as error:
        # A rank that has gone has said why: a traceback from here would bury it.
        sentence = sentence_of(error, args, int(os.environ["RANK"]))
        if sentence is None and not isinstance(error, ValueError | OSError | NonFiniteWeightsError):
            raise
        _print_mistake(error, sentence)
        _leave(USER_ERROR if sentence is None else FAILED)
    return 0


def _leave(status: int) -> None:
    """End this process at once: other ranks may wait for it in a collective, and the launcher stops them."""
    for child in multiprocessing.active_children():  # data workers, and writers of a checkpoint
        child.kill()
    sys.stdout.flush()
    os._exit(status)


def _print_mistake(error: BaseException, sentence: str | None = None) -> None:
    if os.environ.get(TRACEBACK_VARIABLE) == "1":
        traceback.print_exception(error)
    print(f"pretrain.py: {sentence or f'error: {error}'}", file=sys.stderr, flush=True)


def _pretrain(args, exit_request: ExitRequest) -> None:  # type: ignore[no-untyped-def]
    from megatron_geoscale.attention.spec import attach_scaling
    from megatron_geoscale.training import checkpointing, data, loop, model
    from megatron_geoscale.training.monitor import print_from_reporter

    _initialize(args)
    if args.save:
        Path(args.save).mkdir(parents=True, exist_ok=True)  # a path that cannot be saved to is better known now
        (Path(args.save) / EXIT_REASON).unlink(missing_ok=True)
    tokenizer = data.build_tokenizer(args.tokenizer_type, args.tokenizer_model, args.vocab_size)
    args.tokenizer_vocab_size = tokenizer.vocab_size
    args.padded_vocab_size = data.padded_vocab_size(
        tokenizer.vocab_size, args.make_vocab_size_divisible_by, args.tensor_model_parallel_size
    )
    args.model_vocab_size = tokenizer.vocab_size
    if args.load:
        checkpointing.take_saved_vocabulary(args)
    chunks = model.build_model(args)
    optimizer = model.build_optimizer(args, chunks)
    run = checkpointing.Run(
        args=args,
        chunks=chunks,
        optimizer=optimizer,
        scheduler=model.build_scheduler(args, optimizer),
        scaling=None if args.geoscale.recipe == "none" else attach_scaling(chunks, args.geoscale),
        state=checkpointing.TrainState(),
    )
    train_data, valid_data = data.build_datasets(args, tokenizer)
    if args.load:
        directory = checkpointing.load_checkpoint(run)
        print_from_reporter(
            f"loaded checkpoint {directory} at iteration {run.state.iteration}"
            if directory
            else f"no checkpoint in {args.load} yet: starting from random weights"
        )
    reason = loop.Trainer(run, train_data, valid_data).train(exit_request)
    print_from_reporter(reason)
    dist.barrier()
    if args.save and dist.get_rank() == 0:
        (Path(args.save) / EXIT_REASON).write_text(reason + "\n")
    dist.destroy_process_group()


def _initialize(args) -> None:  # type: ignore[no-untyped-def]
    """Process groups, seeds, micro-batch calculator, logging."""
    from megatron.core import parallel_state, tensor_parallel
    from megatron.core.num_microbatches_calculator import init_num_microbatches_calculator
    from megatron.core.rerun_state_machine import RerunMode, initialize_rerun_state_machine

    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    backend = args.distributed_backend or ("nccl" if torch.cuda.is_available() else "gloo")
    dist.init_process_group(backend, timeout=timedelta(minutes=args.distributed_timeout_minutes))
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=args.tensor_model_parallel_size,
        pipeline_model_parallel_size=args.pipeline_model_parallel_size,
        virtual_pipeline_model_parallel_size=args.virtual_pipeline_model_parallel_size,
        context_parallel_size=args.context_parallel_size,
        distributed_timeout_minutes=args.distributed_timeout_minutes,
        expert_model_parallel_size=args.expert_model_parallel_size,
        expert_tensor_parallel_size=args.expert_tensor_parallel_size,
    )
    # Pipeline stages draw different weights, tensor-parallel ranks share the seed (their tracker tells them apart).
    seed = args.seed + 100 * parallel_state.get_pipeline_model_parallel_rank()
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
    tensor_parallel.model_parallel_cuda_manual_seed(seed)
    init_num_microbatches_calculator(
        dist.get_rank(), args.rampup_batch_size, args.global_batch_size, args.micro_batch_size, args.data_parallel_size
    )
    initialize_rerun_state_machine(mode=RerunMode.DISABLED)
