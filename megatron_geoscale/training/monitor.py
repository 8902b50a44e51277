"""What a run tells: Megatron's log line, the JSONL of DESIGN, TensorBoard and, if asked, wandb.

The reporter is the first tensor- and data-parallel rank of the last pipeline stage, the first rank that knows the
loss. Gauges are summed over the whole job, by all ranks together, once an iteration with `--geoscale-log-jsonl` and
once a log interval without.
"""

from __future__ import annotations

import json
import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

import torch
import torch.distributed as dist
from megatron.core import parallel_state

from megatron_geoscale.attention.emulated import EmulatedAttention
from megatron_geoscale.scaling.engine import GeoScaleEngine
from megatron_geoscale.scaling.formats import Powers, powers_to_db
from megatron_geoscale.scaling.slots import SLOTS
from megatron_geoscale.scaling.table import BOUNDS, digest
from megatron_geoscale.training.checkpointing import Run
from megatron_geoscale.training.writers import Writers

_LAYER_BOUNDS = ("sigma", "sigma_bound", "logit_bound", "amax_q", "amax_k", "amax_v")
_BOUNDED_SLOTS = ("qkv", "logits", "o")
"""Slots whose utilisation says how tight a bound is: the softmax output's is 1 by construction, and the gradients are
scaled by what they are."""


@dataclass
class StepReport:
    """One iteration, as this rank saw it."""

    iteration: int
    loss: torch.Tensor | None
    """0-dim, on the last pipeline stage only."""
    grad_norm: float | None
    learning_rate: float
    seconds: float
    refresh_ms: float
    batch_size: int
    skipped: bool
    measured_sqnr: bool


def is_reporter() -> bool:
    """Whether this rank writes the logs."""
    return (
        parallel_state.is_pipeline_last_stage()
        and parallel_state.get_tensor_model_parallel_rank() == 0
        and parallel_state.get_data_parallel_rank(with_context_parallel=True) == 0
    )


def print_from_reporter(text: str) -> None:
    """Print on the rank that writes the logs, with a time stamp as Megatron's."""
    if is_reporter():
        print(time.strftime(" [%Y-%m-%d %H:%M:%S] ") + text, flush=True)


class Monitor:
    """Collects from the run's gauges and writes the logs."""

    def __init__(self, run: Run) -> None:
        self._run, self._args = run, run.args
        modules = [m for chunk in run.chunks for m in chunk.modules()]
        self._scaled = [m for m in modules if getattr(m, "scaler", None) is not None]
        self._emulated = [m for m in self._scaled if isinstance(m, EmulatedAttention)]
        self._jsonl: TextIO | None = None
        self._writers: Writers | None = None
        self._interval = _Interval()
        if is_reporter():
            self._open()

    def _open(self) -> None:
        args = self._args
        if args.geoscale_log_jsonl:
            path = Path(args.geoscale_log_jsonl)
            path.parent.mkdir(parents=True, exist_ok=True)
            self._jsonl = path.open("a")
        self._writers = Writers(args)

    def measure_sqnr(self, on: bool) -> None:
        """Whether the coming step compares its attention output with that of uncast attention."""
        for module in self._emulated:
            module.measure_sqnr = on

    def report(self, step: StepReport) -> None:
        """Log one iteration. Collective over the whole job, where there is something to collect."""
        args, interval = self._args, self._interval
        interval.add(step)
        at_interval = step.iteration % args.log_interval == 0 or step.iteration == args.train_iters
        geoscale = None
        if self._run.scaling is not None and (args.geoscale_log_jsonl or at_interval):
            geoscale = self._collect(step)
            interval.saturated += geoscale["saturated"]
        if not is_reporter():
            interval.reset(at_interval)
            return
        record: dict[str, Any] = {
            "iteration": step.iteration,
            "lm_loss": float(step.loss) if step.loss is not None else None,
            "grad_norm": step.grad_norm,
            "learning_rate": step.learning_rate,
            "tokens_per_second": step.batch_size * args.seq_length / step.seconds,
            "step_ms": step.seconds * 1e3,
        }
        if self._jsonl is not None:
            self._jsonl.write(json.dumps(_finite({**record, "geoscale": geoscale})) + "\n")
            self._jsonl.flush()
        if at_interval:
            self._log_line(step, geoscale)
            assert self._writers is not None  # the reporter has opened them
            scalars = {**record, **{f"geoscale/{name}": value for name, value in (geoscale or {}).items()}}
            self._writers.write(step.iteration, scalars, (geoscale or {}).get("layers", ()))
        interval.reset(at_interval)

    def _log_line(self, step: StepReport, geoscale: dict[str, Any] | None) -> None:
        args, interval = self._args, self._interval
        per_step_ms = interval.seconds / interval.steps * 1e3
        parts = [
            f"iteration {step.iteration:8d}/{args.train_iters:8d}",
            f"consumed samples: {self._run.state.consumed_samples:12d}",
            f"elapsed time per iteration (ms): {per_step_ms:.1f}",
        ]
        if args.log_throughput:
            parts.append(f"tokens per second: {step.batch_size * args.seq_length / per_step_ms * 1e3:.0f}")
        parts += [
            f"learning rate: {step.learning_rate:.6E}",
            f"global batch size: {step.batch_size:5d}",
            f"lm loss: {interval.loss / interval.steps:.6E}",
            f"loss scale: {float(self._run.optimizer.get_loss_scale()):.1f}",
        ]
        if step.grad_norm is not None:
            parts.append(f"grad norm: {step.grad_norm:.3f}")
        parts.append(f"number of skipped iterations: {interval.skipped:3d}")
        if geoscale is not None:
            parts.append(f"saturated values: {interval.saturated}")
            parts.append(f"refresh (ms): {interval.refresh_ms / interval.steps:.1f}")
        print_from_reporter(" | ".join(parts) + " |")

    def report_validation(self, iteration: int, losses: list[torch.Tensor | None]) -> None:
        """Log the mean of the validation losses; None on stages that do not know them."""
        if not is_reporter():
            return
        loss = float(torch.stack([loss for loss in losses if loss is not None]).mean())
        print_from_reporter(
            f"validation loss at iteration {iteration} | lm loss value: {loss:.6E} | "
            f"lm loss PPL: {math.exp(min(20.0, loss)):.6E} |"
        )
        assert self._writers is not None
        self._writers.write(iteration, {"lm loss validation": loss})

    def _collect(self, step: StepReport) -> dict[str, Any]:
        """The `geoscale` object of the JSONL, the same on all ranks; empties the gauges. Collective over the job."""
        scaling = self._run.scaling
        gauge = scaling.gauge
        if isinstance(scaling, GeoScaleEngine):
            scaling.collect()
        local = torch.zeros(len(gauge.amax), 1, device=gauge.amax.device)
        for module in self._scaled:
            local[module.layer_number - 1] = 1.0
        scales = torch.zeros_like(gauge.amax) if scaling.scales is None else scaling.scales * local
        counts = torch.stack([gauge.saturated, gauge.flushed])
        # Kept as they are, NaN would not be the largest to an all-reduce.
        amax = gauge.amax.nan_to_num(nan=math.inf, posinf=math.inf)
        maxima = torch.stack([gauge.overrange.nan_to_num(nan=math.inf, posinf=math.inf), scales, amax])
        dist.all_reduce(counts)
        dist.all_reduce(maxima, op=dist.ReduceOp.MAX)
        gauge.reset()
        (saturated, flushed), (overrange, scales, amax) = counts, maxima
        bounded = [SLOTS.index(slot) for slot in _BOUNDED_SLOTS]
        result: dict[str, Any] = {
            "digest": None if scaling.scales is None else digest(scales),
            "saturated": int(saturated.sum()),
            "utilization_max": float(overrange[:, bounded].max()),
            "refresh_ms": step.refresh_ms,
            "overrange_max": float(overrange.max()),
            "flushed": int(flushed.sum()),
            "saturated_by_slot": dict(zip(SLOTS, saturated.sum(0).tolist(), strict=True)),
        }
        if step.measured_sqnr and not self._args.te_attention:
            result["attention_sqnr_db"] = self._collect_sqnr()
        qkv = SLOTS.index("qkv")
        bounds = scaling.table.bounds if isinstance(scaling, GeoScaleEngine) else None
        calibrator = scaling.calibrator if isinstance(scaling, GeoScaleEngine) else None
        alphas = None if calibrator is None else [calibrator.alpha_of(row) for row in range(len(saturated))]
        result["layers"] = [
            {
                "layer": row + 1,
                **{name: None if bounds is None else float(bounds[row, BOUNDS.index(name)]) for name in _LAYER_BOUNDS},
                "scale_qkv": None if scaling.scales is None else float(scales[row, qkv]),
                "saturated": int(saturated[row].sum()),
                "utilization": {SLOTS[column]: float(overrange[row, column]) for column in bounded},
                "amax": {SLOTS[column]: float(amax[row, column]) for column in bounded},
                **({} if alphas is None else {"alpha": alphas[row]}),
            }
            for row in range(len(saturated))
        ]
        return result

    def _collect_sqnr(self) -> float:
        """SQNR in dB of the attention output of the step, over all layers, heads and micro batches."""
        powers = torch.zeros(2, dtype=torch.float64, device=torch.cuda.current_device())
        for module in self._emulated:
            if module.sqnr_powers is not None:
                powers += torch.stack(list(module.sqnr_powers))
                module.reset_sqnr()
        dist.all_reduce(powers)
        return powers_to_db(Powers(*powers))

    def close(self) -> None:
        """Close the logs."""
        if self._jsonl is not None:
            self._jsonl.close()
        if self._writers is not None:
            self._writers.close()


class _Interval:
    """Sums since the last log line."""

    def __init__(self) -> None:
        self.reset(True)

    def reset(self, now: bool) -> None:
        if now:
            self.seconds, self.refresh_ms, self.loss = 0.0, 0.0, 0.0
            self.steps, self.skipped, self.saturated = 0, 0, 0

    def add(self, step: StepReport) -> None:
        self.seconds += step.seconds
        self.refresh_ms += step.refresh_ms
        self.loss += float(step.loss) if step.loss is not None else 0.0
        self.steps += 1
        self.skipped += step.skipped


def _finite(value: Any) -> Any:
    """`value` with NaN and infinities as strings: JSON has no word for them."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_finite(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value
