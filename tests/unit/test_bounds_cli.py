"""`python -m megatron_geoscale.bounds`: THEORY's figures to their printed digits, valid JSON, and mistakes."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from megatron_geoscale.bounds.__main__ import MODELS, main, reference_spectrum

ROOT = Path(__file__).resolve().parents[2]
# THEORY 4.1 to 4.3, columns as MODELS.
FIGURES = {
    "d / (gamma r)": "8.4 13.9 17.3 27.3",
    "4.1 rank-aware": "0.0735 0.0369 0.0297 0.0190",
    "4.2 rank-agnostic": "0.2126 0.1376 0.1238 0.0993",
    "4.3 exact isotropic": "0.0470 0.0255 0.0206 0.0131",
}


def run(capsys, *arguments):
    main(list(arguments))
    return capsys.readouterr().out


def row(table, label):
    (figures,) = re.findall(rf"^ *{re.escape(label)}  +(.*)$", table, re.MULTILINE)
    return figures.split()


def test_the_table_has_theorys_figures_to_the_printed_digit():
    done = subprocess.run(
        [sys.executable, "-m", "megatron_geoscale.bounds"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    table = done.stdout
    assert re.search(r" +".join(model.name for model in MODELS), table)
    for label, figures in FIGURES.items():
        assert row(table, label) == figures.split()
    assert row(table, "sequence length L") == ["1024", "4096", "4096", "4096"]
    assert "delta = 1e-06" in table and max(map(len, table.splitlines())) <= 100
    assert done.stderr == ""


def test_json_says_what_the_table_says(capsys):
    table, data = run(capsys), json.loads(run(capsys, "--json"))
    assert data["delta"] == 1e-6 and data["reference_head"] in table
    assert [model["name"] for model in data["models"]] == [model.name for model in MODELS]
    for label, section, key, digits in (
        ("gamma", None, "gamma", 3),
        ("d / (gamma r)", None, "exponent_ratio", 1),
        ("4.1 rank-aware", "alpha", "rank_aware", 4),
        ("4.4 stable-rank-aware, reference head", "alpha", "stable_rank_aware", 4),
        ("4.5 diagonal, reference head", "alpha", "diagonal", 4),
        ("4.5 diagonal, worst head of rank r", "alpha", "diagonal_worst", 4),
        ("max(4.3, 4.5)", "combined", "exact_isotropic", 4),
        ("||M||_F", "reference", "frobenius", 3),
    ):
        values = [(model[section] if section else model)[key] for model in data["models"]]
        assert row(table, label) == [f"{value:.{digits}f}" for value in values]


def test_the_combined_alpha_is_the_larger_one(capsys):
    for model in json.loads(run(capsys, "--json"))["models"]:
        single = model["alpha"]
        assert single["diagonal"] <= single["diagonal_worst"]
        assert single["exact_isotropic"] < single["stable_rank_aware"] < single["rank_aware"] < single["rank_agnostic"]
        assert model["combined"].keys() == single.keys() - {"diagonal", "diagonal_worst"}
        for name, value in model["combined"].items():
            assert value == max(single[name], single["diagonal"])


def test_delta_and_sequence_length_move_every_alpha(capsys):
    base = json.loads(run(capsys, "--json"))["models"]
    for flags in (("--delta", "1e-9"), ("--seq-length", "131072")):
        for before, after in zip(base, json.loads(run(capsys, "--json", *flags))["models"], strict=True):
            assert after["gamma"] > before["gamma"] and after["reference"] == before["reference"]
            assert all(after["alpha"][name] > value for name, value in before["alpha"].items())
            assert after["seq_length"] == (131072 if "--seq-length" in flags else before["seq_length"])


def test_reference_spectrum_against_a_dense_svd():
    """Small enough to form M = A^T B and all its singular values."""
    d, r = 96, 16
    a, b = torch.randn(2, r, d, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    m = a.T @ b
    s = torch.linalg.svdvals(m)
    norms = reference_spectrum(d, r)
    assert norms["frobenius"] == pytest.approx((s.square().sum().sqrt() / s[0]).item(), rel=1e-9)
    assert norms["schatten4"] == pytest.approx((s.pow(4).sum().pow(0.25) / s[0]).item(), rel=1e-9)
    assert norms["trace"] == pytest.approx((m.trace() / s[0]).item(), rel=1e-9)
    symmetric = torch.linalg.matrix_norm(m + m.T) / 2
    assert norms["symmetric_frobenius"] == pytest.approx((symmetric / s[0]).item(), rel=1e-9)


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--delta", "0"], "--delta must be a probability between 0 and 1, exclusive, got 0"),
        (["--delta", "nan"], "--delta must be a probability"),
        (["--delta", "x"], "argument --delta: invalid float value: 'x'"),
        (["--seq-length", "0"], "--seq-length must be at least 1, got 0"),
    ],
)
def test_mistakes_are_one_sentence_and_exit_code_2(capsys, flags, message):
    with pytest.raises(SystemExit) as stop:
        main(flags)
    error = capsys.readouterr().err
    assert stop.value.code == 2 and message in error and error.count("\n") == 1


def test_math_md_shows_this_table_and_names_tests_that_exist(capsys):
    text = (ROOT / "docs" / "MATH.md").read_text()
    table = run(capsys)
    for label in (*FIGURES, "gamma", "4.4 stable-rank-aware, reference head", "max(4.3, 4.5)"):
        assert row(text, label) == row(table, label)
    named = set(re.findall(r"(tests/[\w/]+\.py)::(\w+)", text))
    assert len(named) >= 5
    for path, test in named:
        assert f"def {test}(" in (ROOT / path).read_text(), f"{path}::{test}"
    for link in re.findall(r"\]\((?!https?:)([^)#]+)", text):
        assert (ROOT / "docs" / link).exists(), link
