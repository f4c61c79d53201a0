"""From tables of predictions to the scores that are reported: which ones suit a task, their intervals, differences.

score(predictions)            # {"uar": Estimate(value, low, high, ...), "war": ..., ...}, a list being of seeds
compare(ours, theirs)         # Difference, paired on the clips that both have judged
values(predictions)           # plain numbers, for choosing on development clips
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal

import numpy as np

from affekt.data.errors import SettingsError
from affekt.finetune.metrics import confidence, confusion, dimensions, multilabel, shares
from affekt.finetune.metrics.intervals import as_interval, resampled, two_sided_p
from affekt.finetune.predictions import Predictions
from affekt.finetune.schema import Difference, Estimate

Task = Literal["single", "soft", "multi", "dimensions", "joint"]
Truth = Literal["label", "shares", "ratings"]
MAIN: dict[Task, str] = {
    "single": "uar",
    "soft": "multi_macro_f1",
    "multi": "multi_macro_f1",
    "dimensions": "ccc",
    "joint": "uar",
}


@dataclass(frozen=True)
class Score:
    """A score by name: what has to be known of a clip for it to count, and the function of such clips and of how often
    each counts `(..., N)`. `dimension` is the one it is of; None is all."""

    title: str
    truth: Truth
    of: Callable[[Predictions, np.ndarray | None], np.ndarray]
    higher: bool = True
    dimension: int | None = None

    def rows(self, predictions: Predictions) -> np.ndarray:
        """bool (N,): the clips that it can be computed on."""
        known = getattr(predictions, self.truth)
        said = predictions.values if self.truth == "ratings" else predictions.logits
        if known is None or said is None:
            return np.zeros(len(predictions), bool)
        if self.truth == "label":
            return known >= 0
        return np.isfinite(known if self.dimension is None else known[:, [self.dimension]]).all(1)


def _matrix(function: confusion.Score) -> Callable:
    def of(p: Predictions, weights: np.ndarray | None) -> np.ndarray:
        return function(confusion.confusion_matrices(p.label, p.logits.argmax(1), len(p.classes), weights))

    return of


def _masked(function: confusion.Score) -> Callable:
    """The answer is sought among the classes that occur in the truth of all clips."""

    def of(p: Predictions, weights: np.ndarray | None) -> np.ndarray:
        present = np.bincount(p.label, minlength=len(p.classes)) > 0
        prediction = confusion.masked_argmax(p.logits, present)
        return function(confusion.confusion_matrices(p.label, prediction, len(p.classes), weights))

    return of


def _sure(function: Callable) -> Callable:
    return lambda p, weights: function(p.probabilities.max(1), p.logits.argmax(1) == p.label, weights=weights)


def _shares(function: Callable) -> Callable:
    return lambda p, weights: function(p.shares, distribution(p), weights)


def _sets(function: Callable) -> Callable:
    return lambda p, weights: function(multilabel.above_chance(p.shares), chosen_sets(p), weights)


def _dimensions(function: Callable) -> Callable:
    def of(p: Predictions, weights: np.ndarray | None) -> np.ndarray:
        return np.mean([function(t, v, weights) for t, v in zip(p.ratings.T, p.values.T)], axis=0)

    return of


def chosen_sets(predictions: Predictions) -> np.ndarray:
    """bool (N, K): the classes that a model says hold: more than 1/K of a softmax, more than 1/2 of a sigmoid."""
    if predictions.kind == "multi":
        return predictions.logits > 0
    return multilabel.above_chance(predictions.probabilities)


def distribution(predictions: Predictions) -> np.ndarray:
    """(N, K): probabilities whose rows sum to 1; sigmoids are divided by their sum."""
    p = predictions.probabilities
    return p / np.maximum(p.sum(1, keepdims=True), np.finfo(float).tiny)


ONE_CLASS = {
    "uar": Score("UAR", "label", _matrix(confusion.uar)),
    "war": Score("WAR", "label", _matrix(confusion.war)),
    "macro_f1": Score("Macro F1", "label", _matrix(confusion.macro_f1)),
    "weighted_f1": Score("Weighted F1", "label", _matrix(confusion.weighted_f1)),
    "micro_f1": Score("Micro F1", "label", _matrix(confusion.micro_f1)),
    "top2": Score("Top 2", "label", lambda p, weights: confidence.top_k(p.logits, p.label, 2, weights)),
    "top3": Score("Top 3", "label", lambda p, weights: confidence.top_k(p.logits, p.label, 3, weights)),
    "nll": Score("NLL", "label", lambda p, weights: confidence.nll(p.logits, p.label, weights), False),
    "brier": Score("Brier", "label", lambda p, weights: confidence.brier(p.probabilities, p.label, weights), False),
    "ece": Score("ECE", "label", _sure(confidence.ece), False),
    "classwise_ece": Score(
        "Class-wise ECE", "label", lambda p, w: confidence.classwise_ece(p.probabilities, p.label, w), False
    ),
    "aurc": Score("AURC", "label", _sure(confidence.aurc), False),
    "auroc": Score("AUROC of confidence", "label", _sure(confidence.auroc)),
}
# Where the test set lacks classes that the model knows. The present-only UAR is `uar`.
PRESENT_ONLY = {
    "present_macro_f1": Score("Macro F1 of present classes", "label", _matrix(confusion.present_macro_f1)),
    "masked_uar": Score("UAR among present classes", "label", _masked(confusion.uar)),
    "masked_macro_f1": Score("Macro F1 among present classes", "label", _masked(confusion.present_macro_f1)),
}
VOTES = {
    "agreement": Score("Raters who agree", "shares", _shares(shares.agreement)),
    "kl": Score("KL", "shares", _shares(shares.kl), False),
    "js": Score("JS", "shares", _shares(shares.js), False),
    "chebyshev": Score("Chebyshev", "shares", _shares(shares.chebyshev), False),
    "cosine": Score("Cosine", "shares", _shares(shares.cosine)),
    "intersection": Score("Intersection", "shares", _shares(shares.intersection)),
    "multi_macro_f1": Score("Macro F1 of sets", "shares", _sets(multilabel.multi_macro_f1)),
    "multi_micro_f1": Score("Micro F1 of sets", "shares", _sets(multilabel.multi_micro_f1)),
    "weighted_accuracy": Score("Weighted accuracy of sets", "shares", _sets(multilabel.weighted_accuracy)),
}
RATED = {"ccc": dimensions.ccc, "pcc": dimensions.pcc, "rmse": dimensions.rmse, "mae": dimensions.mae}


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


def all_scores(predictions: Predictions) -> dict[str, Score]:
    """Every score that this table has clips for, by name. `ccc` is the mean over the dimensions, on clips that are
    rated in all of them, `ccc_valence` that of one. A model of sets (`multi`) says no one class: it has scores of sets.
    """
    found: dict[str, Score] = {}
    if predictions.kind == "single":
        found |= ONE_CLASS
        known = predictions.label[predictions.label >= 0] if predictions.label is not None else np.zeros(0, int)
        if len(np.unique(known)) < len(predictions.classes):
            found |= PRESENT_ONLY
        for k in (2, 3):
            if k >= len(predictions.classes):
                found.pop(f"top{k}")
    found |= VOTES
    for name, function in RATED.items():
        higher = name in ("ccc", "pcc")
        found[name] = Score(name.upper(), "ratings", _dimensions(function), higher)
        for d, dimension in enumerate(predictions.dimensions):
            of = partial(_one_dimension, function, d)
            found[f"{name}_{dimension}"] = Score(f"{name.upper()} {dimension}", "ratings", of, higher, d)
    return {name: one for name, one in found.items() if one.rows(predictions).any()}


def _one_dimension(function: Callable, d: int, p: Predictions, weights: np.ndarray | None) -> np.ndarray:
    return function(p.ratings[:, d], p.values[:, d], weights)


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
        found |= _estimates(measures, parts[0], bootstrap, seed, cluster)[0]
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


def same_clips(predictions: Predictions | Sequence[Predictions]) -> list[Predictions]:
    """Tables of several seeds in the order of the first. Raises SettingsError where their clips differ."""
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
    return [tables[0], *(in_order(table, tables[0].ids) for table in tables[1:])]


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


def _estimates(measures, clips: Predictions, bootstrap: int, seed: int, cluster: str | None):
    """Estimates by name, and the scores `(bootstrap,)` in all resamples they were made from."""
    groups = clusters(clips, cluster)
    scores = resampled(measures, len(clips), groups, bootstrap, seed)
    once = np.ones((1, len(clips)), np.float32)
    found = {}
    for name, measure in measures.items():
        interval = as_interval(measure(once)[0], scores[name], len(clips), groups, cluster or "clip")
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
        raise SettingsError(f"the two runs were told different {truth} of the same clips; score both by one rule")
