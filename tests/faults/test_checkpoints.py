"""What a damaged checkpoint, a full disk or a kill between two renames leaves: the one before it, and one sentence."""

import io
import os
import re
import resource
import shutil
import zipfile

import pytest

from tests.faults.moments import at, die
from tests.functional.common import base, column, launch, succeed, train

pytestmark = pytest.mark.usefixtures("megatron")

TP2 = "--tensor-model-parallel-size 2"
TRACKER = "latest_checkpointed_iteration.txt"
STEPS = 6


def flags_for(*more):
    return base("--train-iters", STEPS, "--lr-decay-iters", STEPS, *more)


def iterations(folder):
    return sorted(path.name for path in folder.iterdir() if path.name.startswith("iter_"))


@pytest.fixture(scope="module")
def whole(megatron):
    return train(flags_for())


@pytest.fixture(scope="module")
def saved(megatron, tmp_path_factory):
    """Checkpoints of iterations 2 and 4."""
    folder = tmp_path_factory.mktemp("saved")
    succeed(flags_for("--exit-interval 4 --save-interval 2 --save", folder))
    return folder


@pytest.fixture
def broken(saved, tmp_path):
    return shutil.copytree(saved, tmp_path / "broken")


def truncate(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def overwrite(path):
    path.write_bytes(os.urandom(path.stat().st_size))


def flip_a_bit(path):
    """In the largest entry of the archive, or of the first of the archives in a row, that the file is."""
    content = bytearray(path.read_bytes())
    end = content.index(b"PK\x05\x06") + 22
    with zipfile.ZipFile(io.BytesIO(content[:end])) as archive:
        largest = max(archive.infolist(), key=lambda entry: entry.file_size)
        start = content.index(archive.read(largest))
    content[start + largest.file_size // 2] ^= 16
    path.write_bytes(content)


@pytest.mark.parametrize("damage", [os.remove, truncate, overwrite])
@pytest.mark.parametrize("victim", ["common.pt", "metadata.json", ".metadata", "__0_0.distcp"])
def test_damaged_checkpoint_makes_way_for_the_one_before(broken, whole, victim, damage):
    damage(broken / "iter_0000004" / victim)
    (run,) = succeed(flags_for("--load", broken))
    (warning,) = run.err.splitlines()
    assert warning.startswith(f"warning: {broken / 'iter_0000004'} cannot be read as a checkpoint: ")
    assert warning.endswith(f"; the checkpoint before it is loaded, {broken / 'iter_0000002'}")
    assert f"loaded checkpoint {broken / 'iter_0000002'} at iteration 2" in run.out


@pytest.mark.parametrize("victim", ["common.pt", "__0_0.distcp", "__0_1.distcp"])
def test_a_flipped_bit_makes_it_damaged(broken, victim):
    """torch's own reader takes it as it is."""
    flip_a_bit(broken / "iter_0000004" / victim)
    (run,) = succeed(flags_for("--load", broken))
    (warning,) = run.err.splitlines()
    assert f"ValueError {victim} is not what was written: the check sum of " in warning
    assert f"loaded checkpoint {broken / 'iter_0000002'} at iteration 2" in run.out


def test_the_run_that_goes_on_is_the_one_that_was_not_damaged(broken, whole):
    """Also under another layout; the damaged one is replaced, and nothing is read of it again."""
    overwrite(broken / "iter_0000004" / "__0_1.distcp")
    rest = train(flags_for("--save-interval 2 --load", broken, "--save", broken))
    for name in ("lm_loss", "grad_norm", "geoscale.digest"):
        assert column(rest, name) == column(whole, name)[2:]
    (again,) = succeed(flags_for("--load", broken, "--ckpt-step 4"))
    assert again.err == ""
    overwrite(broken / "iter_0000006" / "__0_1.distcp")
    runs = succeed(flags_for("--load", broken, TP2), 2)
    assert [len(run.err.splitlines()) for run in runs] == [1, 0]  # of two ranks that cannot read it, the first says so
    assert "at iteration 4" in "".join(run.out for run in runs)


def test_one_sentence_where_there_is_none_before(broken):
    for victim in ("iter_0000004", "iter_0000002"):
        truncate(broken / victim / "common.pt")
    for more in ("", "--ckpt-step 4"):
        runs = launch(flags_for("--load", broken, TP2, more), 2)
        assert {run.code for run in runs} == {2}
        (sentence,) = {line for run in runs for line in run.err.splitlines()}
        assert sentence.startswith(f"pretrain.py: error: {broken / 'iter_0000004'} cannot be read as a checkpoint: ")


def test_a_named_checkpoint_is_that_one_or_none(broken):
    truncate(broken / "iter_0000004" / "__0_0.distcp")
    (run,) = launch(flags_for("--load", broken, "--ckpt-step 4"))
    assert run.code == 2 and "__0_0.distcp has " in run.err and len(run.err.splitlines()) == 1


@pytest.mark.parametrize("gap", ["partial", "stale"])
def test_kill_between_the_renames_of_a_second_save_loses_nothing(tmp_path, whole, gap):
    """The tracker's own iteration is saved again: the old directory stands in until the new one has its name."""
    succeed(flags_for("--exit-interval 4 --save-interval 2 --save", tmp_path))
    flags = flags_for("--ckpt-step 2 --save-interval 2 --load", tmp_path, "--save", tmp_path)

    def at_the_gap():
        plain = os.rename

        def rename(source, target):
            if str(source).endswith(f".{gap}") if gap == "partial" else str(target).endswith(".deleting"):
                die()
            plain(source, target)

        os.rename = rename

    (run,) = launch(flags, prepare=at("name", 4, at_the_gap))
    assert run.code == -9
    left = {"partial": ["iter_0000002", "iter_0000004.partial", "iter_0000004.stale"],
            "stale": ["iter_0000002", "iter_0000004", "iter_0000004.stale"]}[gap]
    assert iterations(tmp_path) == left and (tmp_path / TRACKER).read_text() == "4"
    rest = train(flags_for("--save-interval 2 --load", tmp_path, "--save", tmp_path))
    assert column(rest, "lm_loss") == column(whole, "lm_loss")[4:]
    assert iterations(tmp_path) == ["iter_0000002", "iter_0000004", "iter_0000006"]


def full_disk():
    """Files of this process and its children can grow no further."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, resource.RLIM_INFINITY))


@pytest.mark.parametrize(
    ("ranks", "extra", "place", "rank"),
    [
        (1, "", "save", 0),
        (1, "", "files", 0),
        (1, "--async-save", "files", 0),
        (2, TP2, "files", 1),
        (2, TP2, "save", 0),
    ],
)
def test_full_disk_is_one_sentence_and_costs_no_checkpoint(tmp_path, whole, ranks, extra, place, rank):
    flags = flags_for(extra, "--save-interval 2 --save", tmp_path)
    runs = launch(flags, ranks, prepare=at(place, 4, full_disk, rank))
    assert [run.code for run in runs] == [1] * ranks
    lines = [line for run in runs for line in run.err.splitlines()]
    assert all(line.startswith("pretrain.py: ") for line in lines), lines
    said = [line for line in lines if f"checkpoint {tmp_path / 'iter_0000004'} cannot be written: " in line]
    assert said and all("another rank" in line for line in lines if line not in said)
    assert any("MiB are free there" in line for line in said)
    assert not [path for path in tmp_path.glob("iter_*.partial") if os.listdir(path)]  # the disk need not stay full
    assert (tmp_path / TRACKER).read_text() == "2"
    if ranks == 1:
        assert iterations(tmp_path) == ["iter_0000002"]
        rest = train(flags_for("--load", tmp_path))
        assert column(rest, "lm_loss") == column(whole, "lm_loss")[2:]


@pytest.mark.skipif(os.geteuid() != 0, reason="to mount a small file system takes root")
def test_full_file_system_is_emptied_of_what_was_begun(tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    if os.system(f"mount -t tmpfs -o size=450k tmpfs {disk} 2>/dev/null"):
        pytest.skip("no file system can be mounted here")
    try:
        (run,) = launch(flags_for("--save-interval 2 --save", disk))
        assert run.code == 1 and "cannot be written: the disk is full" in run.err and len(run.err.splitlines()) == 1
        assert iterations(disk) == ["iter_0000002"]
        succeed(flags_for("--load", disk))
    finally:
        os.system(f"umount {disk}")


@pytest.mark.parametrize("ranks", [1, 2])
def test_saving_beside_training_gives_the_same_checkpoints(tmp_path, ranks):
    extra = "--use-distributed-optimizer --bf16" if ranks == 2 else ""
    flags = flags_for(extra, "--save-interval 2")
    whole = train([*flags, "--save", tmp_path / "plain"], ranks)
    beside = train([*flags, "--async-save", "--save", tmp_path / "beside"], ranks)
    assert column(beside, "lm_loss") == column(whole, "lm_loss")
    assert iterations(tmp_path / "beside") == [f"iter_000000{i}" for i in (2, 4, 6)]
    for step in (2, 4):  # what was saved is the state then, not what training made of it while it was written
        rest = train([*flags_for(extra), "--load", tmp_path / "beside", "--ckpt-step", step], ranks)
        assert column(rest, "lm_loss") == column(whole, "lm_loss")[step:]


def test_writer_that_is_killed_beside_training_is_one_sentence(tmp_path):
    """As the kernel does where memory runs out."""

    def prepare():
        from megatron_geoscale.training import saving

        write = saving._Results.put
        saving._Results.put = lambda results, value: die() if saving._Results.count else write(results, value)
        saving._Results.count = 0
        publish = saving.CheckpointWriter._publish

        def first(writer, iteration):
            saving._Results.count += 1
            return publish(writer, iteration)

        saving.CheckpointWriter._publish = first

    (run,) = launch(flags_for("--async-save --save-interval 2 --save", tmp_path), prepare=prepare)
    (sentence,) = run.err.splitlines()
    assert run.code == 1 and f"{tmp_path / 'iter_0000004'} cannot be written" in sentence
    assert iterations(tmp_path) == ["iter_0000002"]


@pytest.mark.parametrize("extra", ["", "--async-save"])
def test_the_newest_are_kept(tmp_path, extra):
    """And what is no complete checkpoint stays where it is."""
    flags = flags_for(extra, "--save-interval 1 --save", tmp_path)
    unknown = tmp_path / "iter_0000000"
    unknown.mkdir()
    succeed([*flags, "--keep-last", "2", "--exit-interval", "4"])
    assert iterations(tmp_path) == ["iter_0000000", "iter_0000003", "iter_0000004"]
    succeed([*flags, "--keep-last", "1", "--load", tmp_path])
    assert iterations(tmp_path) == ["iter_0000000", "iter_0000006"] and (tmp_path / TRACKER).read_text() == "6"


def test_kill_while_an_old_one_is_deleted_leaves_nothing_that_looks_whole(tmp_path, whole):
    def at_the_deletion():
        shutil.rmtree = lambda path, **_: (os.remove(path / "common.pt"), die()) if path.exists() else None

    flags = flags_for("--save-interval 2 --keep-last 1 --save", tmp_path)
    (run,) = launch(flags, prepare=at("name", 4, at_the_deletion))
    assert run.code == -9 and (tmp_path / TRACKER).read_text() == "4"
    assert iterations(tmp_path) == ["iter_0000002.deleting", "iter_0000004"]
    rest = train([*flags, "--load", tmp_path])
    assert column(rest, "lm_loss") == column(whole, "lm_loss")[4:]
    assert iterations(tmp_path) == ["iter_0000006"]


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("--keep-last 2", "--keep-last needs --save"),
        ("--async-save", "--async-save needs --save"),
        ("--save x --keep-last 0", "--keep-last must be positive, not 0"),
        ("--geoscale-check-interval -1", "--geoscale-check-interval must not be negative, not -1"),
        ("--geoscale-fault-injection flip_bit:1:1", "--geoscale-fault-injection flip_bit:1:1 names a rank beyond"),
        ("--geoscale-fault-injection flip_bit:1:-1", "--geoscale-fault-injection must be"),
        ("--geoscale-fault-injection flip_bit:1:1:1", "--geoscale-fault-injection must be"),
    ],
)
def test_flags_that_cannot_be(flags, words):
    from megatron_geoscale.training.arguments import parse_args

    with pytest.raises(ValueError, match=re.escape(words)):
        parse_args(flags_for(flags))
