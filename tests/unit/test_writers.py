"""Writers: what reaches wandb (a stand-in that keeps the calls) and which values of layers are left out."""

from __future__ import annotations

import math
import sys
from argparse import Namespace
from types import ModuleType

import pytest

from megatron_geoscale.training.writers import Writers


def arguments(**fields: object) -> Namespace:
    defaults = {"tensorboard_dir": None, "wandb_project": "", "wandb_exp_name": "", "wandb_save_dir": ""}
    return Namespace(**(defaults | fields))


@pytest.fixture
def wandb(monkeypatch):
    calls: list[tuple] = []

    class Run:
        def log(self, values, *, step):
            calls.append(("log", values, step))

        def finish(self):
            calls.append(("finish",))

    module = ModuleType("wandb")
    module.init = lambda **kwargs: (calls.append(("init", kwargs)), Run())[1]
    monkeypatch.setitem(sys.modules, "wandb", module)
    return calls


def test_wandb_gets_numbers_and_the_layers_numbers(wandb):
    writers = Writers(arguments(wandb_project="p", wandb_exp_name="n"))
    layers = [
        {"layer": 1, "sigma": 0.5, "alpha": None, "utilization": {"qkv": 0.25}},
        {"layer": 2, "sigma": math.inf, "alpha": 0.5, "utilization": {"qkv": 0.75}},
    ]
    writers.write(3, {"lm_loss": 2.0, "geoscale/digest": "abc", "grad_norm": None, "geoscale/layers": layers}, layers)
    writers.close()
    assert wandb == [
        ("init", {"project": "p", "name": "n", "dir": None}),
        (
            "log",
            {
                "lm_loss": 2.0,
                "geoscale-layers/sigma/layer-1": 0.5,
                "geoscale-layers/sigma/layer-2": math.inf,
                "geoscale-layers/utilization/qkv/layer-1": 0.25,
                "geoscale-layers/utilization/qkv/layer-2": 0.75,
            },
            3,
        ),
        ("finish",),
    ]


def test_infinities_are_in_no_histogram(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    writers = Writers(arguments(tensorboard_dir=str(tmp_path)))
    writers.write(1, {}, [{"sigma": 1.0, "bound": math.nan}, {"sigma": math.inf, "bound": math.inf}])
    writers.close()
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    assert events.Tags()["histograms"] == ["geoscale/sigma/layers"]
    assert events.Histograms("geoscale/sigma/layers")[0].histogram_value.num == 1


def test_without_wandb_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ValueError, match=r"--wandb-project needs wandb: pip install megatron-geoscale\[wandb\]"):
        Writers(arguments(wandb_project="p"))
