#!/usr/bin/env python3
"""Fine-tunes a Hugging Face model on text with DeepSpeed and FP8 attention scaled from the weights.

    deepspeed examples/deepspeed/finetune.py --model DIR --data corpus.txt --output runs/a
    torchrun --nproc-per-node 8 examples/deepspeed/finetune.py --model DIR --data corpus.txt --output runs/a

zero3.json is ZeRO-3 in bfloat16. Run it again with the same --output to go on from its last checkpoint.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

import deepspeed
import torch
import torch.distributed as dist

from megatron_geoscale.config import geoscale_config_from_args
from megatron_geoscale.integrations.deepspeed import attach, compile_nothing

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from finetuning import Text, flags, read_model, report, start


def main(argv: Sequence[str] | None = None) -> None:
    parser = flags(__doc__.splitlines()[0])
    parser.add_argument("--deepspeed-config", type=Path, default=Path(__file__).with_name("zero3.json"), metavar="JSON")
    parser.add_argument("--local_rank", help="what the DeepSpeed launcher passes; the environment says it too")
    args = parser.parse_args(argv)
    device, text = start(), Text(args)
    compile_nothing()
    deepspeed.init_distributed(auto_mpi_discovery=False, verbose=False)

    model = read_model(args.model)
    engine, *_ = deepspeed.initialize(
        model=model, model_parameters=model.parameters(), config=str(args.deepspeed_config)
    )
    scales = attach(engine, geoscale_config_from_args(args))

    _, client = engine.load_checkpoint(str(args.output)) if (args.output / "latest").exists() else (None, None)
    if client:
        scales.load_state_dict(client["scales"])
    size, accumulate = engine.train_micro_batch_size_per_gpu(), engine.gradient_accumulation_steps()

    while engine.global_steps < args.steps:
        step = engine.global_steps
        losses = []
        for micro in range(accumulate):
            tokens = text.batch(step * accumulate + micro, size, device)
            loss = engine(input_ids=tokens, labels=tokens, use_cache=False).loss
            engine.backward(loss)
            engine.step()  # the table follows, once the gradients of all micro batches are applied
            losses.append(loss.detach())
        report(step + 1, torch.stack(losses).mean(), scales)
        if engine.global_steps % args.save_every == 0 or engine.global_steps == args.steps:
            engine.save_checkpoint(str(args.output), client_state={"scales": scales.state_dict()})

    weights = whole_weights(engine.module)
    if dist.get_rank() == 0:
        engine.module.save_pretrained(args.output / "final", state_dict=weights)
        text.tokenizer.save_pretrained(args.output / "final")
    dist.barrier()


def whole_weights(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """On rank 0, gathered one parameter at a time; elsewhere nothing."""
    weights = {}
    for name, parameter in model.named_parameters():
        with deepspeed.zero.GatheredParameters([parameter], enabled=hasattr(parameter, "ds_tensor")):
            if dist.get_rank() == 0:
                weights[name] = parameter.detach().cpu().clone()
    return weights


if __name__ == "__main__":
    main()
    dist.destroy_process_group()
