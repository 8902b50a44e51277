"""Nothing that is read runs, nothing listens but torch, files get the user's umask, and a path is only a path."""

import contextlib
import io
import os
import pickle
import stat
import subprocess

import psutil
import pytest
import torch

from tests.functional.common import base, launch, succeed
from tests.harness import ROOT

pytestmark = pytest.mark.usefixtures("megatron")


def flags_for(*more):
    return base("--train-iters 2", *more)


class Payload:
    """Its pickle makes a file when it is read."""

    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return os.mkdir, (str(self.marker),)


@pytest.fixture(scope="module")
def spoilt_rng(megatron, tmp_path_factory):
    """A checkpoint whose RNG state, an object in a .distcp file, makes a file; and that file."""
    folder = tmp_path_factory.mktemp("rng")

    def prepare():
        from megatron_geoscale.training import checkpointing

        plain = checkpointing.rng_state

        def rng_state():
            state = plain()
            state.data[0]["payload"] = Payload(folder / "ran")
            return state

        checkpointing.rng_state = rng_state

    succeed(flags_for("--save", folder / "save"), prepare=prepare)
    return folder / "save", folder / "ran"


@pytest.mark.parametrize("flags", ["", "--use-checkpoint-args", "--finetune --no-load-rng"])
@pytest.mark.parametrize("victim", [".metadata", "metadata-planner", "common.pt"])
def test_no_pickle_of_a_checkpoint_runs(tmp_path, victim, flags):
    save, marker = tmp_path / "save", tmp_path / "ran"
    succeed(flags_for("--save", save))
    directory = save / "iter_0000002"
    if victim == "common.pt":
        common = torch.load(directory / victim)
        torch.save({**common, "payload": Payload(marker)}, directory / victim)
    elif victim == ".metadata":
        (directory / victim).write_bytes(pickle.dumps(Payload(marker)))
    else:
        metadata = pickle.loads((directory / ".metadata").read_bytes())
        metadata.planner_data = Payload(marker)
        (directory / ".metadata").write_bytes(pickle.dumps(metadata))
    (run,) = launch(flags_for("--load", save, flags))
    (sentence,) = run.err.splitlines()
    assert run.code == 2 and str(directory) in sentence and not marker.exists()
    if not flags:
        launch(flags_for("--load", save, "--trust-checkpoint-pickles"))
        assert marker.exists()  # so it would have run


def test_no_object_among_the_tensors_runs(spoilt_rng):
    save, marker = spoilt_rng
    (run,) = launch(flags_for("--load", save))
    assert run.code == 2 and str(save / "iter_0000002") in run.err and len(run.err.splitlines()) == 1
    assert not marker.exists()
    succeed(flags_for("--load", save, "--no-load-rng"))  # what is not asked for is not read
    assert not marker.exists()
    launch(flags_for("--load", save, "--trust-checkpoint-pickles"))
    assert marker.exists()


def test_a_pickle_may_not_name_a_function(tmp_path):
    from megatron_geoscale.checkpoints.torch_dist import read_metadata

    for function in (os.mkdir, eval, subprocess.run, torch.load, torch.hub.load, torch.distributed.checkpoint.load):
        class Call:
            def __reduce__(self, function=function):
                return function, (str(tmp_path / "ran"),)

        (tmp_path / ".metadata").write_bytes(pickle.dumps(Call()))
        with pytest.raises(pickle.UnpicklingError, match="no part of a checkpoint's metadata"):
            read_metadata(tmp_path)
    assert not (tmp_path / "ran").exists()


def as_extra_state(value):
    """As Transformer Engine keeps the FP8 state of a layer."""
    return {"decoder.layers.0.linear_qkv._extra_state": torch.frombuffer(bytearray(value), dtype=torch.uint8)}


def test_the_fp8_state_of_a_layer_may_name_tensors_and_recipes(tmp_path):
    """Versions of Transformer Engine before 2.20 open it with pickle.loads."""
    from megatron_geoscale.training.plain_pickles import check_extra_states, plain_pickles

    recipe = b"c" + b"transformer_engine.common.recipe\nDelayedScaling\n)\x81"
    check_extra_states(as_extra_state(recipe + b"."))
    plain = pickle.dumps({"scale_fwd": torch.ones(3), "extra_fp8_variables": {"fp8_max": (1.0, 2), "on": True}})
    check_extra_states(as_extra_state(plain) | {"x._extra_state": torch.empty(0), "x.weight": torch.ones(1)})
    nested = io.BytesIO()
    torch.save(Payload(tmp_path / "ran"), nested)

    class Nested:
        def __reduce__(self):
            return torch.storage._load_from_bytes, (nested.getvalue(),)

    dotted = b"\x80\x04\x8c\x20transformer_engine.common.recipe\x8c\x09os.system\x93\x8c\x04true\x85R."
    for bad in (pickle.dumps(Payload(tmp_path / "ran")), pickle.dumps([Nested()]), dotted):
        with pytest.raises(pickle.UnpicklingError), plain_pickles():
            check_extra_states(as_extra_state(bad))
    assert not (tmp_path / "ran").exists()
    with plain_pickles():  # as Transformer Engine would open it, had it not been looked at
        with pytest.raises(pickle.UnpicklingError):
            pickle.loads(pickle.dumps(Nested()))
        assert torch.equal(pickle.loads(plain)["scale_fwd"], torch.ones(3))
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("mask", [0o002, 0o027, 0o077])
def test_files_are_created_with_the_users_umask(tmp_path, mask):
    (tmp_path / "run").mkdir()
    root = tmp_path / "run"
    extra = "--async-save" if mask == 0o027 else ""
    flags = flags_for(extra, "--save", root / "save", "--geoscale-log-jsonl", root / "log" / "log.jsonl",
                      "--tensorboard-dir", root / "board", "--data-cache-path", root / "cache")
    succeed(flags, prepare=lambda: os.umask(mask))
    found = [path for path in root.rglob("*")]
    assert len(found) > 8
    for path in found:
        wanted = (0o777 if path.is_dir() else 0o666) & ~mask
        assert stat.S_IMODE(path.stat().st_mode) == wanted, path


def test_a_path_is_only_a_path(tmp_path):
    """As the name of every directory and file that a run writes."""
    odd = tmp_path / "a b; $(touch ran) `touch ran` 'x' \"y\" *"
    flags = flags_for("--save", odd / "save", "--geoscale-log-jsonl", odd / "log.jsonl", "--data-cache-path", odd)
    succeed(flags)
    succeed([*flags, "--load", odd / "save"])
    assert not (tmp_path / "ran").exists() and not (ROOT / "ran").exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == [odd.name]


def test_no_shell_is_started():
    sources = [path for folder in ("megatron_geoscale", "tools") for path in (ROOT / folder).rglob("*.py")]
    for path in [*sources, ROOT / "pretrain.py"]:
        text = path.read_text()
        assert "shell=True" not in text and "os.system(" not in text and "os.popen(" not in text, path


def listening():
    """Addresses on which this process or a child of its takes connections."""
    me, found = psutil.Process(), set()
    for process in (me, *me.children(recursive=True)):
        with contextlib.suppress(psutil.Error):  # a writer that has ended meanwhile
            found |= {
                connection.laddr
                for connection in process.net_connections("inet")
                if connection.status == psutil.CONN_LISTEN
            }
    return found


def test_nothing_listens_but_torch(tmp_path):
    """What listens once the process groups are there (the rendezvous store, gloo) is all that ever does."""
    seen = {}

    def prepare():
        from megatron_geoscale.training import loop, main

        initialize, step = main._initialize, loop.Trainer._step

        def watched(args):
            seen["before"] = listening()
            initialize(args)
            seen["ready"] = listening()

        def watched_step(trainer):
            step(trainer)
            seen["running"] = seen.get("running", set()) | listening()

        main._initialize, loop.Trainer._step = watched, watched_step

    def watch(trainer, go):
        go()
        return {**seen, "after": listening()}

    flags = flags_for("--train-iters 4 --save-interval 1 --async-save --num-workers 1 --save", tmp_path,
                      "--tensorboard-dir", tmp_path / "board", "--tensor-model-parallel-size 2")
    for run in succeed(flags, 2, prepare=prepare, watch=watch):
        seen = run.value
        assert not seen["before"] and seen["ready"]
        assert seen["running"] | seen["after"] <= seen["ready"]
