"""Is a model as sure as it is right? Calibration errors, proper scores, and how errors lie over confidence.

Inputs are of N clips: `probabilities (N, K)` with `truth` either a class index `(N,)`, or `(N, K)` what the
probabilities should be (sets of classes as 0 and 1, or shares of votes); `confidence (N,)` with `right (N,)`.
Clips that are equally sure have no order: they share a bin, and count in a curve as their average.
"""

import numpy as np
from scipy.special import log_softmax

from affekt.data.errors import SettingsError
from affekt.finetune.metrics.weighted import same_shape, weigh, weighted_mean

BINS = 15


def ece(confidence: np.ndarray, right: np.ndarray, weights: np.ndarray | None = None, bins: int = BINS) -> np.ndarray:
    """Expected calibration error with bins of equal mass (Nguyen and O'Connor 2015): the mean gap between confidence
    and the share that is right, over the clips' bins. `right` may be the share of raters who agree."""
    confidence, right = same_shape(confidence, right)
    mass, gap = (np.atleast_2d(part) for part in _runs(confidence, weigh(weights, len(confidence)), right - confidence))
    total = mass.sum(1)
    # A run belongs to the bin that its middle lies in. Counted in 1 / (2 bins) clips all of this is whole numbers.
    middles = bins * (2 * np.cumsum(mass, 1) - mass)
    inner = [np.searchsorted(row, 2 * n * np.arange(1, bins)) for row, n in zip(middles, total)]
    edges = np.pad(np.array(inner, int).reshape(len(mass), bins - 1), ((0, 0), (1, 1)))
    edges[:, -1] = mass.shape[1]
    so_far = np.pad(np.cumsum(gap, 1), ((0, 0), (1, 0)))
    gaps = np.abs(np.diff(np.take_along_axis(so_far, edges, 1), axis=1)).sum(1) / total
    return gaps.reshape(np.shape(weights)[:-1])


def classwise_ece(
    probabilities: np.ndarray, truth: np.ndarray, weights: np.ndarray | None = None, bins: int = BINS
) -> np.ndarray:
    """Mean over the classes of the ECE of each class's probability (Kull et al. 2019, equation 2, of equal mass)."""
    wanted = _wanted(probabilities, truth)
    return np.mean([ece(p, t, weights, bins) for p, t in zip(probabilities.T, wanted.T)], axis=0)


def brier(probabilities: np.ndarray, truth: np.ndarray, weights: np.ndarray | None = None) -> np.ndarray:
    """Sum over the classes of the squared error (Brier 1950): 0 to 2 where rows sum to 1."""
    return weighted_mean(((probabilities - _wanted(probabilities, truth)) ** 2).sum(1), weights)


def nll(logits: np.ndarray, truth: np.ndarray, weights: np.ndarray | None = None) -> np.ndarray:
    """Negative log likelihood of a softmax, in nats: of a class index `(N,)`, or the cross-entropy of shares."""
    return weighted_mean(-(_wanted(logits, truth) * log_softmax(logits, 1)).sum(1), weights)


def binary_nll(logits: np.ndarray, truth: np.ndarray, weights: np.ndarray | None = None) -> np.ndarray:
    """Negative log likelihood of a sigmoid per class, in nats, mean over classes; `truth (N, K)` in 0 to 1."""
    truth, logits = same_shape(truth, logits)
    losses = np.maximum(logits, 0) - logits * truth + np.log1p(np.exp(-np.abs(logits)))
    return weighted_mean(losses.mean(1), weights)


def risks(
    confidence: np.ndarray, right: np.ndarray, coverage: np.ndarray, weights: np.ndarray | None = None
) -> np.ndarray:
    """Share of errors `(..., C)` among the most confident clips that `coverage (C,)`, shares above 0, keeps."""
    coverage = np.asarray(coverage, float)
    if coverage.min() <= 0 or coverage.max() > 1:
        raise SettingsError("coverage is a share of clips above 0 and up to 1")
    kept, wrong, total = _error_curves(confidence, right, weights)
    found = [np.interp(coverage * n, k, e) / (coverage * n) for k, e, n in zip(kept, wrong, total)]
    return np.reshape(found, (*np.shape(weights)[:-1], len(coverage)))


def aurc(confidence: np.ndarray, right: np.ndarray, weights: np.ndarray | None = None) -> np.ndarray:
    """Area under the risk-coverage curve (Geifman et al. 2019): the mean over n = 1 to N of the share of errors among
    the n most confident clips. 0 where all are right, 1 where all are wrong."""
    kept, wrong, total = _error_curves(confidence, right, weights)
    found = []
    for k, e, n in zip(kept, wrong, total):
        steps = np.arange(1, int(n) + 1)
        found.append((np.interp(steps, k, e) / steps).mean())
    return np.reshape(found, np.shape(weights)[:-1])


def auroc(confidence: np.ndarray, right: np.ndarray, weights: np.ndarray | None = None) -> np.ndarray:
    """The chance that a clip that is right is more confident than one that is wrong, ties half. 0.5, which says
    nothing, where all are right or all are wrong."""
    confidence, right = same_shape(confidence, right)
    mass, hits = _runs(confidence, weigh(weights, len(confidence)), right)
    misses = mass - hits
    below = np.cumsum(misses, -1) - misses / 2
    pairs = hits.sum(-1) * misses.sum(-1)
    return np.where(pairs > 0, (hits * below).sum(-1) / np.where(pairs > 0, pairs, 1), 0.5)


def top_k(logits: np.ndarray, truth: np.ndarray, k: int, weights: np.ndarray | None = None) -> np.ndarray:
    """Share of clips whose class `truth (N,)` is among the k with the largest logits; of equal ones the first come
    first, so that k = 1 is accuracy by argmax."""
    if not 1 <= k <= logits.shape[1]:
        raise SettingsError(f"top {k} of {logits.shape[1]} classes; k is 1 to {logits.shape[1]}")
    own = logits[np.arange(len(logits)), truth][:, None]
    earlier = np.arange(logits.shape[1]) < np.asarray(truth)[:, None]
    return weighted_mean(((logits > own) | (logits == own) & earlier).sum(1) < k, weights)


def _wanted(probabilities: np.ndarray, truth: np.ndarray) -> np.ndarray:
    """(N, K) of what the probabilities should be."""
    truth = np.asarray(truth)
    if truth.ndim == 1 and truth.size and not 0 <= truth.min() <= truth.max() < probabilities.shape[1]:
        raise SettingsError(f"class indices must be 0 to {probabilities.shape[1] - 1}, found {np.unique(truth)}")
    wanted = np.eye(probabilities.shape[1])[truth] if truth.ndim == 1 else truth
    return same_shape(wanted, probabilities)[0]


def _runs(key: np.ndarray, weights: np.ndarray, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Clips of equal key joined, by rising key: their weights and weighted sums of values, `(..., U)` each."""
    order = np.argsort(key, kind="stable")
    ordered = key[order]
    first = np.flatnonzero(np.concatenate([[True], ordered[1:] != ordered[:-1]]))
    mass = np.take(weights, order, -1)
    sums = mass * np.asarray(values, float)[order]
    if len(first) == len(key):
        return mass, sums
    return np.add.reduceat(mass, first, -1), np.add.reduceat(sums, first, -1)


def _error_curves(confidence, right, weights) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """From the most confident on, one row per resample: clips so far and errors among them `(R, U + 1)`, all clips."""
    confidence, right = same_shape(confidence, right)
    mass, wrong = _runs(-confidence, weigh(weights, len(confidence)), 1 - right)
    kept, errors = (np.cumsum(np.atleast_2d(part), -1) for part in (mass, wrong))
    start = np.zeros((len(kept), 1))
    return np.hstack([start, kept]), np.hstack([start, errors]), kept[:, -1]
