"""inspect_scales.py against dense float64 references, real models and the engine of the run that saved the weights."""

import functools
import importlib
import json
import math
import os
import subprocess
import sys
import weakref

import pytest
import torch
from safetensors.torch import save_file

import inspect_scales
from megatron_geoscale.bounds import rotary_norm_bound
from megatron_geoscale.checkpoints import torch_dist
from megatron_geoscale.checkpoints.attention_weights import open_checkpoint
from megatron_geoscale.checkpoints.inspection import inspect_layers
from megatron_geoscale.config import ESTIMATORS, GEOMETRIC_RECIPES, GRANULARITIES, GeoScaleConfig
from tests.functional.common import base, succeed, train
from tests.functional.inspected import FAMILIES, edited, saver
from tests.harness import ROOT

pytestmark = pytest.mark.usefixtures("megatron")


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    return saver(tmp_path_factory.mktemp("families"))


def inspect(capsys, path, *flags):
    inspect_scales.main([str(path), "--json", *map(str, flags)])
    return json.loads(capsys.readouterr().out)


def wide(values):
    return torch.tensor(values, dtype=torch.float64)


def without(name, record):
    return {key: value for key, value in record.items() if key != name}


def dense_layer(model, index):
    """A and a of Q, K and V in float64, [heads, head_dim, d] and [heads, head_dim], from the model's own modules."""
    config = model.config
    heads = config.num_attention_heads
    if hasattr(model, "transformer"):
        block = model.transformer.h[index]
        norm, groups = block.ln_1, heads
        weights, biases = block.attn.c_attn.weight.T.chunk(3), block.attn.c_attn.bias.chunk(3)
    else:
        block = model.model.layers[index]
        norm, groups = block.input_layernorm, config.num_key_value_heads
        linears = [getattr(block.self_attn, f"{letter}_proj") for letter in "qkv"]
        weights, biases = [linear.weight for linear in linears], [linear.bias for linear in linears]
    shift = getattr(norm, "bias", None)
    folded = []
    for weight, bias, n in zip(weights, biases, (heads, groups, groups)):
        offset = torch.zeros(len(weight), dtype=torch.float64)
        if shift is not None:
            offset = offset + weight.detach().double() @ shift.detach().double()
        if bias is not None:
            offset = offset + bias.detach().double()
        matrix = weight.detach().double() @ torch.diag(norm.weight.detach().double())
        folded.append((matrix.view(n, -1, matrix.shape[-1]), offset.view(n, -1)))
    return folded


def yarn_scale(model):
    return model.model.rotary_emb.attention_scaling if hasattr(model, "model") else 1.0


@pytest.mark.parametrize("family", FAMILIES)
def test_norms_of_every_head_are_those_of_dense_matrices(saved, capsys, family):
    model, path = saved(family)
    found = inspect(capsys, path)
    assert len(found["layers"]) == len(found["heads"]) == 2 and found["warnings"] == []
    rotary = yarn_scale(model)
    for index, (layer, details) in enumerate(zip(found["layers"], found["details"])):
        (a_q, b_q), (a_k, b_k), (a_v, b_v) = dense_layer(model, index)
        a_q, b_q, a_k, b_k = (rotary * rows for rows in (a_q, b_q, a_k, b_k))
        shared = a_k.repeat_interleave(len(a_q) // len(a_k), dim=0)
        values = torch.linalg.svdvals(a_q.mT @ shared)
        sigma = values[:, 0]
        torch.testing.assert_close(wide(found["heads"][index]), sigma, rtol=1e-9, atol=0)
        assert layer["layer"] == details["layer"] == index + 1 and layer["saturated"] == 0
        assert math.isclose(layer["sigma"], float(sigma.max()), rel_tol=1e-9)
        ranks = values.square().sum(-1) / sigma.square()
        torch.testing.assert_close(wide(details["stable_rank"]), ranks, rtol=1e-8, atol=0)

        norms = getattr(model, "model", None) and getattr(model.model.layers[index].self_attn, "q_norm", None)
        for letter, rows, offset in (("q", a_q, b_q), ("k", a_k, b_k), ("v", a_v, b_v)):
            mean_square = rows.square().sum(-1).mean() + offset.square().mean()
            if norms and letter != "v":
                norm = getattr(model.model.layers[index].self_attn, f"{letter}_norm")
                mean_square = (rotary * norm.weight.detach().double()).square().mean()
            used = float(mean_square.sqrt()) * layer["scale_qkv"] / 448
            assert math.isclose(details["utilization"][letter], used, rel_tol=1e-9)
        if norms or not hasattr(model, "model"):
            assert details["rotary_tightness"] is None
        else:
            bounds = rotary_norm_bound(a_q, a_k, rotary_dim=a_q.shape[1])
            plain = torch.linalg.matrix_norm(a_q, 2) * torch.linalg.matrix_norm(shared, 2)
            tightness = float((bounds / plain)[bounds.argmax()])
            assert math.isclose(details["rotary_tightness"], tightness, rel_tol=1e-6) and tightness < 1
            assert math.isclose(layer["sigma_bound"], float(bounds.max()), rel_tol=1e-9)


@pytest.mark.parametrize("family", FAMILIES)
def test_bounds_hold_for_what_the_model_computes(saved, capsys, monkeypatch, family):
    """Q and K after RoPE, V and the logits of a real forward stay below the bounds, by less than 30 times."""
    model, path = saved(family)
    module, seen = importlib.import_module(type(model).__module__), {}
    plain = module.eager_attention_forward

    def observe(attention, query, key, value, *args, **options):
        # GPT-2 hands its scale over in `scaling`, as the others do.
        groups = query.shape[1] // key.shape[1]
        logits = query @ key.repeat_interleave(groups, dim=1).mT * options.get("scaling", attention.scaling)
        tensors = {"amax_q": query, "amax_k": key, "amax_v": value, "logit_bound": logits}
        seen[attention.layer_idx] = {name: float(tensor.abs().max()) for name, tensor in tensors.items()}
        return plain(attention, query, key, value, *args, **options)

    monkeypatch.setattr(module, "eager_attention_forward", observe)
    with torch.no_grad():
        model(torch.randint(64, (8, 64), generator=torch.Generator().manual_seed(1)))
    for layer in inspect(capsys, path)["layers"]:
        for name, value in seen[layer["layer"] - 1].items():
            assert value <= layer[name] <= 30 * value, (name, value, layer[name])
        amax = max(value for name, value in seen[layer["layer"] - 1].items() if name.startswith("amax"))
        assert amax * layer["scale_qkv"] <= 448


def test_sharded_and_headless_directories_give_the_same(saved, capsys, tmp_path):
    model, path = saved("llama")
    expected = inspect(capsys, path)
    model.save_pretrained(tmp_path / "shards", max_shard_size="20KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 2
    assert inspect(capsys, tmp_path / "shards") == expected
    model.model.save_pretrained(tmp_path / "headless")
    assert inspect(capsys, tmp_path / "headless") == expected


def engine_layers(scaling_config, chunks):
    """`layers` of a new engine's first refresh."""
    from megatron_geoscale.scaling.engine import GeoScaleEngine

    engine = GeoScaleEngine.attach(chunks, scaling_config)
    engine.refresh()
    names = inspect_scales.LAYER_BOUNDS
    return [
        {"layer": number, **{name: engine.table.bound(number, name) for name in names},
         "scale_qkv": engine.table.scale(number, "qkv"), "saturated": 0}
        for number in range(1, len(engine.table.bounds) + 1)
    ]


CHOICES = [(recipe, estimator, granularity) for recipe in GEOMETRIC_RECIPES for estimator in ESTIMATORS
           for granularity in GRANULARITIES]


def engines(trainer, go):
    """A `watch`: after training, what new engines make of the weights, under every choice."""
    go()
    names = ("recipe", "estimator", "granularity")
    return {choice: engine_layers(GeoScaleConfig(**dict(zip(names, choice))), trainer.run.chunks) for choice in CHOICES}


GPT2_LIKE = "--apply-layernorm-1p --attention-dropout 0.1"
LLAMA_LIKE = "--kv-channels 12 --untie-embeddings-and-output-weights"
EXTRAS = {
    "gpt2": ("gpt2", GPT2_LIKE, 1),
    "gate and norms": ("gpt2", "--qk-layernorm --attention-output-gate --apply-layernorm-1p", 1),
    "llama bf16": ("llama", "--bf16 --rotary-percent 0.5 --rotary-interleaved", 1),
    "yarn": ("llama", "--position-embedding-type yarn --yarn-rotary-scaling-factor 4 --yarn-mscale 1.5 "
             "--yarn-mscale-all-dim 0.5 --apply-query-key-layer-scaling", 1),
    "tp2 pp2": ("llama", f"{LLAMA_LIKE} --tensor-model-parallel-size 2 --pipeline-model-parallel-size 2", 4),
}


@pytest.fixture(scope="module")
def megatron_checkpoint(megatron, tmp_path_factory):
    """`megatron_checkpoint(case)`: the directory of --save, and what engines made of the weights."""
    folder = tmp_path_factory.mktemp("megatron")

    @functools.cache
    def make(case):
        style, flags, ranks = EXTRAS[case]
        path = folder / case.replace(" ", "-")
        runs = succeed(base("--train-iters 2 --save", path, flags, model=style), ranks, watch=engines)
        return path, runs[-1].value

    return make


@pytest.mark.parametrize("case", EXTRAS)
def test_megatron_checkpoint_gives_what_an_engine_gives(megatron_checkpoint, capsys, case):
    path, expected = megatron_checkpoint(case)
    for recipe, estimator, granularity in CHOICES:
        flags = ("--recipe", recipe, "--estimator", estimator, "--granularity", granularity)
        found, wanted = inspect(capsys, path, *flags)["layers"], expected[recipe, estimator, granularity]
        if granularity == "layer" and EXTRAS[case][2] > 1:  # a sum over tensor-parallel ranks rounds in another order
            assert [layer.keys() for layer in found] == [layer.keys() for layer in wanted]
            for mine, theirs in zip(found, wanted):
                assert all(math.isclose(mine[key], theirs[key], rel_tol=1e-6) for key in mine), flags
        else:
            assert found == wanted, flags


def test_megatron_checkpoint_gives_what_a_resumed_run_logs(megatron_checkpoint, capsys):
    path, _ = megatron_checkpoint("tp2 pp2")
    (record,) = train(base("--train-iters 1 --finetune --load", path, LLAMA_LIKE))
    found = inspect(capsys, path)
    keys = found["layers"][0].keys()
    assert found["layers"] == [{key: layer[key] for key in keys} for layer in record["geoscale"]["layers"]]
    assert [max(heads) for heads in found["heads"]] == [layer["sigma"] for layer in found["layers"]]
    assert inspect(capsys, path / "iter_0000002")["layers"] == found["layers"]


def test_megatron_weights_in_a_hugging_face_directory_give_the_same_bits(megatron_checkpoint, capsys, tmp_path):
    path, _ = megatron_checkpoint("tp2 pp2")
    source, tensors = open_checkpoint(path), {}
    for number in (1, 2):
        weights = source.layer(number)
        stem = f"model.layers.{number - 1}."
        tensors[stem + "input_layernorm.weight"] = weights.gain.float()
        for letter, (weight, _bias) in zip("qkv", (weights.query, weights.key, weights.value)):
            tensors[f"{stem}self_attn.{letter}_proj.weight"] = weight.flatten(0, 1).contiguous()
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(dict(
        model_type="llama", hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        head_dim=12, vocab_size=64, max_position_embeddings=16,
    )))
    for recipe in GEOMETRIC_RECIPES:
        theirs = inspect(capsys, path, "--recipe", recipe)
        mine = inspect(capsys, tmp_path, "--recipe", recipe)
        assert without("model", mine) == without("model", theirs)


def test_one_layer_is_read_at_a_time(megatron_checkpoint, saved, monkeypatch):
    path, _ = megatron_checkpoint("tp2 pp2")
    rows = []
    read = torch_dist.FileSystemReader.read_data

    def watched(reader, plan, planner):
        rows.append({item.storage_index.offset[0] for item in plan.items})
        return read(reader, plan, planner)

    monkeypatch.setattr(torch_dist.FileSystemReader, "read_data", watched)
    open_checkpoint(path).layer(2)
    assert rows and all(read == {1} for read in rows), "chunks of another layer were read"

    for directory in (path, saved("llama")[1]):
        source, alive = open_checkpoint(directory), []
        layer = source.layer

        def tracked(number, layer=layer, alive=alive):
            assert all(reference() is None for reference in alive), "a layer outlived its inspection"
            weights = layer(number)
            alive += [weakref.ref(weights), weakref.ref(weights.query[0])]
            return weights

        source.layer = tracked
        assert len(list(inspect_layers(source, GeoScaleConfig()))) == 2 and len(alive) == 4


def test_gain_outlier_is_a_warning(saved, capsys, tmp_path):
    def spike(tensors):
        tensors["model.layers.1.input_layernorm.weight"][5] = -90.0

    (warning,) = inspect(capsys, edited(saved, tmp_path, spike))["warnings"]
    assert warning.startswith("layer 2: the input norm's largest gain, 90 at channel 5, exceeds 20 times its median")


def test_bound_beyond_float32_is_a_warning(saved, capsys, tmp_path):
    def blow_up(tensors):
        tensors["model.layers.0.self_attn.q_proj.weight"][:12] = 1e38  # head 0

    found = inspect(capsys, edited(saved, tmp_path, blow_up))
    assert found["layers"][0]["scale_qkv"] == 1.0
    assert found["warnings"][0].startswith("layer 1, head 0: Q may reach")
    assert found["warnings"][0].endswith("with the scale 1 E4M3 ends at 448")
    assert not any("layer 2" in warning for warning in found["warnings"])


def test_baselines_get_the_scale_that_they_start_with(saved, capsys, tmp_path):
    def grow(tensors):
        tensors["model.layers.1.self_attn.k_proj.weight"][12:] *= 500.0  # key/value head 1

    path = edited(saved, tmp_path, grow)
    certified, delayed, current = (inspect(capsys, path, "--recipe", r) for r in ("certified", "delayed", "current"))
    assert certified["warnings"] == current["warnings"] == []
    (warning,) = delayed["warnings"]
    assert warning.startswith("layer 2, key/value head 1: K may reach")
    assert [layer["scale_qkv"] for layer in delayed["layers"]] == [1.0, 1.0]
    assert [layer["scale_qkv"] for layer in current["layers"]] == [None, None]
    assert [layer["amax_k"] for layer in delayed["layers"]] == [layer["amax_k"] for layer in certified["layers"]]


def test_heads_of_zeros(saved, capsys, tmp_path):
    def empty(tensors):
        for letter in "qk":
            for what in ("weight", "bias"):
                tensors[f"model.layers.0.self_attn.{letter}_proj.{what}"].zero_()

    path = edited(saved, tmp_path, empty)
    found = inspect(capsys, path, "--plot", tmp_path / "sigma.png")
    assert found["heads"][0] == [0.0] * 4 and found["details"][0]["stable_rank"] == [None] * 4
    assert found["layers"][0]["sigma"] == 0.0 and found["details"][0]["rotary_tightness"] is None
    assert (tmp_path / "sigma.png").read_bytes().startswith(b"\x89PNG")


def test_sequence_length_and_flags_reach_the_bounds(saved, capsys):
    _, path = saved("llama")
    short, default, half = (
        inspect(capsys, path, "--recipe", "rank_aware", *more)["layers"][0]
        for more in (("--seq-length", 4), ("--seq-length", 64), ("--margin", 0.5))
    )
    assert short["amax_q"] < default["amax_q"] == half["amax_q"]
    assert default == inspect(capsys, path, "--recipe", "rank_aware")["layers"][0]
    assert math.isclose(half["scale_qkv"], default["scale_qkv"] / 2, rel_tol=1e-6)
    rare = inspect(capsys, path, "--recipe", "rank_aware", "--seq-length", 4, "--failure-probability", 1e-9)
    assert rare["layers"][0]["amax_q"] > short["amax_q"]


def test_dtype_decides_what_rounding_may_add(saved, capsys, tmp_path):
    def halve(tensors):
        for name in tensors:
            tensors[name] = tensors[name].bfloat16()

    def round_only(tensors):
        for name in tensors:
            tensors[name] = tensors[name].bfloat16().float()

    (bf16,), (fp32,) = (
        [inspect(capsys, edited(saved, tmp_path / name, change))["layers"][0]]
        for name, change in (("a", halve), ("b", round_only))
    )
    assert without("scale_qkv", bf16) == without("scale_qkv", fp32)
    assert 1.02 < fp32["scale_qkv"] / bf16["scale_qkv"] < 1.05


def test_as_a_user_runs_it(saved, tmp_path):
    _, path = saved("qwen2")

    def run(*flags):
        command = [sys.executable, ROOT / "tools" / "inspect_scales.py", *flags]
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        return subprocess.run(list(map(str, command)), capture_output=True, text=True, env=environment, cwd=tmp_path)

    good = run(path)
    assert good.returncode == 0 and good.stderr == "", good.stderr
    assert "qwen2: recipe certified" in good.stdout
    bad = run(tmp_path / "nowhere")
    assert bad.returncode == 2 and bad.stdout == ""
    assert bad.stderr == f"inspect_scales.py: error: {tmp_path / 'nowhere'} does not exist\n"
