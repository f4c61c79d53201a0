"""Scores of a classifier that are computed from confusion matrices.

A score is a function from confusion matrices `(..., C, C)`, rows the truth, columns the prediction, to values `(...)`.
That makes a bootstrap over thousands of resamples one matrix product. A class that is neither in the truth nor in the
prediction enters no average; one that is only predicted has no recall, and an F1 of 0.
"""

from collections.abc import Callable

import numpy as np

from affekt.data.errors import SettingsError

Score = Callable[[np.ndarray], np.ndarray]


def confusion_matrix(truth: np.ndarray, prediction: np.ndarray, num_classes: int) -> np.ndarray:
    """Counts `(C, C)` of class indices, rows the truth. SettingsError on empty, unequal or out-of-range input."""
    return confusion_matrices(truth, prediction, num_classes).astype(np.int64)


def confusion_matrices(
    truth: np.ndarray, prediction: np.ndarray, num_classes: int, weights: np.ndarray | None = None
) -> np.ndarray:
    """Float counts `(..., C, C)` of class indices `(N,)`, where a clip counts as often as `weights (..., N)` says."""
    truth, prediction = _checked(truth, num_classes), _checked(prediction, num_classes)
    if truth.shape != prediction.shape:
        raise SettingsError(f"{truth.size} true labels but {prediction.size} predictions; they must be pairs")
    cell = truth * num_classes + prediction
    if weights is None:
        return np.bincount(cell, minlength=num_classes**2).reshape(num_classes, num_classes).astype(float)
    # Whole numbers below 2^24 are exact in float32, which halves the time of a bootstrap.
    counts = np.asarray(weights, np.float32) @ np.eye(num_classes**2, dtype=np.float32)[cell]
    return counts.reshape(*weights.shape[:-1], num_classes, num_classes).astype(float)


def uar(confusion: np.ndarray) -> np.ndarray:
    """Unweighted average recall (balanced accuracy) over the classes that occur in the truth; others have no recall.

    It is present-only by nature: a prediction outside the classes of the truth is an error.
    """
    confusion = np.asarray(confusion, float)
    support = confusion.sum(-1)
    recall = _diagonal(confusion) / _at_least_one(support)
    return (recall * (support > 0)).sum(-1) / (support > 0).sum(-1)


def war(confusion: np.ndarray) -> np.ndarray:
    """Weighted average recall, which is accuracy: the share of clips that are right."""
    confusion = np.asarray(confusion, float)
    return np.trace(confusion, axis1=-2, axis2=-1) / confusion.sum((-2, -1))


def f1_per_class(confusion: np.ndarray) -> np.ndarray:
    """F1 `(..., C)` of each class, 2 TP / (2 TP + FN + FP); 0 where it is nowhere."""
    confusion = np.asarray(confusion, float)
    return 2 * _diagonal(confusion) / _at_least_one(confusion.sum(-1) + confusion.sum(-2))


def macro_f1(confusion: np.ndarray) -> np.ndarray:
    """Mean F1 over the classes that occur in the truth or in the prediction; one that is only predicted counts as 0."""
    found = np.asarray(confusion).sum(-1) + np.asarray(confusion).sum(-2) > 0
    return (f1_per_class(confusion) * found).sum(-1) / found.sum(-1)


def weighted_f1(confusion: np.ndarray) -> np.ndarray:
    """Mean F1 where each class weighs as many clips as truly are of it (the score of MELD and IEMOCAP)."""
    support = np.asarray(confusion, float).sum(-1)
    return (f1_per_class(confusion) * support).sum(-1) / support.sum(-1)


def micro_f1(confusion: np.ndarray) -> np.ndarray:
    """F1 of all clips' decisions together. Each wrong clip is one FN and one FP, so it equals `war`."""
    confusion = np.asarray(confusion, float)
    hits = np.trace(confusion, axis1=-2, axis2=-1)
    return 2 * hits / (confusion.sum((-2, -1)) + confusion.sum((-2, -1)))


def present_macro_f1(confusion: np.ndarray) -> np.ndarray:
    """Mean F1 over the classes that occur in the truth alone, for a test set that lacks classes the model knows.

    A prediction outside them is an error: it lowers the recall of the class it should have been.
    """
    present = np.asarray(confusion).sum(-1) > 0
    return (f1_per_class(confusion) * present).sum(-1) / present.sum(-1)


def masked_argmax(logits: np.ndarray, present: np.ndarray) -> np.ndarray:
    """Class indices `(N,)` of the largest of `logits (N, C)` among the classes that bool `present (C,)` allows."""
    if not np.any(present):
        raise SettingsError("no class is present, so none can be chosen")
    return np.where(present, logits, -np.inf).argmax(1)


SCORES: dict[str, Score] = {"uar": uar, "war": war, "macro_f1": macro_f1}


def _diagonal(confusion: np.ndarray) -> np.ndarray:
    return np.diagonal(confusion, axis1=-2, axis2=-1)


def _at_least_one(counts: np.ndarray) -> np.ndarray:
    """Counts to divide by; expected confusions (of raters) have fractions below one, which stay as they are."""
    return np.where(counts > 0, counts, 1)


def _checked(labels: np.ndarray, num_classes: int) -> np.ndarray:
    labels = np.asarray(labels)
    if labels.size == 0:
        raise SettingsError("no clips to score")
    if not np.issubdtype(labels.dtype, np.integer) or labels.min() < 0 or labels.max() >= num_classes:
        raise SettingsError(
            f"class indices must be whole numbers from 0 to {num_classes - 1}, found {np.unique(labels)}"
        )
    return labels.astype(np.int64)
