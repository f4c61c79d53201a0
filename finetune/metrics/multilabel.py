"""Scores of label sets: `truth` and `prediction` are bool `(N, K)`, several classes or none may hold for a clip."""

import numpy as np

from affekt.data.errors import SettingsError
from affekt.finetune.metrics.weighted import weigh


def above_chance(shares: np.ndarray) -> np.ndarray:
    """The classes `(N, K)` with more than 1/K of the votes, or of a softmax; all of them where all are equal.

    The rule of EMO-SUPERB for truth and prediction alike, after the all-inclusive rule of Chou et al.
    """
    shares = np.asarray(shares, float)
    above = shares > 1 / shares.shape[1]
    return above | ~above.any(1, keepdims=True)


def multi_macro_f1(truth: np.ndarray, prediction: np.ndarray, weights: np.ndarray | None = None) -> np.ndarray:
    """Mean over the classes of F1, 2 TP / (2 TP + FN + FP), over those that are in the truth or in the prediction.

    1 where none is in either: nothing was to be found and nothing was.
    """
    hits, misses, false_alarms, _ = _counts(truth, prediction, weights)
    total = 2 * hits + misses + false_alarms
    found = (total > 0).sum(-1)
    mean = (2 * hits / np.where(total > 0, total, 1)).sum(-1) / np.maximum(found, 1)
    return np.where(found > 0, mean, 1.0)


def multi_micro_f1(truth: np.ndarray, prediction: np.ndarray, weights: np.ndarray | None = None) -> np.ndarray:
    """F1 of the decisions about all classes together; 1 where there is nothing to find and nothing was found."""
    hits, misses, false_alarms, _ = (count.sum(-1) for count in _counts(truth, prediction, weights))
    total = 2 * hits + misses + false_alarms
    return np.where(total > 0, 2 * hits / np.where(total > 0, total, 1), 1.0)


def weighted_accuracy(truth: np.ndarray, prediction: np.ndarray, weights: np.ndarray | None = None) -> np.ndarray:
    """Mean over the classes of (TP N/P + TN) / 2N, the score of CMU-MOSEI, P and N the clips with and without the
    class: half the recall of either. Of a class that all clips have, or none, the one recall that there is."""
    hits, misses, false_alarms, rejections = _counts(truth, prediction, weights)
    positive, negative = hits + misses, false_alarms + rejections
    recalls = hits / np.where(positive > 0, positive, 1) + rejections / np.where(negative > 0, negative, 1)
    return (recalls / ((positive > 0).astype(float) + (negative > 0))).mean(-1)


def _counts(truth: np.ndarray, prediction: np.ndarray, weights: np.ndarray | None) -> tuple[np.ndarray, ...]:
    """TP, FN, FP and TN `(..., K)` of each class."""
    truth, prediction = np.asarray(truth), np.asarray(prediction)
    if truth.shape != prediction.shape or truth.dtype != bool or prediction.dtype != bool:
        raise SettingsError(
            f"label sets are bool (N, K) in pairs, not {truth.dtype} {truth.shape} and {prediction.dtype} "
            f"{prediction.shape}"
        )
    weights = weigh(weights, len(truth))
    sums = weights @ np.hstack([truth & prediction, truth, prediction]).astype(float)
    hits, true, said = np.split(sums, 3, -1)
    return hits, true - hits, said - hits, weights.sum(-1)[..., None] - true - said + hits
