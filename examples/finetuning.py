"""What the examples of fine-tuning a Hugging Face directory on text share: flags, data, and a line per step."""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path

import torch
import torch.distributed as dist
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from megatron_geoscale.config import add_geoscale_args
from megatron_geoscale.integrations.hugging_face import HuggingFaceScales


def flags(description: str) -> argparse.ArgumentParser:
    """Of both examples, the `--geoscale-*` flags among them."""
    parser = argparse.ArgumentParser(description=description, allow_abbrev=False)
    add = parser.add_argument
    add("--model", type=Path, required=True, metavar="DIR", help="config.json, safetensors and tokenizer")
    add("--data", type=Path, required=True, nargs="+", metavar="FILE", help="text files")
    add("--output", type=Path, required=True, metavar="DIR",
        help="checkpoints, the newest of which is gone on from, and at the end the model as a Hugging Face directory")
    add("--steps", type=int, default=1000, metavar="N")
    add("--sequence-length", type=int, default=1024, metavar="N")
    add("--save-every", type=int, default=200, metavar="STEPS")
    return add_geoscale_args(parser)


def start() -> torch.device:
    """Join the job that torchrun or the DeepSpeed launcher has started; this rank's device."""
    cuda = torch.cuda.is_available()
    if cuda:
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    if not dist.is_initialized():
        dist.init_process_group("nccl" if cuda else "gloo")
    return torch.device("cuda", torch.cuda.current_device()) if cuda else torch.device("cpu")


def read_model(directory: Path) -> PreTrainedModel:
    """In float32 and in training mode; every rank reads it."""
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32, local_files_only=True)
    return model.train()


class Text:
    """Sequences of the files' tokens in an order that depends on the step alone, so a resumed run goes on in it."""

    def __init__(self, args: argparse.Namespace) -> None:
        tokenizer = AutoTokenizer.from_pretrained(args.model, local_files_only=True)
        end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
        tokens: list[int] = []
        for path in args.data:
            tokens += tokenizer(path.read_text(encoding="utf-8"), verbose=False)["input_ids"] + end
        count = len(tokens) // args.sequence_length
        if count == 0:
            raise SystemExit(f"the {len(tokens)} tokens of --data do not fill one sequence of {args.sequence_length}")
        self._sequences = torch.tensor(tokens[: count * args.sequence_length]).view(count, -1)
        self.tokenizer = tokenizer

    def batch(self, step: int, size: int, device: torch.device) -> torch.Tensor:
        """[size, sequence length] of this rank at `step`, from 0."""
        first = (step * dist.get_world_size() + dist.get_rank()) * size
        order = torch.randperm(len(self._sequences), generator=torch.Generator().manual_seed(0))
        return self._sequences[order[torch.arange(first, first + size) % len(order)]].to(device)


def report(step: int, loss: torch.Tensor, scales: HuggingFaceScales) -> None:
    """Print a JSON line from rank 0: mean loss, values that FP8 saturated in this step, and the refresh's time."""
    mean = loss.detach().float()
    dist.all_reduce(mean)
    line = {"step": step, "loss": round(float(mean) / dist.get_world_size(), 6), "saturated": scales.saturated(),
            "refresh_ms": round(scales.refresh_ms, 1), "digest": scales.digest()}
    scales.gauge.reset()
    if dist.get_rank() == 0:
        print(json.dumps(line), flush=True)
