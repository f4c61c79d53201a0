"""Scores of confusion matrices against their obvious versions and scikit-learn; intervals against a loop and against
known coverage."""

import numpy as np
import pytest
from sklearn import metrics as sklearn_metrics

from affekt.data.errors import SettingsError
from affekt.finetune.metrics.confusion import (
    confusion_matrices,
    confusion_matrix,
    macro_f1,
    masked_argmax,
    micro_f1,
    present_macro_f1,
    uar,
    war,
    weighted_f1,
)
from affekt.finetune.metrics.intervals import (
    bootstrap_interval,
    by_rows,
    intervals,
    resample_weights,
    resampled,
    resampling_unit,
    two_sided_p,
)

EXACT = {"rel": 0, "abs": 1e-12}


def slow_uar(truth, prediction):
    classes = sorted(set(truth.tolist()))
    return sum(np.mean([p == c for t, p in zip(truth, prediction) if t == c]) for c in classes) / len(classes)


def slow_war(truth, prediction):
    return sum(int(t == p) for t, p in zip(truth, prediction)) / len(truth)


def slow_f1(truth, prediction):
    values = []
    for c in sorted(set(truth.tolist()) | set(prediction.tolist())):
        hit = sum(int(t == p == c) for t, p in zip(truth, prediction))
        said, is_so = sum(prediction == c), sum(truth == c)
        precision, recall = hit / said if said else 0.0, hit / is_so if is_so else 0.0
        values.append(2 * precision * recall / (precision + recall) if hit else 0.0)
    return sum(values) / len(values)


@pytest.mark.filterwarnings("ignore:y_pred contains classes not in y_true", "ignore:A single label was found")
def test_scores_equal_the_slow_versions_and_sklearn():
    seed = int(np.random.SeedSequence().generate_state(1)[0])
    print("seed", seed)
    rng = np.random.default_rng(seed)
    for _ in range(100):
        clips, classes = int(rng.integers(1, 40)), int(rng.integers(2, 8))
        truth, prediction = rng.integers(0, classes, clips), rng.integers(0, classes, clips)  # often leaves classes out
        matrix = confusion_matrix(truth, prediction, classes)
        np.testing.assert_array_equal(
            matrix, sklearn_metrics.confusion_matrix(truth, prediction, labels=range(classes))
        )
        assert uar(matrix) == pytest.approx(slow_uar(truth, prediction), **EXACT)
        assert uar(matrix) == pytest.approx(sklearn_metrics.balanced_accuracy_score(truth, prediction), **EXACT)
        assert war(matrix) == pytest.approx(slow_war(truth, prediction), **EXACT)
        assert macro_f1(matrix) == pytest.approx(slow_f1(truth, prediction), **EXACT)
        for ours, average, labels in (
            (macro_f1, "macro", None),
            (weighted_f1, "weighted", None),
            (micro_f1, "micro", None),
            (present_macro_f1, "macro", np.unique(truth)),
        ):
            theirs = sklearn_metrics.f1_score(truth, prediction, average=average, labels=labels, zero_division=0)
            assert ours(matrix) == pytest.approx(theirs, **EXACT), average
        weights = rng.integers(0, 4, (3, clips)) + (np.arange(clips) == 0)
        for row, stack in zip(weights, confusion_matrices(truth, prediction, classes, weights)):
            np.testing.assert_array_equal(
                stack, confusion_matrix(np.repeat(truth, row), np.repeat(prediction, row), classes)
            )


def test_class_absent_from_the_truth_has_no_recall_but_costs_f1():
    matrix = confusion_matrix(np.array([0, 0, 1, 1]), np.array([0, 0, 1, 2]), num_classes=4)
    assert uar(matrix) == pytest.approx((1 + 0.5) / 2)
    assert macro_f1(matrix) == pytest.approx((1 + 2 / 3 + 0) / 3)  # class 2 is only predicted, class 3 is nowhere


def test_a_stack_of_matrices_is_scored_like_each_alone():
    rng = np.random.default_rng(3)
    stack = rng.integers(0, 9, (5, 4, 4))
    for score in (uar, war, macro_f1, weighted_f1, micro_f1, present_macro_f1):
        np.testing.assert_allclose(score(stack), [score(matrix) for matrix in stack])


def test_where_the_truth_lacks_classes_their_prediction_is_an_error_or_masked_away():
    truth = np.array([0, 0, 2, 2])
    logits = np.array([[2.0, 3, 1], [2, 1, 1], [0, 9, 1], [1, 0, 5]])  # says 1, 0, 1, 2; class 1 is not there
    matrix = confusion_matrix(truth, logits.argmax(1), 3)
    assert uar(matrix) == 0.5
    assert present_macro_f1(matrix) == pytest.approx((2 / 3 + 2 / 3) / 2, **EXACT)
    assert macro_f1(matrix) == pytest.approx((2 / 3 + 2 / 3 + 0) / 3, **EXACT)
    present = np.array([True, False, True])
    assert masked_argmax(logits, present).tolist() == [0, 0, 2, 2]
    with pytest.raises(SettingsError, match="no class is present"):
        masked_argmax(logits, np.zeros(3, bool))


@pytest.mark.parametrize(
    ("truth", "prediction", "message"),
    [([], [], "no clips"), ([0, 1], [0], "pairs"), ([0, 5], [0, 1], "0 to 2"), ([0.5, 1.0], [0, 1], "whole numbers")],
)
def test_input_that_cannot_be_scored_is_an_error(truth, prediction, message):
    with pytest.raises(SettingsError, match=message):
        confusion_matrix(np.array(truth), np.array(prediction), 3)


def test_whole_speakers_are_resampled():
    groups = [f"s{i // 5}" for i in range(60)]
    for weights in resample_weights(60, groups, 500, seed=1):
        per_speaker = weights.reshape(-1, 12, 5)
        assert (per_speaker == per_speaker[:, :, :1]).all()
        assert (per_speaker[:, :, 0].sum(1) == 12).all()
    assert resampling_unit(groups) == "speakers"


def test_few_speakers_are_resampled_in_two_stages():
    groups = ["a"] * 5 + ["b"] * 20 + ["c"] * 10
    weights = np.concatenate(list(resample_weights(35, groups, 2000, seed=1)))
    assert len(weights) == 2000
    totals = np.stack([weights[:, :5].sum(1) / 5, weights[:, 5:25].sum(1) / 20, weights[:, 25:].sum(1) / 10])
    assert (totals == totals.round()).all() and (totals.sum(0) == 3).all()  # each drawn speaker keeps its clip count
    assert (weights[:, :5].std(1) > 0).any()  # and its clips vary within
    assert resampling_unit(groups) == "speakers, then their clips"


def test_interval_equals_a_loop_over_resamples():
    rng = np.random.default_rng(0)
    truth = rng.integers(0, 4, 90)
    prediction = np.where(rng.random(90) < 0.6, truth, rng.integers(0, 4, 90))
    groups = [f"s{i % 15}" for i in range(90)]
    interval = bootstrap_interval(uar, truth, prediction, groups, n=600, seed=5)
    weights = np.concatenate(list(resample_weights(90, groups, 600, seed=5))).astype(int)
    loop = [slow_uar(np.repeat(truth, row), np.repeat(prediction, row)) for row in weights]
    assert interval.value == pytest.approx(slow_uar(truth, prediction))
    assert (interval.low, interval.high) == pytest.approx(tuple(np.quantile(loop, [0.025, 0.975])))
    assert (interval.unit, interval.clusters) == ("speakers", 15)
    assert interval == bootstrap_interval(uar, truth, prediction, groups, n=600, seed=5)


def test_speakers_that_differ_widen_the_interval():
    truth = np.zeros(400, int)
    prediction = np.repeat([0, 1], 200)  # half of the 20 speakers are always right, half always wrong
    groups = [f"s{i // 20}" for i in range(400)]
    over_clips = bootstrap_interval(war, truth, prediction, None)
    over_speakers = bootstrap_interval(war, truth, prediction, groups)
    assert over_clips.unit == "clips" and over_clips.clusters == 400
    assert over_speakers.high - over_speakers.low > 3 * (over_clips.high - over_clips.low)
    # Clips are 400 fair coins: the interval is 0.5 +- 1.96 * 0.025.
    assert (over_clips.low, over_clips.high) == pytest.approx((0.451, 0.549), abs=0.006)


def test_paired_difference_and_mean_over_seeds():
    rng = np.random.default_rng(2)
    truth = rng.integers(0, 3, 200)
    good = np.where(rng.random(200) < 0.7, truth, rng.integers(0, 3, 200))
    bad = np.stack([np.where(rng.random(200) < 0.3, truth, rng.integers(0, 3, 200)) for _ in range(3)])
    gain = bootstrap_interval(war, truth, good, None, minus=bad)
    mean_bad = np.mean([slow_war(truth, row) for row in bad])
    assert bootstrap_interval(war, truth, bad, None).value == pytest.approx(mean_bad)
    assert gain.value == pytest.approx(slow_war(truth, good) - mean_bad)
    assert gain.low > 0.1
    same = bootstrap_interval(war, truth, good, None, minus=good)
    assert (same.value, same.low, same.high) == pytest.approx((0, 0, 0), abs=1e-9)


def test_as_many_groups_as_clips():
    with pytest.raises(SettingsError, match="2 groups for 3 clips"):
        bootstrap_interval(war, np.array([0, 1, 1]), np.array([0, 1, 1]), ["a", "b"])


def test_any_score_can_be_resampled_and_those_of_one_call_share_their_resamples():
    rng = np.random.default_rng(4)
    values, groups = rng.normal(size=30), [f"s{i % 12}" for i in range(30)]
    scores = {"mean": lambda w: w @ values / w.sum(1), "rows": by_rows(lambda rows: values[rows].mean())}
    found = resampled(scores, 30, groups, n=300, seed=2)
    np.testing.assert_allclose(found["mean"], found["rows"], atol=1e-12)
    both = intervals(scores, 30, groups, n=300, seed=2, cluster="session")
    assert both["mean"].low == pytest.approx(both["rows"].low) and both["mean"].unit == "sessions"
    with pytest.raises(SettingsError, match="odd is no number in 300 of 300"):
        resampled({"odd": lambda w: np.full(len(w), np.nan)}, 30, groups, n=300)
    with pytest.raises(SettingsError, match="0 resamples"):
        resampled(scores, 30, groups, n=0)


def test_p_is_two_sided_and_never_0():
    assert two_sided_p(np.full(999, 0.2)) == two_sided_p(np.full(999, -0.2)) == pytest.approx(2 / 1000)
    assert two_sided_p(np.r_[np.full(24, -1.0), np.full(975, 1.0)]) == pytest.approx(0.05)
    assert two_sided_p(np.zeros(999)) == two_sided_p(np.array([-1.0, 1.0])) == 1
