"""A mistake of the user's is one sentence that names the flag or the file, exit code 2, and no traceback."""

import importlib.util
import os
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from tests.functional.common import MODEL, NO_DROPOUT, VOCABULARY, base, corpus, flags_of, launch, succeed, write_corpus
from tests.harness import ROOT

pytestmark = pytest.mark.usefixtures("megatron")

NULL = ["--tokenizer-type", "NullTokenizer", "--vocab-size", VOCABULARY]


def flags_for(*more):
    return base("--train-iters 2", *more)


def with_data(*data, tokenizer=NULL):
    """A run on other data than the usual."""
    return flags_of(MODEL, NO_DROPOUT, "--micro-batch-size 2 --lr 1e-3 --train-iters 2 --eval-iters 0 --num-workers 0",
                    list(data), list(tokenizer))


def mistake(flags, ranks=1, *words, some=False):
    """The one sentence of a run that must end with code 2, said by every rank, or by `some`: the others only notice
    that a rank has gone, or are killed where they wait, as torchrun would kill them."""
    __tracebackhide__ = True
    runs = launch(flags, ranks, timeout=60, patience=3 if some else 20)
    assert "Traceback" not in "".join(run.err for run in runs), [run.err[-3000:] for run in runs]
    guilty = [run for run in runs if run.code == 2] if some else runs
    assert guilty and {run.code for run in guilty} == {2}, [(run.code, run.out[-500:], run.err) for run in runs]
    bystanders = {run.err.partition(" rank ")[2][2:] for run in runs if run not in guilty}
    assert bystanders <= {"", "stops because another rank has gone\n"}
    (said,) = {run.err for run in guilty if run.err}
    (sentence,) = said.splitlines()
    assert sentence.startswith("pretrain.py: error: ")
    for word in words:
        assert str(word) in sentence, sentence
    return sentence


@pytest.mark.parametrize(
    ("flags", "ranks", "word"),
    [
        ("--no-such-flag", 1, "--no-such-flag"),
        ("--geoscale-recipe magic", 2, "--geoscale-recipe"),
        ("--tensor-model-parallel-size 3", 3, "--num-attention-heads 4"),
        ("--geoscale-fault-injection fire:1", 1, "--geoscale-fault-injection"),
        ("--seq-length", 1, "--seq-length"),
        ("--context-parallel-size 2", 2, "--context-parallel-size"),
    ],
)
def test_flags_that_cannot_be(flags, ranks, word):
    assert len(mistake(flags_for(flags), ranks, word)) < 300


def test_real_process_exits_with_2_and_prints_one_line():
    """What the other tests see inside a forked rank, once from outside."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, ROOT / "pretrain.py", *with_data("--data-path", "/nowhere/corpus")]
    plain = subprocess.run(list(map(str, command)), capture_output=True, text=True, env=environment, cwd=ROOT)
    assert plain.returncode == 2
    (sentence,) = plain.stderr.splitlines()
    assert sentence.startswith("pretrain.py: error: ") and "/nowhere/corpus.idx does not exist" in sentence


def test_traceback_on_request(monkeypatch):
    monkeypatch.setenv("GEOSCALE_TRACEBACK", "1")
    (run,) = launch(with_data("--data-path", "/nowhere/corpus"))
    assert run.code == 2 and run.err.startswith("Traceback") and run.err.count("pretrain.py: error: ") == 1


def test_missing_data_is_named_by_every_rank():
    mistake(with_data("--data-path", "/nowhere/corpus"), 2, "/nowhere/corpus.idx does not exist")
    mistake(with_data("--data-path", "0.5", corpus(), "0.5", "/nowhere/other"), 1, "/nowhere/other.idx")
    mistake(with_data("--train-data-path", corpus(), "--valid-data-path", "/nowhere/valid"), 1, "/nowhere/valid.idx")


@pytest.fixture
def damaged(tmp_path):
    """A copy of the corpus, to be damaged."""
    for suffix in (".idx", ".bin"):
        shutil.copy(f"{corpus()}{suffix}", tmp_path / f"copy{suffix}")
    return tmp_path / "copy"


@pytest.mark.parametrize("suffix", [".idx", ".bin"])
@pytest.mark.parametrize("share", [0.0, 0.5, 0.999])
def test_truncated_files_are_named(damaged, suffix, share):
    path = Path(f"{damaged}{suffix}")
    os.truncate(path, int(share * path.stat().st_size))
    mistake(with_data("--data-path", damaged), 1, path, "truncated")


def test_garbage_index_is_named(damaged):
    Path(f"{damaged}.idx").write_bytes(os.urandom(5000))
    mistake(with_data("--data-path", damaged), 1, f"{damaged}.idx", "not a Megatron index file")


@pytest.mark.parametrize("documents", [[], [[]]])
def test_empty_corpus_is_named(tmp_path, documents):
    mistake(with_data("--data-path", write_corpus(tmp_path / "empty", documents)), 1, tmp_path, "the corpus is empty")


def test_split_without_documents_is_named_and_no_wait_for_them(tmp_path):
    """megatron-core would look for a first sample of an empty split for ever."""
    prefix = write_corpus(tmp_path / "few", [list(range(40))] * 3)
    mistake([*with_data("--data-path", prefix), "--eval-iters", 1], 1, "--split", prefix, "valid split")
    (run,) = succeed(with_data("--data-path", prefix))  # nothing is asked of the two small splits
    assert "training is complete" in run.out


def test_split_without_training_documents_is_named():
    mistake(with_data("--data-path", corpus(), "--split", "0,100,0"), 1, "--split 0,100,0")
    mistake(with_data("--data-path", corpus(), "--split", "a,b,c"), 1, "--split", "a,b,c")


def test_token_beyond_the_vocabulary_is_named(tmp_path):
    flags = with_data("--data-path", write_corpus(tmp_path / "big", [list(range(100))] * 40))
    mistake(flags, 1, "token 8", f"vocabulary of {VOCABULARY + 1} tokens", "--data-path")
    mistake([*flags, "--tensor-model-parallel-size", 2], 2, "vocabulary", some=True)
    mistake([*flags, "--pipeline-model-parallel-size", 2], 2, "vocabulary", some=True)


@pytest.fixture
def sentencepiece_model(tmp_path):
    import sentencepiece

    (tmp_path / "text").write_text("the quick brown fox jumps over the lazy dog\n" * 20)
    sentencepiece.SentencePieceTrainer.train(
        input=str(tmp_path / "text"), model_prefix=str(tmp_path / "small"), vocab_size=40, model_type="bpe",
        minloglevel=2,
    )
    return tmp_path / "small.model"


def test_tokenizers_that_do_not_fit_are_named(tmp_path, sentencepiece_model):
    kind = ["--tokenizer-type", "SentencePieceTokenizer", "--tokenizer-model"]
    data = ("--data-path", corpus())
    mistake(with_data(*data, tokenizer=[*kind, tmp_path / "none"]), 2, f"--tokenizer-model {tmp_path / 'none'}")
    (tmp_path / "garbage").write_bytes(b"garbage")
    mistake(with_data(*data, tokenizer=[*kind, tmp_path / "garbage"]), 1, f"--tokenizer-model {tmp_path / 'garbage'}")
    mistake(with_data(*data, tokenizer=[*kind, sentencepiece_model, "--vocab-size", 50]), 1, "--vocab-size 50", "40")
    mistake(with_data(*data, tokenizer=[*kind, sentencepiece_model]), 1, "vocabulary of 40 tokens")


@pytest.fixture(scope="module")
def checkpoint(megatron, tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoint")
    succeed(flags_for("--save", folder))
    return folder


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ("--hidden-size 64", "--hidden-size was 32 when it was saved and is 64 now"),
        ("--num-layers 4", "--num-layers"),
        ("--num-attention-heads 8", "--num-attention-heads"),
        ("--num-query-groups 4", "--num-query-groups"),
        ("--ffn-hidden-size 128", "--ffn-hidden-size"),
        ("--vocab-size 90", "--vocab-size"),
        ("--add-qkv-bias", "--add-qkv-bias"),
        ("--normalization LayerNorm", "--normalization"),
        ("--position-embedding-type learned_absolute", "--position-embedding-type"),
    ],
)
def test_checkpoint_of_another_shape(checkpoint, change, word):
    mistake(flags_for("--load", checkpoint, change), 1, checkpoint / "iter_0000002", "another shape", word)


def test_checkpoint_of_other_positions(tmp_path):
    flags = base("--train-iters 1", model="gpt2")
    succeed([*flags, "--save", tmp_path])
    mistake([*flags, "--load", tmp_path, "--max-position-embeddings", 64], 1, tmp_path, "--max-position-embeddings")


@pytest.fixture
def broken(checkpoint, tmp_path):
    """A copy of the checkpoint, to be broken."""
    return Path(shutil.copytree(checkpoint, tmp_path / "broken"))


@pytest.mark.parametrize("text", ["", "soon", "-1", "release"])
def test_garbage_tracker_is_named(broken, text):
    tracker = broken / "latest_checkpointed_iteration.txt"
    tracker.write_text(text)
    mistake(flags_for("--load", broken), 2, tracker)


def test_missing_checkpoints_are_named(broken):
    (broken / "latest_checkpointed_iteration.txt").write_text("99")
    mistake(flags_for("--load", broken), 1, broken / "iter_0000099")
    mistake(flags_for("--load", broken, "--ckpt-step 7"), 1, broken / "iter_0000007")
    mistake(flags_for("--load", broken / "none", "--exit-on-missing-checkpoint"), 1, broken / "none")
    mistake(flags_for("--load", broken / "none", "--finetune"), 1, broken / "none")


@pytest.mark.parametrize("victim", ["common.pt", "metadata.json", ".metadata", "*.distcp"])
@pytest.mark.parametrize("damage", ["removed", "truncated", "garbage"])
def test_damaged_checkpoint_is_named(broken, victim, damage):
    directory = broken / "iter_0000002"
    paths = list(directory.glob(victim))
    assert paths
    for path in paths:
        if damage == "removed":
            path.unlink()
        else:
            path.write_bytes(path.read_bytes()[: path.stat().st_size // 2] if damage == "truncated" else b"garbage")
    mistake(flags_for("--load", broken), 1, directory)


def test_checkpoint_without_optimizer_says_how_to_load_it(tmp_path):
    succeed(flags_for("--save", tmp_path, "--no-save-optim"))
    mistake(flags_for("--load", tmp_path), 1, "--no-load-optim")
    succeed(flags_for("--load", tmp_path, "--no-load-optim"))


def test_save_that_is_no_directory_is_named_before_training(tmp_path):
    occupied = tmp_path / "file"
    occupied.touch()
    runs = launch(flags_for("--save", occupied))
    assert "iteration        1/" not in runs[0].out
    mistake(flags_for("--save", occupied), 2, occupied)
    mistake(flags_for("--save", occupied / "below"), 1, occupied)


def test_paths_of_logs_are_named(tmp_path):
    (tmp_path / "file").touch()
    mistake(flags_for("--geoscale-log-jsonl", tmp_path / "file" / "log"), 1, tmp_path / "file")
    mistake(flags_for("--geoscale-log-jsonl", tmp_path), 1, tmp_path)
    mistake(flags_for("--tensorboard-dir", tmp_path / "file"), 1, tmp_path / "file")


def test_read_only_directory_is_named(tmp_path):
    locked = tmp_path / "locked"
    locked.mkdir()
    locked.chmod(stat.S_IRUSR | stat.S_IXUSR)
    if os.access(locked, os.W_OK):
        locked = Path("/proc/none")  # root may write anywhere but here
    mistake(flags_for("--save", locked / "save"), 1, locked)


def test_absent_wandb_says_what_to_install():
    assert importlib.util.find_spec("wandb") is None, "the test needs an environment without wandb"
    mistake(flags_for("--wandb-project x"), 1, "megatron-geoscale[wandb]")
