"""convert_hf.py: mistakes in one sentence, nothing half-written whatever happens, and little memory."""

import argparse
import json
import os
import re
import resource
import shutil
import signal
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import _conversion
from _cli import run
from megatron_geoscale.checkpoints.hf_writer import Entry, write_safetensors
from tests.functional.hf_models import COMMON, LLAMA3_ROPE, VOCABULARY, convert, importer


@pytest.fixture(scope="module")
def imported(tmp_path_factory):
    """`imported(family)`, as `importer`'s."""
    return importer(tmp_path_factory.mktemp("families"))


def assert_refused(words, *argv):
    """The conversion ends with a sentence that `words` are in, and there is no new file."""
    target = Path(argv[-1])
    before = sorted(target.parent.rglob("*"))
    with pytest.raises(ValueError, match=words) as raised:
        convert(*argv)
    assert "\n" not in str(raised.value) and len(str(raised.value)) < 600
    assert sorted(target.parent.rglob("*")) == before


def copied(imported, tmp_path, family="llama-2"):
    return Path(shutil.copytree(imported(family)[1], tmp_path / "hf"))


def change_config(folder, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def change_tensor(folder, name, change):
    path = folder / "model.safetensors"
    tensors = load_file(path)
    tensors[name] = change(tensors[name])
    save_file(tensors, path)


def poison(value):
    def change(tensor):
        tensor.view(-1)[7] = value
        return tensor
    return change


UP = "model.layers.1.mlp.up_proj.weight"


def truncate(folder):
    path = folder / "model.safetensors"
    os.truncate(path, path.stat().st_size - 100)


def pickled(folder):
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def index(**weight_map):
    def write(folder):
        (folder / "model.safetensors").rename(folder / "a.safetensors")
        names = load_file(folder / "a.safetensors")
        content = {"weight_map": dict.fromkeys(names, "a.safetensors") | weight_map.get("more", {})}
        (folder / "model.safetensors.index.json").write_text(json.dumps(content))
    return write


DAMAGE = {
    "truncated": (truncate, r"model\.safetensors is not a whole safetensors file"),
    "missing shard": (index(more={UP: "b.safetensors"}), r"b\.safetensors is missing"),
    "outside": (index(more={UP: "../b.safetensors"}), "not a file of its own directory"),
    "absent name": (index(more={"gone": "a.safetensors"}), "says that a.safetensors holds gone, and it does not"),
    "pickle": (pickled, r"pytorch_model\.bin is a pickle"),
    "hidden size": (lambda folder: change_config(folder, hidden_size=32),
                    r"model\.embed_tokens\.weight has shape \[150, 64\], and .*config\.json makes it \[150, 32\]"),
    "fewer layers": (lambda folder: change_config(folder, num_hidden_layers=1), r"model\.layers\.1\..*says nothing of"),
    "endless layers": (lambda folder: change_config(folder, num_hidden_layers=10**9), r"no tensor model\.layers\.2\."),
    "more layers": (lambda folder: change_config(folder, num_hidden_layers=3), r"no tensor model\.layers\.2\."),
    "architecture": (lambda folder: change_config(folder, model_type="gemma", architectures=["GemmaForCausalLM"]),
                     r"GemmaForCausalLM \(model_type gemma\)"),
    "mixtral": (lambda folder: change_config(folder, model_type="mixtral"),
                r"no tensor model\.layers\.0\.block_sparse_moe\.gate\.weight"),
    "rope": (lambda folder: change_config(folder, rope_parameters=LLAMA3_ROPE | {"low_freq_factor": 2.0}),
             r"config\.json: low_freq_factor .*built in"),
    "no config": (lambda folder: (folder / "config.json").unlink(), "No such file"),
    "nan": (lambda folder: change_tensor(folder, UP, poison(float("nan"))), f"{UP} holds values that are NaN"),
    "infinite": (lambda folder: change_tensor(folder, UP, poison(float("inf"))), f"{UP} holds values that are NaN"),
    "int8": (lambda folder: change_tensor(folder, UP, lambda tensor: tensor.to(torch.int8)), "quantized"),
    "mixed": (lambda folder: change_tensor(folder, "model.layers.1.self_attn.k_proj.weight", torch.Tensor.half),
              "float16 and float32: give --dtype"),
    "tokenizer": (lambda folder: (folder / "tokenizer.json").write_text("{"), "the tokenizer cannot be read"),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_damaged_directories_are_refused_and_nothing_is_left(imported, tmp_path, kind):
    damage, words = DAMAGE[kind]
    folder = copied(imported, tmp_path)
    damage(folder)
    if kind == "no config":
        with pytest.raises(OSError, match=words):
            convert("import", folder, tmp_path / "megatron")
        assert list(tmp_path.iterdir()) == [folder]
    else:
        assert_refused(words, "import", folder, tmp_path / "megatron")


def test_values_beyond_fp16_are_refused(imported, tmp_path):
    folder = copied(imported, tmp_path)
    change_tensor(folder, UP, poison(1e6))
    assert_refused(f"{UP} .* infinite in float16", "import", folder, "--dtype", "fp16", tmp_path / "megatron")


def test_values_that_are_not_finite_are_not_exported(imported, tmp_path, monkeypatch):
    folder = copied(imported, tmp_path)
    change_tensor(folder, UP, poison(float("nan")))
    with monkeypatch.context() as patch:
        patch.setattr(_conversion, "_finite", lambda name, tensor: tensor)
        convert("import", folder, tmp_path / "megatron")
    assert_refused(f"{UP} holds values that are NaN", "export", tmp_path / "megatron", tmp_path / "again")


def test_wrong_targets_and_flags(imported, tmp_path, capsys):
    _, source, checkpoint = imported("llama-2")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    assert_refused("full exists and is not an empty directory", "import", source, tmp_path / "full")
    assert_refused("full exists and is not an empty directory", "export", checkpoint, tmp_path / "full")
    assert_refused("file exists and is not an empty", "import", source, tmp_path / "full" / "file")
    (tmp_path / "mine.partial").mkdir()
    assert_refused(r"mine\.partial is in the way", "import", source, tmp_path / "mine")
    assert_refused("--num-attention-heads 4 is not divisible by --tensor-model-parallel-size 3", "import", source,
                   "--tensor-model-parallel-size", 3, tmp_path / "x")
    assert_refused("--pipeline-model-parallel-size 4 does not divide 2 layers", "import", source,
                   "--pipeline-model-parallel-size", 4, tmp_path / "x")
    assert_refused("--seq-length 49 exceeds", "import", source, "--seq-length", 49, tmp_path / "x")
    assert_refused("--seq-length must be positive", "import", source, "--seq-length", 0, tmp_path / "x")
    assert_refused("gone is not a directory", "import", tmp_path / "gone", tmp_path / "x")
    assert_refused("is not a complete torch_dist checkpoint", "export", source, tmp_path / "x")
    assert run(lambda: convert("export", source, tmp_path / "x")) == 2
    assert re.fullmatch(r"\S+: error: \S+ is not a complete torch_dist checkpoint: it has no \.metadata\n",
                        capsys.readouterr().err)
    (tmp_path / "empty").mkdir()
    convert("export", checkpoint, tmp_path / "empty")
    assert (tmp_path / "empty" / "config.json").exists()


def test_export_refuses_what_it_cannot_say(imported, tmp_path):
    checkpoint = Path(shutil.copytree(imported("llama-2")[2], tmp_path / "megatron"))
    path = checkpoint / "iter_0000000" / "common.pt"
    torch.serialization.add_safe_globals([argparse.Namespace])  # for good, as megatron-core does
    common = torch.load(path, weights_only=True)
    for change, words in (
        ({"softmax_type": "off-by-one"}, "--softmax-type off-by-one has no counterpart"),
        ({"ffn_hidden_size": 40}, r"mlp\.linear_fc1\.weight has shape \[2, 96, 64\], and the saved flags make it"),
        ({"qk_layernorm": True}, "holds no tensor decoder.layers.self_attention.q_layernorm.weight"),
        ({"untie_embeddings_and_output_weights": False}, r"holds output_layer\.weight, which has no counterpart"),
    ):
        torch.save(common | {"args": argparse.Namespace(**{**vars(common["args"]), **change})}, path)
        assert_refused(words, "export", checkpoint, tmp_path / "x")
    torch.save(common, path)
    (data,) = (checkpoint / "iter_0000000").glob("*.distcp")
    os.truncate(data, data.stat().st_size // 2)
    assert_refused("cannot be read", "export", checkpoint, tmp_path / "x")


@pytest.mark.parametrize("command", ["import", "export"])
def test_a_killed_conversion_looks_like_none_and_can_be_repeated(imported, tmp_path, monkeypatch, command):
    _, source, checkpoint = imported("llama-2")
    argv = [command, source if command == "import" else checkpoint, tmp_path / "target"]
    process = os.fork()
    if process == 0:
        calls = iter(range(9))
        plain = _conversion._finite
        _conversion._finite = lambda *args: (plain(*args) if next(calls, None) is not None
                                             else os.kill(os.getpid(), signal.SIGKILL))
        convert(*argv)
        os._exit(0)
    assert os.waitpid(process, 0)[1] == signal.SIGKILL
    assert [path.name for path in tmp_path.iterdir()] == ["target.partial"]
    left = {path.name for path in (tmp_path / "target.partial").rglob("*")}
    assert left.isdisjoint({"latest_checkpointed_iteration.txt", "metadata.json", ".metadata"})
    if command == "export":
        assert "config.json" not in left
        with pytest.raises(Exception, match=r"."), safe_open(tmp_path / "target.partial/model.safetensors", "pt"):
            pass
    convert(*argv)
    assert [path.name for path in tmp_path.iterdir()] == ["target"]
    assert not list((tmp_path / "target").rglob(".converting"))


def test_sigterm_leaves_nothing(imported, tmp_path):
    process = os.fork()
    if process == 0:
        _conversion._finite = lambda *args: os.kill(os.getpid(), signal.SIGTERM)
        try:
            run(lambda: convert("import", imported("llama-2")[1], tmp_path / "target"))
        except SystemExit as stopped:
            os._exit(stopped.code)
    assert os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) == 128 + signal.SIGTERM
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("command", ["import", "export"])
def test_a_full_disk_is_one_sentence_and_leaves_nothing(imported, tmp_path, command):
    _, source, checkpoint = imported("llama-2")
    argv = [command, source if command == "import" else checkpoint, tmp_path / "target"]
    process = os.fork()
    if process == 0:
        os.dup2(os.open(tmp_path / "err", os.O_CREAT | os.O_WRONLY), 2)
        sys.stderr = os.fdopen(2, "w")
        resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000))
        code = run(lambda: convert(*argv))
        sys.stderr.flush()
        os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) == 2
    assert re.fullmatch(r"\S+: error: \S+target\.partial: File too large\n", (tmp_path / "err").read_text())
    assert [path.name for path in tmp_path.iterdir()] == ["err"]


def peak_growth(job):
    """MiB by which the resident memory of a fork grows at most while it does `job`."""
    reader, writer = os.pipe()
    process = os.fork()
    if process == 0:
        Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew

        def peak(name):
            return int(re.search(rf"{name}:\s+(\d+)", Path("/proc/self/status").read_text())[1])

        before = peak("VmRSS")
        job()
        os.write(writer, str(peak("VmHWM") - before).encode())
        os._exit(0)
    os.close(writer)
    with os.fdopen(reader) as stream:
        growth = stream.read()
    assert os.waitpid(process, 0)[1] == 0
    return int(growth) / 1024


def test_memory_is_that_of_a_few_tensors(tmp_path):
    """Of 208 MiB in tensors of up to 4 MiB, never more than a file's 64 MiB and twice the largest are in memory."""
    from transformers import LlamaConfig

    fields = COMMON | dict(hidden_size=512, intermediate_size=2048, num_hidden_layers=12, num_key_value_heads=4)
    LlamaConfig(**fields, architectures=["LlamaForCausalLM"]).save_pretrained(tmp_path / "hf")
    shapes = {"model.embed_tokens": (VOCABULARY, 512), "lm_head": (VOCABULARY, 512), "model.norm": (512,)}
    for i in range(12):
        stem = f"model.layers.{i}."
        shapes |= {f"{stem}{name}": (512,) for name in ("input_layernorm", "post_attention_layernorm")}
        shapes |= {f"{stem}self_attn.{letter}_proj": (512, 512) for letter in "qkvo"}
        shapes |= {f"{stem}mlp.{name}_proj": (2048, 512) for name in ("gate", "up")}
        shapes[f"{stem}mlp.down_proj"] = (512, 2048)
    entries = [Entry(f"{name}.weight", shape, torch.float32) for name, shape in shapes.items()]
    write_safetensors(tmp_path / "hf", entries, (torch.ones(entry.shape) for entry in entries))
    size = sum(entry.num_bytes for entry in entries) / 2**20
    assert 190 < size < 230
    assert peak_growth(lambda: convert("import", tmp_path / "hf", tmp_path / "megatron")) < 100
    assert peak_growth(lambda: convert("export", tmp_path / "megatron", tmp_path / "again")) < 60
