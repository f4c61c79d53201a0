"""Temperatures: what they may see, what they never change, what they mend; bins, votes and the risk-coverage curve."""

from dataclasses import replace

import numpy as np
import pytest
from scipy.special import expit, softmax

from affekt.data.errors import SettingsError
from affekt.finetune.calibration import (
    HIGHEST,
    LOWEST,
    Temperatures,
    calibration_errors,
    fit_temperatures,
    reliability_bins,
    risk_coverage,
)
from affekt.finetune.metrics import confidence
from affekt.finetune.predictions import Predictions

CLASSES = ["anger", "joy", "neutral", "sadness"]


def calibrated(clips: int, rng: np.random.Generator, part: str = "dev", scale: float = 1.0) -> Predictions:
    """Labels drawn from the softmax of the logits, which are then multiplied."""
    logits = rng.normal(size=(clips, 4)) * 1.5
    label = (logits + rng.gumbel(size=logits.shape)).argmax(1)
    ids = [f"{part}{n}" for n in range(clips)]
    return Predictions(ids, CLASSES, logits=logits * scale, label=label, about={"part": part})


def of_sets(clips: int, rng: np.random.Generator, scales: np.ndarray) -> Predictions:
    """Four classes drawn from the sigmoids of their logits, which are then multiplied, and one that all clips have."""
    logits = np.hstack([rng.normal(size=(clips, 4)) * 2, np.ones((clips, 1))])
    hot = rng.random((clips, 5)) < expit(logits)
    hot[:, 4] = True
    shares = hot / hot.sum(1, keepdims=True)
    ids = [str(n) for n in range(clips)]
    return Predictions(
        ids, [*CLASSES, "any"], kind="multi", logits=logits * scales, shares=shares, about={"part": "dev"}
    )


def test_logits_times_three_are_scaled_back():
    rng = np.random.default_rng(0)
    dev, test = calibrated(400, rng, scale=3), calibrated(2000, rng, "test", scale=3)
    fitted = fit_temperatures(dev)
    assert fitted.values == pytest.approx([3], rel=0.15)
    before, after = calibration_errors(test), calibration_errors(fitted.apply(test))
    assert after["ece"] <= before["ece"] / 2 and after["classwise_ece"] <= before["classwise_ece"] / 2
    assert after["nll"] < before["nll"] and after["brier"] < before["brier"]


def test_a_calibrated_model_has_a_small_error():
    test = calibrated(8000, np.random.default_rng(1))
    assert calibration_errors(test)["ece"] < 0.02


def test_scaling_never_raises_the_nll_of_its_fitting_part_nor_changes_an_answer():
    seed = int(np.random.SeedSequence().generate_state(1)[0])
    print("seed", seed)
    rng = np.random.default_rng(seed)
    for _ in range(25):
        dev = calibrated(int(rng.integers(1, 60)), rng, scale=float(np.exp(rng.normal() * 2)))
        if rng.random() < 0.3:
            dev = replace(dev, label=rng.integers(0, 4, len(dev)))  # nothing was learned
        fitted = fit_temperatures(dev)
        assert LOWEST <= fitted.values[0] <= HIGHEST
        scaled = fitted.apply(dev)
        assert confidence.nll(scaled.logits, dev.label) <= confidence.nll(dev.logits, dev.label)
        np.testing.assert_array_equal(scaled.logits.argmax(1), dev.logits.argmax(1))
        sets = of_sets(40, rng, np.exp(rng.normal(size=5)))
        scaled, hot = fit_temperatures(sets).apply(sets), sets.shares > 0
        assert confidence.binary_nll(scaled.logits, hot) <= confidence.binary_nll(sets.logits, hot)
        np.testing.assert_array_equal(scaled.logits > 0, sets.logits > 0)


def test_an_answer_that_wins_by_the_last_bit_goes_on_winning():
    low = np.array([3.9 + n * 2**-51 for n in range(200)])
    logits = np.stack([low, np.nextafter(low, 4)], 1)
    table = Predictions([str(n) for n in range(200)], ["a", "b"], logits=logits)
    assert ((logits / 3).argmax(1) == 0).any()  # so dividing alone would change some
    assert (Temperatures(np.array([3.0]), ["a", "b"], "single").apply(table).logits.argmax(1) == 1).all()


def test_each_class_of_a_set_has_its_own_temperature():
    rng = np.random.default_rng(2)
    planted = np.array([0.5, 1, 2, 4, 3])
    fitted = fit_temperatures(of_sets(3000, rng, planted)).values
    assert fitted == pytest.approx([*planted[:4], 1], rel=0.2)  # the last class, which all have, tells nothing
    rare = of_sets(50, rng, planted)
    shares = rare.shares * (np.arange(5) != 3)
    fitted = fit_temperatures(replace(rare, shares=shares / shares.sum(1, keepdims=True))).values
    assert fitted[3] == fitted[4] == 1 and (fitted[:3] != 1).all()


def test_what_temperatures_may_not_be_fitted_on():
    rng = np.random.default_rng(3)
    test = calibrated(50, rng, "test")
    with pytest.raises(SettingsError, match="fitted on development clips"):
        fit_temperatures(test)
    with pytest.raises(SettingsError, match="there are none"):
        fit_temperatures(calibrated(50, rng).take([]))
    with pytest.raises(SettingsError, match="there are none"):
        fit_temperatures(replace(calibrated(5, rng), label=np.full(5, -1)))
    with pytest.raises(SettingsError, match="temperatures are of single"):
        fit_temperatures(calibrated(50, rng)).apply(replace(test, classes=["a", "b", "c", "d"]))


def test_where_every_development_clip_is_right_no_temperature_is_best():
    dev = Predictions(["a", "b"], ["x", "y"], logits=np.array([[3.0, 0], [0, 0.1]]), label=np.array([0, 1]))
    assert fit_temperatures(dev).values == [1]


def test_where_all_temperatures_are_as_good_it_stays_1():
    dev = Predictions(["a", "b"], ["x", "y"], logits=np.zeros((2, 2)), label=np.array([0, 1]))
    assert fit_temperatures(dev).values == [1]


def test_against_the_share_of_raters():
    rng = np.random.default_rng(4)
    logits = rng.normal(size=(3000, 4))
    shares = np.array([rng.multinomial(10, p) / 10 for p in softmax(logits, 1)])
    ids = [str(n) for n in range(3000)]
    people = Predictions(ids, CLASSES, logits=logits, shares=shares, label=shares.argmax(1))
    assert calibration_errors(people, votes=True)["ece"] < 0.02  # it says how many would say so
    assert calibration_errors(people)["ece"] > 0.1  # and is therefore too unsure of the label
    sure = replace(people, logits=3 * logits)
    assert calibration_errors(sure, votes=True)["ece"] > 0.1
    assert fit_temperatures(replace(sure, label=None)).values == pytest.approx([3], rel=0.05)  # on votes alone


def test_bins_are_those_of_the_error():
    table = calibrated(500, np.random.default_rng(5), scale=2)
    sure, right = table.probabilities.max(1).round(2), (table.logits.argmax(1) == table.label).astype(float)
    bins = reliability_bins(sure, right)
    assert sum(one.clips for one in bins) == 500
    assert sum(one.clips * abs(one.share - one.confidence) for one in bins) / 500 == pytest.approx(
        confidence.ece(sure, right), abs=1e-12
    )
    assert [one.confidence for one in bins] == sorted(one.confidence for one in bins)
    [one] = reliability_bins(np.full(7, 0.5), np.r_[np.ones(2), np.zeros(5)])  # a majority class
    assert (one.clips, one.share) == (7, pytest.approx(2 / 7))


def test_risk_falls_with_less_coverage_and_ends_at_the_error():
    table = calibrated(600, np.random.default_rng(6))
    groups = [f"s{n % 20}" for n in range(600)]
    curve = risk_coverage([table, table], "model", groups, bootstrap=200)
    assert curve.x[-1] == 1 and curve.y[-1] == pytest.approx(np.mean(table.logits.argmax(1) != table.label))
    assert curve.y[10] < curve.y[-1]
    assert all(low <= y <= high for low, y, high in zip(curve.low, curve.y, curve.high))
