"""Calibration: the rules of bounds.calibration by hand, and the Calibrator that keeps its state."""

import math

import numpy as np
import pytest
import torch

from megatron_geoscale.bounds.calibration import BINS, ShareStatistics, calibrated_alpha, raised_alpha
from megatron_geoscale.config import GeoScaleConfig
from megatron_geoscale.scaling.slots import SLOTS

QKV, LOGITS, PROBABILITIES, OUTPUT = (SLOTS.index(slot) for slot in ("qkv", "logits", "s", "o"))


def float64(*values):
    return torch.tensor(values, dtype=torch.float64)


def statistics_of(sequence):
    statistics = ShareStatistics((1,))
    for rho in sequence:
        statistics.add(float64(rho))
    return statistics


@pytest.mark.parametrize(
    ("sequence", "factor", "floor", "alpha"),
    [
        ([0.1, 0.3, 0.2], 1.5, 0.01, 29 / 64),  # 0.45 = 28.8 / 64, rounded up
        ([0.25, 0.25], 2.0, 0.01, 0.5),  # what is on the grid stays
        ([0.25 * (1 + 1e-9)], 2.0, 0.01, 17 / 32),
        ([0.9], 1.5, 0.01, 1.0),  # clipped
        ([0.001, 0.002], 1.5, 0.01, 0.01),  # the floor
        ([0.0, 0.0], 1.5, 0.01, 1.0),  # nothing but zeros says nothing
        ([0.0, 0.5, 0.0], 1.25, 0.01, 0.625),
        ([0.1, math.nan], 1.5, 0.01, 1.0),
        ([0.1, math.inf], 1.5, 0.01, 1.0),
        ([1.7, 0.1], 1.5, 0.01, 1.0),  # above its bound, as isotropic ones can be
        ([2.0**-40], 1.5, 2.0**-60, 1.5 * 2.0**-40),
    ],
)
def test_alpha_of_a_sequence_by_hand(sequence, factor, floor, alpha):
    statistics = statistics_of(sequence)
    assert calibrated_alpha(statistics.maxima, factor=factor, floor=floor).tolist() == [alpha]
    assert statistics.steps == len(sequence)


def test_alpha_is_never_below_what_was_asked_and_at_most_a_sixteenth_above():
    maxima = torch.rand(100_000, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * 0.6 + 0.01
    alpha = calibrated_alpha(maxima, factor=1.5, floor=1e-9)
    wanted = 1.5 * maxima
    assert (alpha >= wanted)[wanted <= 1].all() and (alpha <= wanted * 1.0625).all() and (alpha <= 1).all()
    noisy = calibrated_alpha(maxima * (1 + 1e-12), factor=1.5, floor=1e-9)
    assert (noisy != alpha).sum() <= 2  # last bits, in which layouts differ, do not show


def test_a_saturated_value_doubles_alpha_up_to_one():
    alpha = float64(0.1, 0.1, 0.3, 0.6, 1.0)
    saturated = torch.tensor([True, False, True, True, True])
    assert raised_alpha(alpha, saturated).tolist() == [0.2, 0.1, 0.6, 1.0, 1.0]


@pytest.mark.parametrize("distribution", ["lognormal", "uniform", "constant"])
def test_quantiles_are_those_of_all_observations_within_a_bin(distribution):
    random = np.random.default_rng(0)
    draw = {
        "lognormal": lambda: np.exp(random.normal(-4, 0.8, 3000)),
        "uniform": lambda: random.uniform(1e-3, 1, 3000),
        "constant": lambda: np.full(3000, 0.37),
    }[distribution]
    rho = np.minimum(draw(), 0.999)
    statistics = ShareStatistics((1,))
    for value in torch.from_numpy(rho)[:, None]:
        statistics.add(value)
    for share in (0.001, 0.01, 0.5, 0.9, 0.999, 1.0):
        exact = np.quantile(rho, share, method="inverted_cdf")
        assert abs(math.log2(float(statistics.quantile(share)) / exact)) <= 1 / 16 + 1e-9


def test_quantile_of_little_and_of_nothing():
    assert ShareStatistics((2,)).quantile(0.5).tolist() == [0.0, 0.0]
    assert statistics_of([0.0] * 5).quantile(0.5).tolist() == [0.0]
    assert float(statistics_of([2.0**-30]).quantile(1.0)) == 2.0**-30
    for share in (0.0, -0.1, 1.1):
        with pytest.raises(ValueError, match="share"):
            statistics_of([0.1]).quantile(share)


def test_memory_does_not_grow_and_the_order_of_steps_does_not_matter():
    rho = torch.rand(1000, 3, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    forward, backward = ShareStatistics((3, 2)), ShareStatistics((3, 2))
    for one, other in zip(rho, rho.flip(0)):
        forward.add(one)
        backward.add(other)
    assert forward.counts.shape == (3, 2, BINS) and forward.maxima.shape == (3, 2)
    assert len(vars(forward)) == 3 and forward.counts.sum() == 1000 * 6
    assert torch.equal(forward.maxima, backward.maxima) and torch.equal(forward.counts, backward.counts)
    assert torch.equal(forward.maxima, rho.amax(0))


SCALE = 64.0
"""Of every slot in the burn-in below: a bound of 7 in E4M3 at margin 1."""


def calibrator_of(layers=2, **changes):
    from megatron_geoscale.scaling.calibrator import Calibrator

    options = dict(recipe="calibrated", logits_dtype="fp8", burn_in_steps=3, calibration_factor=1.25)
    return Calibrator(layers, GeoScaleConfig(**(options | changes)), torch.device("cpu"))


def step(calibrator, amax, saturated=()):
    """One step in which each layer's slots see `amax`, a dict {(row, column): value}."""
    for (row, column), value in amax.items():
        zero, count = torch.tensor(0), torch.tensor(int((row, column) in saturated))
        calibrator.gauge.observe(row, SLOTS[column], torch.tensor(value), count, zero, torch.tensor(SCALE))
    calibrator.end_step(lambda: torch.full_like(calibrator.gauge.amax, SCALE))
    return calibrator.news()


@pytest.mark.usefixtures("megatron")
def test_burn_in_then_alpha_then_only_saturation_counts():
    calibrator = calibrator_of()
    assert step(calibrator, {(0, QKV): 0.7, (1, QKV): 1.4, (0, PROBABILITIES): 7.0}) == []
    assert step(calibrator, {(0, QKV): 1.75, (1, QKV): 0.0, (0, OUTPUT): 3.5}, saturated={(0, QKV)}) == []
    assert calibrator.alpha is None and calibrator.alpha_of(0) is None
    (told,) = step(calibrator, {(0, QKV): 0.1})
    assert "calibration ended after 3 steps" in told and "qkv 0.25 to 0.3125" in told
    # rho 0.25 and 0.2 of the bound 7, times 1.25; a slot in which nothing was seen stays certified
    assert calibrator.alpha_of(0) == {"qkv": 0.3125, "logits": 1.0, "o": 0.625}
    assert calibrator.alpha_of(1) == {"qkv": 0.25, "logits": 1.0, "o": 1.0}
    assert torch.equal(calibrator.alpha[:, PROBABILITIES], torch.ones(2).double())

    assert step(calibrator, {(0, QKV): 7.0, (1, OUTPUT): 7.0}) == []  # large values alone change nothing now
    assert calibrator.statistics.steps == 3 and calibrator.statistics.maxima[0, QKV] == 0.25
    told = step(
        calibrator,
        {(1, QKV): 2.0, (0, PROBABILITIES): 1.0, (0, LOGITS): 1.0},
        saturated={(1, QKV), (0, PROBABILITIES), (0, LOGITS)},
    )
    assert told == ["WARNING: values of qkv saturated in layer 2: alpha is raised from 0.25 to 0.5"]
    assert step(calibrator, {}) == []  # a step's saturation counts once
    step(calibrator, {(1, QKV): 2.0}, {(1, QKV)})
    assert calibrator.news() == []  # nothing is told twice
    assert calibrator.alpha_of(1)["qkv"] == 1.0 and calibrator.alpha_of(0)["qkv"] == 0.3125


@pytest.mark.usefixtures("megatron")
def test_rho_is_relative_to_the_bound_whatever_the_margin_and_nan_keeps_it():
    calibrator = calibrator_of(margin=0.5, burn_in_steps=1)  # the same scale is now that of a bound of 3.5
    step(calibrator, {(0, QKV): 0.7, (1, QKV): math.nan, (0, PROBABILITIES): math.nan})
    assert calibrator.alpha_of(0)["qkv"] == 0.25 and calibrator.alpha_of(1)["qkv"] == 1.0


@pytest.mark.usefixtures("megatron")
def test_float32_logits_are_not_calibrated():
    assert calibrator_of(logits_dtype="fp32").config.calibrated_slots == ("qkv", "o")
    assert GeoScaleConfig(recipe="paper").calibrated_slots == ()
    assert GeoScaleConfig(recipe="paper", logits_dtype="fp8").calibrated_slots == ("logits",)
    assert GeoScaleConfig(logits_dtype="fp8").calibrated_slots == ()


@pytest.mark.usefixtures("megatron")
@pytest.mark.parametrize(("saved_at", "burn_in", "alpha"), [(1, 3, None), (3, 3, 0.3125), (2, 1, 0.25), (3, 5, None)])
def test_state_moves_and_the_burn_in_may_be_made_longer_or_shorter(saved_at, burn_in, alpha):
    def values_of(calibrator):
        statistics = calibrator.statistics
        tensors = (calibrator.factors, statistics.maxima, statistics.counts, torch.tensor([statistics.steps]))
        names = ("alpha", "maxima", "counts", "steps")
        return {f"geoscale.calibration.calibrated.{name}": t for name, t in zip(names, tensors)}

    source = calibrator_of()
    for value in (0.7, 1.4, 1.75)[:saved_at]:
        step(source, {(0, QKV): value})
    target = calibrator_of(burn_in_steps=burn_in)
    target.load_state_dict(values_of(source))
    told_of_a_new_end = burn_in < saved_at  # the end of the checkpoint's own burn-in was told by the run that saved it
    assert [("ended" in sentence) for sentence in target.news()] == [True] * told_of_a_new_end
    assert (target.alpha_of(0) or {}).get("qkv") == alpha
    assert torch.equal(target.statistics.counts, source.statistics.counts)
    while target.burning_in:
        step(target, {(0, QKV): 1.75})
    assert target.alpha_of(0)["qkv"] == (alpha or 0.3125)


@pytest.mark.parametrize(
    ("name", "values"),
    [("burn_in_steps", (0, -1)), ("calibration_factor", (1.0, 0.5, math.inf, math.nan)), ("alpha_floor", (0, -1, 1.5))],
)
def test_options_out_of_range_are_named_by_their_flag(name, values):
    for value in values:
        with pytest.raises(ValueError, match="--geoscale-" + name.replace("_", "-")):
            GeoScaleConfig(**{name: value})
