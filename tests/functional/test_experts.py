"""pretrain.py with a mixture of experts: every layout trains alike and is resumed, mistakes are one sentence."""

import pytest

from tests.functional.common import base, close, column, flags_of, launch, train

pytestmark = pytest.mark.usefixtures("megatron")

EXPERTS = "--num-experts 4 --moe-router-topk 2 --moe-ffn-hidden-size 24"
BALANCED = "--moe-aux-loss-coeff 0.5 --moe-z-loss-coeff 0.1"
"""Coefficients that change the losses in the second decimal."""


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """Directory of a checkpoint at iteration 2, with the optimizer's state."""
    directory = tmp_path_factory.mktemp("experts")
    train(base(EXPERTS, "--train-iters 4 --exit-interval 2 --save", directory))
    return directory


def resumed(checkpoint, *more, ranks=1):
    return train(base(EXPERTS, "--train-iters 4 --load", checkpoint, *more), ranks)


@pytest.mark.parametrize(("layout", "ranks"), [
    ("--moe-token-dispatcher-type alltoall --moe-permute-fusion --moe-grouped-gemm", 1),
    ("--tensor-model-parallel-size 2 --sequence-parallel", 2),
    ("--tensor-model-parallel-size 2 --sequence-parallel --moe-token-dispatcher-type alltoall", 2),
    ("--expert-model-parallel-size 2", 2),
    ("--expert-model-parallel-size 2 --moe-token-dispatcher-type alltoall --use-distributed-optimizer", 2),
    ("--pipeline-model-parallel-size 2 --moe-router-dtype fp32", 2),
    ("--tensor-model-parallel-size 2 --sequence-parallel --expert-model-parallel-size 2 "
     "--expert-tensor-parallel-size 1 --moe-token-dispatcher-type alltoall", 4),
])
def test_every_layout_goes_on_as_one_rank_does(checkpoint, layout, ranks):
    """From weights and Adam's moments of one rank, under the certified recipe."""
    shared = "--expert-model-parallel-size" in layout  # replicas balance their own tokens, as in Megatron-LM
    more = "--no-load-optim" if shared else BALANCED
    one, many = resumed(checkpoint, more), resumed(checkpoint, more, layout, ranks=ranks)
    assert column(many, "iteration") == [3, 4]
    for name in ("lm_loss", "grad_norm"):
        assert close(column(many, name), column(one, name), 1e-5), name


def test_shared_experts_are_resumed_with_their_optimizer(checkpoint, tmp_path):
    layout = "--expert-model-parallel-size 2 --moe-token-dispatcher-type alltoall --use-distributed-optimizer"
    whole = resumed(checkpoint, "--no-load-optim", layout, ranks=2)
    resumed(checkpoint, "--no-load-optim --exit-interval 3", layout, ["--save", tmp_path / "saved"], ranks=2)
    rest = resumed(tmp_path / "saved", layout, ranks=2)
    for name in ("lm_loss", "grad_norm"):
        assert column(rest, name) == column(whole, name)[1:]
    for directory, more, ranks, word in ((checkpoint, layout, 2, "without"), (tmp_path / "saved", "", 1, "with")):
        runs = launch(base(EXPERTS, "--train-iters 4 --load", directory, more), ranks)
        assert any(f"was saved {word} --expert-model-parallel-size above 1" in run.err for run in runs)


def test_balancing_and_router_flags_do_something(checkpoint):
    plain = resumed(checkpoint)
    for flags in ("--moe-aux-loss-coeff 0.5", "--moe-z-loss-coeff 0.1",
                  "--moe-router-load-balancing-type seq_aux_loss --moe-aux-loss-coeff 0.5"):
        other = resumed(checkpoint, flags)
        assert column(other, "lm_loss")[0] == column(plain, "lm_loss")[0]  # no part of what is logged
        assert not close(column(other, "grad_norm"), column(plain, "grad_norm"), 1e-3), flags
    for name, sentence in (("--moe-router-topk 3", "--moe-router-topk was 2"),
                           ("--moe-router-pre-softmax", "--moe-router-pre-softmax was False"),
                           ("--num-experts 8", "--num-experts was 4")):
        (run,) = launch(base(EXPERTS, "--train-iters 4 --load", checkpoint, name))
        assert run.code == 2 and sentence in run.err


@pytest.fixture
def parse(monkeypatch):
    from megatron_geoscale.training.arguments import parse_args

    def parse(*parts, ranks=1):
        monkeypatch.setenv("WORLD_SIZE", str(ranks))
        return parse_args(flags_of(*parts))

    return parse


@pytest.mark.parametrize(("flags", "ranks", "sentence"), [
    ("--moe-router-topk 5", 1, "--moe-router-topk 5 exceeds --num-experts 4"),
    ("--moe-router-topk 1", 1, "--moe-router-topk 1 needs --moe-router-pre-softmax"),
    ("--moe-router-topk 0", 1, "--moe-router-topk must be positive, not 0"),
    ("--tensor-model-parallel-size 2", 2, "--num-experts with --tensor-model-parallel-size 2 needs --sequence-par"),
    ("--expert-model-parallel-size 3", 3, "--num-experts 4 is not divisible by --expert-model-parallel-size 3"),
    ("--expert-model-parallel-size 2", 3, "3 processes cannot be split into --expert-tensor-parallel-size 1 x"),
    ("--tensor-model-parallel-size 2 --sequence-parallel --expert-tensor-parallel-size 1", 2,
     "--expert-tensor-parallel-size 1 with --tensor-model-parallel-size 2 needs --expert-model-parallel-size above 1"),
    ("--moe-ffn-hidden-size 25 --tensor-model-parallel-size 2 --sequence-parallel", 2,
     "--moe-ffn-hidden-size 25 is not divisible by --expert-tensor-parallel-size 2"),
    ("--moe-router-load-balancing-type none --moe-aux-loss-coeff 0.1", 1, "--moe-aux-loss-coeff 0.1 does nothing with"),
    ("--moe-aux-loss-coeff -1", 1, "--moe-aux-loss-coeff must not be negative"),
])
def test_mistakes_are_one_sentence(parse, flags, ranks, sentence):
    with pytest.raises(ValueError, match=f"^{sentence}"):
        parse(base("--train-iters 1 --global-batch-size 12", EXPERTS, flags), ranks=ranks)


def test_experts_need_a_model_that_has_them(parse):
    with pytest.raises(ValueError, match=r"^--expert-model-parallel-size is for a mixture of experts"):
        parse(base("--train-iters 1 --expert-model-parallel-size 2"), ranks=2)
    with pytest.raises(ValueError, match=r"^--num-experts needs --disable-bias-linear"):
        parse(base("--train-iters 1 --num-experts 4", model="gpt2"))
    with pytest.raises(ValueError, match=r"^--no-position-embedding needs --position-embedding-type"):
        parse(base("--train-iters 1 --no-position-embedding", model="gpt2"))


MIXTRAL = """
--use-mcore-models --disable-bias-linear --seq-length 4096 --max-position-embeddings 32768 --num-layers 32
--hidden-size 4096 --ffn-hidden-size 14336 --num-attention-heads 32 --init-method-std 0.01 --attention-dropout 0.0
--hidden-dropout 0.0 --normalization RMSNorm --position-embedding-type rope --swiglu
--untie-embeddings-and-output-weights --group-query-attention --num-query-groups 8 --no-masked-softmax-fusion
--no-position-embedding --rotary-base 1000000 --num-experts 8 --moe-router-topk 2
--moe-router-load-balancing-type aux_loss --moe-aux-loss-coeff 1e-2 --moe-grouped-gemm
--moe-token-dispatcher-type alltoall --overlap-param-gather --overlap-grad-reduce --tokenizer-type Llama2Tokenizer
--tokenizer-model tokenizer.model --data-path data --split 99990,8,2 --micro-batch-size 1 --global-batch-size 256
--lr 1e-4 --train-iters 500000 --lr-decay-iters 320000 --lr-decay-style cosine --min-lr 1.0e-5 --weight-decay 0.1
--lr-warmup-iters 500 --clip-grad 1.0 --bf16 --tensor-model-parallel-size 1 --pipeline-model-parallel-size 4
--expert-model-parallel-size 8 --use-distributed-optimizer --sequence-parallel --log-interval 1 --save-interval 10000
--eval-interval 1000 --eval-iters 10 --save checkpoints --load checkpoints --tensorboard-dir logs --no-load-optim
--no-load-rng
"""
"""Flags of examples/mixtral in https://github.com/NVIDIA/Megatron-LM."""


def test_a_launch_of_mixtral_is_understood(parse):
    args = parse(MIXTRAL, ranks=32)
    assert (args.num_experts, args.moe_ffn_hidden_size, args.expert_tensor_parallel_size) == (8, 14336, 1)
    assert args.data_parallel_size == 8 and args.moe_token_dispatcher_type == "alltoall"
