"""Clips whose voice says one thing and whose face another: how many there are, and whom a model follows.

CREMA-D's raters judged every clip by its voice, by its face and by both; where the first two disagree and the third is
clear, the truth is what people made of the conflict.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
from scipy.optimize import minimize
from scipy.special import log_softmax, softmax

from affekt.data.errors import SettingsError
from affekt.finetune.metrics.intervals import as_interval, resampled
from affekt.finetune.predictions import Predictions, pooled
from affekt.finetune.schema import Conflict, Estimate
from affekt.finetune.scores import clusters, same_clips
from affekt.finetune.stress.menu import Alter, swap_sound
from affekt.finetune.stress.scene import Scene

CONSISTENT, FACE, VOICE = "consistent", "follows_face", "follows_voice"
SUBSETS = (CONSISTENT, FACE, VOICE, "neither", "tie", "overruled")
UNJUDGED = "conflict"  # nobody has judged both streams together
SMALL = 0.001  # weight of squared parameters of a calibration


def winner(votes: Mapping[str, float] | None) -> str:
    """The one class with most votes; "" where there are none or two lead."""
    counts = {name: float(count) for name, count in (votes or {}).items()}
    most = max(counts.values(), default=0)
    leading = [name for name, count in counts.items() if count == most > 0]
    return leading[0] if len(leading) == 1 else ""


def said_by_raters(rows: Iterable[Mapping[str, Any]]) -> tuple[list[str], list[str], list[str] | None]:
    """What the voice, the face and both together say, of the `meta` of clips: the winners of `votes_voice`,
    `votes_face` and `votes`; without such votes `label_voice` and `label_face`, and nothing (None) of both together.

    Raises SettingsError where no clip has either.
    """
    metas = [row["meta"] for row in rows]
    if any(meta.get("votes_voice") and meta.get("votes_face") for meta in metas):
        voice, face, joint = ([winner(meta.get(k)) for meta in metas] for k in ("votes_voice", "votes_face", "votes"))
        return voice, face, joint
    voice, face = ([str(meta.get(name) or "") for meta in metas] for name in ("label_voice", "label_face"))
    if not any(a and b for a, b in zip(voice, face)):
        raise SettingsError(
            "no clip says what its voice and its face express alone: votes_voice and votes_face (CREMA-D), or "
            "label_voice and label_face; without them there is no conflict to report"
        )
    return voice, face, None


def subsets(voice: Sequence[str], face: Sequence[str], joint: Sequence[str] | None = None) -> np.ndarray:
    """The subset (N,) that each clip is in, by single winners ("" where several or none lead).

    Where voice and face agree: `consistent`, or `overruled` where both together were taken for something else. Where
    they do not: `follows_face`, `follows_voice`, `neither`, or `tie` where the judgement of both has no winner;
    `conflict` where there is no such judgement (`joint` None). "" where the voice or the face has no winner.
    """
    voice, face = np.asarray(voice, str), np.asarray(face, str)
    known, agree = (voice != "") & (face != ""), voice == face
    if joint is None:
        return np.select([known & agree, known], [CONSISTENT, UNJUDGED], "")
    both = np.asarray(joint, str)
    return np.select(
        [~known, agree & (both == voice), agree, both == "", both == face, both == voice],
        ["", CONSISTENT, "overruled", "tie", FACE, VOICE],
        "neither",
    )


def describe_conflict(
    predictions: Predictions | Sequence[Predictions],
    voice: Sequence[str],
    face: Sequence[str],
    joint: Sequence[str] | None = None,
    *,
    note: str = "",
    bootstrap: int = 2000,
    seed: int = 0,
    cluster: str | None = "speaker",
) -> Conflict:
    """Accuracy by subset of what a model answers, against what its raters said of the clips in that order.

    `bias_index` is the accuracy where people follow the face minus where they follow the voice, `conflict_gap` the
    accuracy on consistent clips minus the mean of these two (CA-MER's form on CREMA-D's votes), `audio_follow` the
    share of all conflicts that are answered as the voice says. Without a joint judgement the two accuracies are shares
    of all conflicts that are answered as the face, and as the voice, says. A list has a table per seed: means over
    them. A resample that leaves a subset empty counts with the value of all clips.

    Raises SettingsError where one of the three subsets is empty.
    """
    tables = same_clips(predictions)
    said = np.array([np.array(table.classes)[table.logits.argmax(1)] for table in tables])  # (seeds, N)
    voice, face = np.asarray(voice, str), np.asarray(face, str)
    where = subsets(voice, face, joint)
    conflicts = ~np.isin(where, ["", CONSISTENT, "overruled"])
    follows = {name: conflicts if joint is None else where == name for name in (FACE, VOICE)}
    parts = {
        CONSISTENT: (where == CONSISTENT, said == voice),
        FACE: (follows[FACE], said == face),
        VOICE: (follows[VOICE], said == voice),
    }
    for name, (rows, _) in parts.items():
        if not rows.any():
            raise SettingsError(f"no clip counts as `{name}` by its raters, so conflicts cannot be compared")
    of = {name: partial(_share, rows, hits.mean(0)) for name, (rows, hits) in parts.items()}
    measures: dict[str, Callable[[np.ndarray], np.ndarray]] = {
        **of,
        "bias_index": lambda w: of[FACE](w) - of[VOICE](w),
        "conflict_gap": lambda w: of[CONSISTENT](w) - (of[FACE](w) + of[VOICE](w)) / 2,
        "audio_follow": partial(_share, conflicts, (said == voice).mean(0)),
    }
    groups, n = clusters(tables[0], cluster), len(tables[0])
    scores = resampled(measures, n, groups, bootstrap, seed)
    found = {
        name: Estimate(**as_interval(measure(np.ones((1, n)))[0], scores[name], n, groups, cluster or "clip").as_dict())
        for name, measure in measures.items()
    }
    names = SUBSETS if joint is not None else (CONSISTENT, UNJUDGED)
    return Conflict(
        system=tables[0].about.get("name", ""),
        subsets={name: int((where == name).sum()) for name in names},
        accuracy={name: found[name] for name in parts},
        note=note,
        **{name: found[name] for name in ("bias_index", "conflict_gap", "audio_follow")},
    )


def swapped_conflict(
    scene: Scene, clean: Predictions, judge: Callable[[Alter], Predictions], bootstrap: int = 2000
) -> Conflict:
    """Conflicts that are made: clips with the sound of another clip of the same speaker, beside all clips as they are.

    `judge(alter)` gives the answers to the clips of `clean` under an alteration. Raises SettingsError where no speaker
    has clips of two classes with sound.
    """
    truth = {clip: clean.classes[k] if k >= 0 else "" for clip, k in zip(clean.ids, clean.label.tolist())}
    partners = {a: b for a, b in scene.partners({c: truth.get(c, "") for c in scene.samples}).items() if truth.get(b)}
    swapped = judge(swap_sound(scene, partners))
    swapped = swapped.take([c in partners and bool(truth.get(c)) for c in swapped.ids])
    if not len(swapped):
        raise SettingsError("no speaker has two clips with sound, so that no sounds can be swapped")
    both = pooled([clean, replace(swapped, ids=[f"{clip} with another sound" for clip in swapped.ids])])
    voice = [truth[c] for c in clean.ids] + [truth[partners[c]] for c in swapped.ids]
    face = [truth[c] for c in (*clean.ids, *swapped.ids)]
    note = "Made by swapping sounds among the clips of a speaker: shares of all conflicts."
    return describe_conflict(both, voice, face, note=note, bootstrap=bootstrap)


def conflict_share(voice: Predictions, face: Predictions, dev_voice: Predictions, dev_face: Predictions) -> float:
    """The share of clips whose voice and face express different classes, by a model's answers to each stream alone.

    Mistakes of either answer look like conflicts. Its probabilities are calibrated on development clips with `label` of
    that stream, and the joint distribution of both truths is the one under which the test clips are most likely
    (expectation maximisation; Saerens et al. 2002, section 2.2, with two answers that err independently of each other).
    Raises SettingsError for classes that no development clip has.
    """
    if voice.ids != face.ids or voice.classes != face.classes:
        raise SettingsError("the answers to voice and face are of other clips or classes; judge the same with both")
    k = len(voice.classes)
    # (N, K, K): how likely a clip is under each pair of truths, up to a factor.
    likely = _likelihood(voice, dev_voice)[:, :, None] * _likelihood(face, dev_face)[:, None, :]
    joint = np.full((k, k), 1 / k**2)
    for _ in range(500):
        posterior = joint * likely
        joint, before = (posterior / posterior.sum((1, 2), keepdims=True)).mean(0), joint
        if np.abs(joint - before).max() < 1e-9:
            break
    return float(1 - np.trace(joint))


def _likelihood(table: Predictions, dev: Predictions) -> np.ndarray:
    """(N, K) P(clip | class) up to a factor of the clip: calibrated probabilities over the shares of the classes. A
    temperature and a bias of each class are fitted on the development clips (Alexandari et al. 2020, section 3: what
    this maximum likelihood needs)."""
    known = dev.label >= 0
    counts = np.bincount(dev.label[known], minlength=len(dev.classes))
    if not counts.all():
        missing = [name for name, count in zip(dev.classes, counts) if not count]
        raise SettingsError(f"no development clip has {', '.join(missing)}; how they are mistaken is not known")
    logits, hot = dev.logits[known], np.eye(len(counts))[dev.label[known]]

    def loss(parameters: np.ndarray) -> tuple[float, np.ndarray]:
        scale, bias = np.exp(parameters[0]), parameters[1:]
        told = log_softmax(logits * scale + bias, 1)
        slope = (np.exp(told) - hot) / len(hot)
        # Or biases could drift off together, and answers without a mistake be taken for certain.
        value = -(told * hot).sum() / len(hot) + SMALL * parameters @ parameters
        return value, np.array([(slope * logits).sum() * scale, *slope.sum(0)]) + 2 * SMALL * parameters

    fitted = minimize(loss, np.zeros(1 + len(counts)), jac=True).x
    return softmax(table.logits * np.exp(fitted[0]) + fitted[1:], 1) / (counts / counts.sum())


def _share(rows: np.ndarray, hits: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Share (R,) of hits among the rows, by weights (R, N)."""
    total = weights @ rows.astype(float)
    return np.where(total > 0, weights @ (rows * hits) / np.maximum(total, 1e-30), hits[rows].mean())
