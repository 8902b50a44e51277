"""convert_hf.py: logits of transformers after import, the same bits after export, and mistakes in one sentence."""

import argparse
import functools
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
import convert_hf
from _cli import run
from megatron_geoscale.checkpoints.hf_writer import Entry, write_safetensors
from megatron_geoscale.checkpoints.torch_dist import TorchDistDirectory
from tests.functional.common import BATCH, NO_DROPOUT, column, flags_of, succeed, train

pytestmark = pytest.mark.usefixtures("megatron")

VOCABULARY, LENGTH = 150, 48
COMMON = dict(vocab_size=VOCABULARY, hidden_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
              max_position_embeddings=LENGTH, intermediate_size=48)
LLAMA3_ROPE = dict(rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
                   original_max_position_embeddings=8192, rope_theta=500000.0)
FAMILIES = {
    "gpt2": ("GPT2", dict(vocab_size=VOCABULARY, n_embd=64, n_layer=2, n_head=4, n_positions=LENGTH)),
    "llama-2": ("Llama", COMMON | dict(num_key_value_heads=4, rms_norm_eps=1e-5)),
    "llama-3.1": ("Llama", COMMON | dict(rope_parameters=LLAMA3_ROPE)),
    "mistral": ("Mistral", COMMON | dict(head_dim=20, sliding_window=8)),
    "qwen2": ("Qwen2", COMMON | dict(tie_word_embeddings=True, num_key_value_heads=2)),
    "qwen3": ("Qwen3", COMMON | dict(head_dim=20)),
}


def make_model(family, **changes):
    """A random model, everything off its initial value, weights large enough for attention to matter."""
    import transformers

    name, fields = FAMILIES[family]
    config = getattr(transformers, f"{name}Config")(**fields | changes, bos_token_id=None, eos_token_id=None)
    torch.manual_seed(sum(map(ord, family)))
    model = getattr(transformers, "GPT2LMHeadModel" if name == "GPT2" else f"{name}ForCausalLM")(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += (0.1 if parameter.dim() > 1 else 0.3) * torch.randn_like(parameter)
    return model.float().eval()


@pytest.fixture(scope="module")
def imported(tmp_path_factory):
    """`imported(family)`: the model, transformers' directory of it, and the Megatron checkpoint made from that."""
    folder = tmp_path_factory.mktemp("families")

    @functools.cache
    def make(family):
        model = make_model(family)
        model.save_pretrained(folder / family)
        convert_hf.main(["import", str(folder / family), str(folder / f"{family}-megatron")])
        return model, folder / family, folder / f"{family}-megatron"

    return make


def convert(*argv):
    convert_hf.main([*map(str, argv)])


def resume(checkpoint, *more):
    """Flags of a run that goes on from the checkpoint: none of the model, the tokenizer or the sequence length."""
    return flags_of(BATCH, NO_DROPOUT, "--mock-data --use-checkpoint-args --geoscale-recipe none",
                    ["--load", checkpoint], *more)


def megatron_logits(checkpoint, tokens, ranks=1):
    """[b, s, padded vocabulary] of pretrain.py's model, float32."""
    def watch(trainer, go):
        (chunk,) = trainer.run.chunks
        with torch.no_grad():
            return chunk.eval()(tokens, torch.arange(tokens.shape[1]).expand_as(tokens), None)

    flags = resume(checkpoint, "--train-iters 1 --tensor-model-parallel-size", ranks)
    runs = succeed(flags, ranks, watch=watch)
    assert f"loaded checkpoint {checkpoint}/iter_0000000 at iteration 0" in runs[0].out + runs[-1].out
    return torch.cat([run.value for run in runs], dim=-1)


def random_tokens(length=LENGTH):
    return torch.randint(VOCABULARY, (2, length), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_are_those_of_transformers(imported, family):
    model, _, checkpoint = imported(family)
    tokens = random_tokens()
    with torch.no_grad():
        expected = model(tokens).logits
        other = model(tokens.roll(1, dims=1)).logits
    assert expected.abs().max() > 1 and (expected - other).abs().mean() > 0.1  # a model that ignores its input would do
    for ranks in (1, 2):
        found = megatron_logits(checkpoint, tokens, ranks)
        assert found.shape[-1] == 256  # a multiple of 128
        assert (found[..., :VOCABULARY] - expected).abs().max() <= 1e-5 * expected.abs().max().clamp(min=1), ranks
        assert (found[..., VOCABULARY:] == 0).all()


def assert_same_weights(directory, expected):
    """transformers loads the directory, with the names and bits of `expected`, a model."""
    from transformers import AutoModelForCausalLM

    again = AutoModelForCausalLM.from_pretrained(directory, dtype="auto")
    assert type(again) is type(expected)
    mine, theirs = expected.state_dict(), again.state_dict()
    assert mine.keys() == theirs.keys()
    for name, tensor in mine.items():
        assert theirs[name].dtype == tensor.dtype and torch.equal(theirs[name], tensor), name
    return again


@pytest.mark.parametrize("family", FAMILIES)
def test_export_gives_back_the_bits_and_the_model(imported, tmp_path, family):
    model, source, checkpoint = imported(family)
    convert("export", checkpoint, tmp_path / "again")
    again = assert_same_weights(tmp_path / "again", model)
    tokens = random_tokens()
    with torch.no_grad():
        assert torch.equal(again(tokens).logits, model(tokens).logits)
    mine, theirs = (load_file(folder / "model.safetensors") for folder in (source, tmp_path / "again"))
    assert mine.keys() == theirs.keys()
    kept = {"torch_dtype", "dtype", "transformers_version", "rope_scaling", "rope_theta", "layer_types",
            "max_window_layers", "n_inner", "sliding_window"}
    before, after = (json.loads((folder / "config.json").read_text()) for folder in (source, tmp_path / "again"))
    assert {key: value for key, value in before.items() if key not in kept | {"rope_parameters"}} == {
        key: value for key, value in after.items() if key not in kept
    }


@pytest.mark.parametrize(("family", "ranks", "layout"), [
    ("llama-3.1", 2, "--tensor-model-parallel-size 2"),
    ("qwen2", 2, "--pipeline-model-parallel-size 2 --finetune"),
])
def test_any_layout_trains_alike_and_is_exported(imported, tmp_path, family, ranks, layout):
    model, _, checkpoint = imported(family)
    one = train(resume(checkpoint, "--train-iters 2 --lr 1e-3"))
    many = train(resume(checkpoint, "--train-iters 2 --lr 1e-3", layout), ranks)
    assert column(one, "iteration") == column(many, "iteration") == [1, 2]
    for mine, theirs in zip(column(one, "lm_loss"), column(many, "lm_loss")):
        assert abs(mine - theirs) <= 1e-5 * mine
    succeed(resume(checkpoint, "--train-iters 0", layout, ["--save", tmp_path / "saved"]), ranks)
    convert("export", tmp_path / "saved", tmp_path / "again")
    assert_same_weights(tmp_path / "again", model)


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_dtype_is_kept_or_changed(imported, tmp_path, dtype):
    _, source, _ = imported("qwen3")
    kind = convert_hf.DTYPES[dtype]
    half = make_model("qwen3").to(kind)
    half.save_pretrained(tmp_path / "half")
    convert("import", tmp_path / "half", tmp_path / "kept", "--tensor-model-parallel-size", 2)
    convert("import", source, tmp_path / "changed", "--dtype", dtype)
    for name, rows in (("kept", 256), ("changed", 256)):
        stored = TorchDistDirectory(tmp_path / name / "iter_0000000")
        assert getattr(stored.args(), dtype) is True
        assert {stored.dtype(tensor) for tensor in stored.names()} == {kind}
        assert stored.shape("output_layer.weight") == (rows, 64)
        convert("export", tmp_path / name, tmp_path / f"{name}-again")
        assert_same_weights(tmp_path / f"{name}-again", half)
    convert("export", tmp_path / "kept", tmp_path / "wide", "--dtype", "fp32")
    assert_same_weights(tmp_path / "wide", half.float())


def test_padding_follows_tensor_parallelism(imported, tmp_path):
    _, source, _ = imported("llama-2")
    convert("import", source, tmp_path / "four", "--tensor-model-parallel-size", 4, "--pipeline-model-parallel-size", 2)
    stored = TorchDistDirectory(tmp_path / "four" / "iter_0000000")
    args = stored.args()
    assert stored.shape("embedding.word_embeddings.weight")[0] == args.padded_vocab_size == 512
    assert (args.tensor_model_parallel_size, args.pipeline_model_parallel_size) == (4, 2)
    assert (args.seq_length, args.tokenizer_vocab_size) == (LENGTH, VOCABULARY)
    with torch.no_grad():
        expected = imported("llama-2")[0](random_tokens()).logits
    found = megatron_logits(tmp_path / "four", random_tokens())  # on one rank
    assert found.shape[-1] == 512 and (found[..., :VOCABULARY] - expected).abs().max() < 1e-5


@pytest.fixture
def with_tokenizer(tmp_path):
    """A Llama of 320 tokens in shards, with a tokenizer of fewer."""
    from tokenizers import ByteLevelBPETokenizer
    from transformers import PreTrainedTokenizerFast

    folder = tmp_path / "with-tokenizer"
    trained = ByteLevelBPETokenizer()
    trained.train_from_iterator(["some words of a text"], vocab_size=290, special_tokens=["<eos>"], show_progress=False)
    make_model("llama-2", vocab_size=320).save_pretrained(folder, max_shard_size="60KB")
    PreTrainedTokenizerFast(tokenizer_object=trained._tokenizer, eos_token="<eos>").save_pretrained(folder)
    return folder


def test_tokenizer_and_shards(with_tokenizer, tmp_path, monkeypatch):
    assert len(list(with_tokenizer.glob("*.safetensors"))) > 3
    convert("import", with_tokenizer, tmp_path / "megatron")
    args = TorchDistDirectory(tmp_path / "megatron" / "iter_0000000").args()
    assert args.tokenizer_type == "HuggingFaceTokenizer"
    assert args.tokenizer_model == str(tmp_path / "megatron" / "tokenizer")
    assert args.tokenizer_vocab_size < 320 <= args.padded_vocab_size == 384
    succeed(resume(tmp_path / "megatron", "--train-iters 0", ["--save", tmp_path / "saved"]))
    monkeypatch.setattr(convert_hf.export_model.__globals__["write_safetensors"], "__kwdefaults__",
                        {"shard_bytes": 100_000})
    convert("export", tmp_path / "saved", tmp_path / "again")
    from transformers import AutoModelForCausalLM, AutoTokenizer

    assert_same_weights(tmp_path / "again", AutoModelForCausalLM.from_pretrained(with_tokenizer))
    shards = list((tmp_path / "again").glob("model-*.safetensors"))
    assert len(shards) > 3 and all(path.stat().st_size < 110_000 for path in shards)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / "again" / name).read_bytes() == (with_tokenizer / name).read_bytes()
    again = AutoTokenizer.from_pretrained(tmp_path / "again")
    assert len(again) == args.tokenizer_vocab_size and again("of words").input_ids


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
    "more layers": (lambda folder: change_config(folder, num_hidden_layers=3), r"no tensor model\.layers\.2\."),
    "architecture": (lambda folder: change_config(folder, model_type="gemma", architectures=["GemmaForCausalLM"]),
                     r"GemmaForCausalLM \(model_type gemma\)"),
    "mixtral": (lambda folder: change_config(folder, model_type="mixtral"), "mixtral is a mixture of experts"),
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
    with torch.serialization.safe_globals([argparse.Namespace]):
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
