"""95 % intervals of scores: the percentile bootstrap, by whole speakers, paired where two systems are compared."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass

import numpy as np

from affekt.data.errors import SettingsError
from affekt.finetune.metrics.confusion import Score, confusion_matrices

# Below this many speakers their resampling alone is too coarse to say anything (four speakers have 35 distinct
# resamples), so the clips within each drawn speaker are resampled too.
FEW_CLUSTERS = 10
SAME = 1e-12  # two scores that are closer differ by rounding alone

# A score of some clips by how often each counts: weights (R, N) to scores (R,).
Measure = Callable[[np.ndarray], np.ndarray]


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


def resampled(
    measures: Mapping[str, Measure], num_clips: int, groups: Sequence[str] | None, n: int = 2000, seed: int = 0
) -> dict[str, np.ndarray]:
    """Scores `(n,)` of every measure in the same n resamples of the clips, so that they may be subtracted in pairs.

    Whole `groups` (speakers) are drawn; below 10 of them the clips of each drawn one are resampled too; None draws
    clips. Raises SettingsError where a measure gives no number.
    """
    if n < 1:
        raise SettingsError(f"{n} resamples give no interval; 2000 are usual")
    found: dict[str, list[np.ndarray]] = {name: [] for name in measures}
    for weights in resample_weights(num_clips, groups, n, seed):
        weights = weights.astype(float)
        for name, measure in measures.items():
            found[name].append(measure(weights))
    scores = {name: np.concatenate(parts) for name, parts in found.items()}
    for name, values in scores.items():
        if not np.isfinite(values).all():
            raise SettingsError(f"{name} is no number in {np.sum(~np.isfinite(values))} of {n} resamples")
    return scores


def intervals(
    measures: Mapping[str, Measure],
    num_clips: int,
    groups: Sequence[str] | None,
    n: int = 2000,
    seed: int = 0,
    *,
    cluster: str = "speaker",
) -> dict[str, Interval]:
    """Every measure's value over all clips with its 95 % interval. `cluster` is the word for what `groups` are."""
    scores = resampled(measures, num_clips, groups, n, seed)
    once = np.ones((1, num_clips), np.float32)
    return {
        name: as_interval(measure(once)[0], scores[name], num_clips, groups, cluster)
        for name, measure in measures.items()
    }


def as_interval(
    value: float,
    scores: np.ndarray,
    num_clips: int,
    groups: Sequence[str] | None,
    cluster: str = "speaker",
    *,
    centred: bool = False,
) -> Interval:
    """`value` with the percentiles of its `scores` in the resamples of those clips.

    A calibration error is a mean of absolute gaps, to which resampling adds some of its own; `centred` shifts the
    scores so that their median is the value, but not below 0.
    """
    if centred:
        scores = np.maximum(scores - np.median(scores) + value, 0)
    low, high = np.quantile(scores, [0.025, 0.975])
    clusters = num_clips if groups is None else len(set(groups))
    return Interval(float(value), float(low), float(high), resampling_unit(groups, cluster), clusters)


def two_sided_p(differences: np.ndarray) -> float:
    """How likely a difference this far from 0 were if there was none, by a paired bootstrap `(n,)` of it.

    Twice the share of resamples on the smaller side of 0, those at 0 on both; n resamples can show no less than
    2 / (n + 1) (Davison and Hinkley 1997, section 4.4).
    """
    smaller = min(np.sum(differences <= SAME), np.sum(differences >= -SAME))
    return float(min(1.0, 2 * (1 + smaller) / (1 + len(differences))))


def by_rows(score: Callable[[np.ndarray], float]) -> Measure:
    """The measure of any function of clip indices, each as often as it was drawn: the slow way, one call a resample."""

    def measure(weights: np.ndarray) -> np.ndarray:
        return np.array([score(np.repeat(np.arange(len(row)), row.astype(int))) for row in weights])

    return measure


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
    """Percentile bootstrap of a score of confusion matrices.

    `truth (N,)` and `prediction (N,)` or `(K, N)` are class indices; with K predictions (say of K seeds) the score is
    their mean. With `minus`, predictions of another system for the same clips, it is the paired difference. `groups` as
    in `resampled`; `unit` says which was drawn. A class that a resample leaves out is left out of its average.
    """
    truth = np.asarray(truth)
    prediction = np.atleast_2d(prediction)
    both = prediction if minus is None else np.concatenate([prediction, np.atleast_2d(minus)])
    num_classes = num_classes or int(max(truth.max(initial=0), both.max(initial=0))) + 1
    signs = np.full(len(both), 1 / len(prediction))
    if minus is not None:
        signs[len(prediction) :] = -1 / (len(both) - len(prediction))

    def measure(weights: np.ndarray) -> np.ndarray:
        return sum(s * score_fn(confusion_matrices(truth, row, num_classes, weights)) for s, row in zip(signs, both))

    return intervals({"score": measure}, len(truth), groups, n, seed)["score"]


def resampling_unit(groups: Sequence[str] | None, cluster: str = "speaker") -> str:
    """What `resampled` draws for these groups, in words."""
    if groups is None:
        return "clips"
    return f"{cluster}s" if len(set(groups)) >= FEW_CLUSTERS else f"{cluster}s, then their clips"


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
