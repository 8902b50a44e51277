#!/usr/bin/env python3
"""Fine-tunes a Hugging Face model on text with PyTorch's FSDP2 and FP8 attention scaled from the weights.

    torchrun --nproc-per-node 8 examples/fsdp2/finetune.py --model DIR --data corpus.txt --output runs/a

Weights are float32, computed with in bfloat16. Run it again with the same --output to go on from its last checkpoint.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_state_dict,
    set_state_dict,
)
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

from megatron_geoscale.config import geoscale_config_from_args
from megatron_geoscale.integrations.fsdp import attach

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from finetuning import Text, flags, read_model, report, start


def main(argv: Sequence[str] | None = None) -> None:
    parser = flags(__doc__.splitlines()[0])
    parser.add_argument("--batch-size", type=int, default=1, metavar="N", help="sequences of each rank in a step")
    parser.add_argument("--lr", type=float, default=1e-5, metavar="RATE")
    parser.add_argument("--precision", choices=("bf16", "fp32"), default="bf16", help="of the computation")
    args = parser.parse_args(argv)
    device, text = start(), Text(args)
    dtype = {"bf16": torch.bfloat16, "fp32": torch.float32}[args.precision]
    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32)

    model = read_model(args.model).to(device)
    for layer in model.transformer.h if hasattr(model, "transformer") else model.model.layers:
        fully_shard(layer, mp_policy=policy)
    fully_shard(model, mp_policy=policy)
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, weight_decay=0.01)
    scales = attach(model, geoscale_config_from_args(args), optimizer=optimizer, dtype=dtype)

    def state(step: int) -> dict[str, Any]:
        weights, moments = get_state_dict(model, optimizer)
        return {"model": weights, "optimizer": moments, "scales": scales.state_dict(), "step": torch.tensor(step)}

    step = 0
    saved = sorted(args.output.glob("step_*/.metadata"))  # written last, so the checkpoint is whole
    if saved:
        loaded = state(step)
        dcp.load(loaded, checkpoint_id=saved[-1].parent)
        set_state_dict(model, optimizer, model_state_dict=loaded["model"], optim_state_dict=loaded["optimizer"])
        scales.load_state_dict(loaded["scales"])  # and the table follows the loaded weights
        step = int(loaded["step"])

    while step < args.steps:
        tokens = text.batch(step, args.batch_size, device)
        loss = model(input_ids=tokens, labels=tokens, use_cache=False).loss
        loss.backward()
        optimizer.step()  # the table follows
        optimizer.zero_grad()
        step += 1
        report(step, loss, scales)
        if step % args.save_every == 0 or step == args.steps:
            dcp.save(state(step), checkpoint_id=args.output / f"step_{step:08d}")

    weights = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    if dist.get_rank() == 0:
        model.save_pretrained(args.output / "final", state_dict=weights)
        text.tokenizer.save_pretrained(args.output / "final")
    dist.barrier()


if __name__ == "__main__":
    main()
    dist.destroy_process_group()
