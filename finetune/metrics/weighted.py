"""How often each clip counts: what all scores but those of confusion matrices take, so that a bootstrap is one call.

A score is a function of what is known and said of N clips, and of `weights (..., N)`: once each (None) gives the score
`()`, a stack of resamples gives one `(...)` each. Weights are whole numbers, and no row is all zero.
"""

import numpy as np

from affekt.data.errors import SettingsError


def weigh(weights: np.ndarray | None, num_clips: int) -> np.ndarray:
    """`weights` as float64 `(..., N)`, ones where None. SettingsError where no clip is left or one has no weight."""
    if not num_clips:
        raise SettingsError("no clips to score; the part has none of which the truth is known")
    if weights is None:
        return np.ones(num_clips)
    if weights.shape[-1] != num_clips:
        raise SettingsError(f"{weights.shape[-1]} weights for {num_clips} clips; each clip needs one")
    return np.asarray(weights, float)


def weighted_mean(values: np.ndarray, weights: np.ndarray | None = None) -> np.ndarray:
    """Mean of one value `(N,)` per clip."""
    weights = weigh(weights, len(values))
    return weights @ np.asarray(values, float) / weights.sum(-1)


def same_shape(truth: np.ndarray, prediction: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Both as float64. SettingsError where they are no pairs, or where one is NaN or infinite: no score may be."""
    truth, prediction = np.asarray(truth, float), np.asarray(prediction, float)
    if truth.shape != prediction.shape:
        raise SettingsError(f"the truth is {truth.shape}, the prediction {prediction.shape}; they must be pairs")
    if not (np.isfinite(truth).all() and np.isfinite(prediction).all()):
        raise SettingsError("NaN or infinity among what is to be scored; leave out the clips whose truth is unknown")
    return truth, prediction
