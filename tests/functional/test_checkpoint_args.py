"""--use-checkpoint-args: the model's flags, tokenizer and sequence length from the checkpoint instead of the user."""

import argparse
import shutil

import pytest
import torch

from tests.functional.common import BATCH, LLAMA, MODEL, NO_DROPOUT, VOCABULARY, base, column, corpus, flags_of, launch
from tests.functional.common import train as train_records

pytestmark = pytest.mark.usefixtures("megatron")

WINDOW = "--window-size 7 0 --window-attn-skip-freq 2"
TRAINING = "--micro-batch-size 2 --train-iters 4 --lr 1e-3 --mock-data"


def without_model_flags(*more):
    """Data and training flags of `base`, and nothing that the checkpoint knows."""
    return flags_of(BATCH, NO_DROPOUT, ["--data-path", corpus(), "--split", "90,10,0"], *more)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """Directory of a checkpoint at iteration 2, with groups, a window, an untied output: little is a default."""
    directory = tmp_path_factory.mktemp("checkpoint")
    train_records(base(WINDOW, "--train-iters 4 --exit-interval 2 --save", directory))
    return directory


@pytest.fixture
def parse(monkeypatch):
    from megatron_geoscale.training.arguments import parse_args

    monkeypatch.setenv("WORLD_SIZE", "1")
    return lambda *parts: parse_args(flags_of(*parts))


def test_resumes_with_the_losses_that_the_flags_give(checkpoint):
    load = ["--train-iters", 4, "--load", checkpoint]
    with_flags = train_records(base(WINDOW, load))
    without = train_records(without_model_flags(load, "--use-checkpoint-args"))
    assert column(without, "iteration") == [3, 4]
    for name in ("lm_loss", "geoscale.digest"):
        assert column(without, name) == column(with_flags, name)


def test_contradicting_flags_are_overridden_with_one_line_each(checkpoint, parse, capsys):
    from megatron_geoscale.training.checkpoint_args import checkpoint_flags

    expected = parse(base(WINDOW, "--train-iters 4"))
    capsys.readouterr()
    wrong = "--num-layers 3 --normalization LayerNorm --swiglu --add-qkv-bias --window-size 7,0"
    args = parse(without_model_flags("--train-iters 4 --use-checkpoint-args", ["--load", checkpoint], wrong))
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[1:4] for line in lines] == [
        ["--num-layers", "is", "2"], ["--normalization", "is", "RMSNorm"], ["--add-qkv-bias", "is", "False"],
    ]  # those that agree are not mentioned, in whatever spelling
    assert all(line.startswith("--use-checkpoint-args: ") and str(checkpoint) in line for line in lines)
    assert lines[0].endswith(", not 3") and lines[1].endswith(", not LayerNorm") and lines[2].endswith(", not True")
    for name in checkpoint_flags():
        assert getattr(args, name) == getattr(expected, name), name
    assert (args.window_size, args.num_query_groups, args.vocab_size) == ((7, 0), 2, VOCABULARY)


def test_what_a_run_may_choose_is_the_checkpoints_unless_it_is_typed(checkpoint, parse, capsys):
    def chosen(*flags):
        args = parse(TRAINING, ["--load", checkpoint, "--use-checkpoint-args"], *flags)
        assert capsys.readouterr().out == ""
        return args.seq_length, args.max_position_embeddings, args.attention_dropout, args.hidden_dropout

    assert chosen() == (16, 16, 0.0, 0.0)
    assert chosen("--seq-length 8") == (8, 16, 0.0, 0.0)
    assert chosen("--hidden-dropout 0.25") == (16, 16, 0.0, 0.25)
    typed = "--seq-length 32 --max-position-embeddings 64 --attention-dropout 0.5"
    assert chosen(typed) == (32, 64, 0.5, 0.0)  # RoPE has no positions to run out of
    with pytest.raises(ValueError, match="--seq-length 32 exceeds --max-position-embeddings 16"):
        chosen("--seq-length 32")


def test_learned_positions_are_the_checkpoints(checkpoint, parse, tmp_path, capsys):
    first = parse("--num-layers 2 --hidden-size 32 --num-attention-heads 4", TRAINING, "--seq-length 16 --vocab-size 9")
    saved = resaved(checkpoint, tmp_path / "saved", lambda args: first)
    args = parse(TRAINING, ["--load", saved, "--use-checkpoint-args", "--max-position-embeddings", 64])
    assert args.max_position_embeddings == 16
    assert capsys.readouterr().out.startswith("--use-checkpoint-args: --max-position-embeddings is 16 as in")


@pytest.mark.parametrize("flags", [
    "--num-layers 4 --hidden-size 64 --num-attention-heads 8",
    "--num-layers 4 --hidden-size 64 --num-attention-heads 8 --group-query-attention --num-query-groups 4 "
    "--kv-channels 24 --position-embedding-type yarn --yarn-rotary-scaling-factor 2 --yarn-mscale-all-dim 0.5 "
    "--max-position-embeddings 64",
    "--num-layers 4 --hidden-size 64 --num-attention-heads 8 --multi-latent-attention --q-lora-rank 16 "
    "--position-embedding-type rope",
    "--num-layers 4 --hidden-size 96 --num-attention-heads 8 --position-embedding-type rope --rotary-percent 0.5 "
    "--rotary-interleaved --qk-layernorm --apply-layernorm-1p --normalization LayerNorm --norm-epsilon 1e-6 "
    "--use-rope-scaling --apply-query-key-layer-scaling --softmax-type learnable --swiglu --attention-output-gate",
    "--num-layers 4 --hidden-size 64 --num-attention-heads 8 --disable-bias-linear --num-experts 4 --moe-router-topk 3 "
    "--moe-ffn-hidden-size 24 --moe-router-pre-softmax --moe-router-topk-scaling-factor 1.5",
])
def test_every_model_flag_comes_back(checkpoint, parse, tmp_path, flags):
    from megatron_geoscale.training.checkpoint_args import checkpoint_flags

    first = parse(flags, TRAINING, "--seq-length 32 --vocab-size 100")
    saved = resaved(checkpoint, tmp_path / "saved", lambda args: first)
    again = parse(TRAINING, ["--load", saved, "--use-checkpoint-args"])
    assert {name: getattr(again, name) for name in checkpoint_flags()} == {
        name: getattr(first, name) for name in checkpoint_flags()
    }


def resaved(checkpoint, target, change):
    """A copy of the checkpoint whose flags are `change(its flags)`."""
    shutil.copytree(checkpoint, target)
    path = target / "iter_0000002" / "common.pt"
    torch.serialization.add_safe_globals([argparse.Namespace])  # for good, as megatron-core does
    common = torch.load(path, weights_only=True)
    kept = (str, int, float, bool, tuple, type(None))
    fields = {name: value for name, value in vars(change(common["args"])).items() if isinstance(value, kept)}
    torch.save({**common, "args": argparse.Namespace(**fields)}, path)
    return target


def test_what_the_checkpoint_does_not_say_stays_the_users(checkpoint, parse, tmp_path, capsys):
    def forget(args):
        del args.norm_epsilon, args.rotary_base  # as if these flags had not existed
        return args

    saved = resaved(checkpoint, tmp_path / "saved", forget)
    args = parse(TRAINING, ["--load", saved, "--use-checkpoint-args", "--norm-epsilon", "1e-6"])
    assert (args.norm_epsilon, args.rotary_base) == (1e-6, 10000) and capsys.readouterr().out == ""


def test_a_moved_tokenizer_can_be_named(checkpoint, parse, tmp_path):
    def elsewhere(args):
        args.tokenizer_type, args.tokenizer_model, args.vocab_size = "SentencePieceTokenizer", "/gone/model", None
        return args

    saved = resaved(checkpoint, tmp_path / "saved", elsewhere)
    flags = [TRAINING, ["--load", saved, "--use-checkpoint-args", "--tokenizer-model", "/here/model"]]
    assert parse(*flags).tokenizer_model == "/gone/model"
    assert parse(*flags, "--no-use-tokenizer-model-from-checkpoint-args").tokenizer_model == "/here/model"
    assert parse(*flags[:1], flags[1][:-2], "--no-use-tokenizer-model-from-checkpoint-args").tokenizer_model == (
        "/gone/model"
    )


def test_mistakes_are_one_sentence(checkpoint, parse, tmp_path):
    with pytest.raises(ValueError, match=r"^--use-checkpoint-args needs --load"):
        parse(TRAINING, "--use-checkpoint-args")
    with pytest.raises(ValueError, match=rf"^--load {tmp_path} holds no checkpoint to take the flags from"):
        parse(TRAINING, ["--load", tmp_path, "--use-checkpoint-args"])
    with pytest.raises(ValueError, match=r"iter_0000009 is not there"):
        parse(TRAINING, ["--load", checkpoint, "--ckpt-step", 9, "--use-checkpoint-args"])

    def unknown(args):
        args.tokenizer_type = "GPT2BPETokenizer"
        return args

    saved = resaved(checkpoint, tmp_path / "saved", unknown)
    with pytest.raises(ValueError, match=r"iter_0000002 was saved with a flag .*--tokenizer-type.*GPT2BPETokenizer"):
        parse(TRAINING, ["--load", saved, "--use-checkpoint-args"])


def test_the_command_ends_with_that_sentence(tmp_path):
    (run,) = launch(without_model_flags("--train-iters 1 --use-checkpoint-args", ["--load", tmp_path]))
    assert run.code == 2
    assert run.err == (
        f"pretrain.py: error: --load {tmp_path} holds no checkpoint to take the flags from: "
        "latest_checkpointed_iteration.txt is not there\n"
    )


def test_model_flags_are_still_required_without_it(parse):
    with pytest.raises(ValueError, match="--num-layers is required"):
        parse(TRAINING, "--vocab-size 100")
    assert parse(MODEL, LLAMA, TRAINING, "--vocab-size 100").num_layers == 2
