"""Groups of people: gaps on balanced truth, what chance would show, small groups, speakers; corpora side by side."""

import random

import numpy as np
import pytest

from affekt.data.errors import SettingsError
from affekt.finetune.predictions import Predictions
from affekt.finetune.stress import fairness
from affekt.finetune.stress.across import across_corpora
from affekt.finetune.stress.fairness import balanced, describe_fairness

CLASSES = ["a", "b", "c"]


def table(truth, said, **meta):
    ids = [f"clip{i}" for i in range(len(truth))]
    logits = 3.0 * np.eye(len(CLASSES))[said]
    meta = {name: [str(v) for v in values] for name, values in meta.items()}
    return Predictions(ids, CLASSES, logits=logits, label=np.asarray(truth), meta=meta, about={"name": "model"})


def answers(rng, truth, accuracy):
    wrong = (truth + rng.integers(1, len(CLASSES), len(truth))) % len(CLASSES)
    return np.where(rng.random(len(truth)) < accuracy, truth, wrong)


def people(n, each=2):
    """Sexes in turn and `each` speakers of either."""
    sex = np.array(["female", "male"])[np.arange(n) % 2]
    return {"sex": sex, "speaker": [f"{s}{i // 2 % each}" for i, s in enumerate(sex)]}


def test_truth_is_balanced_before_groups_are_compared():
    truth = [0] * 30 + [1] * 10 + [0] * 10 + [1] * 30
    meta = {"sex": ["female"] * 40 + ["male"] * 40, "speaker": [f"s{i // 10}" for i in range(80)]}
    found = describe_fairness(table(truth, [0] * 80, **meta), "sex", "war")  # all that is a is right, all else wrong
    assert [g.scores["war"] for g in found.groups] == pytest.approx([0.5, 0.5])
    assert found.gap == pytest.approx(0, abs=1e-6) and found.passes
    assert [(g.name, g.clips, g.speakers) for g in found.groups] == [("female", 40, 4), ("male", 40, 4)]
    weights = balanced(np.array([[1.0] * 40 + [0] * 40, [0.0] * 40 + [1] * 40]), np.array(truth))
    for stratum in (0, 1):
        assert weights[:, np.array(truth) == stratum].sum(1) == pytest.approx([10, 10])
    with pytest.raises(SettingsError, match="in common"):
        balanced(np.array([[1.0, 0], [0, 1.0]]), np.array([0, 1]))


def test_a_gap_is_held_against_chance(monkeypatch):
    monkeypatch.setattr(fairness, "SIMULATIONS", 200)
    rng = np.random.default_rng(3)
    truth = rng.integers(0, 3, 240)
    who = people(240, each=6)
    passed = [describe_fairness(table(truth, answers(rng, truth, 0.7), **who), "sex").passes for _ in range(12)]
    assert sum(passed) >= 9  # each passes with 95 %: fewer than nine of twelve in one of 4,000 tries
    said = answers(rng, truth, np.where(np.arange(240) % 2, 0.5, 0.9))
    unfair = describe_fairness(table(truth, said, **who), "sex")
    recalls = [[np.mean(said[(truth == k) & (np.arange(240) % 2 == g)] == k) for k in range(3)] for g in (0, 1)]
    assert [g.scores["uar"] for g in unfair.groups] == pytest.approx(np.mean(recalls, 1))
    assert unfair.gap == pytest.approx(abs(np.diff(np.mean(recalls, 1))[0])) and unfair.gap > 0.2
    assert not unfair.passes and 0.02 < unfair.threshold < unfair.gap
    assert "as few as 6 speakers" in unfair.note
    again = describe_fairness(table(truth, said, **who), "sex")
    assert again == unfair


def test_a_gap_between_speakers_is_none_between_their_groups(monkeypatch):
    """Models that are good with some speakers and bad with others, whatever their sex."""
    seed = random.randrange(2**31)
    print(f"seed {seed}")
    monkeypatch.setattr(fairness, "SIMULATIONS", 100)
    rng, who = np.random.default_rng(seed), people(480, each=6)
    number = np.unique(who["speaker"], return_inverse=True)[1]
    passed = {"speakers": 0, "clips": 0}
    for _ in range(24):
        truth = rng.integers(0, 3, 480)
        said = answers(rng, truth, rng.permutation(np.repeat([0.35, 0.95], 6))[number])
        for draws in passed:
            strangers = {"speaker": [f"s{i}" for i in range(480)]} if draws == "clips" else {}  # each clip its own
            passed[draws] += describe_fairness(table(truth, said, **who | strangers), "sex").passes
    print(passed)
    assert passed["speakers"] >= 16  # of 24 with 92 %, for few gaps are possible: fewer in one of 5,000 tries
    assert passed["clips"] <= passed["speakers"] - 4


def test_who_answers_for_whom():
    strata, people_ = np.array([0, 0, 0, 1, 1, 1, 0, 1]), np.array([*"aabbab", "", ""])
    used = np.array([True] * 5 + [False] + [True] * 2)
    donors = fairness.Donors(strata, used, people_)
    rng, seen = np.random.default_rng(0), {i: set() for i in range(8)}
    for _ in range(400):
        drawn = donors.draw(rng)
        assert (strata[drawn] == strata).all() and drawn[5] == 5
        assert people_[drawn[0]] == people_[drawn[1]]  # one donor for a speaker's clips of a stratum
        for clip, donor in enumerate(drawn):
            seen[clip].add(int(donor))
    assert seen[0] == seen[1] == {0, 1, 2} and seen[3] == {3, 4}  # known people have known donors
    assert seen[6] == {0, 1, 2, 6} and seen[7] == {3, 4, 7}  # the others, any clip
    nobody = fairness.Donors(strata, used, np.full(8, ""))
    assert {int(nobody.draw(rng)[0]) for _ in range(200)} == {0, 1, 2, 6}


def test_two_speakers_a_side_are_told_to_say_nothing(monkeypatch):
    monkeypatch.setattr(fairness, "SIMULATIONS", 100)
    rng, truth = np.random.default_rng(0), np.arange(240) % 3
    said = answers(rng, truth, np.where(np.arange(240) % 2, 0.4, 0.98))
    found = describe_fairness(table(truth, said, **people(240, each=2)), "sex")
    assert "as few as 2 speakers" in found.note and "that it passes says nothing" in found.note
    assert "says nothing" not in describe_fairness(table(truth, said, **people(240, each=5)), "sex").note


def test_small_groups_are_told_and_not_compared():
    n, rng = 120, np.random.default_rng(0)
    truth = np.arange(n) % 3
    age = ["25"] * 50 + ["35"] * 50 + ["70"] * 10 + [""] * 5 + ["child"] * 5
    speakers = [f"s{i % 7}" for i in range(n)]
    found = describe_fairness(table(truth, answers(rng, truth, 0.8), age=age, speaker=speakers), "age")
    assert [g.name for g in found.groups] == ["30 to 49", "below 30"]
    assert "50 and above: 10 clips, fewer than 20" in found.note and "child: 5 clips" in found.note
    assert "unknown: 5 clips" in found.note
    with pytest.raises(SettingsError, match="female: 40 clips of one speaker"):
        describe_fairness(table([0, 1] * 40, [0] * 80, sex=["female", "male"] * 40, speaker=["f", "m"] * 40), "sex")
    with pytest.raises(SettingsError, match="unknown: 80 clips"):
        describe_fairness(table([0, 1] * 40, [0] * 80, speaker=["f", "m"] * 40), "sex")


def test_speakers_and_their_means_of_ratings():
    rng, n = np.random.default_rng(1), 200
    speaker = np.arange(n) % 10
    truth = 0.05 * speaker + rng.normal(0, 0.1, n)
    ratings, values = truth[:, None], (truth + 0.3)[:, None]
    ids, meta = [str(i) for i in range(n)], {"speaker": [f"s{s}" for s in speaker]}
    found = describe_fairness(Predictions(ids, [], ["arousal"], ratings=ratings, values=values, meta=meta), "speaker")
    assert len(found.groups) == 10 and all(g.clips == 20 and g.speakers == 1 for g in found.groups)
    assert "Means of speakers in arousal are off by 0.300, Spearman 1.00" in found.note
    scores = [g.scores["ccc"] for g in found.groups]
    assert f"mean {np.mean(scores):.3f}, deviation {np.std(scores, ddof=1):.3f}" in found.note
    assert f"worst tenth {min(scores):.3f}" in found.note


def test_corpora_side_by_side_count_the_classes_that_they_have():
    full, lacking = table([0, 1, 2, 0], [0, 1, 1, 0]), table([0, 0, 1, 1], [0, 2, 1, 1])
    lacking.logits[1] = [1.0, 0, 2]  # c first, which is not there, then a
    found = across_corpora({"here": full, "there": lacking}, bootstrap=100)
    assert [row[:3] for row in found.rows] == [["here", "4", "3 of 3"], ["there", "4", "2 of 3"]]
    first = [[cell.split()[0] for cell in row[3:]] for row in found.rows]
    assert first[0][0] == first[0][2] == "66.7" and first[0][1] == first[0][3]
    assert first[1] == ["75.0", f"{100 * (2 / 3 + 1) / 2:.1f}", "100.0", "100.0"]
    with pytest.raises(SettingsError, match="nowhere: scores across"):
        across_corpora({"nowhere": table([-1, -1], [0, 0])})
