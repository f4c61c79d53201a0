"""k nearest neighbours by cosine, with defined answers for ties and for rows without length."""

from collections.abc import Iterator, Sequence

import faiss
import numpy as np

from affekt.finetune.probes.targets import Targets

RESOLUTION = 1e-5  # cosines that are nearer to each other than this may be equal: faiss computes them in float32
NOBODY = 1e-6  # the share of the votes of a class that nobody votes for, so that its logarithm is finite
SPARE = 32  # neighbours beyond k that are looked at for ties


def knn(
    train: np.ndarray, targets: Targets, other: np.ndarray, options: Sequence[tuple[int, float]]
) -> Iterator[np.ndarray]:
    """Answers `(m, K)` for the rows `other (m, d)`, one array per option `(k, temperature)`.

    The k rows of `train (n, d)` with the largest cosine vote with weight w_i exp(cosine / temperature) (Wu et al.
    2018); classes are answered by the logarithm of their share of the votes, ratings by the weighted mean. Of equal
    cosines the earlier row of `train` counts as nearer; k above n is n. A row without length has cosine 0 with every
    other, so as a question it has no neighbours: all of `train` votes.
    """
    ours, theirs = unit_rows(train), unit_rows(other)
    most = min(max(k for k, _ in options), len(ours))
    cosine, near = nearest(ours, theirs, most)
    lost = ~theirs.any(1)
    everyone = (targets.weights @ targets.values) / targets.weights.sum()
    for k, temperature in options:
        closeness = np.exp((cosine[:, :k] - cosine[:, :1]) / temperature)
        votes = closeness * targets.weights[near[:, :k]]
        mean = np.einsum("mk,mkc->mc", votes, targets.values[near[:, :k]]) / votes.sum(1, keepdims=True)
        mean[lost] = everyone
        yield np.log(mean.clip(NOBODY)) if targets.classes else mean


def nearest(train: np.ndarray, other: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """The k largest cosines `(m, k)` of unit rows and whose they are; of equal ones the earlier row is first."""
    index = faiss.IndexFlatIP(train.shape[1])
    index.add(train)
    found, rows = index.search(other, min(k + SPARE, len(train)))
    near, cosine = np.empty((len(other), k), int), np.empty((len(other), k))
    for question, (row, looked_at) in enumerate(zip(other.astype(np.float64), rows)):
        # Where the ties at place k may go on beyond what was looked at, all rows are looked at.
        if len(looked_at) < len(train) and found[question, -1] > found[question, k - 1] - RESOLUTION:
            looked_at = np.arange(len(train))
        # Unlike a matrix product, this sums every row in the same order: equal rows have equal cosines to the bit.
        exact = np.einsum("kd,d->k", train[looked_at].astype(np.float64), row)
        order = np.lexsort((looked_at, -exact))[:k]
        near[question], cosine[question] = looked_at[order], exact[order]
    return cosine, near


def unit_rows(rows: np.ndarray) -> np.ndarray:
    """Rows divided by their length, float32; those without one stay zero."""
    length = np.linalg.norm(rows, axis=1, keepdims=True)
    unit = np.divide(rows, length, out=np.zeros_like(rows, dtype=np.float64), where=length > 1e-12)
    return np.ascontiguousarray(unit, np.float32)
