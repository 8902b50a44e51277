"""examples/fsdp2 and examples/deepspeed at toy size: train, save, go on as if nothing had stopped, leave a model."""

import contextlib
import importlib.util
import io
import json
import os

import pytest
import torch

from tests.functional.data_tools import save_hf_tokenizer
from tests.functional.hf_models import random_model
from tests.harness import ROOT, run_ranks
from tests.sharded_models import preload

LINES = [f"{a} and {b} are {a + b}, less than {a + b + 1}\n" for a in range(12) for b in range(12)]
LENGTH = 24


@pytest.fixture(scope="module")
def inputs(megatron, tmp_path_factory):
    """A Qwen2 with tied embeddings and its tokenizer, and a text."""
    preload()
    folder = tmp_path_factory.mktemp("model")
    save_hf_tokenizer(folder, LINES, 300, eos_token="<eos>")
    fields = dict(vocab_size=304, hidden_size=36, num_hidden_layers=2, num_attention_heads=6, num_key_value_heads=3,
                  max_position_embeddings=LENGTH, intermediate_size=24, tie_word_embeddings=True)
    random_model("Qwen2", fields, seed="example").save_pretrained(folder)
    text = folder / "text.txt"
    text.write_text("".join(LINES))
    return folder, text


@pytest.fixture(params=["fsdp2", "deepspeed"])
def example(request, inputs, tmp_path):
    """`example(output, steps, *more)`: the records of both ranks' run of the script, by rank."""
    path = ROOT / "examples" / request.param / "finetune.py"
    spec = importlib.util.spec_from_file_location(f"finetune_{request.param}", path)
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    more = ["--lr", "1e-3"]
    if request.param == "deepspeed":
        config = json.loads(path.with_name("zero3.json").read_text())
        config["optimizer"]["params"]["lr"] = 1e-3
        config["gradient_accumulation_steps"] = 2
        (tmp_path / "zero3.json").write_text(json.dumps(config))
        more = ["--deepspeed-config", tmp_path / "zero3.json"]

    def main(rank, world, output, steps, options):
        os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world))
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            script.main([*map(str, ["--model", inputs[0], "--data", inputs[1], "--output", tmp_path / output, "--steps",
                                    steps, "--sequence-length", LENGTH, "--save-every", 2, *more, *options])])
        return [json.loads(line) for line in printed.getvalue().splitlines() if line.startswith("{")]

    def run(output, steps, *options):
        return run_ranks(main, 2, output, steps, options)

    return run


def test_a_run_that_stopped_goes_on_as_if_it_had_not(example, inputs, tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    recipe = ("--geoscale-recipe", "calibrated", "--geoscale-burn-in-steps", 3)  # the burn-in ends after the resume
    whole, silent = example("whole", 4, *recipe)
    assert [record["step"] for record in whole] == [1, 2, 3, 4] and silent == []
    assert whole[3]["loss"] < whole[0]["loss"]
    assert len({record["digest"] for record in whole}) == 4 and not any(record["saturated"] for record in whole)

    first, _ = example("halves", 2, *recipe)
    second, _ = example("halves", 4, *recipe)
    for expected, found in zip(whole, first + second, strict=True):
        assert {**expected, "refresh_ms": 0} == {**found, "refresh_ms": 0}

    weights = []
    for output in ("whole", "halves"):
        model = AutoModelForCausalLM.from_pretrained(tmp_path / output / "final", dtype="auto")
        weights.append(dict(model.named_parameters()))
        assert model.lm_head.weight is model.model.embed_tokens.weight
    assert all(torch.equal(mine, weights[1][name]) for name, mine in weights[0].items())
    before = AutoModelForCausalLM.from_pretrained(inputs[0])
    assert not torch.equal(before.model.norm.weight, weights[0]["model.norm.weight"].float())
    mine, theirs = (AutoTokenizer.from_pretrained(folder) for folder in (tmp_path / "whole" / "final", inputs[0]))
    assert mine(LINES[5])["input_ids"] == theirs(LINES[5])["input_ids"]
