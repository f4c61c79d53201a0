"""Targets from labels, votes and ratings: each rule against counts by hand and the published ones of CREMA-D."""

import csv

import numpy as np
import pytest

from affekt.data.errors import DataError, SettingsError
from affekt.data.labels import LabelSettings, all_inclusive, make_targets, smoothed_shares, top_class


def row(name="c", **meta):
    return {"id": name, "meta": meta}


def targets(rows, **settings):
    return make_targets(rows, LabelSettings.parse(settings))


def test_the_rules_on_votes_by_hand():
    rows = [
        row(votes={"a": 6, "b": 4, "c": 0}),  # a majority
        row(votes={"a": 4, "b": 3, "c": 3}),  # a plurality
        row(votes={"a": 5, "b": 5, "c": 0}),  # a tie, which is no majority either
        row(votes={}),
        row(),
    ]
    assert targets(rows, rule="majority").label.tolist() == [0, -1, -1, -1, -1]
    assert targets(rows, rule="plurality").label.tolist() == [0, 0, -1, -1, -1]
    soft = targets(rows, rule="soft")
    assert np.allclose(soft.target[:3], [[0.6, 0.4, 0], [0.4, 0.3, 0.3], [0.5, 0.5, 0]])
    assert soft.known.tolist() == [True, True, True, False, False] and np.isnan(soft.shares[3:]).all()
    several = targets(rows, rule="all_inclusive")
    assert several.target[:3].tolist() == [[1, 1, 0], [1, 0, 0], [1, 1, 0]]
    assert np.isnan(several.target[3:]).all()


def test_a_majority_is_more_than_half_and_equal_votes_are_everything():
    counts = np.array([[2, 1, 1], [3, 1, 1], [1, 1, 1], [0, 0, 0]], float)
    assert top_class(counts, more_than_half=True).tolist() == [-1, 0, -1, -1]
    assert all_inclusive(counts).tolist() == [[True, False, False], [True, False, False], [True] * 3, [False] * 3]


def test_smoothing_is_that_of_emo_superb():
    shares = np.array([[0.6, 0.4, 0, 0, 0, 0]])
    assert np.allclose(smoothed_shares(shares, 0.05), [[0.574, 0.386, 0.01, 0.01, 0.01, 0.01]], atol=1e-12)
    assert np.allclose(smoothed_shares(np.array([[0.0, 1, 0, 0]]), 0.05)[0, 0], 0.05 / 3, atol=1e-12)
    assert np.isclose(targets([row(votes={"a": 6, "b": 4})] * 2, rule="soft", smoothing=0.05).target[0, 0], 0.59)


def test_the_all_inclusive_rule_gives_the_published_counts_of_cremad(shared_data):
    """3,359, 3,076, 950 and 57 clips have one, two, three and four labels (audio-visual votes)."""
    with open(shared_data / "cremad_votes" / "tabulatedVotes.csv", newline="") as file:
        votes = [{k: int(r[k]) for k in "ADFHNS"} for r in csv.DictReader(file) if r[""].startswith("3")]
    found = targets([row(votes=vote) for vote in votes], rule="all_inclusive")
    assert np.bincount(found.target.sum(1).astype(int)).tolist() == [0, 3359, 3076, 950, 57]


def test_a_map_joins_votes_and_drops_names():
    rows = [row(label="joy", votes={"joy": 2, "glad": 3, "bored": 9}), row(label="bored", votes={"sad": 1})]
    how = {"map": {"joy": "happy", "glad": "happy", "sad": "sad"}, "classes": ["sad", "happy"]}
    mapped = targets(rows, rule="label", **how)
    assert mapped.label.tolist() == [1, -1] and mapped.classes == ["sad", "happy"]
    assert targets(rows, rule="soft", **how).shares.tolist() == [[0, 1], [1, 0]]


def test_conditions_and_ratings_keep_apart():
    rows = [row(votes={"a": 1}, votes_voice={"b": 1}, valence="2", arousal=""), row(votes={"b": 1}, valence=5)]
    rows[1]["meta"]["votes_voice"] = {"a": 1}
    assert targets(rows, rule="plurality").label.tolist() == [0, 1]
    assert targets(rows, rule="plurality", condition="votes_voice").label.tolist() == [1, 0]
    rated = targets(rows, rule=None, dimensions={"valence": [1, 5], "arousal": [0, 1]})
    assert rated.ratings[:, 0].tolist() == [2, 5] and np.isnan(rated.ratings[:, 1]).all()
    assert rated.classes == [] and rated.known.all()


@pytest.mark.parametrize(
    ("rows", "settings", "message"),
    [
        ([row("x", votes={"a": -1})], {"rule": "soft"}, "clip x: votes .* no counts"),
        ([row("x", valence=9)], {"rule": None, "dimensions": {"valence": [1, 5]}}, "clip x: valence is 9, outside"),
        ([row("x", valence="much")], {"rule": None, "dimensions": {"valence": [1, 5]}}, "clip x: valence is 'much'"),
        ([row(label="a")], {}, "fewer than two classes"),
        ([row(label="a"), row(label="b")], {"classes": ["c", "d"]}, "no clip has one of the classes c, d"),
        ([], {"rule": None}, "needs dimensions"),
        ([], {"rule": "majority", "smoothing": 0.1}, "smoothing is of vote shares"),
        ([], {"dimensions": {"valence": [5, 1]}}, "the larger number comes second"),
        ([], {"classes": ["a", "a"]}, "all different"),
        ([], {"map": {"a": "b"}, "classes": ["b", "c"]}, "map leads to no c"),
    ],
)
def test_what_cannot_be_used_is_named(rows, settings, message):
    with pytest.raises((SettingsError, DataError), match=message):
        targets(rows, **settings)
