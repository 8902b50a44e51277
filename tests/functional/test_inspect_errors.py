"""What inspect_scales.py says of damaged checkpoints and wrong flags: one sentence, and never what a pickle wants."""

import os
import pickle
import shutil

import pytest
import torch

import inspect_scales
from _cli import describe
from megatron_geoscale.checkpoints.iterations import TRACKER
from tests.functional.common import base, succeed
from tests.functional.inspected import edited, saver

pytestmark = pytest.mark.usefixtures("megatron")


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    return saver(tmp_path_factory.mktemp("families"))


@pytest.fixture(scope="module")
def megatron_checkpoint(megatron, tmp_path_factory):
    path = tmp_path_factory.mktemp("megatron")
    succeed(base("--train-iters 2 --save", path, model="gpt2"))
    return path


def remove_q(tensors):
    del tensors["model.layers.1.self_attn.q_proj.weight"]


def transpose_k(tensors):
    name = "model.layers.1.self_attn.k_proj.weight"
    tensors[name] = tensors[name].T.contiguous()


def quantize_v(tensors):
    name = "model.layers.0.self_attn.v_proj.weight"
    tensors[name] = tensors[name].to(torch.float8_e4m3fn)


def nan_in_k(tensors):
    tensors["model.layers.1.self_attn.k_proj.weight"][13, 7] = float("nan")  # key/value head 1, for queries 2 and 3


def infinite_gain(tensors):
    tensors["model.layers.0.input_layernorm.weight"][0] = float("inf")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (remove_q, ("holds no tensor model.layers.1.self_attn.q_proj.weight",)),
        (transpose_k, ("model.layers.1.self_attn.k_proj.weight has shape [48, 24]", "makes it [24, 48]")),
        (quantize_v, ("model.layers.0.self_attn.v_proj.weight is stored as float8_e4m3fn",)),
        (nan_in_k, ("non-finite attention weights in layer 2, head 2, W_K",)),
        (infinite_gain, ("non-finite attention weights in layer 1, head 0, W_Q",)),
    ],
)
def test_wrong_tensors(saved, tmp_path, change, words):
    mistake(edited(saved, tmp_path, change), words=words)


def mistake(path, *flags, words=()):
    __tracebackhide__ = True
    with pytest.raises((ValueError, OSError)) as error:
        inspect_scales.main([str(path), *flags])
    sentence = describe(error.value)
    assert all(word in sentence for word in words), sentence
    assert len(sentence) < 500


def damage_metadata(path):
    file = path / "iter_0000002" / ".metadata"
    file.write_bytes(file.read_bytes()[:100])


class Evil:
    def __reduce__(self):
        return os.system, ("touch /tmp/never",)


def evil_metadata(path):
    (path / "iter_0000002" / ".metadata").write_bytes(pickle.dumps(Evil()))


def evil_common(path):
    torch.save({"args": Evil()}, path / "iter_0000002" / "common.pt")


def truncate_chunks(path):
    for file in (path / "iter_0000002").glob("*.distcp"):
        file.write_bytes(file.read_bytes()[: file.stat().st_size // 8])


def change_args(**values):
    def change(path):
        file = path / "iter_0000002" / "common.pt"
        common = torch.load(file, weights_only=False)
        for name, value in values.items():
            setattr(common["args"], name, value)
        torch.save(common, file)

    return change


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda path: (path / TRACKER).write_text("ten"), ("must hold an iteration number, not 'ten'",)),
        (lambda path: (path / TRACKER).write_text("7"), ("names iteration 7", "iter_0000007 is not there")),
        (lambda path: (path / "iter_0000002" / "common.pt").unlink(), ("it has no common.pt",)),
        (damage_metadata, (".metadata cannot be read",)),
        (evil_metadata, (".metadata cannot be read", "names posix.system")),
        (evil_common, ("common.pt cannot be read",)),
        (truncate_chunks, ("cannot be read",)),
        (change_args(num_layers=3), ("has shape [2, ", "common.pt makes it [3, ")),
        (change_args(hidden_size="big"), ("common.pt has 'big' for --hidden-size",)),
        (change_args(multi_latent_attention=True), ("--multi-latent-attention",)),
        (change_args(position_embedding_type="mrope"), ("--position-embedding-type mrope",)),
    ],
)
def test_wrong_megatron_checkpoints(megatron_checkpoint, tmp_path, damage, words):
    copy = shutil.copytree(megatron_checkpoint, tmp_path / "copy")
    damage(copy)
    mistake(copy, words=words)


def test_wrong_paths_and_flags(saved, tmp_path, capsys, monkeypatch):
    _, path = saved("llama")
    mistake(tmp_path / "nowhere", words=("nowhere does not exist",))
    mistake(path / "model.safetensors", words=("is a file: give the directory",))
    mistake(tmp_path, words=("holds neither config.json", "latest_checkpointed_iteration.txt"))
    mistake(path, "--seq-length", "0", words=("--seq-length must be positive",))
    mistake(path, "--margin", "2", words=("--margin must lie in (0, 1]",))
    mistake(path, "--plot", "sigma.pdf", words=("--plot sigma.pdf must end in .png",))
    mistake(path, "--plot", str(tmp_path / "no" / "sigma.png"), words=("its directory does not exist",))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    mistake(path, "--plot", "sigma.png", words=("megatron-geoscale[plot]",))
    for flags in (("--recipe", "magic"), ("--estimator", "svd"), ("--granularity", "row"), ("--no-such-flag",)):
        with pytest.raises(SystemExit) as end:
            inspect_scales.main([str(path), *flags])
        assert end.value.code == 2
        (sentence,) = capsys.readouterr().err.splitlines()
        assert sentence.startswith("inspect_scales.py: error: ") and flags[0] in sentence
