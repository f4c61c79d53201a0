"""The page of an evaluation: all of it drawn from results, safe for any text, and looked at in a real browser."""

import csv
import io
import json
import re
import zlib
from itertools import pairwise

import numpy as np
import pytest
from sklearn.cluster import KMeans

from affekt.data.errors import SettingsError
from affekt.data.page import anchor, page
from affekt.finetune.metrics.confusion import SCORES, confusion_matrix
from affekt.finetune.metrics.intervals import bootstrap_interval
from affekt.finetune.report.map import SHOWN, as_json, drawn, embedding_map
from affekt.finetune.report.results import write_results_report
from affekt.finetune.report.rows import HEAD, results_csv
from affekt.finetune.report.summary import holm
from affekt.finetune.report.words import figure, score_name, signed
from affekt.finetune.schema import Estimate, Results
from benchmarks.pages import Browser, find_browser

ATTACK = "</script><img src=x onerror=alert(1)>\u2028\"'"
SECTIONS = (
    "The short answer", "Chosen on the test clips", "Differences", "What is taken for what", "Speakers",
    "Groups of people", "Confidence", "Against the raters' votes", "When it may stay silent",
    "Where in the network it sits", "Under stress", "When face and voice disagree", "Map of the clips", "Worst mistakes",
    "More tables", "Folds and seeds", "Limits and intended use", "How it was measured",
)  # fmt: skip


# Results of made-up answers about real clips: their scores, intervals and curves are computed as those of models are.


def answers(truth, skill, rng, classes):
    """Logits (N, K) float64 in which the truth stands out by `skill` deviations."""
    return rng.normal(size=(len(truth), classes)) * 1.5 + skill * np.eye(classes)[truth]


def softmax(logits):
    odds = np.exp(logits - logits.max(1, keepdims=True))
    return odds / odds.sum(1, keepdims=True)


def bins_of(confidence, share):
    """Five bins of as many clips each."""
    parts = np.array_split(np.argsort(confidence), 5)
    return [{"confidence": confidence[p].mean(), "share": share[p].mean(), "clips": len(p)} for p in parts]


def estimates(truth, answers, speakers, **more):
    return {n: bootstrap_interval(f, truth, answers, speakers, 300, **more).as_dict() for n, f in SCORES.items()}


def system(clips, name, title, kind, skill, rng, seeds=(0, 1), **about):
    """A row of the summary: `clips` has ids, truth, speakers, classes and folds."""
    truth, speakers, classes = clips["truth"], np.array(clips["speakers"]), clips["classes"]
    logits = np.stack([answers(truth, skill, rng, len(classes)) for _ in seeds or (0,)])
    said = logits.argmax(-1)
    row = dict(name=name, title=title, kind=kind, streams="both", seeds=list(seeds), clips=len(truth), **about)
    row["scores"] = estimates(truth, said, speakers, num_classes=len(classes))
    if kind in ("majority", "raters"):
        return row, said
    matrices = [confusion_matrix(truth, one, len(classes)) for one in said]
    row["by_seed"] = [{n: float(f(m)) for n, f in SCORES.items()} for m in matrices]
    row["confusion"] = sum(matrices).tolist()
    sexes = {s: "female" if i % 2 else "male" for i, s in enumerate(np.unique(speakers))}
    who = [(s, speakers == s) for s in np.unique(speakers)]
    row["speakers"] = [
        {"name": s, "clips": int(m.sum()), "score": float((said[0] == truth)[m].mean()), "sex": sexes[s]}
        for s, m in who
    ]
    row["by_fold"] = [
        {"name": f"fold {i}", "clips": int(m.sum()), "scores": {"uar": float((said[0] == truth)[m].mean())}}
        | {"chosen": {"epoch": int(rng.integers(5, 40))}}
        for i, (_, m) in enumerate(who)
    ]
    p, hot = softmax(logits[0]), said[0] == truth
    sure, order = p.max(1), np.argsort(-p.max(1))
    wrong = np.cumsum(~hot[order]) / np.arange(1, len(truth) + 1)
    row["risk_coverage"] = {
        "name": name,
        "x": (np.arange(1, len(truth) + 1) / len(truth)).tolist(),
        "y": wrong.tolist(),
    }
    scaled = softmax(logits[0] / 2).max(1)
    raters = rng.binomial(10, np.where(hot, 0.7, 0.3)) / 10
    row["calibration"] = {
        "temperatures": [2.0],
        "before": {"ece": float(abs(sure - hot).mean()), "nll": float(-np.log(p[np.arange(len(p)), truth]).mean())},
        "after": {"ece": float(abs(scaled - hot).mean()), "nll": float(-np.log(scaled).mean())},
        "bins": bins_of(scaled, hot),
        "bins_before": bins_of(sure, hot),
        "votes": {"ece": float(abs(scaled - raters).mean())},
        "vote_bins": bins_of(scaled, raters),
    }
    wrong = [i for i in order if not hot[i]][:5]
    row["mistakes"] = [
        {"id": clips["ids"][i], "truth": classes[truth[i]], "prediction": classes[said[0][i]]}
        | {"confidence": float(sure[i]), "speaker": clips["speakers"][i]}
        for i in wrong
    ]
    return row, said


def example(index, seed=0, attack=""):
    """Results with every part there is. `attack` is put at the end of ids, names and titles."""
    rng = np.random.default_rng(seed)
    samples = list(index.samples)
    classes = sorted({s.meta["label"] for s in samples})
    clips = {
        "ids": [s.id + attack for s in samples],
        "truth": np.array([classes.index(s.meta["label"]) for s in samples]),
        "speakers": [s.meta["speaker"] + attack for s in samples],
        "classes": [c + attack for c in classes],
    }
    truth, speakers = clips["truth"], clips["speakers"]
    made = [
        system(clips, "finetuned", "Fine-tuned" + attack, "finetuned", 3.0, rng),
        system(clips, "probe", "Linear probe", "probe", 2.2, rng, transductive=True),
        system(clips, "scratch", "From scratch", "scratch", 1.4, rng),
        system(clips, "random", "Random encoder", "random", 1.0, rng),
        system(clips, "statistics", "Mel statistics + SVM", "statistics", 1.3, rng, seeds=()),
        system(clips, "majority", "Majority class", "majority", 0.0, rng, seeds=()),
        system(clips, "flattered", "Fine-tuned", "finetuned", 3.4, rng, selected="test"),
    ]
    said = {row["name"]: answer for row, answer in made}
    differences = [
        {"of": "finetuned", "minus": minus, "score": "uar", "clips": len(truth), "p": p}
        | {"estimate": estimates(truth, said["finetuned"], speakers, minus=said[minus])["uar"]}
        for minus, p in (("probe", 0.03), ("scratch", 0.0004))
    ]
    depth = list(range(1, 9))
    curve = [0.3 + 0.05 * d - 0.004 * d * d + 0.01 * rng.normal() for d in depth]
    control = [0.2 + 0.01 * rng.normal() for _ in depth]
    levels = {
        "noise": ("Noise", "dB SNR", [-5.0, 0.0, 5.0, 10.0, 20.0], None),
        "rmfm": ("Missing frames", "share", [0.0, 0.25, 0.5, 1.0], 0.51),
    }
    stress = []
    for name in ("finetuned", "probe"):
        for damage, (title, unit, steps, area) in levels.items():
            hurt = np.linspace(0.05, 0.95, len(steps))[:: -1 if area is None else 1]
            wrong = [
                np.where(rng.random(said[name].shape) < h, rng.integers(0, len(classes), said[name].shape), said[name])
                for h in hurt
            ]
            stress.append(
                {
                    "name": damage,
                    "title": title,
                    "unit": unit,
                    "system": name,
                    "score": "uar",
                    "levels": steps,
                    "area": area,
                }
                | {"scores": [estimates(truth, w, speakers, num_classes=len(classes))["uar"] for w in wrong]}
                | {"unchanged": [float((w == said[name]).mean()) for w in wrong], "note": "Keyed by clip." + attack}
            )
    one = estimates(truth, said["finetuned"], speakers)["war"]
    subsets = {"follows_face" + attack: 18, "follows_voice": 9, "consistent": 40}
    features = np.concatenate([2 * np.eye(len(classes))[truth], rng.normal(size=(len(truth), 20))], 1)
    return Results(
        title="Six emotions of speakers nobody trained on" + attack,
        task="single", label="label", classes=clips["classes"], main_score="uar",
        protocol={"name": "leave-one-speaker-out", "folds": len(set(speakers)), "development": "the next speaker"},
        clips={"test": len(truth), "speakers": sorted(set(speakers)), "unread": {}},
        systems=[row for row, _ in made], differences=differences,
        layers=[{"system": "probe", "stream": s, "score": "uar", "best": "audio_5/mean" + attack, "curves": [
            {"name": "probe", "x": depth, "y": curve, "low": [v - 0.05 for v in curve], "high": [v + 0.05 for v in curve]},
            {"name": "control", "x": depth, "y": control},
            {"name": "selectivity", "x": depth, "y": [a - b for a, b in zip(curve, control)]}],
            "weights": {"name": "w", "x": depth, "y": [1 / 8] * 8}} for s in ("audio", "video")],
        stress=stress,
        fairness=[{"system": "finetuned", "attribute": "sex", "score": "uar", "gap": 0.06, "threshold": 0.11, "passes": True,
            "note": "other: 2 clips, skipped" + attack, "groups": [
            {"name": n, "clips": 30, "speakers": 2, "scores": {"uar": v}} for n, v in (("female" + attack, 0.66), ("male", 0.6))]}],
        conflict=[{"system": "finetuned", "subsets": subsets, "accuracy": dict.fromkeys(subsets, one), "bias_index": one,
            "conflict_gap": one, "audio_follow": one}],
        map=embedding_map(features, clips["ids"], [clips["classes"][t] for t in truth], speakers),
        tables=[{"title": "Across corpora" + attack, "head": ["From", "Present-only UAR"], "rows": [["A" + attack, "50.1"]]}],
        pretraining={"clips": 600, "speakers": 20, "shared_with_test": {"ids": 0}}, licences=["CC0-1.0" + attack],
        settings={"epochs": 40, "name" + attack: [1, 2]}, versions={"affekt": "0.1.0" + attack}, seconds={"all": 12.3},
    )  # fmt: skip


@pytest.fixture(scope="module")
def index(tiny_shards):
    return tiny_shards(48, "mixed", seconds=0.5, size=32)


@pytest.fixture(scope="module")
def results(index):
    return example(index)


@pytest.fixture(scope="module")
def report(results, index, tmp_path_factory):
    return write_results_report(tmp_path_factory.mktemp("page") / "report.html", results, index)
