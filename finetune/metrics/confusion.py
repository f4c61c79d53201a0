"""Scores of a classifier that are computed from confusion matrices.

A score is a function from confusion matrices `(..., C, C)`, rows the truth, columns the prediction, to values `(...)`.
That makes a bootstrap over thousands of resamples one matrix product.
"""

from collections.abc import Callable

import numpy as np

from affekt.data.errors import SettingsError

Score = Callable[[np.ndarray], np.ndarray]


def confusion_matrix(truth: np.ndarray, prediction: np.ndarray, num_classes: int) -> np.ndarray:
    """Counts `(C, C)` of class indices, rows the truth. SettingsError on empty, unequal or out-of-range input."""
    truth, prediction = _checked(truth, num_classes), _checked(prediction, num_classes)
    if truth.shape != prediction.shape:
        raise SettingsError(f"{truth.size} true labels but {prediction.size} predictions; they must be pairs")
    return np.bincount(truth * num_classes + prediction, minlength=num_classes**2).reshape(num_classes, num_classes)


def uar(confusion: np.ndarray) -> np.ndarray:
    """Unweighted average recall (balanced accuracy) over the classes that occur in the truth; others have no recall."""
    confusion = np.asarray(confusion, float)
    support = confusion.sum(-1)
    recall = np.diagonal(confusion, axis1=-2, axis2=-1) / np.maximum(support, 1)
    return (recall * (support > 0)).sum(-1) / (support > 0).sum(-1)


def war(confusion: np.ndarray) -> np.ndarray:
    """Weighted average recall, which is accuracy: the share of clips that are right."""
    confusion = np.asarray(confusion, float)
    return np.trace(confusion, axis1=-2, axis2=-1) / confusion.sum((-2, -1))


def macro_f1(confusion: np.ndarray) -> np.ndarray:
    """Mean F1 over the classes that occur in the truth or in the prediction; one that is only predicted counts as 0."""
    confusion = np.asarray(confusion, float)
    total = confusion.sum(-1) + confusion.sum(-2)  # 2 TP + FN + FP
    f1 = 2 * np.diagonal(confusion, axis1=-2, axis2=-1) / np.maximum(total, 1)
    return (f1 * (total > 0)).sum(-1) / (total > 0).sum(-1)


SCORES: dict[str, Score] = {"uar": uar, "war": war, "macro_f1": macro_f1}


def _checked(labels: np.ndarray, num_classes: int) -> np.ndarray:
    labels = np.asarray(labels)
    if labels.size == 0:
        raise SettingsError("no clips to score")
    if not np.issubdtype(labels.dtype, np.integer) or labels.min() < 0 or labels.max() >= num_classes:
        raise SettingsError(
            f"class indices must be whole numbers from 0 to {num_classes - 1}, found {np.unique(labels)}"
        )
    return labels.astype(np.int64)
