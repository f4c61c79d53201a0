"""Every score by name: on which clips it can be computed, and how, from a table of predictions."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Literal

import numpy as np

from affekt.finetune.metrics import confidence, confusion, dimensions, multilabel, shares
from affekt.finetune.predictions import Predictions

Truth = Literal["label", "shares", "ratings"]


@dataclass(frozen=True)
class Score:
    """A score by name: what has to be known of a clip for it to count, and the function of such clips and of how often
    each counts `(..., N)`. `dimension` is the one it is of; None is all. `centred` as in `intervals.as_interval`."""

    title: str
    truth: Truth
    of: Callable[[Predictions, np.ndarray | None], np.ndarray]
    higher: bool = True
    dimension: int | None = None
    centred: bool = False

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
    "ece": Score("ECE", "label", _sure(confidence.ece), False, centred=True),
    "classwise_ece": Score(
        "Class-wise ECE",
        "label",
        lambda p, weights: confidence.classwise_ece(p.probabilities, p.label, weights),
        False,
        centred=True,
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
