"""Results of made-up answers about the clips of some shards, to look at the page of an evaluation while changing it.

Scores, intervals and curves are computed from the answers as those of models are; the answers are drawn at random
around the truth. `python -m benchmarks.pages --example SHARDS FOLDER` shows the page.
"""

from typing import Any

import numpy as np

from affekt.data.shards import ShardIndex
from affekt.finetune.metrics.confusion import SCORES, confusion_matrix
from affekt.finetune.metrics.intervals import bootstrap_interval
from affekt.finetune.report.map import embedding_map
from affekt.finetune.schema import Results


def answers(truth: np.ndarray, skill: float, rng: np.random.Generator, classes: int) -> np.ndarray:
    """Logits (N, K) float64 in which the truth stands out by `skill` deviations."""
    return rng.normal(size=(len(truth), classes)) * 1.5 + skill * np.eye(classes)[truth]


def softmax(logits: np.ndarray) -> np.ndarray:
    odds = np.exp(logits - logits.max(1, keepdims=True))
    return odds / odds.sum(1, keepdims=True)


def bins_of(confidence: np.ndarray, share: np.ndarray) -> list[dict[str, Any]]:
    """Five bins of as many clips each."""
    parts = np.array_split(np.argsort(confidence), 5)
    return [{"confidence": confidence[p].mean(), "share": share[p].mean(), "clips": len(p)} for p in parts]


def estimates(truth: np.ndarray, answers: np.ndarray, speakers: list[str], **more: Any) -> dict[str, Any]:
    return {n: bootstrap_interval(f, truth, answers, speakers, 300, **more).as_dict() for n, f in SCORES.items()}


def system(
    clips: dict[str, Any],
    name: str,
    title: str,
    kind: str,
    skill: float,
    rng: np.random.Generator,
    seeds: tuple[int, ...] = (0, 1),
    **about: Any,
) -> tuple[dict[str, Any], np.ndarray]:
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
    p, hot = softmax(logits[0]), said[0] == truth
    row["speakers"] = [
        {"name": s, "clips": int(m.sum()), "score": float(hot[m].mean()), "sex": sexes[s]} for s, m in who
    ]
    row["by_fold"] = [
        {"name": f"fold {i}", "clips": one["clips"], "scores": {"uar": one["score"]}, "chosen": {"epoch": 5 + i}}
        for i, one in enumerate(row["speakers"])
    ]
    sure, order = p.max(1), np.argsort(-p.max(1))
    kept = np.arange(1, len(truth) + 1)
    risk = np.cumsum(~hot[order]) / kept
    row["risk_coverage"] = {"name": name, "x": (kept / len(truth)).tolist(), "y": risk.tolist()}
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


def example(index: ShardIndex, seed: int = 0, attack: str = "") -> Results:
    """Results with every part there is. `attack` is put at the end of names, titles and every other id."""
    rng = np.random.default_rng(seed)
    samples = list(index.samples)
    classes = sorted({s.meta["label"] for s in samples})
    clips = {
        "ids": [s.id + attack * (i % 2) for i, s in enumerate(samples)],
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
    one = estimates(truth, said["finetuned"], speakers)["war"]
    subsets = {"follows_face" + attack: 18, "follows_voice": 9, "consistent": 40}
    features = np.concatenate([2 * np.eye(len(classes))[truth], rng.normal(size=(len(truth), 20))], 1)
    return Results(
        title="Six emotions of speakers nobody trained on" + attack,
        task="single",
        label="label",
        classes=clips["classes"],
        main_score="uar",
        protocol={"name": "leave-one-speaker-out", "folds": len(set(speakers))},
        clips={"test": len(truth), "speakers": sorted(set(speakers))},
        systems=[row for row, _ in made],
        differences=differences,
        layers=[layer_curves(stream, rng, attack) for stream in ("audio", "video")],
        stress=[
            damaged(truth, speakers, said[name], rng, name, kind, attack)
            for name in ("finetuned", "probe")
            for kind in ("noise", "missing")
        ],
        fairness=[by_sex(attack)],
        conflict=[
            {"system": "finetuned", "subsets": subsets, "accuracy": dict.fromkeys(subsets, one)}
            | dict.fromkeys(("bias_index", "conflict_gap", "audio_follow"), one)
        ],
        map=embedding_map(features, clips["ids"], [clips["classes"][t] for t in truth], speakers),
        tables=[{"title": "Across corpora" + attack, "head": ["From", "UAR"], "rows": [["A" + attack, "50.1"]]}],
        pretraining={"clips": 600, "shared_with_test": {"ids": 0}},
        licences=["CC0-1.0" + attack],
        settings={"epochs": 40, "name" + attack: [1, 2]},
        versions={"affekt": "0.1.0" + attack},
        seconds={"all": 12.3},
    )


def layer_curves(stream: str, rng: np.random.Generator, attack: str) -> dict[str, Any]:
    depth = list(range(1, 9))
    probe = [0.3 + 0.05 * d - 0.004 * d * d + 0.01 * rng.normal() for d in depth]
    control = [0.2 + 0.01 * rng.normal() for _ in depth]
    curves = {"probe": probe, "control": control, "selectivity": [a - b for a, b in zip(probe, control)]}
    curves = [{"name": name, "x": depth, "y": y} for name, y in curves.items()]
    curves[0] |= {"low": [v - 0.05 for v in probe], "high": [v + 0.05 for v in probe]}
    weights = {"name": "weights", "x": depth, "y": rng.dirichlet(np.ones(8)).tolist()}
    about = {"system": "probe", "stream": stream, "score": "uar", "best": f"{stream}_5/mean" + attack}
    return about | {"curves": curves, "weights": weights}


def damaged(
    truth: np.ndarray,
    speakers: list[str],
    said: np.ndarray,
    rng: np.random.Generator,
    system: str,
    kind: str,
    attack: str,
) -> dict[str, Any]:
    """Answers of which more and more are replaced by guesses."""
    title, unit, levels = {
        "noise": ("Noise", "dB SNR", [20.0, 10.0, 5.0, 0.0, -5.0]),
        "missing": ("Missing frames", "share", [0.0, 0.25, 0.5, 1.0]),
    }[kind]
    classes = truth.max() + 1
    guesses, draws = rng.integers(0, classes, said.shape), rng.random(said.shape)
    spoiled = [np.where(draws < share, guesses, said) for share in np.linspace(0, 1, len(levels))]
    scores = [estimates(truth, one, speakers, num_classes=classes)["uar"] for one in spoiled]
    about = {"name": kind, "title": title, "unit": unit, "system": system, "score": "uar", "levels": levels}
    kept = [float((one == said).mean()) for one in spoiled]
    return about | {"scores": scores, "unchanged": kept, "area": 0.4 if kind == "missing" else None, "note": attack}


def by_sex(attack: str) -> dict[str, Any]:
    groups = (("female" + attack, 0.66), ("male", 0.6))
    groups = [{"name": n, "clips": 30, "speakers": 2, "scores": {"uar": v}} for n, v in groups]
    found = {"gap": 0.06, "threshold": 0.11, "passes": True, "note": "other: 2 clips, skipped" + attack}
    return {"system": "finetuned", "attribute": "sex", "score": "uar", "groups": groups} | found
