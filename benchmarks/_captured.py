"""Real attention tensors of a trained model, and what FP8 attention loses on them under any scaler.

`in_model(flags, checkpoint, work, ...)` forks a process with a one-rank process group, builds the model that the flags
of pretrain.py describe, loads the checkpoint's weights and calls `work(model, ...)`. `Model.capture` runs batches of
held-out text through uncast attention and keeps every layer's Q and K (after RoPE), V and dO; `measure` casts the same
tensors under a recipe. The reference is attention in float64 on the same tensors, with autograd's gradients.
"""

from __future__ import annotations

import multiprocessing
import sys
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from _measure import megatron_on_one_rank
from torch import Tensor

from _runs import import_once

GRADIENTS = ("dQ", "dK", "dV")
OUTPUTS = ("O", *GRADIENTS)
HISTORY = 2
"""Batches before the one that is measured: the history of delayed scaling, the burn-in of `calibrated`."""

T = TypeVar("T")


@dataclass(frozen=True)
class Tensors:
    """One layer's attention in one batch: q [s, b, heads, d], k and v [s, b, groups, d], dO as q; and what exact causal
    attention makes of them, O, dQ, dK, dV in float64."""

    q: Tensor
    k: Tensor
    v: Tensor
    gradient: Tensor
    softmax_scale: float
    exact: tuple[Tensor, ...]

    @classmethod
    def of(cls, q: Tensor, k: Tensor, v: Tensor, gradient: Tensor, softmax_scale: float) -> Tensors:
        q, k, v, gradient = (x.detach().float() for x in (q, k, v, gradient))
        inputs = [x.double().requires_grad_() for x in (q, k, v)]
        with torch.enable_grad():
            out = causal_attention(*inputs, softmax_scale)
            found = torch.autograd.grad(out, inputs, gradient.double())
        return cls(q, k, v, gradient, softmax_scale, (out.detach(), *found))

    def cast(
        self, scaler: Any, *, fp8_logits: bool = False, fp8_backward: bool = True, part: slice = slice(None)
    ) -> dict[str, Any]:
        """Signal and noise (`formats.Powers`) of O, dQ, dK, dV, and of Q, K, V themselves, under `scaler`. Without an
        FP8 backward pass the tensors are BF16, as Transformer Engine's are. part: the tokens whose O, dQ, dK, dV
        count."""
        from megatron_geoscale.scaling.formats import SLOT_FORMATS, Powers, cast, signal_and_noise

        dtype = torch.float32 if fp8_backward else torch.bfloat16
        inputs = [x.to(dtype, copy=True).requires_grad_() for x in (self.q, self.k, self.v)]
        with torch.enable_grad():
            out = self.attend(*inputs, scaler, fp8_logits=fp8_logits, fp8_backward=fp8_backward)
            found = torch.autograd.grad(out, inputs, self.gradient.to(dtype))
        powers = {
            name: signal_and_noise(exact[part], x[part])
            for name, exact, x in zip(OUTPUTS, self.exact, (out, *found), strict=True)
        }
        own = (self.q, self.k, self.v)
        scale = scaler.scale("qkv", *own)
        parts = [signal_and_noise(x, cast(x, scale, SLOT_FORMATS["qkv"]).values) for x in own]
        return powers | {"QKV": Powers(*(torch.stack(column).sum() for column in zip(*parts)))}

    def attend(self, q: Tensor, k: Tensor, v: Tensor, scaler: Any, **options: Any) -> Tensor:
        """FP8 attention on other tensors of the same shapes, with `options` of `fp8_attention`."""
        from megatron_geoscale.attention.fp8_function import fp8_attention

        masked = torch.ones(len(q), len(k), dtype=torch.bool).triu(1)
        return fp8_attention(
            q, k, v, scaler=scaler, softmax_scale=self.softmax_scale, masked=masked, **options
        )


def causal_attention(q: Tensor, k: Tensor, v: Tensor, softmax_scale: float) -> Tensor:
    """Uncast attention on [s, b, heads, d], differentiable, in the dtype of its inputs."""
    q, k, v = (x.permute(1, 2, 0, 3) for x in (q, k, v))
    out = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=softmax_scale, enable_gqa=True)
    return out.permute(2, 0, 1, 3)


class Model:
    """A model with weights from a checkpoint, and batches of held-out text. Needs megatron on one rank."""

    def __init__(self, flags: Sequence[object], checkpoint: Path) -> None:
        from megatron_geoscale.training import checkpointing, data, model
        from megatron_geoscale.training.arguments import parse_args

        held_out = ["--split", "95,5,0", "--eval-iters", HISTORY + 1, "--eval-interval", 1, "--train-iters", 1]
        args = parse_args([*map(str, [*flags, *held_out, "--lr-warmup-iters", 0, "--geoscale-recipe", "certified"])])
        tokenizer = data.build_tokenizer(args.tokenizer_type, args.tokenizer_model, args.vocab_size)
        args.tokenizer_vocab_size = args.model_vocab_size = tokenizer.vocab_size
        args.padded_vocab_size = data.padded_vocab_size(tokenizer.vocab_size, args.make_vocab_size_divisible_by, 1)
        self.args, self.chunks = args, model.build_model(args)
        run = checkpointing.Run(
            args=args, chunks=self.chunks, optimizer=model.build_optimizer(args, self.chunks), scheduler=None,
            scaling=None, state=checkpointing.TrainState(),
        )  # fmt: skip
        checkpointing.load_weights(run, str(checkpoint))
        self._text = data.build_datasets(args, tokenizer)[1]

    def capture(self) -> list[list[Tensors]]:
        """Tensors of every layer in each of HISTORY + 1 batches; dO is the gradient of the mean token loss."""
        from megatron_geoscale.scaling.layers import find_attention_layers
        from megatron_geoscale.training.data import build_iterator, get_batch

        layers = find_attention_layers(self.chunks)
        iterator = build_iterator(self._text, 0, self.args)
        captured = []
        for _ in range(HISTORY + 1):
            batch = get_batch(iterator, self.args)
            taps = [_Tap(layer.core_attention) for layer in layers]
            try:
                losses = self.chunks[0](
                    batch["tokens"], batch["position_ids"], batch["attention_mask"], labels=batch["labels"]
                )
                losses.float().mean().backward()
            finally:
                for tap in taps:
                    tap.remove()
            captured.append([tap.tensors() for tap in taps])
        return captured


class _Tap:
    """Computes a core attention without casts, and keeps what goes through it."""

    def __init__(self, core: Any) -> None:
        self._core, self._scale = core, core.softmax_scale * core.logit_multiplier
        core.forward = self._forward

    def _forward(self, query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> Tensor:
        self._inputs = (query, key, value)
        out = causal_attention(query, key, value, self._scale)
        out.register_hook(self._keep_gradient)
        return out.flatten(2)

    def _keep_gradient(self, gradient: Tensor) -> None:
        self._gradient = gradient

    def remove(self) -> None:
        del self._core.forward  # the class's own comes back

    def tensors(self) -> Tensors:
        return Tensors.of(*self._inputs, self._gradient, self._scale)


def attach_after(
    model: Model, history: Sequence[Sequence[Tensors]], config: Any, adjust: Callable[[Tensor], Tensor] = lambda x: x
) -> tuple[Any, list[Any]]:
    """A recipe's scales after it has seen `history`, with empty gauges, and every layer's scaler.

    adjust: changes the scale table [layers, slots] of a geometric recipe. Applied after every step, so it must be
    idempotent.
    """
    from megatron_geoscale.attention.spec import attach_scaling
    from megatron_geoscale.scaling.layers import find_attention_layers

    def swapped() -> None:
        if config.is_geometric:
            scaling.table.scales.copy_(adjust(scaling.table.scales))

    scaling = attach_scaling(model.chunks, config)
    if config.is_geometric:
        scaling.refresh()
    swapped()
    scalers = [layer.core_attention.scaler for layer in find_attention_layers(model.chunks)]
    for batch in history:
        for tensors, scaler in zip(batch, scalers, strict=True):
            tensors.cast(scaler, **_options(config))
        scaling.end_step()
        swapped()
    scaling.gauge.reset()
    return scaling, scalers


def measure(
    model: Model, captured: Sequence[Sequence[Tensors]], config: Any, adjust: Callable[[Tensor], Tensor] = lambda x: x
) -> dict[str, Any]:
    """What the casts of a recipe lose on the last batch, after the others were its history, `adjust` as `attach_after`.

    Powers of all layers are added up; utilisation is max|x| * scale / FP8_max.
    """
    scaling, scalers = attach_after(model, captured[:-1], config, adjust)
    powers = [
        tensors.cast(scaler, **_options(config))
        for tensors, scaler in zip(captured[-1], scalers, strict=True)
    ]
    return summary(powers, scaling.gauge)


def summary(powers: Sequence[dict[str, Any]], gauge: Any) -> dict[str, Any]:
    """Of results of `Tensors.cast` and the gauge that was told of them."""
    from megatron_geoscale.scaling.slots import SLOTS

    return {
        "sqnr_db": sqnr(powers),
        "utilization": dict(zip(SLOTS, gauge.overrange.amax(dim=0).tolist(), strict=True)),
        "utilization_qkv_median": median(gauge.overrange[:, SLOTS.index("qkv")].tolist()),
        "saturated": int(gauge.saturated.sum()),
        "saturated_by_slot": dict(zip(SLOTS, gauge.saturated.sum(dim=0).tolist(), strict=True)),
        "flushed": int(gauge.flushed.sum()),
        "flushed_by_slot": dict(zip(SLOTS, gauge.flushed.sum(dim=0).tolist(), strict=True)),
    }


def _options(config: Any) -> dict[str, bool]:
    """Of `Tensors.cast`."""
    return {"fp8_logits": config.logits_dtype == "fp8", "fp8_backward": config.backward != "bf16"}


def sqnr(parts: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Decibels of each quantity over all `parts` (results of `Tensors.cast`) together."""
    from megatron_geoscale.scaling.formats import Powers, powers_to_db

    return {
        name: powers_to_db(Powers(*(torch.stack(column).sum() for column in zip(*(part[name] for part in parts)))))
        for name in parts[0]
    }


def recipe_config(recipe: str, **fields: Any) -> Any:
    """The recipe's GeoScaleConfig, with a burn-in that ends before the batch that is measured."""
    from megatron_geoscale.config import GeoScaleConfig

    return GeoScaleConfig(recipe=recipe, **{"burn_in_steps": HISTORY, **fields})


def measure_recipes(model: Model, recipes: Sequence[str]) -> dict[str, dict[str, Any]]:
    """`measure` of each recipe on the same captured tensors."""
    captured = model.capture()
    return {recipe: measure(model, captured, recipe_config(recipe)) for recipe in recipes}


def in_model(flags: Sequence[object], checkpoint: Path, work: Callable[..., T], *arguments: Any) -> T:
    """`work(model, *arguments)` in a forked process of its own; returns its result, plain numbers and containers.

    Raises ValueError for a checkpoint that is not there or does not fit, SystemExit after any other failure, whose
    traceback is on stderr.
    """
    import_once()
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_work, args=(sender, flags, checkpoint, work, arguments))
    process.start()
    sender.close()
    try:
        result, mistake = receiver.recv()
    except EOFError:
        raise SystemExit(f"{Path(sys.argv[0]).name}: the process that casts captured tensors has failed") from None
    finally:
        process.join()
    if mistake is not None:
        raise ValueError(mistake)
    return result


def _work(sender: Any, flags: Sequence[object], checkpoint: Path, work: Callable[..., Any], arguments: Any) -> None:
    torch.set_num_threads(1)
    try:
        with megatron_on_one_rank():
            sender.send((work(Model(flags, checkpoint), *arguments), None))
    except ValueError as error:
        traceback.print_exc()
        sender.send((None, str(error)))
