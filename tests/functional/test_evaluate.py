"""evaluate.py against float64 references: an unbatched model, a dense one made from a checkpoint, known preferences."""

import contextlib
import functools
import io
import json
import shutil
import warnings
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist

import _models
import evaluate
from _multiple_choice import answers, prompt, read_tasks
from _multiple_choice import evaluate as score
from megatron_geoscale.checkpoints.torch_dist import TorchDistDirectory
from tests.functional.common import BATCH, LLAMA, NO_DROPOUT, flags_of, succeed
from tests.functional.questions import SHOTS, SUBJECTS, write_tasks
from tests.harness import run_ranks

pytestmark = pytest.mark.usefixtures("megatron")

@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    return write_tasks(tmp_path_factory.mktemp("tasks"))


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    """Directory of a byte-level BPE that knows the questions."""
    from tokenizers import ByteLevelBPETokenizer
    from transformers import PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("tokenizer")
    trained = ByteLevelBPETokenizer()
    text = [field for rows in SUBJECTS.values() for row in rows for field in row] + ["Answer: A B C D\n"] * 9
    trained.train_from_iterator(text, vocab_size=300, min_frequency=2, special_tokens=["<eos>"], show_progress=False)
    PreTrainedTokenizerFast(tokenizer_object=trained._tokenizer, eos_token="<eos>").save_pretrained(folder)
    return folder


def tiny_llama(vocabulary, length=384):
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=vocabulary, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=length, rms_norm_eps=1e-5, bos_token_id=None, eos_token_id=None,
        initializer_range=0.2, tie_word_embeddings=False,
    )
    return LlamaForCausalLM(config).eval()


@pytest.fixture(scope="module")
def save_hf(tmp_path_factory, tokenizer):
    """`save_hf(model)`: a directory of the model and the tokenizer."""
    def save(model):
        folder = tmp_path_factory.mktemp("hf")
        shutil.copytree(tokenizer, folder, dirs_exist_ok=True)
        model.save_pretrained(folder)
        return folder

    return save


@pytest.fixture(scope="module")
def llama(save_hf):
    torch.manual_seed(5)
    model = tiny_llama(300)
    return model, save_hf(model)


def continuations(encode, directory, scoring):
    """Prompt tokens and answer tokens of every answer, question by question: what evaluate.py must ask for."""
    asked = []
    for subject in read_tasks(directory, SHOTS):
        for question in subject.questions:
            text = prompt(subject.name, subject.examples, question, scoring)
            asked.append([(encode(text), encode(answer)) for answer in answers(question, scoring)])
    return asked


def dense_log_likelihoods(model, asked):
    """The same, one sequence after another in float64: softmax of every row over the whole vocabulary."""
    values = []
    for context, answer in asked:
        with torch.no_grad():
            logits = model(torch.tensor([context + answer])).logits[0]
        assert logits.dtype == torch.float64
        shifted = torch.exp(logits - logits.max(-1, keepdim=True).values)
        rows = torch.log(shifted / shifted.sum(-1, keepdim=True))
        values.append(sum(float(rows[len(context) - 1 + i, token]) for i, token in enumerate(answer)))
    return values


def correct(directory, values, scoring):
    """Correct answers by subject, from dense log-likelihoods."""
    values, right = iter(values), {}
    for subject in read_tasks(directory, SHOTS):
        for question in subject.questions:
            lengths = [len(text) + 1 if scoring == "text" else 1 for text in question.choices]
            mine = [value / length for value, length in zip(next(values), lengths, strict=True)]
            hit = all(mine[question.answer] >= other for other in mine)
            right[subject.name] = right.get(subject.name, 0) + hit
    return right


def run(*argv):
    """What evaluate.py --json prints."""
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        evaluate.main([*map(str, argv), "--json"])
    return json.loads(out.getvalue())


def recorded(*argv):
    """`run`, and the log-likelihoods that it computed."""
    seen, plain = [], evaluate.log_likelihoods

    def watch(model, requests, batch_size):
        seen.extend(plain(model, requests, batch_size))
        return seen

    evaluate.log_likelihoods = watch
    try:
        return run(*argv), seen
    finally:
        evaluate.log_likelihoods = plain


@pytest.mark.parametrize(("flags", "words"), [
    ("--load {empty}", "holds no checkpoint"),
    ("--hf {empty}", r"holds no \*.safetensors"),
    ("--hf {empty}/gone", "is not a directory"),
])
def test_a_missing_model_is_one_sentence(tasks, tmp_path, flags, words):
    flags = flags.format(empty=tmp_path)
    with pytest.raises(ValueError, match=f"^{flags} {words}"):
        run("--tasks", tasks, "--num-shots", SHOTS, *flags.split())


@pytest.mark.parametrize("flags", ["--geoscale-recipe certified", "--tokenizer-model x", "--ckpt-step 1",
                                   "--num-shots -1", "--micro-batch-size 0", "--load x"])
def test_flags_that_cannot_be_with_hf(tmp_path, flags, capsys):
    with pytest.raises(SystemExit) as raised:
        run("--tasks", tmp_path, "--hf", tmp_path, *flags.split())
    assert raised.value.code == 2 and flags.split()[0] in capsys.readouterr().err


# A Hugging Face directory


def encoder(tokenizer):
    from transformers import AutoTokenizer

    loaded = AutoTokenizer.from_pretrained(tokenizer)
    return lambda text: loaded(text, add_special_tokens=False)["input_ids"]


@pytest.mark.parametrize(("scoring", "batch_size"), [("letter", 3), ("text", 5)])
def test_hugging_face_scores_are_the_dense_ones(llama, tasks, tokenizer, scoring, batch_size):
    model, folder = llama
    asked = continuations(encoder(tokenizer), tasks, scoring)
    oracle = [dense_log_likelihoods(model.double(), four) for four in asked]
    model.float()
    summary, values = recorded("--tasks", tasks, "--hf", folder, "--num-shots", SHOTS, "--scoring", scoring,
                               "--micro-batch-size", batch_size)
    assert values == pytest.approx([value for four in oracle for value in four], rel=1e-4)
    assert min(max(four) - min(four) for four in oracle) > 1e-2  # the answers differ by more than the tolerance
    right = correct(tasks, oracle, scoring)
    assert {name: fields["correct"] for name, fields in summary["subjects"].items()} == right
    assert 0 < sum(right.values()) < summary["micro_average"]["questions"] == 11
    assert summary["micro_average"]["correct"] == sum(right.values())
    assert (summary["saturated"], summary["shortened_prompts"], summary["cut_prompts"]) == (None, 0, 0)


def test_four_letters_cost_one_forward(llama, tasks):
    model = _models.HuggingFaceModel(llama[1])
    batches, plain = [], model.logits
    model.logits = lambda batch: batches.append(batch) or plain(batch)
    for scoring, forwards in (("letter", 11), ("text", 44)):
        batches.clear()
        result = score(read_tasks(tasks, SHOTS), model.encode, functools.partial(
            _models.log_likelihoods, model, batch_size=4), scoring=scoring, sequence_length=384)
        # Answers that are one token share theirs with the question's others.
        count = sum(map(len, batches))
        assert result.total.questions == 11 and (count == forwards if scoring == "letter" else 11 <= count <= forwards)
        assert max(map(len, batches)) == 4


def test_a_model_that_knows_the_answers_gets_all_and_its_negative_none(tasks, tokenizer, save_hf):
    """The rows of the letters in the output layer are solved for: their logits are then the right ones."""
    encode = encoder(tokenizer)
    asked = continuations(encode, tasks, "letter")
    torch.manual_seed(7)
    model = tiny_llama(300).double()
    with torch.no_grad():
        hidden = torch.stack([model.model(torch.tensor([four[0][0]])).last_hidden_state[0, -1] for four in asked])
        questions = [question for subject in read_tasks(tasks, SHOTS) for question in subject.questions]
        wanted = torch.full((len(questions), 4), -5.0, dtype=torch.float64)
        wanted[range(len(questions)), [question.answer for question in questions]] = 5.0
        model.lm_head.weight.zero_()
        letters = [encode(f" {letter}") for letter in "ABCD"]
        model.lm_head.weight[[token for (token,) in letters]] = (torch.linalg.pinv(hidden) @ wanted).T
        assert {question.answer for question in questions} == {0, 1, 2, 3}
        for sign, accuracy in ((1, 1.0), (-1, 0.0)):
            model.lm_head.weight *= sign
            summary = run("--tasks", tasks, "--hf", save_hf(model.float()), "--num-shots", SHOTS)
            model.double()
            assert {fields["accuracy"] for fields in summary["subjects"].values()} == {accuracy}
            assert summary["micro_average"]["accuracy"] == summary["macro_average"]["accuracy"] == accuracy


def test_a_beginning_token_begins_the_prompt(llama, tokenizer, save_hf):
    from tokenizers.processors import TemplateProcessing
    from transformers import AutoTokenizer

    plain = _models.HuggingFaceModel(llama[1])
    folder = save_hf(llama[0])
    loaded = AutoTokenizer.from_pretrained(tokenizer, bos_token="<eos>")
    loaded._tokenizer.post_processor = TemplateProcessing(
        single="<eos> $A <eos>", special_tokens=[("<eos>", loaded.bos_token_id)]
    )
    loaded.save_pretrained(folder)
    assert loaded("Grass")["input_ids"][-1] == loaded.bos_token_id  # an end that must not come before the answer
    assert _models.HuggingFaceModel(folder).encode("Grass") == [loaded.bos_token_id, *plain.encode("Grass")]


def test_logits_that_are_not_finite_are_refused(llama, tasks, save_hf):
    torch.manual_seed(5)
    model = tiny_llama(300)
    with torch.no_grad():
        model.model.norm.weight[0] = float("nan")
    with pytest.raises(ValueError, match="the logits are not finite"):
        run("--tasks", tasks, "--hf", save_hf(model), "--num-shots", SHOTS)


def test_prompts_that_lost_examples_are_reported(tasks, save_hf, capsys):
    torch.manual_seed(5)
    folder = save_hf(tiny_llama(300, length=64))
    evaluate.main(["--tasks", str(tasks), "--hf", str(folder), "--num-shots", str(SHOTS)])
    out = capsys.readouterr().out
    summary = run("--tasks", tasks, "--hf", folder, "--num-shots", SHOTS)
    assert summary["shortened_prompts"] == 11 and f"11 of 11 prompts lost worked examples to fit 64 tokens, " \
        f"{summary['cut_prompts']} the question's start too" in out
    assert "high_school_colors" in out and "micro average" in out and "macro average" in out


# A Megatron checkpoint


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory, tokenizer):
    """--save directory of two iterations, on two tensor-parallel ranks; before the second, W_Q, W_K and W_V jump."""
    directory = tmp_path_factory.mktemp("checkpoint")
    succeed(flags_of(
        "--num-layers 2 --hidden-size 32 --num-attention-heads 4 --group-query-attention --num-query-groups 2",
        "--seq-length 384 --make-vocab-size-divisible-by 8 --init-method-std 0.2", LLAMA, BATCH, NO_DROPOUT,
        "--mock-data --tensor-model-parallel-size 2 --train-iters 2 --save-interval 1",
        "--geoscale-fault-injection weight_spike:2:400",
        ["--tokenizer-type", "HuggingFaceTokenizer", "--tokenizer-model", tokenizer, "--save", directory],
    ), ranks=2)
    return directory


def alone(fn):
    """`fn()` in a process of its own without a process group."""
    def rank_main(rank, world_size):
        dist.destroy_process_group()
        try:
            return fn()
        finally:
            dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)  # which the harness ends

    return run_ranks(rank_main, 1)[0]


def dense(directory):
    """The checkpoint's weights in a float64 Llama of transformers, read by torch alone."""
    from torch.distributed.checkpoint import FileSystemReader, load
    from torch.distributed.checkpoint.metadata import TensorStorageMetadata

    reader = FileSystemReader(directory)
    entries = reader.read_metadata().state_dict_metadata
    saved = {name: torch.empty(entry.size, dtype=entry.properties.dtype) for name, entry in entries.items()
             if isinstance(entry, TensorStorageMetadata) and name.startswith(("embedding", "decoder", "output_layer"))}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it warns that there is one process
        load(saved, storage_reader=reader)
    vocabulary = TorchDistDirectory(directory).args().tokenizer_vocab_size  # what pads it has no probability
    model = tiny_llama(vocabulary).double()
    state = {
        "model.embed_tokens.weight": saved["embedding.word_embeddings.weight"][:vocabulary],
        "model.norm.weight": saved["decoder.final_layernorm.weight"],
        "lm_head.weight": saved["output_layer.weight"][:vocabulary],
    }
    for i in range(2):
        mine = {name.removeprefix("decoder.layers."): tensor[i] for name, tensor in saved.items() if ".layers." in name}
        qkv = mine["self_attention.linear_qkv.weight"].view(2, 2 + 2, 8, 32)  # each group: its queries, key, value
        gate, up = mine["mlp.linear_fc1.weight"].chunk(2)
        state |= {f"model.layers.{i}.{name}.weight": tensor for name, tensor in {
            "self_attn.q_proj": qkv[:, :2].reshape(32, 32), "self_attn.k_proj": qkv[:, 2].reshape(16, 32),
            "self_attn.v_proj": qkv[:, 3].reshape(16, 32),
            "self_attn.o_proj": mine["self_attention.linear_proj.weight"],
            "mlp.gate_proj": gate, "mlp.up_proj": up, "mlp.down_proj": mine["mlp.linear_fc2.weight"],
            "input_layernorm": mine["self_attention.linear_qkv.layer_norm_weight"],
            "post_attention_layernorm": mine["mlp.linear_fc1.layer_norm_weight"],
        }.items()}
    model.load_state_dict(state)
    return model


@pytest.mark.parametrize("scoring", ["letter", "text"])
def test_megatron_scores_are_the_dense_ones(checkpoint, tasks, tokenizer, scoring):
    flags = ["--tasks", tasks, "--load", checkpoint, "--ckpt-step", 1, "--num-shots", SHOTS, "--scoring", scoring]
    (summary, values), (fp8, cast) = alone(
        lambda: [recorded(*flags), recorded(*flags, "--geoscale-recipe", "certified")]
    )
    asked = continuations(encoder(tokenizer), tasks, scoring)
    model = dense(checkpoint / "iter_0000001")
    oracle = [dense_log_likelihoods(model, four) for four in asked]
    flat = [value for four in oracle for value in four]
    assert values == pytest.approx(flat, rel=1e-4)
    right = correct(tasks, oracle, scoring)
    assert {name: fields["correct"] for name, fields in summary["subjects"].items()} == right
    assert 0 < sum(right.values()) < summary["micro_average"]["questions"] == 11
    assert (summary["recipe"], summary["saturated"], summary["sequence_length"]) == ("none", None, 384)
    # FP8 changes the values, by little, and saturates none.
    assert cast == pytest.approx(flat, abs=1.0) and cast != pytest.approx(flat, rel=1e-4)
    assert (fp8["recipe"], fp8["saturated"]) == ("certified", 0)


def test_recipes_after_a_weight_spike(checkpoint, tasks):
    """The scales are those of the weights in the checkpoint; a history that is empty saturates."""
    flags = ["--tasks", tasks, "--load", checkpoint, "--num-shots", 0, "--geoscale-recipe"]
    recipes = ("certified", "calibrated", "current", "delayed")
    summaries = dict(zip(recipes, alone(lambda: [run(*flags, recipe) for recipe in recipes]), strict=True))
    assert all(summary["model"].endswith("iter_0000002") for summary in summaries.values())
    saturated = {recipe: summary["saturated"] for recipe, summary in summaries.items()}
    assert saturated == {"certified": 0, "calibrated": 0, "current": 0, "delayed": saturated["delayed"]}
    assert saturated["delayed"] > 0


def test_what_the_checkpoint_cannot_read_is_one_sentence(checkpoint, tasks, tokenizer, tmp_path, monkeypatch):
    from transformers import PreTrainedTokenizerFast

    bigger = PreTrainedTokenizerFast.from_pretrained(tokenizer)
    bigger.add_tokens([f"<{i}>" for i in range(50)])
    bigger.save_pretrained(tmp_path / "bigger")
    args = SimpleNamespace(load="RUN", padded_vocab_size=304, tokenizer_model=None, tokenizer_type="NullTokenizer")
    with pytest.raises(ValueError, match=r"^RUN was trained with NullTokenizer, which reads no text: give"):
        _models._tokenizer_for(args, None, None)
    with pytest.raises(ValueError, match=r"^--tokenizer-type must be one of .*, not GPT2BPETokenizer"):
        _models._tokenizer_for(args, "GPT2BPETokenizer", None)
    with pytest.raises(ValueError, match=r"^--tokenizer-model is required with HuggingFaceTokenizer"):
        _models._tokenizer_for(args, "HuggingFaceTokenizer", None)
    with pytest.raises(ValueError, match=r"bigger has 350 tokens, more than the 304 of the model in RUN"):
        _models._tokenizer_for(args, "HuggingFaceTokenizer", str(tmp_path / "bigger"))
    assert _models._tokenizer_for(args, "HuggingFaceTokenizer", str(tokenizer)).vocab_size == 300
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="single process"):
        run("--tasks", tasks, "--load", checkpoint, "--num-shots", SHOTS)
