"""The benchmarks run, at toy sizes, and what they write has the promised shape; no time is judged here."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
TOY = {
    "refresh.py": ["--shrink", "16", "--rounds", "1", "--demo-rounds", "1"],
    "growth.py": [
        *("--shrink", "16", "--rounds", "2", "--layers", "1", "3", "--heads", "2", "4", "--tensor-parallel", "4", "8"),
        *("--dense-hidden", "96"),
    ],
    "tightness.py": ["--hidden", "96", "--head-dim", "16", "--starts", "64", "--steps", "20", "--positions", "64",
                     "--length", "512"],
}  # fmt: skip


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """All three, side by side: {script: (stdout, JSON)}."""
    folder = tmp_path_factory.mktemp("benchmarks")
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    running = {}
    for script, flags in TOY.items():
        command = [sys.executable, str(ROOT / "benchmarks" / script), "--threads", "1"]
        command += ["--json", str(folder / f"{script}.json"), *flags]
        running[script] = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
        )
    results = {}
    try:
        for script, process in running.items():
            out, err = process.communicate(timeout=280)
            assert process.returncode == 0, err
            results[script] = out, json.loads((folder / f"{script}.json").read_text())
    finally:
        for process in running.values():
            process.kill()
    return results


@pytest.mark.parametrize("script", TOY)
def test_markdown_on_stdout_and_the_machine_in_both(runs, script):
    out, content = runs[script]
    assert out.startswith(content["machine"]["cpu"]) and content["machine"]["threads"] == 1
    blocks = out.split("<!-- table: ")[1:]
    assert blocks
    for block in blocks:
        name, rest = block.split(" -->", 1)
        lines = rest.split(f"<!-- end of table: {name} -->")[0].strip().splitlines()
        assert len(lines) > 2 and len({line.count("|") for line in lines}) == 1


def test_refresh(runs):
    rows = runs["refresh.py"][1]["rows"]
    recipes = ["refresh, certified", "refresh, paper", "refresh, paper, layer granularity"]
    demo, layer = ([row for row in rows if row["case"] == case] for case in ("demo model", "7B-shaped layer"))
    assert [row["what"] for row in demo[1:]] == recipes and [row["what"] for row in layer[-3:]] == recipes
    assert len(demo) + len(layer) == len(rows) and layer[1]["what"] == "norms of 2 heads, Gram"
    assert demo[0]["share"] == layer[0]["share"] == 1.0 and all(row["share"] > 0 and row["ms"] > 0 for row in rows)


def test_growth(runs):
    content = runs["growth.py"][1]
    assert set(content["ceilings"]) == {"matmul_gflops", "gram_gflops", "copy_gbps"}
    rows = {(row["case"], row["layers"], row["heads"], row["groups"]): row for row in content["growth"]}
    shapes = [("layers", 1, 8, 1), ("layers", 3, 8, 1), ("heads", 1, 2, 2), ("heads", 1, 4, 4)]
    assert set(rows) == {*shapes, ("TP", 1, 16, 2), ("TP", 1, 8, 1)}
    for row in rows.values():
        matrices = row["heads"] + 2 * row["groups"]
        elements = matrices * row["head_dim"] * row["hidden"]
        assert row["bytes_read"] == 2 * elements and row["bytes_moved"] == 34 * elements
        assert row["flops"] == matrices * row["head_dim"] * (row["head_dim"] + 1) * row["hidden"]
        ratios = [row[key] for key in row if "share" in key]
        assert len(ratios) == 4 and min(ratios) > 0 and len(row["samples_ms"]) == 2
        for sample in row["samples_ms"]:
            assert min(sample.values()) > 0
    assert [row["what"].split(",")[0] for row in content["dense"]] == [
        "Gram matrices", "power iteration", "QR of A^T and B^T", "power iteration on M = A^T B", "SVD of M = A^T B",
    ]  # fmt: skip
    assert all(row["share"] > 0 for row in content["dense"])


def test_tightness(runs):
    rows = runs["tightness.py"][1]["rows"]
    assert {row["family"].split(":")[0] for row in rows} == {"plain", "GPT-2", "Llama", "Mistral", "Qwen2", "Qwen3"}
    for row in rows:
        plain = row["family"].startswith("plain")
        for name in ("logits", "q", "k", "v"):
            ratio = row[name]
            assert 1.0 <= ratio["least"] <= ratio["median"] <= ratio["worst"]
            assert ratio["worst"] <= (1.05 if plain else 4.0)
        if "balanced_over_plain" in row:
            assert 0 < row["balanced_over_plain"]["worst"] <= 1.0
    rotary = {row["content"]: row for row in rows if row["family"].startswith("Llama")}
    assert rotary["mismatched"]["balanced_over_plain"]["worst"] < 0.1
