"""Rows that only pad the vocabulary: the loss is that of the model without them, and they get no gradient."""

import pytest
import torch

from megatron_geoscale.checkpoints.torch_dist import TorchDistDirectory
from tests.functional.common import succeed
from tests.functional.hf_models import VOCABULARY, convert, importer, make_model, random_tokens, resume

pytestmark = pytest.mark.usefixtures("megatron")


@pytest.fixture(scope="module")
def imported(tmp_path_factory):
    """`imported(family)`, as `importer`'s."""
    return importer(tmp_path_factory.mktemp("padding"))


def loss_and_gradients(checkpoint, tokens, *more, ranks=1):
    """pretrain.py's mean loss over all tokens but the last of `tokens`, and the gradient of every row of the matrix
    that makes logits."""
    def watch(trainer, go):
        (chunk,) = trainer.run.chunks
        positions = torch.arange(tokens.shape[1]).expand_as(tokens)
        losses = chunk(tokens, positions, None, labels=tokens.roll(-1, dims=1))
        loss = losses[:, :-1].mean()
        loss.backward()
        named = dict(chunk.named_parameters())
        rows = named.get("module.output_layer.weight", named["module.embedding.word_embeddings.weight"])
        return loss.item(), rows.main_grad

    runs = succeed(resume(checkpoint, "--train-iters 1", *more), ranks, watch=watch)
    losses = {run.value[0] for run in runs}
    assert len(losses) == 1
    return losses.pop(), torch.cat([run.value[1] for run in runs])


@pytest.mark.parametrize(("family", "ranks"), [("llama-2", 1), ("llama-2", 2), ("gpt2", 2)])
def test_loss_is_that_of_transformers_and_padding_gets_no_gradient(imported, family, ranks):
    model, _, checkpoint = imported(family)
    tokens = random_tokens()
    expected = model(tokens, labels=tokens).loss
    wanted = torch.autograd.grad(expected, model.get_output_embeddings().weight)[0]
    loss, rows = loss_and_gradients(checkpoint, tokens, "--tensor-model-parallel-size", ranks, ranks=ranks)
    assert abs(loss - expected.item()) <= 1e-6 * expected.item()
    assert len(rows) == 256 and (rows[VOCABULARY:] == 0).all()
    assert (rows[:VOCABULARY] - wanted).abs().max() <= 1e-5 * wanted.abs().max()


def test_rows_without_a_token_are_the_models(imported, tmp_path):
    """A model with more rows than its tokenizer has tokens has probabilities for all of them, in transformers too."""
    model, source, _ = imported("llama-2")
    import sentencepiece

    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["some words of a text"] * 9), model_prefix=str(source / "tokenizer"), vocab_size=20,
        model_type="char", minloglevel=2, hard_vocab_limit=False,
    )
    convert("import", source, tmp_path / "megatron")
    (source / "tokenizer.model").unlink()
    args = TorchDistDirectory(tmp_path / "megatron" / "iter_0000000").args()
    assert args.tokenizer_vocab_size < args.model_vocab_size == VOCABULARY < args.padded_vocab_size
    tokens = random_tokens()
    expected = model(tokens, labels=tokens).loss.item()
    again = ["--save", tmp_path / "saved"]
    for checkpoint, more in ((tmp_path / "megatron", again), (tmp_path / "saved", [])):  # the number is kept
        loss, rows = loss_and_gradients(checkpoint, tokens, more)
        assert abs(loss - expected) <= 1e-6 * expected and (rows[:VOCABULARY] != 0).any(dim=1).all()
        if more:
            succeed(resume(checkpoint, "--train-iters 0", more))


def test_every_rank_may_hold_padding_alone(tmp_path):
    """With four ranks for 150 tokens two of them hold nothing else."""
    model = make_model("qwen2")
    model.save_pretrained(tmp_path / "hf")
    convert("import", tmp_path / "hf", tmp_path / "megatron", "--tensor-model-parallel-size", 4)
    tokens = random_tokens()
    expected = model(tokens, labels=tokens).loss.item()
    loss, rows = loss_and_gradients(tmp_path / "megatron", tokens, "--tensor-model-parallel-size 4", ranks=4)
    assert len(rows) == 512 and (rows[VOCABULARY:] == 0).all()
    assert abs(loss - expected) <= 1e-6 * expected
