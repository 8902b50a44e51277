"""tools/replay_transients.py at toy size: what it counts, its JSON, its determinism, where delayed scaling fails."""

import contextlib
import io
import json
import os
import subprocess
import sys

import pytest
import torch

from tests.harness import ROOT

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("megatron")]

KEYS = {
    "scenario", "recipe", "saturated_values", "saturated_steps", "first_saturated_step", "worst_overrange",
    "flushed_values", "transient_sqnr_db", "nonfinite", "utilization_median", "utilization_max", "final_loss",
    "reference_loss",
}  # fmt: skip


INPUT = os.path.dirname(json.__file__)
MODEL = """
    --num-layers 2 --hidden-size 64 --num-attention-heads 4 --group-query-attention --num-query-groups 2
    --seq-length 64 --position-embedding-type rope --normalization RMSNorm --swiglu --ffn-hidden-size 128
    --untie-embeddings-and-output-weights --disable-bias-linear --attention-dropout 0 --hidden-dropout 0
"""


@pytest.fixture(scope="module")
def output(tmp_path_factory):
    return tmp_path_factory.mktemp("replay")


@pytest.fixture(autouse=True, scope="module")
def small():
    """The replays' model at toy size: their runs are forks, which inherit it."""
    import _replay_training

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_replay_training, "MODEL", MODEL)
        patch.setenv("PYTHONPATH", str(ROOT))  # of the tools that it starts
        yield


def replay(output, *flags):
    """What --json prints of a weight spike after four steps of training on one package of the standard library."""
    import replay_transients

    stdout = io.StringIO()
    with contextlib.redirect_stdout(stdout):
        replay_transients.main(["--scenario", "weight_spike", "--base-steps", "4", "--output", str(output),
                                "--input", INPUT, "--json", *flags])  # fmt: skip
    return json.loads(stdout.getvalue())


@pytest.fixture(scope="module")
def toy(output, small):
    return replay(output, "--recipe", "delayed")


def test_one_replay_is_one_object_and_delayed_saturates(toy, output):
    assert set(toy) == KEYS
    assert (toy["scenario"], toy["recipe"]) == ("weight_spike", "delayed")
    assert toy["saturated_values"] > 1000 and toy["worst_overrange"] > 3 and toy["nonfinite"] == 0
    assert toy["first_saturated_step"] <= 9 and toy["utilization_max"] > 1
    assert json.loads((output / "replay.json").read_text()) == [toy]
    assert "| delayed |" in (output / "replay.md").read_text()
    assert (output / "weight_spike.png").read_bytes().startswith(b"\x89PNG")
    log = (output / "runs" / "weight_spike-delayed.log").read_text()
    assert log.startswith("$ python pretrain.py ") and "--geoscale-fault-injection weight_spike:13:4.0" in log


def test_the_numbers_are_those_of_the_records(toy, output):
    lines = (output / "runs" / "weight_spike-delayed.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    assert [record["iteration"] for record in records] == list(range(5, 21))
    assert toy["saturated_values"] == sum(record["geoscale"]["saturated"] for record in records)
    assert toy["transient_sqnr_db"] == records[8]["geoscale"]["attention_sqnr_db"]
    assert toy["final_loss"] == records[-1]["lm_loss"]
    reference = (output / "runs" / "weight_spike-none.jsonl").read_text().splitlines()[-1]
    assert toy["reference_loss"] == json.loads(reference)["lm_loss"]


def test_the_same_again_is_the_same_json_and_trains_nothing(toy, output):
    tracker = output / "base-4" / "latest_checkpointed_iteration.txt"
    before = tracker.stat().st_mtime_ns
    assert replay(output, "--recipe", "delayed", "--workers", "1") == toy
    assert tracker.stat().st_mtime_ns == before


def test_another_checkpoint_and_other_settings(toy, output, tmp_path):
    """Logits cast too, overflow to NaN: certified saturates nothing and ends well, delayed diverges."""
    flags = ["--load", str(output / "base-4"), "--logits-dtype", "fp8", "--overflow", "nan", "--factor", "8"]
    certified = replay(output, "--recipe", "certified", *flags)
    assert certified["saturated_values"] == certified["nonfinite"] == 0 and certified["worst_overrange"] <= 1
    delayed = replay(output, "--recipe", "delayed", *flags)
    assert delayed["nonfinite"] >= 8 and delayed["final_loss"] == "nan"


def test_another_model_with_its_own_data(output, tmp_path):
    """A GPT-2-like checkpoint of the null tokenizer: nothing of the tool's own model or text is used."""
    from tests.functional.common import base, corpus, succeed

    succeed(base("--train-iters 2 --init-method-std 0.2 --save", tmp_path, model="gpt2"))
    found = replay(output, "--recipe", "delayed", "--load", str(tmp_path), "--data-path", str(corpus()))
    assert found["saturated_values"] > 0 and found["worst_overrange"] > 3
    log = (output / "runs" / "weight_spike-delayed.log").read_text()
    assert "--num-layers=2" in log and "--tokenizer-type=NullTokenizer" in log and "swiglu" not in log


@pytest.mark.parametrize("flags, word", [
    (["--factor", "3"], "--factor"), (["--scenario", "fire"], "--scenario"), (["--load", "/nowhere"], "/nowhere"),
    (["--base-steps", "0"], "--base-steps"), (["--data-path", "x"], "--load"), (["--weights", "x"], "--shape"),
])  # fmt: skip
def test_mistakes_are_one_sentence(flags, word, output):
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(ROOT / "tools" / "replay_transients.py"), *flags, "--output", str(output)]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert run.returncode == 2 and word in run.stderr.splitlines()[-1]
    assert "Traceback" not in run.stderr


SMALL = dict(layers=2, hidden_size=96, heads=4, groups=2, head_dim=16, seq_length=128)


@pytest.mark.parametrize("rotary, layer_norm", [(True, False), (False, True)])
def test_layers_of_a_shape_saturate_under_delayed_and_under_no_certified_scale(rotary, layer_norm):
    """All four scenarios at a small shape, logits cast as well."""
    import _replay_shapes
    from _shape_layers import Shape, synthesise

    shape = Shape(**SMALL, rotary=rotary, layer_norm=layer_norm)
    trained = synthesise(shape, 1, torch.device("cpu"))
    found = {}
    for scenario, factor in (("pretrained_load", 1), ("resume", 1), ("lr_spike", 300), ("weight_spike", 4)):
        options = dict(layer=1, tokens=48, factor=factor, logits_dtype="fp8", overflow="saturate")
        recipes = ("certified", "delayed", "current", "paper", "calibrated", "rank_aware")
        steps = _replay_shapes.replay_layer(shape, scenario, recipes, trained, **options)
        again = _replay_shapes.replay_layer(shape, scenario, recipes, trained, **options)
        for recipe in recipes:
            summary = _replay_shapes.summarize(scenario, recipe, [steps[recipe]])
            assert summary == _replay_shapes.summarize(scenario, recipe, [again[recipe]])
            assert set(summary) == KEYS
            found[scenario, recipe] = summary
        for recipe in ("certified", "current"):
            assert found[scenario, recipe]["saturated_values"] == 0
            assert found[scenario, recipe]["worst_overrange"] <= 1
    for scenario in ("pretrained_load", "lr_spike", "weight_spike"):
        assert found[scenario, "delayed"]["saturated_values"] > 20, scenario
        assert found[scenario, "delayed"]["worst_overrange"] > 1.3, scenario
    for scenario in ("pretrained_load", "weight_spike"):
        assert found[scenario, "delayed"]["transient_sqnr_db"] < found[scenario, "certified"]["transient_sqnr_db"] - 3
    resumed = found["resume", "delayed"]  # an empty history: the first step is cast at scale 1
    assert resumed["first_saturated_step"] != 1
    assert resumed["flushed_values"] > found["resume", "current"]["flushed_values"]


def test_projections_of_a_shape_are_what_its_queries_and_keys_are_made_with():
    """The replayed layer computes with the weights that its bounds are made of: Q, K, V equal the folded form."""
    import _shape_layers

    shape = _shape_layers.Shape(**SMALL, rotary=False, layer_norm=True)
    trained = _shape_layers.synthesise(shape, 2, torch.device("cpu"))
    hidden = _shape_layers.draw_tokens(shape, 2, 1, 32, torch.device("cpu"))
    p = trained.projections()
    xhat = torch.nn.functional.layer_norm(hidden.double(), (shape.hidden_size,), eps=1e-5)
    folded = ((p.q, p.q_bias), (p.k, p.k_bias), (p.v, p.v_bias))
    for made, (weight, bias) in zip(_shape_layers.qkv(shape, trained, hidden), folded):
        expected = torch.einsum("td,hed->the", xhat, weight) + bias
        torch.testing.assert_close(made[:, 0].double(), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_weights_of_a_hugging_face_directory(kind, tmp_path):
    """Q, K and V of the replayed layer are those of transformers' own modules."""
    import transformers

    import _shape_layers
    from megatron_geoscale.checkpoints.attention_weights import open_checkpoint

    if kind == "llama":
        config = transformers.LlamaConfig(hidden_size=96, intermediate_size=64, num_hidden_layers=2, vocab_size=50,
                                          num_attention_heads=4, num_key_value_heads=2, head_dim=16)  # fmt: skip
        model = transformers.LlamaForCausalLM(config)
        attention, norm = model.model.layers[1].self_attn, model.model.layers[1].input_layernorm
    else:
        config = transformers.GPT2Config(n_embd=64, n_layer=2, n_head=4, vocab_size=50, n_positions=128)
        model = transformers.GPT2LMHeadModel(config)
        attention, norm = model.transformer.h[1].attn, model.transformer.h[1].ln_1
        torch.nn.init.normal_(norm.bias, std=0.3)
        torch.nn.init.normal_(attention.c_attn.bias, std=0.3)
    torch.nn.init.normal_(norm.weight, mean=1.0, std=0.3)
    model.save_pretrained(tmp_path)
    d, groups = (96, 2) if kind == "llama" else (64, 4)
    shape = _shape_layers.Shape(2, d, 4, groups, 16, 128, rotary=kind == "llama", layer_norm=kind == "gpt2")
    source = open_checkpoint(tmp_path)
    weights = _shape_layers.stored_layer(source, shape, 2, torch.device("cpu"))
    hidden = _shape_layers.draw_tokens(shape, 2, 1, 24, torch.device("cpu"))
    made = _shape_layers.qkv(shape, weights, hidden)
    with torch.no_grad():
        x = norm(hidden)
        if kind == "gpt2":
            expected = [part.view(24, 4, 16) for part in attention.c_attn(x).split(64, dim=-1)]
        else:
            expected = [layer(x).view(24, -1, 16) for layer in (attention.q_proj, attention.k_proj, attention.v_proj)]
            cos, sin = model.model.rotary_emb(x[None], torch.arange(24)[None])
            turned = transformers.models.llama.modeling_llama.apply_rotary_pos_emb(
                *(part.transpose(0, 1)[None] for part in expected[:2]), cos, sin
            )
            expected[:2] = [part[0].transpose(0, 1) for part in turned]
    for part, right in zip(made, expected):
        torch.testing.assert_close(part[:, 0], right, rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match="another shape"):
        _shape_layers.stored_layer(source, _shape_layers.SHAPES["gpt2-xl"], 1, torch.device("cpu"))
