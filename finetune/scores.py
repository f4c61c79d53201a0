"""From tables of predictions to the scores that are reported: which ones suit a task, their intervals, differences.

score(predictions)            # {"uar": Estimate(value, low, high, ...), "war": ..., ...}, a list being of seeds
compare(ours, theirs)         # Difference, paired on the clips that both have judged
values(predictions)           # plain numbers, for choosing on development clips
"""

from collections.abc import Iterable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, Literal

import numpy as np

from affekt.data.errors import SettingsError
from affekt.finetune.calibration import describe_calibration, fit_temperatures, risk_coverage
from affekt.finetune.metrics.catalogue import Score, Truth, all_scores
from affekt.finetune.metrics.confusion import confusion_matrix
from affekt.finetune.metrics.intervals import as_interval, resampled, two_sided_p
from affekt.finetune.predictions import Predictions
from affekt.finetune.schema import Calibration, Difference, Estimate, Fold, Mistake, Speaker, System

Task = Literal["single", "soft", "multi", "dimensions", "joint"]
MAIN: dict[Task, str] = {
    "single": "uar",
    "soft": "multi_macro_f1",
    "multi": "multi_macro_f1",
    "dimensions": "ccc",
    "joint": "uar",
}


def task_of(predictions: Predictions) -> Task:
    """`about["task"]`, or what the table holds; single where a label is beside shares."""
    if "task" in predictions.about:
        return predictions.about["task"]
    if predictions.logits is None or not predictions.classes:
        return "dimensions"
    if predictions.values is not None:
        return "joint"
    if predictions.kind == "multi":
        return "multi"
    return "soft" if predictions.label is None else "single"


def main_score(task: Task) -> str:
    """The one score by which models of a task are chosen and compared."""
    return MAIN[task]


def values(predictions: Predictions, names: Iterable[str] | None = None) -> dict[str, float]:
    """Scores without intervals, those of `names` or all that can be computed.

    Raises SettingsError for a score that the table has no clips for.
    """
    chosen = _named(predictions, names)
    return {name: float(one.of(predictions.take(one.rows(predictions)), None)) for name, one in chosen.items()}


def score(
    predictions: Predictions | Sequence[Predictions],
    names: Iterable[str] | None = None,
    *,
    bootstrap: int = 2000,
    seed: int = 0,
    cluster: str | None = "speaker",
) -> dict[str, Estimate]:
    """Scores with 95 % intervals; of a list, one table per seed on the same clips, their means over seeds.

    The interval is over people and clips, not over seeds: it resamples `meta[cluster]` as `intervals.resampled` does,
    None single clips. A clip whose cluster is unknown is one of its own; where none is known, clips are resampled.
    """
    tables = same_clips(predictions)
    found: dict[str, Estimate] = {}
    for rows, wanted in _by_rows(tables[0], _named(tables[0], names)).items():
        parts = [table.take(np.array(rows)) for table in tables]
        measures = {name: partial(_mean, one, parts) for name, one in wanted.items()}
        centred = {name for name, one in wanted.items() if one.centred}
        found |= _estimates(measures, parts[0], bootstrap, seed, cluster, centred)[0]
    return {name: found[name] for name in _named(tables[0], names)}


def compare(
    of: Predictions | Sequence[Predictions],
    minus: Predictions | Sequence[Predictions],
    name: str | None = None,
    *,
    bootstrap: int = 2000,
    seed: int = 0,
    cluster: str | None = "speaker",
) -> Difference:
    """A score of one run minus that of another, by default the main one: means over the seeds of each, on the clips
    that both have judged, both in the same resamples. Raises SettingsError where they share none."""
    ours, theirs = same_clips(of), same_clips(minus)
    for what in ("classes", "dimensions", "kind"):
        if getattr(ours[0], what) != getattr(theirs[0], what):
            raise SettingsError(f"{what} differ: {getattr(ours[0], what)} and {getattr(theirs[0], what)}")
    there = set(theirs[0].ids)
    shared = [clip for clip in ours[0].ids if clip in there]
    if not shared:
        raise SettingsError("the two runs have judged no clip in common, so there is nothing to compare")
    ours, theirs = ([in_order(table, shared) for table in tables] for tables in (ours, theirs))
    name = name or main_score(task_of(ours[0]))
    one = _named(ours[0], [name])[name]
    rows = one.rows(ours[0])
    ours, theirs = ([table.take(rows) for table in tables] for tables in (ours, theirs))
    _same_truth(ours[0], theirs[0], one.truth)

    def measure(weights: np.ndarray) -> np.ndarray:
        return _mean(one, ours, weights) - _mean(one, theirs, weights)

    estimates, scores = _estimates({name: measure}, ours[0], bootstrap, seed, cluster)
    return Difference(
        of=ours[0].about.get("name", ""),
        minus=theirs[0].about.get("name", ""),
        score=name,
        clips=len(ours[0]),
        estimate=estimates[name],
        p=two_sided_p(scores[name]),
    )


def describe_system(
    name: str,
    title: str,
    kind: str,
    predictions: Predictions | Sequence[Predictions],
    dev: Sequence[Predictions] | None = None,
    *,
    bootstrap: int = 2000,
    seed: int = 0,
    cluster: str | None = "speaker",
    mistakes: int = 24,
    **other: Any,
) -> System:
    """All that `results.json` says of one model, from what it said about the clips of all test folds.

    `predictions` is a table per seed, all folds in it with their names in `meta["fold"]`. `dev` are those of the
    development clips, a table per seed and fold by `about`; where every fold of every seed has one, temperatures are
    fitted on it and applied to that fold alone. `other` are further keys of `System`, as `selected` and `predictions`.
    """
    tables = same_clips(predictions)
    first, how = tables[0], {"bootstrap": bootstrap, "seed": seed}
    scores = score(tables, cluster=cluster, **how)
    main = main_score(task_of(first))
    labelled = first.kind == "single" and "war" in scores
    rows = first.label >= 0 if labelled else np.zeros(len(first), bool)
    known = [table.take(rows) for table in tables]
    about = {
        "streams": first.about.get("streams", "both"),
        "selected": first.about.get("selected", "dev"),
        "seeds": [table.about["seed"] for table in tables if "seed" in table.about],
    }
    curve = risk_coverage(known, title, clusters(known[0], cluster), **how) if labelled else None
    return System(
        name=name,
        title=title,
        kind=kind,
        clips=len(first),
        scores=scores,
        by_seed=[values(table) for table in tables],
        by_fold=[
            Fold(name=fold, clips=len(parts[0]), scores={k: v for k, v in _values(parts).items() if k in scores})
            for fold, parts in _parted(tables, "fold").items()
        ],
        confusion=sum(_confusion(table) for table in known).tolist() if labelled else [],
        speakers=_speakers(tables, main),
        calibration=_calibration(tables, dev or []) if first.logits is not None else None,
        risk_coverage=curve,
        mistakes=_mistakes(known, mistakes) if labelled else [],
        **about | other,
    )


def same_clips(predictions: Predictions | Sequence[Predictions]) -> list[Predictions]:
    """Tables of several seeds in the order of the first. Raises SettingsError where their clips differ, or what is
    known of them."""
    tables = [predictions] if isinstance(predictions, Predictions) else list(predictions)
    if not tables or not len(tables[0]):
        raise SettingsError("no clips to score")
    for table in tables[1:]:
        differing = set(table.ids) ^ set(tables[0].ids)
        if differing:
            raise SettingsError(
                f"seeds have judged different clips: {len(differing)} are in one alone, first {min(differing)}; judge "
                "the same clips with each, or compare() runs on those they share"
            )
    tables = [tables[0], *(in_order(table, tables[0].ids) for table in tables[1:])]
    for table in tables[1:]:
        for truth in ("label", "shares", "ratings"):
            if getattr(tables[0], truth) is not None:
                _same_truth(tables[0], table, truth)
    return tables


def in_order(table: Predictions, ids: Sequence[str]) -> Predictions:
    """The clips `ids` of a table, in that order."""
    if table.ids == list(ids):
        return table
    place = {clip: row for row, clip in enumerate(table.ids)}
    return table.take([place[clip] for clip in ids])


def clusters(predictions: Predictions, name: str | None) -> list[str] | None:
    """What the bootstrap draws: `meta[name]` of each clip, its id where that is unknown; None: the clips alone."""
    known = predictions.meta.get(name, []) if name else []
    if not any(known):
        return None
    return [f"{name} {value}" if value else f"clip {clip}" for value, clip in zip(known, predictions.ids)]


def cluster_of(table: Predictions) -> str | None:
    """What the bootstrap draws: speakers where they are known, else sessions, else single clips."""
    return next((name for name in ("speaker", "session") if any(table.meta.get(name, []))), None)


def _estimates(measures, clips: Predictions, bootstrap: int, seed: int, cluster: str | None, centred=frozenset()):
    """Estimates by name, and the scores `(bootstrap,)` in all resamples they were made from."""
    groups = clusters(clips, cluster)
    scores = resampled(measures, len(clips), groups, bootstrap, seed)
    once = np.ones((1, len(clips)), np.float32)
    found = {}
    for name, measure in measures.items():
        interval = as_interval(
            measure(once)[0], scores[name], len(clips), groups, cluster or "clip", centred=name in centred
        )
        found[name] = Estimate(**interval.as_dict())
    return found, scores


def _mean(one: Score, tables: Sequence[Predictions], weights: np.ndarray) -> np.ndarray:
    return np.mean([one.of(table, weights) for table in tables], axis=0)


def _by_rows(predictions: Predictions, scores: dict[str, Score]) -> dict[tuple[bool, ...], dict[str, Score]]:
    """Scores of the same clips together: they share the resamples."""
    together: dict[tuple[bool, ...], dict[str, Score]] = {}
    for name, one in scores.items():
        together.setdefault(tuple(one.rows(predictions).tolist()), {})[name] = one
    return together


def _named(predictions: Predictions, names: Iterable[str] | None) -> dict[str, Score]:
    there = all_scores(predictions)
    if not there:
        raise SettingsError("no scores: of no clip is the label, the votes or the ratings known")
    for name in names or ():
        if name not in there:
            raise SettingsError(f"no clip has what the score {name} needs; those there are: {', '.join(there)}")
    return {name: there[name] for name in (names or there)}


def _same_truth(ours: Predictions, theirs: Predictions, truth: Truth) -> None:
    a, b = getattr(ours, truth), getattr(theirs, truth)
    if b is None or not np.array_equal(a, b, equal_nan=truth != "label"):
        raise SettingsError(f"two tables were told different {truth} of the same clips; score both by one rule")


def _values(tables: Sequence[Predictions]) -> dict[str, float]:
    """Means over seeds, of the scores that there are for every one."""
    found = [values(table) for table in tables]
    return {name: float(np.mean([one[name] for one in found])) for name in found[0]}


def _confusion(table: Predictions) -> np.ndarray:
    return confusion_matrix(table.label, table.logits.argmax(1), len(table.classes))


def _parted(tables: Sequence[Predictions], by: str) -> dict[str, list[Predictions]]:
    """The clips of each value of `meta[by]`, in order of appearance; those without one are in none."""
    column = np.array(tables[0].meta.get(by, []), str)
    return {
        value: [table.take(column == value) for table in tables] for value in dict.fromkeys(column.tolist()) if value
    }


def _speakers(tables: Sequence[Predictions], main: str) -> list[Speaker]:
    found = []
    for name, parts in _parted(tables, "speaker").items():
        if main in all_scores(parts[0]):
            value = float(np.mean([values(part, [main])[main] for part in parts]))
            sex = next(iter(parts[0].meta.get("sex", [])), "")
            found.append(Speaker(name=name, clips=len(parts[0]), score=value, sex=sex))
    return found


def _calibration(tables: Sequence[Predictions], dev: Sequence[Predictions]) -> Calibration | None:
    """Each fold of each seed is scaled by the temperatures of its own development clips."""
    devs = {(part.about.get("seed"), str(part.about.get("fold", ""))): part for part in dev}
    temperatures, scaled = [], []
    for table in tables:
        folds = np.array(table.meta.get("fold", [""] * len(table)), str)
        logits = table.logits.copy()
        for fold in dict.fromkeys(folds.tolist()):
            part = devs.get((table.about.get("seed"), fold))
            if part is None:
                return None
            shared = set(part.ids) & {clip for clip, own in zip(table.ids, folds) if own == fold}
            if shared:
                raise SettingsError(
                    f"{len(shared)} development clips are test clips of the same fold, first {min(shared)}; "
                    "temperatures may not see those"
                )
            temperatures.append(fit_temperatures(part))
            logits[folds == fold] = temperatures[-1].apply(table.take(folds == fold)).logits
        scaled.append(replace(table, logits=logits))
    return describe_calibration(tables, scaled, temperatures)


def _mistakes(tables: Sequence[Predictions], most: int) -> list[Mistake]:
    """Clips that the mean of the seeds' probabilities gets wrong, the surest first."""
    p, first = np.mean([table.probabilities for table in tables], axis=0), tables[0]
    wrong = np.flatnonzero(p.argmax(1) != first.label)
    speakers = first.meta.get("speaker", [""] * len(first))
    return [
        Mistake(
            id=first.ids[row],
            truth=first.classes[first.label[row]],
            prediction=first.classes[p[row].argmax()],
            confidence=float(p[row].max()),
            speaker=speakers[row],
        )
        for row in wrong[np.argsort(-p[wrong].max(1), kind="stable")][:most]
    ]
