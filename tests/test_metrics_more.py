"""Scores of dimensions, distributions, sets, confidence and raters: against scikit-learn, scipy and slow twins."""

import itertools
import math

import numpy as np
import pytest
from scipy import special, stats
from scipy.spatial import distance
from sklearn import metrics as sklearn_metrics

from affekt.data.errors import SettingsError
from affekt.finetune.metrics import confidence, dimensions, multilabel, raters, shares
from affekt.finetune.metrics.confusion import uar, war
from affekt.finetune.metrics.missing import auilc

EXACT = {"rel": 0, "abs": 1e-12}


@pytest.fixture
def rng() -> np.random.Generator:
    seed = int(np.random.SeedSequence().generate_state(1)[0])
    print("seed", seed)
    return np.random.default_rng(seed)


def test_dimensions_equal_scipy_and_sklearn(rng):
    for _ in range(50):
        clips = int(rng.integers(2, 60))
        truth = rng.normal(rng.normal(), 1, clips)
        said = 0.5 * truth + rng.normal(size=clips) + rng.normal()
        mean_t, mean_s = sum(truth) / clips, sum(said) / clips
        covariance = sum((t - mean_t) * (s - mean_s) for t, s in zip(truth, said)) / clips
        spread = sum((t - mean_t) ** 2 for t in truth) / clips + sum((s - mean_s) ** 2 for s in said) / clips
        assert dimensions.ccc(truth, said) == pytest.approx(2 * covariance / (spread + (mean_t - mean_s) ** 2), **EXACT)
        assert dimensions.pcc(truth, said) == pytest.approx(stats.pearsonr(truth, said).statistic, **EXACT)
        assert dimensions.rmse(truth, said) == pytest.approx(
            sklearn_metrics.root_mean_squared_error(truth, said), **EXACT
        )
        assert dimensions.mae(truth, said) == pytest.approx(sklearn_metrics.mean_absolute_error(truth, said), **EXACT)


def test_ccc_of_itself_its_shift_and_its_opposite():
    x = np.array([0.1, 0.4, 0.35, 0.8])
    assert dimensions.ccc(x, x) == pytest.approx(1, **EXACT)
    assert dimensions.ccc(x, x + 0.1) < 1 and dimensions.pcc(x, x + 0.1) == pytest.approx(1, **EXACT)
    assert dimensions.ccc(x, -x) < 0
    assert dimensions.ccc(x + 1e6, x + 1e6) == pytest.approx(1, abs=1e-9)


@pytest.mark.parametrize(
    ("truth", "said"), [([1.0, 2, 3], [0.3] * 3), ([0.1] * 3, [1.0, 2, 3]), ([0.7] * 3, [0.7] * 3), ([1.0], [1.0])]
)
def test_what_is_constant_agrees_with_nothing(truth, said):
    truth, said = np.array(truth), np.array(said)
    assert dimensions.ccc(truth, said) == dimensions.pcc(truth, said) == 0


def test_resamples_of_one_value_are_constant_whatever_rounding_says(rng):
    truth, said = np.repeat(rng.normal(size=(2, 40)), 7, axis=1)  # 40 values, 7 clips of each
    weights = np.kron(np.eye(40, dtype=int), np.ones(7, int)) * rng.integers(1, 9, (40, 280))
    assert (dimensions.pcc(truth, said, weights) == 0).all() and (dimensions.ccc(truth, said, weights) == 0).all()


def test_distributions_equal_scipy(rng):
    truth, said = (rng.dirichlet(np.full(6, 0.5), 40) for _ in range(2))
    truth[:5] = np.eye(6)[:5]  # votes that all fall on one class
    for ours, slow in (
        (shares.kl, stats.entropy),
        (shares.js, lambda p, q: distance.jensenshannon(p, q) ** 2),
        (shares.chebyshev, distance.chebyshev),
        (shares.cosine, lambda p, q: 1 - distance.cosine(p, q)),
        (shares.intersection, lambda p, q: 1 - distance.cityblock(p, q) / 2),
    ):
        assert ours(truth, said) == pytest.approx(np.mean([slow(p, q) for p, q in zip(truth, said)]), **EXACT)
    assert shares.agreement(np.array([[0.7, 0.3], [0.4, 0.6]]), np.array([[0.9, 0.1], [0.8, 0.2]])) == 0.55
    assert shares.kl(np.array([[1.0, 0]]), np.array([[0.0, 1]])) == pytest.approx(12 * math.log(10), **EXACT)
    with pytest.raises(SettingsError, match="no distributions, first row 1"):
        shares.kl(np.array([[1.0, 0], [1, 1]]), np.array([[0.0, 1], [0, 1]]))
    with pytest.raises(SettingsError, match="NaN"):
        shares.js(np.array([[np.nan, 1.0]]), np.array([[0.0, 1]]))


@pytest.mark.filterwarnings("ignore")
def test_label_sets_equal_sklearn(rng):
    for _ in range(30):
        truth, said = (rng.random((int(rng.integers(1, 30)), 5)) < 0.3 for _ in range(2))
        said = said[:1].repeat(len(truth), 0) ^ (rng.random(truth.shape) < 0.2)
        found = np.flatnonzero((truth | said).any(0))
        if len(found):
            theirs = sklearn_metrics.f1_score(truth, said, labels=found, average="macro", zero_division=0)
            assert multilabel.multi_macro_f1(truth, said) == pytest.approx(theirs, **EXACT)
            theirs = sklearn_metrics.f1_score(truth, said, average="micro", zero_division=0)
            assert multilabel.multi_micro_f1(truth, said) == pytest.approx(theirs, **EXACT)
        each = [sklearn_metrics.balanced_accuracy_score(t, s) for t, s in zip(truth.T, said.T)]
        assert multilabel.weighted_accuracy(truth, said) == pytest.approx(np.mean(each), **EXACT)


def test_weighted_accuracy_is_that_of_mosei():
    truth = np.array([[1, 0], [0, 0], [0, 1], [0, 0]], bool)
    said = np.array([[1, 1], [1, 0], [0, 1], [0, 0]], bool)
    each = [(tp * n / p + tn) / (2 * n) for tp, tn, p, n in ((1, 2, 1, 3), (1, 2, 1, 3))]
    assert multilabel.weighted_accuracy(truth, said) == pytest.approx(np.mean(each), **EXACT)


def test_a_share_above_chance_is_in_the_set():
    votes = np.array([[3, 2, 1], [2, 2, 2], [6, 0, 0], [3, 3, 0]]) / 6
    assert multilabel.above_chance(votes).astype(int).tolist() == [[1, 0, 0], [1, 1, 1], [1, 0, 0], [1, 1, 0]]
    nothing = np.zeros((2, 3), bool)
    assert multilabel.multi_macro_f1(nothing, nothing) == multilabel.multi_micro_f1(nothing, nothing) == 1
    with pytest.raises(SettingsError, match="bool"):
        multilabel.multi_macro_f1(votes, votes)


def slow_ece(sure, right, bins=15):
    """Bins of as equal a number of clips as whole clips allow, where no two are equally sure."""
    order = np.argsort(sure)
    places = [int((i + 0.5) * bins // len(sure)) for i in range(len(sure))]
    total = 0.0
    for place in set(places):
        rows = [order[i] for i in range(len(sure)) if places[i] == place]
        total += abs(sum(right[r] for r in rows) - sum(sure[r] for r in rows))
    return total / len(sure)


def slow_aurc(sure, right):
    order = np.argsort(-sure)
    return np.mean([np.mean([1 - right[r] for r in order[:n]]) for n in range(1, len(sure) + 1)])


def test_confidence_equals_sklearn_and_slow_twins(rng):
    for _ in range(20):
        clips, classes = int(rng.integers(8, 120)), 5
        logits = rng.normal(size=(clips, classes)) * 2
        truth = np.r_[np.arange(classes), rng.integers(0, classes, clips - classes)]
        p = special.softmax(logits, 1)
        sure, right = p.max(1), (p.argmax(1) == truth).astype(float)
        hot = np.eye(classes)[truth]
        assert confidence.ece(sure, right) == pytest.approx(slow_ece(sure, right), **EXACT)
        each = [slow_ece(p[:, k], hot[:, k]) for k in range(classes)]
        assert confidence.classwise_ece(p, truth) == pytest.approx(np.mean(each), **EXACT)
        assert confidence.nll(logits, truth) == pytest.approx(sklearn_metrics.log_loss(truth, p), **EXACT)
        squared = [sklearn_metrics.mean_squared_error(hot[:, k], p[:, k]) for k in range(classes)]
        assert confidence.brier(p, truth) == pytest.approx(sum(squared), **EXACT)
        each = [sklearn_metrics.log_loss(h, q, labels=[0, 1]) for h, q in zip(hot.T, special.expit(logits).T)]
        assert confidence.binary_nll(logits, hot) == pytest.approx(np.mean(each), **EXACT)
        for k in (1, 2, 3):
            theirs = sklearn_metrics.top_k_accuracy_score(truth, p, k=k)
            assert confidence.top_k(logits, truth, k) == pytest.approx(theirs, **EXACT)
        assert confidence.aurc(sure, right) == pytest.approx(slow_aurc(sure, right), **EXACT)
        if 0 < right.mean() < 1:
            assert confidence.auroc(sure, right) == pytest.approx(sklearn_metrics.roc_auc_score(right, sure), **EXACT)
            rounded = sure.round(1)
            theirs = sklearn_metrics.roc_auc_score(right, rounded)
            assert confidence.auroc(rounded, right) == pytest.approx(theirs, **EXACT)


def test_clips_that_are_equally_sure_have_no_order(rng):
    sure = np.array([0.9, 0.9, 0.9, 0.5, 0.5, 0.7])
    right = np.array([1.0, 0, 0, 1, 0, 1])
    orders = itertools.product(itertools.permutations([0, 1, 2]), [(5,)], itertools.permutations([3, 4]))
    ordered = [[row for rows in order for row in rows] for order in orders]
    every = [np.mean([np.mean(1 - right[rows[:n]]) for n in range(1, 7)]) for rows in ordered]
    assert confidence.aurc(sure, right) == pytest.approx(np.mean(every), **EXACT)
    mixed = rng.permutation(6)
    for score in (confidence.ece, confidence.aurc, confidence.auroc):
        assert score(sure[mixed], right[mixed]) == pytest.approx(score(sure, right), **EXACT)
    # One bin each: |1/3 - 0.9| * 3, |1 - 0.7| and |1/2 - 0.5| * 2, over six clips.
    assert confidence.ece(sure, right) == pytest.approx((1.7 + 0.3 + 0) / 6, **EXACT)
    assert confidence.top_k(np.zeros((3, 3)), np.array([0, 1, 2]), 1) == pytest.approx(1 / 3)  # the argmax is class 0


def test_risk_over_coverage():
    sure, right = np.array([0.9, 0.8, 0.7, 0.6]), np.array([1, 0, 1, 0])
    np.testing.assert_allclose(confidence.risks(sure, right, [0.25, 0.5, 1]), [0, 0.5, 0.5], atol=1e-12)
    with pytest.raises(SettingsError, match="coverage"):
        confidence.risks(sure, right, [0.0])


@pytest.mark.parametrize("right", [[1, 1, 1], [0, 0, 0], [1]])
def test_all_right_or_all_wrong_is_a_defined_figure(right):
    sure = np.linspace(0.5, 0.9, len(right))
    assert confidence.aurc(sure, np.array(right)) == 1 - right[0]
    assert confidence.auroc(sure, np.array(right)) == 0.5
    assert confidence.ece(sure, np.array(right)) == pytest.approx(np.mean(np.abs(sure - right)), **EXACT)


def test_weights_are_repetitions(rng):
    clips = 40
    p, q = (rng.dirichlet(np.ones(4), clips) for _ in range(2))
    label, x, y = rng.integers(0, 4, clips), rng.normal(size=clips).round(1), rng.normal(size=clips)
    sure, right = q.max(1).round(2), (q.argmax(1) == label).astype(float)
    sets = (p > 0.25, q > 0.25)
    weights = rng.integers(0, 4, (5, clips)) + np.eye(5, clips, dtype=int)
    for score, arrays in (
        *((getattr(dimensions, name), (x, y)) for name in ("ccc", "pcc", "rmse", "mae")),
        *((getattr(shares, n), (p, q)) for n in ("kl", "js", "chebyshev", "cosine", "intersection", "agreement")),
        *((getattr(multilabel, name), sets) for name in ("multi_macro_f1", "multi_micro_f1", "weighted_accuracy")),
        *((getattr(confidence, name), (sure, right)) for name in ("ece", "aurc", "auroc")),
        *((getattr(confidence, name), (q, label)) for name in ("classwise_ece", "brier", "nll")),
        (confidence.binary_nll, (q, sets[0].astype(float))),
        (lambda logits, truth, weights=None: confidence.top_k(logits, truth, 2, weights), (q, label)),
        (raters.agreement, (rng.integers(1, 5, (clips, 3)),)),
    ):
        slow = [score(*(np.repeat(array, row, 0) for array in arrays)) for row in weights]
        np.testing.assert_allclose(score(*arrays, weights=weights), slow, rtol=0, atol=1e-12)
    with pytest.raises(SettingsError, match="no clips to score"):
        dimensions.mae(np.zeros(0), np.zeros(0))


def test_a_held_out_rater_equals_holding_out_each_in_turn(rng):
    counts = rng.integers(0, 4, (25, 4)) + np.eye(25, 4, dtype=int)
    confusion, pairs, clips = np.zeros((4, 4)), [], 0
    for row in counts.tolist():
        votes = [k for k, count in enumerate(row) for _ in range(count)]
        if len(votes) < 2:
            continue
        clips += 1
        agree = []
        for held in range(len(votes)):
            others = votes[:held] + votes[held + 1 :]
            most = max(others.count(k) for k in range(4))
            tied = [k for k in range(4) if others.count(k) == most]
            for k in tied:
                confusion[k, votes[held]] += 1 / len(tied) / len(votes)
            agree.append(others.count(votes[held]) / len(others))
        pairs.append(np.mean(agree))
    found = raters.rater_confusions(counts)
    np.testing.assert_allclose(found.sum(0), confusion, atol=1e-12)
    assert war(found.sum(0)) == pytest.approx(np.trace(confusion) / clips, **EXACT)
    few = found[counts.sum(1) > 1][:2].sum(0)  # so few clips that a class may have less than one
    recalls = [few[k, k] / few[k].sum() for k in range(4) if few[k].sum()]
    assert uar(few) == pytest.approx(np.mean(recalls), **EXACT)
    assert raters.agreement(counts) == pytest.approx(np.mean(pairs), **EXACT)


def test_raters_who_agree_and_those_who_are_alone():
    same = np.array([[9, 0], [0, 9], [1, 0]])
    assert uar(raters.rater_confusions(same).sum(0)) == raters.agreement(same) == 1
    with pytest.raises(SettingsError, match="two raters"):
        raters.agreement(np.array([[1, 0]]))
    with pytest.raises(SettingsError, match="whole numbers"):
        raters.rater_confusions(np.array([[0.5, 0.5]]))


def test_the_area_over_rates_of_missing_data():
    assert auilc([0, 0.5, 1], [0.8, 0.6, 0.2]) == pytest.approx((0.7 + 0.4) / 2, **EXACT)
    assert auilc(np.linspace(0, 0.5, 6), [0.7] * 6) == pytest.approx(0.7, **EXACT)
    for rates, scores in (([0], [1]), ([0, 0], [1, 1]), ([1, 0], [1, 1]), ([0, 1], [1, float("nan")])):
        with pytest.raises(SettingsError, match="rising rates"):
            auilc(rates, scores)
