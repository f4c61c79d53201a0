"""Distances of predicted distributions from the shares of votes, both `(N, K)` with rows that sum to 1; clip means.

The label distribution measures of Geng (2016), table 1, and the Jensen-Shannon divergence. Natural logarithms.
"""

import numpy as np
from scipy.special import rel_entr

from affekt.data.errors import SettingsError
from affekt.finetune.metrics.weighted import same_shape, weighted_mean

SMALLEST = 1e-12  # of a predicted share, so that a class that raters chose costs much but not everything


def kl(truth: np.ndarray, prediction: np.ndarray, weights: np.ndarray | None = None) -> np.ndarray:
    """Kullback-Leibler divergence of the truth from the prediction, in nats; a predicted 0 counts as 1e-12."""
    truth, prediction = _rows(truth, prediction)
    return weighted_mean(rel_entr(truth, np.maximum(prediction, SMALLEST)).sum(1), weights)


def js(truth: np.ndarray, prediction: np.ndarray, weights: np.ndarray | None = None) -> np.ndarray:
    """Jensen-Shannon divergence, in nats: 0 to log 2."""
    truth, prediction = _rows(truth, prediction)
    middle = (truth + prediction) / 2
    return weighted_mean((rel_entr(truth, middle) + rel_entr(prediction, middle)).sum(1) / 2, weights)


def chebyshev(truth: np.ndarray, prediction: np.ndarray, weights: np.ndarray | None = None) -> np.ndarray:
    """The largest difference in any class."""
    truth, prediction = _rows(truth, prediction)
    return weighted_mean(np.abs(truth - prediction).max(1), weights)


def cosine(truth: np.ndarray, prediction: np.ndarray, weights: np.ndarray | None = None) -> np.ndarray:
    """Cosine similarity: 1 is equal, 0 has no class in common."""
    truth, prediction = _rows(truth, prediction)
    lengths = np.linalg.norm(truth, axis=1) * np.linalg.norm(prediction, axis=1)
    return weighted_mean((truth * prediction).sum(1) / lengths, weights)


def intersection(truth: np.ndarray, prediction: np.ndarray, weights: np.ndarray | None = None) -> np.ndarray:
    """The share that both give to the same classes: 1 minus half the sum of the differences."""
    truth, prediction = _rows(truth, prediction)
    return weighted_mean(np.minimum(truth, prediction).sum(1), weights)


def agreement(truth: np.ndarray, prediction: np.ndarray, weights: np.ndarray | None = None) -> np.ndarray:
    """Soft agreement: the share of raters who chose the class that the prediction has as its largest.

    What `raters.agreement` is for a rater and the other raters.
    """
    truth, prediction = _rows(truth, prediction)
    return weighted_mean(truth[np.arange(len(truth)), prediction.argmax(1)], weights)


def _rows(truth: np.ndarray, prediction: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    truth, prediction = same_shape(truth, prediction)
    for name, rows in (("the truth", truth), ("the prediction", prediction)):
        bad = np.flatnonzero((rows.min(1) < 0) | (np.abs(rows.sum(1) - 1) > 1e-6)) if rows.size else []
        if len(bad):
            raise SettingsError(f"{len(bad)} rows of {name} are no distributions, first row {bad[0]}: {rows[bad[0]]}")
    return truth, prediction
