"""Scores of one dimension (valence, arousal, dominance): `truth` and `prediction` `(N,)` over the whole test set.

All moments are population moments (divided by N), as in the CCC of Lin (1989) and the loss of Wagner et al. (2023).
What is constant agrees with nothing, so its CCC and PCC are 0; that holds for a single clip too.
"""

import numpy as np

from affekt.finetune.metrics.weighted import same_shape, weigh, weighted_mean

ROUNDING = 1e-12  # a variance below this share of the squared range is that of a constant


def ccc(truth: np.ndarray, prediction: np.ndarray, weights: np.ndarray | None = None) -> np.ndarray:
    """Concordance: 2 cov / (var + var + (difference of the means)^2)."""
    covariance, var_truth, var_prediction, shift = _moments(truth, prediction, weights)
    spread = var_truth + var_prediction + shift**2
    defined = (var_truth > 0) & (var_prediction > 0)
    return np.where(defined, 2 * covariance / np.where(defined, spread, 1), 0.0)


def pcc(truth: np.ndarray, prediction: np.ndarray, weights: np.ndarray | None = None) -> np.ndarray:
    """Pearson's correlation: cov / sqrt(var var)."""
    covariance, var_truth, var_prediction, _ = _moments(truth, prediction, weights)
    spread = np.sqrt(var_truth) * np.sqrt(var_prediction)
    return np.clip(np.where(spread > 0, covariance / np.where(spread > 0, spread, 1), 0.0), -1, 1)


def rmse(truth: np.ndarray, prediction: np.ndarray, weights: np.ndarray | None = None) -> np.ndarray:
    """Root of the mean squared error, in the unit of the ratings."""
    truth, prediction = same_shape(truth, prediction)
    return np.sqrt(weighted_mean((truth - prediction) ** 2, weights))


def mae(truth: np.ndarray, prediction: np.ndarray, weights: np.ndarray | None = None) -> np.ndarray:
    """Mean absolute error, in the unit of the ratings."""
    truth, prediction = same_shape(truth, prediction)
    return weighted_mean(np.abs(truth - prediction), weights)


def _moments(truth: np.ndarray, prediction: np.ndarray, weights: np.ndarray | None) -> tuple[np.ndarray, ...]:
    """Covariance, the two variances and the difference of the means, `(...)` each."""
    truth, prediction = same_shape(truth, prediction)
    weights = weigh(weights, len(truth))
    # Sums of squares lose digits to a common offset, so both are counted from a value of their own. The first, not the
    # mean: then what is constant is exactly 0.
    x, y = truth - truth[0], prediction - prediction[0]
    terms = np.stack([x, y, x * x, y * y, x * y], 1)
    mean_x, mean_y, square_x, square_y, product = np.moveaxis(weights @ terms / weights.sum(-1)[..., None], -1, 0)
    variances = [
        np.where(variance > ROUNDING * np.abs(values).max() ** 2, variance, 0.0)
        for variance, values in ((square_x - mean_x**2, x), (square_y - mean_y**2, y))
    ]
    return product - mean_x * mean_y, *variances, mean_x + truth[0] - mean_y - prediction[0]
