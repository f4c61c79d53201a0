"""Ridge regression in closed form: of one-hot classes or of ratings, and behind random nodes as broad learning."""

from collections.abc import Iterator, Sequence

import numpy as np
from scipy.linalg import cho_factor, cho_solve

from affekt.finetune.probes.targets import Targets

FEATURE_NODES, ENHANCEMENT_NODES = 256, 512


def ridge(train: np.ndarray, targets: Targets, other: np.ndarray, penalties: Sequence[float]) -> Iterator[np.ndarray]:
    """Answers `(m, K)` for the rows `other (m, d)`, one array per penalty, fitted on `train (n, d)`.

    Minimises mean(w_i * |y_i - b - x_i W|^2) + penalty * |W|^2 with the weights of `targets`; the intercept is free.
    """
    weights = targets.weights / len(train)
    mean, offset = weights @ train, weights @ targets.values
    centred = train - mean
    weighted = centred * weights[:, None]
    covariance, cross = weighted.T @ centred, weighted.T @ (targets.values - offset)
    for penalty in penalties:
        factor = cho_factor(covariance + penalty * np.eye(len(covariance)), check_finite=False)
        yield (other - mean) @ cho_solve(factor, cross, check_finite=False) + offset


def broad(
    train: np.ndarray, targets: Targets, other: np.ndarray, penalties: Sequence[float], seed: int
) -> Iterator[np.ndarray]:
    """Broad learning (Chen and Liu 2018): Z = tanh(X We + be), H = tanh(Z Wh + bh), and a ridge on [Z H].

    The weights of the nodes are drawn from `seed` and stay; each node's input has about unit variance.
    """
    rng = np.random.default_rng(seed)
    extent = np.sqrt(np.square(train).sum(1).mean()) or 1.0

    def layer(width: int, nodes: int, scale: float) -> tuple[np.ndarray, np.ndarray]:
        return scale * rng.standard_normal((width, nodes)), rng.uniform(-1, 1, nodes)

    to_features = layer(train.shape[1], FEATURE_NODES, 1 / extent)
    to_enhancement = layer(FEATURE_NODES, ENHANCEMENT_NODES, FEATURE_NODES**-0.5)

    def nodes(rows: np.ndarray) -> np.ndarray:
        features = np.tanh(rows @ to_features[0] + to_features[1])
        both = np.concatenate([features, np.tanh(features @ to_enhancement[0] + to_enhancement[1])], 1)
        return both / np.sqrt(both.shape[1])  # one scale of penalties serves any number of nodes

    yield from ridge(nodes(train), targets, nodes(other), penalties)
