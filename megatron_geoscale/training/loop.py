"""The training loop: megatron-core's schedule and optimizer, with a refresh of the scales between them.

One iteration: inject a fault if this is its step; refresh the scale table if weights have changed since; forward and
backward over the micro batches; optimizer and scheduler; log; evaluate, save, exit where the flags say so. Whether to
refresh, save or exit is decided from state that all ranks share, so no collective is entered by some ranks only.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.num_microbatches_calculator import (
    get_current_global_batch_size,
    get_num_microbatches,
    update_num_microbatches,
)
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.pipeline_parallel import get_forward_backward_func

from megatron_geoscale.attention.baselines import DelayedScaling
from megatron_geoscale.scaling.drift import check_replicas
from megatron_geoscale.scaling.engine import GeoScaleEngine
from megatron_geoscale.scaling.layers import find_attention_layers
from megatron_geoscale.training.checkpointing import Run, load_weights
from megatron_geoscale.training.data import build_iterator, get_batch
from megatron_geoscale.training.exit_request import ExitRequest
from megatron_geoscale.training.fault_injection import Fault, inject
from megatron_geoscale.training.monitor import Monitor, StepReport, print_from_reporter
from megatron_geoscale.training.saving import CheckpointWriter


def _loss(loss_mask: torch.Tensor, losses: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
    """Sum of the masked token losses, number of tokens, and both for the log."""
    total = (losses.float() * loss_mask).sum()
    num_tokens = loss_mask.sum().to(torch.int)
    ranks = parallel_state.get_context_parallel_world_size()
    if ranks > 1:  # gradients are averaged over the ranks that share a sequence, which hold unlike numbers of tokens
        total = total * ranks
        dist.all_reduce(num_tokens, group=parallel_state.get_context_parallel_group())
    return total, num_tokens, {"lm loss": torch.stack([total.detach(), num_tokens.to(total.dtype)])}


def _forward_step(args: argparse.Namespace, iterator: Any, model: torch.nn.Module) -> tuple[torch.Tensor, Any]:
    batch = get_batch(iterator, args)
    output = model(
        batch.get("tokens"), batch.get("position_ids"), batch.get("attention_mask"), labels=batch.get("labels")
    )
    return output, partial(_loss, batch.get("loss_mask"))


def _run_schedule(run: Run, iterators: Any, *, forward_only: bool) -> torch.Tensor | None:
    """Forward (and backward) over one global batch; the mean token loss on the last stage, None on the others."""
    outputs = get_forward_backward_func()(
        forward_step_func=partial(_forward_step, run.args),
        data_iterator=iterators,
        model=run.chunks,
        num_microbatches=get_num_microbatches(),
        seq_length=run.args.seq_length,
        micro_batch_size=run.args.micro_batch_size,
        forward_only=forward_only,
    )
    if not outputs:
        return None
    totals = torch.stack([output["lm loss"] for output in outputs])
    # The mean over micro batches of each one's mean loss: what the gradient is the gradient of.
    mean = (totals[:, 0] / totals[:, 1].clamp(min=1)).mean()
    dist.all_reduce(mean, group=parallel_state.get_data_parallel_group(with_context_parallel=True))
    return mean / parallel_state.get_data_parallel_world_size(with_context_parallel=True)


@contextmanager
def _spiked_learning_rate(optimizer: MegatronOptimizer, factor: float) -> Iterator[None]:
    """`factor` times the learning rate inside, afterwards what it was: a skipped step does not move the schedule."""
    rates = [group["lr"] for group in optimizer.param_groups]
    for group in optimizer.param_groups:
        group["lr"] *= factor
    yield
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        group["lr"] = rate


class Trainer:
    """Runs `train` to the end, or to a reason to stop."""

    def __init__(self, run: Run, train_data: Any, valid_data: Any) -> None:
        self.run, self.args, self.state = run, run.args, run.state
        self._train_data, self._valid_data = train_data, valid_data
        self._monitor = Monitor(run)
        self._writer = CheckpointWriter(run)
        self._without_table = True  # the first forward needs one, and so does one after an injected fault
        self._unchecked = False  # whether a refresh still has to be asked if it met weights that are not finite
        update_num_microbatches(self.state.consumed_samples)
        self._iterators = self._per_chunk(train_data, self.state.consumed_samples)

    def _per_chunk(self, dataset: Any, consumed: int) -> Any:
        """One iterator, or one for each model chunk of an interleaved pipeline."""
        iterators = [build_iterator(dataset, consumed, self.args) for _ in self.run.chunks]
        return iterators if len(iterators) > 1 else iterators[0]

    def train(self, exit_request: ExitRequest) -> str:
        """Train to --train-iters; returns why it stopped. Saves before it stops when --save is given."""
        saved_at = self.state.iteration or None  # of a run that has just begun, even iteration 0 is worth saving
        reason = "training is complete"
        requested = exit_request.reason(before_any_step=True)
        while requested is None and self.state.iteration < self.args.train_iters:
            self._step()
            self._announce(self._writer.finish(wait=False))
            iteration = self.state.iteration
            if self._valid_data_wanted() and iteration % self.args.eval_interval == 0:
                self.evaluate()
            if self.args.save_interval and iteration % self.args.save_interval == 0:
                self._save()
                saved_at = iteration
            requested = exit_request.reason()
            if requested is None and self.args.exit_interval and iteration % self.args.exit_interval == 0:
                requested = "--exit-interval"
        if requested:
            reason = f"exiting at iteration {self.state.iteration}: {requested}"
        if self.args.save and saved_at != self.state.iteration:
            self._save()
        self._announce(self._writer.finish(wait=True))
        self._monitor.close()
        return reason

    def _save(self) -> None:
        self._gather_params()  # the first replica saves, and knows only its own share of the last update
        self._compare_replicas()
        self._announce(self._writer.save(self.run))

    def _announce(self, directories: list[Path]) -> None:
        for directory in directories:
            print_from_reporter(f"saved checkpoint at iteration {int(directory.name.split('_')[1]):7d} to {directory}")

    def _step(self) -> None:
        """One iteration."""
        run, start = self.run, time.perf_counter()
        run.state.iteration += 1
        fault = self.args.fault
        faulty = fault is not None and fault.step == self.state.iteration
        if faulty and fault.kind != "lr_spike":
            self._inject(fault)
        for chunk in run.chunks:
            chunk.zero_grad_buffer()
            chunk.train()
        run.optimizer.zero_grad()
        interval = self.args.geoscale_check_interval
        if interval and run.state.iteration % interval == 0:
            self._gather_params()
            self._compare_replicas()
        refresh_ms = self._refresh()
        with_sqnr = faulty or self.args.geoscale_log_sqnr
        self._monitor.measure_sqnr(with_sqnr)
        if isinstance(run.scaling, GeoScaleEngine):
            run.scaling.begin_step()

        loss = _run_schedule(run, self._iterators, forward_only=False)
        self._check_finite()
        with _spiked_learning_rate(run.optimizer, fault.factor if faulty and fault.kind == "lr_spike" else 1.0):
            applied, grad_norm, _ = run.optimizer.step()
        batch = get_current_global_batch_size()
        if applied:
            run.scheduler.step(increment=batch)
            run.state.applied_since_refresh += 1
        else:
            run.state.skipped_iterations += 1
        run.state.consumed_samples += batch
        update_num_microbatches(run.state.consumed_samples)
        report = StepReport(
            iteration=run.state.iteration,
            loss=loss,
            grad_norm=None if grad_norm is None else float(grad_norm),
            learning_rate=run.optimizer.param_groups[0]["lr"] if run.optimizer.param_groups else 0.0,
            seconds=time.perf_counter() - start,
            refresh_ms=refresh_ms,
            batch_size=batch,
            skipped=not applied,
            measured_sqnr=with_sqnr,
        )
        self._monitor.report(report)
        if isinstance(run.scaling, DelayedScaling):
            run.scaling.end_step()  # after the report, which shows the scales that this step has used
        elif isinstance(run.scaling, GeoScaleEngine):
            run.scaling.end_step()  # likewise
            if report.iteration % self.args.log_interval == 0 or report.iteration == self.args.train_iters:
                for sentence in run.scaling.news():
                    print_from_reporter(sentence)

    def _inject(self, fault: Fault) -> None:
        """A sudden change of the weights before this step's forward."""
        run = self.run
        self._gather_params()
        if fault.kind == "load_weights":
            load_weights(run, fault.directory)
        else:
            inject(fault, self._layers(), self.args.num_layers, run.optimizer)
        self._without_table = True

    def _layers(self) -> Any:
        return find_attention_layers(self.run.chunks, takes_scales=self.run.scaling is not None)

    def _compare_replicas(self) -> None:
        """Stop if attention weights differ between data-parallel replicas. The weights must be gathered."""
        replicas = parallel_state.get_data_parallel_world_size(with_context_parallel=True)
        if self.args.geoscale_check_interval and replicas > 1:
            check_replicas(self._layers())

    def _refresh(self) -> float:
        """Make the scale table agree with the weights if they have changed; milliseconds it took."""
        scaling, state = self.run.scaling, self.state
        due = state.applied_since_refresh >= self.args.geoscale.refresh_interval
        if not isinstance(scaling, GeoScaleEngine) or not (due or self._without_table):
            return 0.0
        self._gather_params()
        # On a GPU the host runs ahead of the device: whether all was finite is asked where it waits anyway.
        scaling.refresh(check=not torch.cuda.is_available())
        self._unchecked = torch.cuda.is_available()
        self._without_table = False
        if due:  # a run that has been resumed between two refreshes keeps their rhythm
            state.applied_since_refresh = 0
        return scaling.refresh_ms

    def _check_finite(self) -> None:
        """Before an update is applied, stop if the refresh of this step met weights that are not finite."""
        if self._unchecked:
            self.run.scaling.check_finite()
            self._unchecked = False

    def _gather_params(self) -> None:
        """Make the weights final where gathering them overlaps the forward: until then replicas differ."""
        if self.args.overlap_param_gather:
            for chunk in self.run.chunks:
                chunk.start_param_sync(force_sync=True)

    def _valid_data_wanted(self) -> bool:
        return self.args.eval_iters > 0 and self.args.has_validation

    @torch.no_grad()
    def evaluate(self) -> None:
        """Mean loss over --eval-iters global batches of the validation split, with the scales of the new weights."""
        args = self.args
        self._refresh()
        for chunk in self.run.chunks:
            chunk.eval()
        consumed = (self.state.iteration // args.eval_interval - 1) * args.eval_iters * args.global_batch_size
        iterators = self._per_chunk(self._valid_data, consumed)
        update_num_microbatches(args.global_batch_size)
        losses = [_run_schedule(self.run, iterators, forward_only=True) for _ in range(args.eval_iters)]
        self._check_finite()
        update_num_microbatches(self.state.consumed_samples)
        self._monitor.report_validation(self.state.iteration, losses)
        for chunk in self.run.chunks:
            chunk.train()
