"""Time and memory of inspect_scales.py at Llama-2-70B's shapes, on random weights.

Writes the attention tensors of a few of the 80 layers in bfloat16, 168 MB each, to a temporary directory, reads them
as the tool does, one layer after another, and prints the seconds of a layer, of processor time, which on one thread and
an idle machine is wall time, and the peak of the resident memory. The files come from the system's cache.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import resource
import statistics
import sys
import tempfile
import time
from pathlib import Path

import psutil
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from _measure import machine_line, parser, progress, set_up, write_json

from megatron_geoscale.checkpoints.attention_weights import open_checkpoint
from megatron_geoscale.checkpoints.inspection import inspect_layers
from megatron_geoscale.config import GEOMETRIC_RECIPES, GeoScaleConfig

ALL_LAYERS, HIDDEN, HEADS, GROUPS, HEAD_DIM = 80, 8192, 64, 8, 128


def write(directory: Path, layers: int) -> None:
    """A Hugging Face directory of `layers` layers, one file each."""
    from safetensors.torch import save_file

    weight_map = {}
    for layer in range(layers):
        torch.manual_seed(layer)
        stem, file = f"model.layers.{layer}.", f"model-{layer:05d}.safetensors"
        tensors = {stem + "input_layernorm.weight": torch.rand(HIDDEN).to(torch.bfloat16) + 0.5}
        for letter, heads in (("q", HEADS), ("k", GROUPS), ("v", GROUPS)):
            weight = torch.empty(heads * HEAD_DIM, HIDDEN, dtype=torch.bfloat16).normal_(std=0.02)
            tensors[f"{stem}self_attn.{letter}_proj.weight"] = weight
        save_file(tensors, directory / file)
        weight_map |= dict.fromkeys(tensors, file)
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    (directory / "config.json").write_text(json.dumps({
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "num_hidden_layers": layers,
        "hidden_size": HIDDEN, "num_attention_heads": HEADS, "num_key_value_heads": GROUPS, "vocab_size": 32000,
        "max_position_embeddings": 4096,
    }))  # fmt: skip


def main() -> None:
    options = parse()
    about = set_up(options.threads)
    with tempfile.TemporaryDirectory(dir=options.directory) as name:
        progress(f"writing {options.layers} layers")
        writer = multiprocessing.get_context("fork").Process(target=write, args=(Path(name), options.layers))
        writer.start()  # a process of its own, whose memory is not counted
        writer.join()
        if writer.exitcode:
            raise SystemExit("the weights could not be written")
        before = psutil.Process().memory_info().rss
        seconds, start = [], time.process_time()
        for report in inspect_layers(open_checkpoint(Path(name)), GeoScaleConfig(recipe=options.recipe)):
            seconds.append(time.process_time() - start)
            progress(f"layer {report.number}: {seconds[-1]:.1f} s, sigma {report.bounds['sigma']:.4g}")
            start = time.process_time()
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    numbers, layer = (HEADS + 2 * GROUPS) * HEAD_DIM * HIDDEN, statistics.median(seconds)
    print(
        f"{machine_line(about)}\n"
        f"Llama-2-70B's shapes in bfloat16, {options.layers} of {ALL_LAYERS} layers, recipe {options.recipe}: "
        f"{layer:.1f} s of processor time a layer (median), {layer * ALL_LAYERS / 60:.1f} min for all {ALL_LAYERS}.\n"
        f"Resident memory: {before / 2**20:.0f} MiB before the first layer, {peak / 2**20:.0f} MiB at its peak; "
        f"a layer's weights are {numbers * 2 / 2**20:.0f} MiB as stored and {numbers * 8 / 2**20:.0f} in float64."
    )
    write_json(options.json, about, {"recipe": options.recipe, "seconds": seconds, "rss": before, "peak_rss": peak})


def parse() -> argparse.Namespace:
    options = parser(__doc__)
    options.add_argument("--layers", type=int, default=8)
    options.add_argument("--recipe", choices=GEOMETRIC_RECIPES, default="certified")
    options.add_argument("--directory", type=Path, help="where there is room for the weights (default: the system's)")
    return options.parse_args()


if __name__ == "__main__":
    main()
