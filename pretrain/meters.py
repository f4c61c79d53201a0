"""What embeddings of clips are worth and whether they collapse: a linear readout, neighbours, retrieval, geometry.

All of it is closed form or a matrix product and takes milliseconds for some hundred clips, so that a run can be
watched. Rows are clips; embeddings are L2-normalised; everything is computed in float64.
"""

from collections.abc import Sequence

import numpy as np

RIDGE_PENALTIES = (30.0, 3.0, 0.3, 0.03, 0.003)  # strongest first: on equal scores the simplest is kept
INTERCEPT = (
    10.0  # extent of the constant feature, beside rows of mean square 1: an intercept that costs next to nothing
)
NEIGHBOURS, NEIGHBOUR_TEMPERATURE = 10, 0.07  # temperature as in Wu et al. 2018, "Unsupervised Feature Learning"


def ridge_predict(train: np.ndarray, labels: np.ndarray, groups: Sequence[str], other: np.ndarray) -> np.ndarray:
    """Class indices (m,) for the rows `other` (m, D), from ridge regression of one-hot classes on `train` (n, D).

    Classes weigh equally. The penalty is the one with the best balanced accuracy on `train` when each group (speaker)
    is left out in turn. In the dual, with K the Gram matrix, W the weights and A = (K + penalty W^-1)^-1, the rows of a
    left-out group g miss their targets by (A_gg)^-1 (A Y)_g: no fit is repeated.
    """
    train, other = _standardised(train, other)
    targets = np.eye(labels.max() + 1)[labels]
    counts = targets.sum(0)
    weights = (len(labels) / (counts > 0).sum() / np.maximum(counts, 1))[labels]
    names = np.asarray(groups) if len(set(groups)) > 1 else np.arange(len(labels))
    members = [np.flatnonzero(names == name) for name in np.unique(names)]
    gram = train @ train.T + INTERCEPT
    best, chosen = -1.0, None
    for penalty in RIDGE_PENALTIES:
        inverse = np.linalg.inv(gram + np.diag(penalty / weights))
        dual = inverse @ targets
        left_out = np.empty_like(targets)
        for rows in members:
            left_out[rows] = targets[rows] - np.linalg.solve(inverse[np.ix_(rows, rows)], dual[rows])
        score = balanced_accuracy(labels, left_out.argmax(1))
        if score > best:
            best, chosen = score, dual
    return ((other @ train.T + INTERCEPT) @ chosen).argmax(1)


def neighbour_predict(train: np.ndarray, labels: np.ndarray, other: np.ndarray) -> np.ndarray:
    """Class indices (m,): a vote of the most similar rows of `train`, weighted by exp(similarity / temperature)."""
    similarity = other.astype(np.float64) @ train.T.astype(np.float64)
    count = min(NEIGHBOURS, len(train))
    nearest = np.argsort(-similarity, axis=1, kind="stable")[:, :count]
    votes = np.exp((np.take_along_axis(similarity, nearest, 1) - 1) / NEIGHBOUR_TEMPERATURE)
    return (votes[:, :, None] * np.eye(labels.max() + 1)[labels[nearest]]).sum(1).argmax(1)


def balanced_accuracy(labels: np.ndarray, predictions: np.ndarray) -> float:
    """Unweighted average recall over the classes in `labels`."""
    return float(np.mean([(predictions[labels == c] == c).mean() for c in np.unique(labels)]))


def recall_at(queries: np.ndarray, answers: np.ndarray, ranks: Sequence[int] = (1, 5, 10)) -> dict[int, float]:
    """Share of rows i of `queries` (n, D) whose answer i is among the k most similar of `answers` (n, D).

    Another answer as similar as the right one counts as better: embeddings that are all alike find nothing.
    """
    similarity = queries.astype(np.float64) @ answers.T.astype(np.float64)
    right = np.diagonal(similarity)[:, None]
    better = (similarity >= right - 1e-9).sum(1) - 1  # the right one itself is no better
    return {k: float((better < k).mean()) for k in ranks}


def effective_rank(embeddings: np.ndarray) -> float:
    """exp of the entropy of the singular values of the centred rows, 1 to min(n - 1, D): how many directions are in use
    (Roy & Vetterli 2007, "The effective rank"). 0 for rows that are all equal."""
    x = embeddings.astype(np.float64)
    values = np.linalg.svd(x - x.mean(0), compute_uv=False)
    if values.sum() < 1e-6 * np.sqrt(x.size):  # what is left is rounding
        return 0.0
    share = values / values.sum()
    share = share[share > 0]
    return float(np.exp(-(share * np.log(share)).sum()))


def alignment(one: np.ndarray, other: np.ndarray) -> float:
    """Mean squared distance of the two embeddings of each clip: 0 when equal, 2 when unrelated (Wang & Isola 2020,
    "Understanding contrastive representation learning through alignment and uniformity", alpha = 2)."""
    return float(np.square(one.astype(np.float64) - other).sum(1).mean())


def uniformity(embeddings: np.ndarray) -> float:
    """Log of the mean Gaussian potential exp(-2 |x - y|^2) over pairs of clips: 0 when all are one point, about -4 when
    they are spread evenly over the sphere (Wang & Isola 2020, t = 2)."""
    x = embeddings.astype(np.float64)
    squares = np.square(x).sum(1)
    distances = squares[:, None] + squares - 2 * x @ x.T
    pairs = distances[np.triu_indices(len(x), 1)]
    return float(np.log(np.exp(-2 * pairs).mean()))


def modality_gap(one: np.ndarray, other: np.ndarray) -> float:
    """Distance between the centres of the two streams' embeddings (Liang et al. 2022, "Mind the gap")."""
    return float(np.linalg.norm(one.astype(np.float64).mean(0) - other.astype(np.float64).mean(0)))


def _standardised(train: np.ndarray, other: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """By mean and deviation over `train`, rows of mean square 1; a dimension that is constant there becomes 0."""
    train, other = train.astype(np.float64), other.astype(np.float64)
    mean, deviation = train.mean(0), train.std(0)
    used = deviation > 1e-7 * np.abs(mean) + 1e-12
    scale = np.where(used, 1 / np.where(used, deviation, 1.0), 0.0) / np.sqrt(max(used.sum(), 1))
    return (train - mean) * scale, (other - mean) * scale
