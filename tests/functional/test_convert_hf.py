"""convert_hf.py: logits of transformers after import, the same bits after export, and files that other tools read."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import convert_hf
import inspect_scales
from megatron_geoscale.checkpoints.families import Experts, read_family
from megatron_geoscale.checkpoints.torch_dist import TorchDistDirectory
from tests.functional.common import column, succeed, train
from tests.functional.hf_models import (
    FAMILIES,
    LENGTH,
    VOCABULARY,
    convert,
    importer,
    make_model,
    random_tokens,
    resume,
)

pytestmark = pytest.mark.usefixtures("megatron")


@pytest.fixture(scope="module")
def imported(tmp_path_factory):
    """`imported(family)`, as `importer`'s."""
    return importer(tmp_path_factory.mktemp("families"))


def megatron_logits(checkpoint, tokens, ranks=1):
    """[b, s, padded vocabulary] of pretrain.py's model, float32."""
    def watch(trainer, go):
        (chunk,) = trainer.run.chunks
        with torch.no_grad():
            return chunk.eval()(tokens, torch.arange(tokens.shape[1]).expand_as(tokens), None)

    flags = resume(checkpoint, "--train-iters 1 --sequence-parallel --tensor-model-parallel-size", ranks)
    runs = succeed(flags, ranks, watch=watch)
    assert f"loaded checkpoint {checkpoint}/iter_0000000 at iteration 0" in runs[0].out + runs[-1].out
    return torch.cat([run.value for run in runs], dim=-1)


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
        assert (found[..., :VOCABULARY] - expected).abs().max() <= 1e-5, ranks
        assert (found[..., VOCABULARY:] < -1e30).all() and found.isfinite().all()


@pytest.mark.parametrize("family", FAMILIES)
def test_bounds_of_both_formats_are_the_same(imported, capsys, family):
    """Every projection, bias, norm and setting of attention reaches both readers, or the numbers would differ."""
    found = []
    for path in imported(family)[1:]:
        capsys.readouterr()
        inspect_scales.main([str(path), "--json"])
        found.append(json.loads(capsys.readouterr().out))
    for mine, theirs in zip(found[0]["layers"], found[1]["layers"], strict=True):
        assert mine == pytest.approx(theirs, rel=1e-12)  # a transposed matrix is summed in another order
    assert torch.allclose(*(torch.tensor(one["heads"], dtype=torch.float64) for one in found), rtol=1e-12, atol=0)


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
            "max_window_layers", "n_inner", "sliding_window", "num_experts"}
    before, after = (json.loads((folder / "config.json").read_text()) for folder in (source, tmp_path / "again"))
    assert {key: value for key, value in before.items() if key not in kept | {"rope_parameters"}} == {
        key: value for key, value in after.items() if key not in kept
    }


@pytest.mark.parametrize(("family", "ranks", "layout"), [
    ("llama-3.1", 2, "--tensor-model-parallel-size 2"),
    ("qwen2", 2, "--pipeline-model-parallel-size 2 --finetune"),
    ("yarn", 2, "--pipeline-model-parallel-size 2 --decoder-last-pipeline-num-layers 2"),
    ("mixtral", 2, "--expert-model-parallel-size 2 --moe-token-dispatcher-type alltoall"),
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


def test_experts_in_one_tensor_are_imported_too(imported, tmp_path):
    """As transformers 5 saves them when it is told not to restore the names of the release."""
    model, _, checkpoint = imported("mixtral")
    model.save_pretrained(tmp_path / "fused", save_original_format=False)
    assert "model.layers.1.mlp.experts.gate_up_proj" in load_file(tmp_path / "fused" / "model.safetensors")
    convert("import", tmp_path / "fused", tmp_path / "megatron")
    mine, theirs = (TorchDistDirectory(path / "iter_0000000") for path in (tmp_path / "megatron", checkpoint))
    assert set(mine.names()) == set(theirs.names())
    for name in theirs.names():
        whole = ((0,) * len(theirs.shape(name)), theirs.shape(name))
        assert torch.equal(mine.block(name, *whole), theirs.block(name, *whole))


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
    assert args.attention_dropout == args.hidden_dropout == 0  # transformers' defaults, and not Megatron's
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


@pytest.mark.parametrize("family", FAMILIES)
def test_absent_keys_mean_what_transformers_takes_them_for(tmp_path, family):
    import transformers

    name, fields = FAMILIES[family]
    default = getattr(transformers, f"{name}Config")()
    optional = ("intermediate_size", "rms_norm_eps", "num_local_experts", "num_experts", "num_experts_per_tok",
                "moe_intermediate_size")
    required = {key: value for key, value in fields.items() if key not in optional}
    (tmp_path / "config.json").write_text(json.dumps(required | {"model_type": default.model_type}))
    found = read_family(tmp_path / "config.json")
    if name == "GPT2":
        assert default.n_inner is None and found.ffn_hidden_size == 4 * found.hidden_size
        assert (found.norm_epsilon, found.activation) == (default.layer_norm_epsilon, default.activation_function)
    else:
        assert found.ffn_hidden_size == getattr(default, "moe_intermediate_size", default.intermediate_size)
        assert (found.norm_epsilon, found.activation) == (default.rms_norm_eps, default.hidden_act)
    if found.experts is not None:
        assert found.experts == Experts(
            default.num_experts, default.num_experts_per_tok, getattr(default, "norm_topk_prob", True)
        )


def test_sentencepiece_alone(imported, tmp_path):
    import sentencepiece

    model, source, _ = imported("llama-2")
    folder = Path(shutil.copytree(source, tmp_path / "hf"))
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["some words of a text"] * 9), model_prefix=str(folder / "tokenizer"), vocab_size=20,
        model_type="char", minloglevel=2, hard_vocab_limit=False,
    )
    convert("import", folder, tmp_path / "megatron")
    args = TorchDistDirectory(tmp_path / "megatron" / "iter_0000000").args()
    assert args.tokenizer_type == "SentencePieceTokenizer" and args.tokenizer_vocab_size < VOCABULARY
    succeed(resume(tmp_path / "megatron", "--train-iters 0", ["--save", tmp_path / "saved"]))
    convert("export", tmp_path / "saved", tmp_path / "again")
    assert (tmp_path / "again" / "tokenizer.model").read_bytes() == (folder / "tokenizer.model").read_bytes()
    assert_same_weights(tmp_path / "again", model)  # the rows that no token stands for, too


def test_gpt2_as_it_was_released(imported, tmp_path):
    """Its files hold no head, no prefix, and the causal masks."""
    model, _, _ = imported("gpt2")
    model.transformer.save_pretrained(tmp_path / "hf")
    path = tmp_path / "hf" / "model.safetensors"
    masks = {f"h.{i}.attn.bias": torch.ones(1, 1, LENGTH, LENGTH) for i in range(2)}
    save_file(load_file(path) | masks, path)
    convert("import", tmp_path / "hf", tmp_path / "megatron")
    convert("export", tmp_path / "megatron", tmp_path / "again")
    assert_same_weights(tmp_path / "again", model)
