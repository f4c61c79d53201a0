"""95 % intervals of scores: the percentile bootstrap, by whole speakers."""

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass

import numpy as np

from affekt.data.errors import SettingsError
from affekt.finetune.metrics.confusion import Score, confusion_matrix

# Below this many speakers their resampling alone is too coarse to say anything (four speakers have 35 distinct
# resamples), so the clips within each drawn speaker are resampled too.
FEW_CLUSTERS = 10


@dataclass(frozen=True)
class Interval:
    """A value, the 2.5 and 97.5 percentile of its bootstrap, what was resampled and how many of those there were."""

    value: float
    low: float
    high: float
    unit: str
    clusters: int

    def as_dict(self) -> dict[str, float | int | str]:
        return asdict(self)


def bootstrap_interval(
    score_fn: Score,
    truth: np.ndarray,
    prediction: np.ndarray,
    groups: Sequence[str] | None,
    n: int = 2000,
    seed: int = 0,
    *,
    num_classes: int | None = None,
    minus: np.ndarray | None = None,
) -> Interval:
    """Percentile bootstrap of a score, resampling whole `groups` (speakers).

    `truth (N,)` and `prediction (N,)` or `(K, N)` are class indices; with K predictions (say of K seeds) the score is
    their mean. With `minus`, predictions of another system for the same clips, it is the paired difference. Below 10
    groups the clips of each drawn speaker are resampled too; `groups=None` resamples clips; `unit` says which. A class
    that a resample leaves out is left out of that resample's average.
    """
    truth = np.asarray(truth)
    prediction = np.atleast_2d(prediction)
    both = prediction if minus is None else np.concatenate([prediction, np.atleast_2d(minus)])
    num_classes = num_classes or int(max(truth.max(initial=0), both.max(initial=0))) + 1
    signs = np.full(len(both), 1 / len(prediction))
    if minus is not None:
        signs[len(prediction) :] = -1 / (len(both) - len(prediction))

    def score(matrices: list[np.ndarray]) -> np.ndarray:
        return sum(sign * score_fn(matrix) for sign, matrix in zip(signs, matrices))

    value = score([confusion_matrix(truth, row, num_classes) for row in both])
    cells = [np.eye(num_classes**2, dtype=np.float32)[truth * num_classes + row] for row in both]  # (N, C*C) each
    resampled = [
        score([(weights @ cell).reshape(-1, num_classes, num_classes) for cell in cells])
        for weights in resample_weights(len(truth), groups, n, seed)
    ]
    low, high = np.quantile(np.concatenate(resampled), [0.025, 0.975])
    clusters = len(truth) if groups is None else len(set(groups))
    return Interval(float(value), float(low), float(high), resampling_unit(groups), clusters)


def resampling_unit(groups: Sequence[str] | None) -> str:
    """What `bootstrap_interval` resamples for these groups, in words."""
    if groups is None:
        return "clips"
    return "speakers" if len(set(groups)) >= FEW_CLUSTERS else "speakers, then their clips"


def resample_weights(num_clips: int, groups: Sequence[str] | None, n: int, seed: int) -> Iterator[np.ndarray]:
    """Blocks `(<=250, num_clips)` float32, n rows in all: how often each clip occurs in each resample."""
    rng = np.random.default_rng(seed)
    if groups is None:
        members = [np.arange(num_clips)]
    else:
        names = np.asarray([str(group) for group in groups])
        if len(names) != num_clips:
            raise SettingsError(f"{len(names)} groups for {num_clips} clips; each clip needs one")
        members = [np.flatnonzero(names == name) for name in np.unique(names)]
    within = groups is None or len(members) < FEW_CLUSTERS
    for first in range(0, n, 250):
        rows = min(250, n - first)
        drawn = rng.multinomial(len(members), np.full(len(members), 1 / len(members)), size=rows)  # (rows, groups)
        weights = np.empty((rows, num_clips), np.float32)
        for group, clips in enumerate(members):
            times = drawn[:, group]
            # A speaker drawn t times contributes t independent resamples of its clips: one multinomial of t x clips.
            each = (
                rng.multinomial(times * len(clips), np.full(len(clips), 1 / len(clips))) if within else times[:, None]
            )
            weights[:, clips] = each
        yield weights
