"""Multinomial logistic regression on frozen features, made quick enough to try a whole menu of them.

With fewer clips than dimensions the optimum of an L2-penalised linear model lies in the span of the training rows.
Rotating the features into that span is therefore exact, and a fit costs by the number of clips, not of dimensions.
"""

import warnings
from collections.abc import Iterator, Sequence

import numpy as np
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression

from affekt.finetune.probes.targets import Targets

# Directions in which the training rows extend less than this share of their largest extent are rounding, not features.
NEGLIGIBLE = 1e-6
ABSENT = -100.0


def standardise(train: Sequence[np.ndarray], other: Sequence[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Join feature blocks after standardising each dimension by its mean and deviation over the training rows.

    `train` holds one array `(n, d_b)` per block, `other` the same blocks for other rows. Each block is divided by the
    square root of its width and of the number of blocks: a wide block does not outweigh a narrow one, and one scale of
    penalties serves every width. A dimension that is constant in training becomes 0 everywhere. Returns float64.
    """
    joined = []
    for rows, others in zip(train, other, strict=True):
        rows, others = np.asarray(rows, np.float64), np.asarray(others, np.float64)
        mean, deviation = rows.mean(0), rows.std(0)
        constant = deviation <= 1e-7 * np.abs(mean) + 1e-30
        scale = np.where(constant, 0.0, 1 / np.where(constant, 1.0, deviation))
        scale /= np.sqrt(rows.shape[1] * len(train))
        joined.append(((rows - mean) * scale, (others - mean) * scale))
    return np.concatenate([rows for rows, _ in joined], 1), np.concatenate([others for _, others in joined], 1)


def rotate(train: np.ndarray, other: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Coordinates in an orthonormal basis of the span of the training rows, where that has fewer dimensions.

    From the eigenvectors of the Gram matrix `(n, n)`: with X = U S V', coordinates are X V = U S and Y V = Y X' U / S.
    """
    if train.shape[1] <= train.shape[0]:
        return train, other
    values, vectors = np.linalg.eigh(train @ train.T)
    keep = values > NEGLIGIBLE**2 * max(values[-1], 1e-30)
    extent = np.sqrt(values[keep])
    basis = (train.T @ vectors[:, keep]) / extent  # (d, r), orthonormal columns
    return vectors[:, keep] * extent, other @ basis


class Path:
    """Logistic regressions on the same rows along a path of penalties, each fit started from the one before.

    Minimises mean(w_i * cross-entropy_i) + penalty / 2 * |W|^2 with weights that make the classes count equally and an
    intercept that is not penalised. `features` come from `standardise` (and `rotate`), `labels` are class indices.
    """

    def __init__(self, features: np.ndarray, labels: np.ndarray) -> None:
        self.labels = labels
        # Features without any extent still have a defined answer: the first class, from the intercepts alone.
        self.features = features if features.shape[1] else np.zeros((len(features), 1))
        self.model = LogisticRegression(class_weight="balanced", warm_start=True, max_iter=1000, tol=1e-4)

    def fit(self, penalty: float) -> "Path":
        """Move to this penalty. Go from strong to weak: that is the quick direction."""
        self.model.set_params(C=1 / (penalty * len(self.labels)))
        with warnings.catch_warnings():
            # A weak penalty on separable rows has its optimum far away; 1000 steps of it classify the same.
            warnings.simplefilter("ignore", ConvergenceWarning)
            self.model.fit(self.features, self.labels)
        return self

    def answers(self, features: np.ndarray, num_classes: int) -> np.ndarray:
        """Log-probabilities `(n, num_classes)` for rows in the coordinates of the training rows.

        A class that no training row has gets `ABSENT`, below what any other can have."""
        features = features if features.shape[1] else np.zeros((len(features), 1))
        answers = np.full((len(features), num_classes), ABSENT)
        answers[:, self.model.classes_] = np.maximum(self.model.predict_log_proba(features), ABSENT + 1)
        return answers


def logistic(
    train: np.ndarray, targets: Targets, other: np.ndarray, penalties: Sequence[float]
) -> Iterator[np.ndarray]:
    """Answers `(m, K)` of a `Path` for the rows `other`, one array per penalty, the strongest first."""
    path = Path(train, targets.labels)
    for penalty in penalties:
        yield path.fit(penalty).answers(other, targets.values.shape[1])


def strongest_first(penalties: Sequence[float]) -> list[float]:
    """The order in which a `Path` is walked; on equal scores the first, simplest, is kept."""
    return sorted(set(penalties), reverse=True)
