"""benchmarks/parity.py, ablations.py and backward.py at toy size: what they write, that it repeats, what must hold."""

import contextlib
import io
import json
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))

import _captured
import ablations
import backward
import parity

import replay_transients
from tests.functional.common import VOCABULARY, corpus

pytestmark = pytest.mark.usefixtures("megatron")

RECIPES = ("certified", "delayed")
SOURCES = ("Gaussian", "Student t, 3 degrees", "log-normal", "captured")


def quietly(main, *flags):
    """What a script prints, and the JSON that it writes."""
    path = Path(flags[flags.index("--json") + 1])
    with contextlib.redirect_stdout(io.StringIO()) as out:
        main(list(map(str, flags)))
    return out.getvalue(), json.loads(path.read_text())


def toy_flags(folder, inputs):
    """In place of the real text, and of the real model: a later flag wins."""
    return ["--num-layers", 2, "--hidden-size", 64, "--num-attention-heads", 4, "--num-query-groups", 2,
            "--seq-length", 64, "--vocab-size", VOCABULARY, "--tokenizer-type", "NullTokenizer",
            "--data-path", corpus(), "--data-cache-path", folder / "cache"]  # fmt: skip


def parity_flags(output, name):
    return ("--steps", 3, "--seeds", 1, "--recipes", *RECIPES, "--output", output, "--json", output / name)


@pytest.fixture(scope="module")
def output(megatron, tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        for module in (parity, ablations, replay_transients):
            patch.setattr(module, "data_flags", toy_flags)
        patch.setattr(ablations, "TOKENS", 64)
        patch.setattr(backward, "TOKENS", 64)
        yield tmp_path_factory.mktemp("parity")


@pytest.fixture(scope="module")
def compared(output):
    return quietly(parity.main, *parity_flags(output, "parity.json"))


@pytest.fixture(scope="module")
def ablated(compared, output):
    """On the model that the comparison has trained."""
    names = ("powers_of_two", "slack", "causality", "tokens")
    return quietly(ablations.main, "--only", *names, "--load", output / "trained", "--output", output,
                   "--json", output / "ablations.json")  # fmt: skip


def test_backward_scales_beside_each_other(compared, output):
    text, content = quietly(backward.main, "--load", output / "trained", "--output", output, "--lengths", 128, 256,
                            "--json", output / "backward.json")  # fmt: skip
    found = content["backward"]
    assert text.count("<!-- table: backward") == 2
    rows = {(row["case"], row["backward"]): row for row in found["gradients"]}
    assert len(rows) == 6 * len(backward.MODES)
    for (case, mode), row in rows.items():
        if mode == "bound":
            assert row["saturated"] == 0 and row["room of dqkv (bits)"] > 2, case
            assert rows[case, "delayed"]["saturated"] > 0 or "32 times" not in case
            assert row["dV"] > rows[case, "delayed"]["dV"] + 6 or "32 times" not in case
    own, bound, alone = ([row for row in found["length"] if row["backward"] == what]
                         for what in ("own amax", "bound", "bound, weights alone"))
    for a, b, c in zip(own, bound, alone, strict=True):
        assert abs(a["dQ"] - b["dQ"]) < 1 and b["room of dqkv (bits)"] < c["room of dqkv (bits)"]


def test_parity_has_a_row_for_each_recipe(compared):
    text, content = compared
    assert content["settings"] == {"seeds": 1, "steps": 3, "bf16": True}
    rows = {row["recipe"]: row for row in content["rows"]}
    assert list(rows) == ["none", "none, perturbed", *RECIPES]
    lines = text.split("<!-- table: parity -->")[1].split("<!-- end")[0].strip().splitlines()
    assert len(lines) == 2 + len(rows) and len({line.count("|") for line in lines}) == 1
    for recipe, row in rows.items():
        for name in ("loss", "validation"):
            assert 2 < row[name]["mean"] < 10 and len(row["seeds"]) == 1
            gap = row[name]["mean"] - rows["none"][name]["mean"]
            assert row[f"{name}_gap"] == {"mean": gap, "least": gap, "largest": gap} and abs(gap) < 0.1
        assert ("captured" in row) == (recipe in RECIPES)
    assert rows["none"]["loss_gap"]["mean"] == 0.0
    assert rows["none"]["saturated"] == rows["certified"]["saturated"] == 0 < rows["delayed"]["saturated"]


def test_captured_tensors_are_cast_within_the_range_and_the_noise_of_their_formats(compared):
    rows = {row["recipe"]: row["captured"] for row in compared[1]["rows"] if "captured" in row}
    assert rows["certified"]["saturated"] == 0
    for row in rows.values():
        # Three mantissa bits give about 31 dB for Q, K and V, two about 25 dB; gradients pass several casts.
        assert 30 < row["sqnr_db"]["QKV"] < 33
        assert all(10 < row["sqnr_db"][name] < 33 for name in _captured.OUTPUTS)
        assert 0 < row["utilization_qkv_median"] < 2


def test_a_second_call_repeats_no_run_and_captures_the_same(compared, output):
    runs = {path: path.stat().st_mtime_ns for path in (output / "runs").iterdir()}
    _, again = quietly(parity.main, *parity_flags(output, "again.json"))
    assert again["rows"] == compared[1]["rows"]
    assert {path: path.stat().st_mtime_ns for path in runs} == runs


def test_a_loose_scale_costs_little_and_a_tight_one_much(ablated):
    rows = {row["slack"]: row for row in ablated[1]["ablations"]["slack"]}
    for source in SOURCES:
        own = {slack: row[f"{source}: Q, K, V (dB)"] for slack, row in rows.items()}
        assert own["2^0"] - own["2^3"] < 1 and own["2^0"] - own["2^-2"] > 5, source
        assert own["2^0"] - own["2^14"] > 5, source  # the subnormals end it


def test_powers_of_two_cost_less_than_a_decibel(ablated):
    rows = ablated[1]["ablations"]["powers_of_two"]
    by_recipe = {row["recipe"]: {} for row in rows}
    for row in rows:
        by_recipe[row["recipe"]][row["powers of two"]] = row
    assert set(by_recipe) == {"certified", "rank_aware", "calibrated"}
    used = "utilisation of Q, K, V, median"
    for recipe, ways in by_recipe.items():
        assert list(ways) == ["none", "all", "all but P", "P alone"]
        assert 0.5 <= ways["all"][used] / ways["none"][used] <= 1 and ways["all but P"][used] == ways["all"][used]
        assert ways["P alone"][used] == ways["none"][used] and ways["P alone"]["O"] != ways["none"]["O"]
        assert all(abs(row["O"] - ways["none"]["O"]) < 1 for row in ways.values())
        assert recipe != "certified" or not any(row["saturated"] for row in ways.values())


def test_only_the_certified_recipe_withstands_adversarial_tokens(ablated):
    rows = {(row["tokens"], row["recipe"]): row for row in ablated[1]["ablations"]["tokens"]}
    first, fifth = "saturated Q, K, V, O: first step", "saturated Q, K, V, O: fifth"
    assert {kind for kind, _ in rows} == set(ablations.KINDS)
    for kind in ablations.KINDS:
        row = rows[kind, "certified"]
        assert row[first] == row[fifth] == row["saturated logits: first step"] == row["saturated logits: fifth"] == 0
    for recipe in ("rank_aware", "paper", "calibrated", "delayed"):
        assert rows["adversarial", recipe][first] > 0 and rows["isotropic", recipe][first] < 10
    assert rows["adversarial", "calibrated"][fifth] == 0  # alpha was doubled
    assert 0.5 < rows["adversarial", "certified"]["utilisation of Q, K, V: first step"] <= 1


def test_only_current_scaling_lets_a_later_token_change_earlier_ones(ablated):
    rows = {row["recipe"]: row for row in ablated[1]["ablations"]["causality"]}
    assert rows.pop("current")["changed values of earlier tokens"] > 0
    assert set(rows) == {"certified", "rank_aware", "calibrated", "paper", "delayed"}
    assert all(row["changed values of earlier tokens"] == 0 < row["of"] for row in rows.values())


def test_refresh_interval(compared, output, monkeypatch):
    for name, value in {"RUN_STEPS": 4, "SPIKE_STEP": 2, "SPIKES": (100.0,), "INTERVALS": (1, 4)}.items():
        monkeypatch.setattr(ablations, name, value)
    args = ablations.parse(["--output", str(output)])
    rows = ablations.refresh_interval(args)
    assert [row["refresh interval"] for row in rows] == [1, 4, 1, 4]
    assert all(row["saturated values"] == 0 for row in rows if row["refresh interval"] == 1)
    assert rows[3]["largest"] > rows[2]["largest"]  # scales of older weights leave less room


def test_exact_attention_is_that_of_an_explicit_loop():
    g = torch.Generator().manual_seed(0)
    q, k, v, gradient = (torch.randn(5, 2, heads, 8, generator=g) for heads in (4, 2, 2, 4))
    found = _captured.Tensors.of(q, k, v, gradient, 0.3)
    inputs = [x.double().requires_grad_() for x in (q, k, v)]
    out = torch.zeros(5, 2, 4, 8, dtype=torch.float64)
    for b in range(2):
        for head in range(4):
            own_q, own_k, own_v = inputs[0][:, b, head], inputs[1][:, b, head // 2], inputs[2][:, b, head // 2]
            for i in range(5):
                weights = torch.softmax(own_k[: i + 1] @ own_q[i] * 0.3, dim=0)
                out[i, b, head] = weights @ own_v[: i + 1]
    expected = (out, *torch.autograd.grad(out, inputs, gradient.double()))
    for mine, theirs in zip(found.exact, expected, strict=True):
        assert torch.allclose(mine, theirs, rtol=1e-10, atol=1e-12)


def test_plot(ablated, tmp_path):
    pytest.importorskip("matplotlib")
    ablations.plot(ablated[1]["ablations"]["slack"], tmp_path / "slack.png")
    assert (tmp_path / "slack.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("main, flags, word", [
    (parity.main, ["--seeds", "0"], "--seeds"),
    (parity.main, ["--recipes", "none"], "none"),
    (ablations.main, ["--only", "margin", "--plot", "x.png"], "--plot"),
])  # fmt: skip
def test_mistakes_are_one_sentence(main, flags, word, capsys):
    with pytest.raises(SystemExit) as exit_:
        main(flags)
    assert exit_.value.code == 2
    sentence = capsys.readouterr().err
    assert sentence.count("\n") == 1 and word in sentence


def test_a_directory_without_a_checkpoint_is_named(tmp_path):
    with pytest.raises(ValueError, match=f"--load {tmp_path} holds no"):
        ablations.main(["--only", "margin", "--load", str(tmp_path), "--output", str(tmp_path)])
