"""Conflicts between voice and face: the figures of CREMA-D's votes, the indices by hand, a planted share."""

import csv
from collections import Counter

import numpy as np
import pytest

from affekt.data.errors import SettingsError
from affekt.data.synth.corpus import Recipe, plan_corpus
from affekt.data.synth.plan import Strengths
from affekt.finetune.predictions import Predictions
from affekt.finetune.stress.conflict import conflict_share, describe_conflict, said_by_raters, subsets, winner

CLASSES = ["a", "b", "c", "d"]


def table(said, ids=None, label=None, **about):
    logits = 5.0 * np.eye(len(CLASSES))[[CLASSES.index(name) for name in said]]
    ids = ids or [f"clip{i}" for i in range(len(said))]
    return Predictions(ids, CLASSES, logits=logits, label=label, about={"name": "model", **about})


def test_the_votes_of_cremad_have_the_known_conflicts(shared_data):
    with open(shared_data / "cremad_votes" / "summaryTable.csv", newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    single = [["" if ":" in row[k] else row[k] for row in rows] for k in ("VoiceVote", "FaceVote", "MultiModalVote")]
    found = Counter(subsets(*single).tolist())
    assert len(rows) == 7442 and len(rows) - found.pop("") == 6383
    assert found == {
        "consistent": 3034, "overruled": 3360 - 3034, "follows_face": 1887, "follows_voice": 548, "neither": 359,
        "tie": 229,
    }  # fmt: skip
    without = Counter(subsets(*single[:2]).tolist())
    assert without == {"": len(rows) - 6383, "conflict": 3023, "consistent": 3360}


def test_winners_of_votes():
    assert winner({"a": 3, "b": 2}) == "a"
    assert winner({"a": 2, "b": 2}) == winner({"a": 0}) == winner({}) == winner(None) == ""
    rows = [{"meta": {"votes_voice": {"a": 2, "b": 1}, "votes_face": {"b": 3}, "votes": {"a": 1, "b": 1}}}]
    assert said_by_raters(rows) == (["a"], ["b"], [""])
    planted = [{"meta": {"label_voice": "a", "label_face": "b", "votes": {"a": 5}}}]
    assert said_by_raters(planted) == (["a"], ["b"], None)
    with pytest.raises(SettingsError, match="votes_voice"):
        said_by_raters([{"meta": {"label": "a", "votes": {"a": 1}}}])


def test_indices_are_those_computed_by_hand():
    voice = ["a", "a", "a", "a", "a", "a", "a", "a", "", "b"]
    face = ["a", "a", "b", "b", "b", "b", "b", "b", "b", "b"]
    joint = ["a", "a", "b", "b", "b", "a", "c", "", "b", "c"]
    said = ["a", "b", "b", "b", "a", "a", "a", "a", "b", "b"]
    found = describe_conflict(table(said), voice, face, joint, bootstrap=200)
    assert found.subsets == {
        "consistent": 2, "follows_face": 3, "follows_voice": 1, "neither": 1, "tie": 1, "overruled": 1,
    }  # fmt: skip
    accuracy = {name: estimate.value for name, estimate in found.accuracy.items()}
    assert accuracy == pytest.approx({"consistent": 1 / 2, "follows_face": 2 / 3, "follows_voice": 1})
    assert found.bias_index.value == pytest.approx(2 / 3 - 1)
    assert found.conflict_gap.value == pytest.approx(1 / 2 - (2 / 3 + 1) / 2)
    assert found.audio_follow.value == pytest.approx(4 / 6)
    for estimate in (*found.accuracy.values(), found.bias_index, found.conflict_gap, found.audio_follow):
        assert estimate.low <= estimate.value <= estimate.high and estimate.unit == "clips"

    unjudged = describe_conflict(table(said), voice, face, bootstrap=200)
    assert unjudged.subsets == {"consistent": 3, "conflict": 6}
    assert unjudged.accuracy["follows_face"].value == pytest.approx(2 / 6)
    assert unjudged.audio_follow == unjudged.accuracy["follows_voice"]
    with pytest.raises(SettingsError, match="follows_voice"):
        describe_conflict(table(said), voice, face, ["b"] * 10)


@pytest.mark.parametrize("planted", [0.0, 0.1, 0.3, 0.6])
def test_answers_to_each_stream_alone_recover_the_planted_share(planted):
    rng, n, k = np.random.default_rng(7), 4000, len(CLASSES)
    voice = rng.integers(0, k, n)
    face = np.where(rng.random(n) < planted, (voice + rng.integers(1, k, n)) % k, voice)

    def answers(truth, accuracy):
        wrong = (truth + rng.integers(1, k, len(truth))) % k
        said = np.where(rng.random(len(truth)) < accuracy, truth, wrong)
        return table([CLASSES[i] for i in said], label=truth)

    streams = [answers(voice, 0.9), answers(face, 0.85)]
    dev = [answers(rng.integers(0, k, 2000), accuracy) for accuracy in (0.9, 0.85)]
    assert abs(conflict_share(*streams, *dev) - planted) < 0.02
    with pytest.raises(SettingsError, match="no development clip has d; how they are mistaken"):
        conflict_share(*streams, dev[0], dev[1].take(dev[1].label < 3))
    naive = np.mean(streams[0].logits.argmax(1) != streams[1].logits.argmax(1))
    assert planted > 0.5 or naive - planted > 0.05  # mistakes look like conflicts where they are not accounted for


def test_the_share_holds_with_few_development_clips_and_answers_that_are_biased_and_too_sure():
    """Beside the plain correction, by how often which class is taken for which."""
    rng, k, shares, counted = np.random.default_rng(3), len(CLASSES), [], []
    centres = 2 * np.eye(k)

    def answers(truth):
        seen = centres[truth] + rng.standard_normal((len(truth), k))
        sure = -2.0 * ((seen[:, None] - centres) ** 2).sum(2) + np.array([0, 1.0, 0, -1.0])
        return Predictions([f"clip{i}" for i in range(len(truth))], CLASSES, logits=sure, label=truth)

    def confused(dev):
        counts = np.full((k, k), 0.5)
        np.add.at(counts, (dev.label, dev.logits.argmax(1)), 1)
        return counts / counts.sum(1, keepdims=True)

    for _ in range(12):
        voice = rng.integers(0, k, 1000)
        face = np.where(rng.random(1000) < 0.3, (voice + rng.integers(1, k, 1000)) % k, voice)
        streams, dev = [answers(voice), answers(face)], [answers(rng.integers(0, k, 150)) for _ in range(2)]
        shares.append(conflict_share(*streams, *dev) - np.mean(voice != face))
        said = [table.logits.argmax(1) for table in streams]
        pairs = np.zeros((k, k))
        np.add.at(pairs, tuple(said), 1 / 1000)
        truths = np.linalg.inv(confused(dev[0])).T @ pairs @ np.linalg.inv(confused(dev[1]))
        counted.append(1 - np.trace(truths) - np.mean(voice != face))
    error, plain = (float(np.sqrt(np.mean(np.square(x)))) for x in (shares, counted))
    assert error < 0.05 and error < plain, (error, plain)


def test_the_report_finds_the_planted_share_of_the_synthetic_corpus():
    recipe = Recipe(speakers=24, seed=5, conflict=0.3, missing=0.0, seconds=3.0, strengths=Strengths())
    plans = plan_corpus(recipe, 480)
    voice, face, joint = said_by_raters(
        {"meta": {"label_voice": p.label_voice, "label_face": p.label_face}} for p in plans
    )
    assert joint is None and abs(np.mean(subsets(voice, face) == "conflict") - 0.3) < 0.02
    names = sorted(set(voice))
    logits = np.eye(len(names))[[names.index(v) for v in voice]]
    meta = {"speaker": [p.speaker.id for p in plans]}
    model = Predictions([str(p.number) for p in plans], names, logits=logits, meta=meta, about={"name": "ear"})
    found = describe_conflict(model, voice, face, bootstrap=200)
    assert abs(found.subsets["conflict"] / 480 - 0.3) < 0.02 and found.audio_follow.value == 1
    assert found.bias_index.value == -1 and found.conflict_gap.value == 0.5 and found.bias_index.unit == "speakers"
