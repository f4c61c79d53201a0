"""How well a ranking finds what is right, where scores may be tied: expected values over all orders of the ties.

A list whose scores are all the same is worth what chance is, whatever its items are called (McSherry & Najork 2008,
"Computing information retrieval performance measures efficiently in the presence of tied scores").
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
from scipy.special import gammaln

from affekt.finetune.metrics.intervals import intervals
from affekt.finetune.schema import Estimate

CUTS = (1, 5, 10)
SAME = 9  # decimals of a cosine; what differs less is rounding
CELLS = 4_000_000  # of the matrices that are sorted at once


@dataclass
class Ranks:
    """What Q queries found. Those without any right answer in reach are not among them.

    `queries` (Q,) places among all that were asked, `first` (Q,) the rank of the first right answer, from 1,
    `precision` (Q,) average precision, `hits[k]` (Q,) whether a right answer is among the first k: chances where ties
    decide it.
    """

    queries: np.ndarray
    first: np.ndarray
    precision: np.ndarray
    hits: dict[int, np.ndarray]

    def values(self) -> dict[str, np.ndarray]:
        """By name of the score, what each query adds to it."""
        return {f"recall_{k}": hit for k, hit in self.hits.items()} | {"map": self.precision, "median_rank": self.first}

    def scores(self) -> dict[str, float]:
        return {n: float(np.median(v) if n == "median_rank" else v.mean()) for n, v in self.values().items()}


def rank(
    count: int, similar: Callable[[slice], np.ndarray], right: Callable[[slice], np.ndarray], left_out=None
) -> Ranks:
    """Ranks of `count` queries among N items, in blocks of rows: `similar(rows)` float (n, N), the higher the better,
    `right(rows)` bool (n, N), and `left_out(rows)` bool (n, N), items that are neither right nor wrong for a query."""
    parts, at, size = [], 0, 1
    while at < count:
        rows = slice(at, min(count, at + size))
        scores, wanted = similar(rows).astype(np.float64), right(rows)
        if left_out is not None:
            away = left_out(rows)
            scores, wanted = np.where(away, -np.inf, scores), wanted & ~away
        parts.append(_rank(scores.round(SAME), wanted, at))
        at, size = rows.stop, max(1, CELLS // max(scores.shape[1], 1))
    joined = [np.concatenate([part[i] for part in parts]) for i in range(3 + len(CUTS))] if parts else None
    if joined is None or not len(joined[0]):
        return Ranks(np.zeros(0, int), np.zeros(0), np.zeros(0), {k: np.zeros(0) for k in CUTS})
    return Ranks(joined[0], joined[1], joined[2], dict(zip(CUTS, joined[3:], strict=True)))


def _rank(scores: np.ndarray, right: np.ndarray, start: int) -> tuple[np.ndarray, ...]:
    asked = np.flatnonzero(right.any(1))
    order = np.argsort(-scores[asked], axis=1, kind="stable")
    scores, right = np.take_along_axis(scores[asked], order, 1), np.take_along_axis(right[asked], order, 1)
    n, items = scores.shape
    place = np.broadcast_to(np.arange(items), (n, items))
    begins = np.ones((n, items), bool)
    begins[:, 1:] = scores[:, 1:] != scores[:, :-1]
    ends = np.ones((n, items), bool)
    ends[:, :-1] = begins[:, 1:]
    before = np.maximum.accumulate(np.where(begins, place, 0), 1)  # items before the tie that an item belongs to
    last = np.flip(np.minimum.accumulate(np.flip(np.where(ends, place, items), 1), 1), 1)
    tied = last - before + 1
    seen = np.concatenate([np.zeros((n, 1), int), right.cumsum(1)], 1)
    seen_before = np.take_along_axis(seen, before, 1)
    right_tied = np.take_along_axis(seen, last + 1, 1) - seen_before
    # At place i of a tie an item is right with the chance r / n, and then (i - 1)(r - 1) / (n - 1) right ones are
    # expected before it in the tie.
    inside = (place - before) * np.maximum(right_tied - 1, 0) / np.maximum(tied - 1, 1)
    precision = right_tied / tied * (seen_before + 1 + inside) / (place + 1)
    precision = precision.sum(1) / right.sum(1)
    at = right.argmax(1)[:, None]  # within the first tie that holds a right answer
    b, t, r = (np.take_along_axis(x, at, 1)[:, 0] for x in (before, tied, right_tied))
    first = b + (t + 1) / (r + 1)
    return (asked + start, first, precision, *(_hit(k - b, t, r) for k in CUTS))


def _hit(room: np.ndarray, tied: np.ndarray, right: np.ndarray) -> np.ndarray:
    """The chance that of `right` among `tied` items in any order at least one stands in the first `room` places."""
    room = np.clip(room, 0, tied)
    wrong = tied - right
    safe = np.minimum(room, wrong)
    missed = gammaln(wrong + 1) - gammaln(wrong - safe + 1) - gammaln(tied + 1) + gammaln(tied - safe + 1)
    return np.where(room > wrong, 1.0, np.where(room == 0, 0.0, -np.expm1(missed)))


def estimates(
    ranks: Ranks, groups: Sequence[str], n: int = 2000, seed: int = 0, unit: str = "speaker"
) -> dict[str, Estimate]:
    """Each score with its 95 % interval: queries are resampled, by whole `groups` (one of each query; `unit` is the
    word for one, `id` for clips). What they are searched among stays as it is."""
    order = np.argsort(ranks.first, kind="stable")
    measures = {name: partial(_mean, values) for name, values in ranks.values().items()}
    measures["median_rank"] = lambda weights: _medians(ranks.first, weights, order)
    found = intervals(measures, len(ranks.first), groups, n, seed, cluster=unit)
    if unit == "id":
        found = {name: replace(interval, unit="clips") for name, interval in found.items()}
    return {name: Estimate(**interval.as_dict()) for name, interval in found.items()}


def _mean(values: np.ndarray, weights: np.ndarray) -> np.ndarray:
    return weights @ values / weights.sum(1)


def _medians(values: np.ndarray, weights: np.ndarray, order: np.ndarray) -> np.ndarray:
    """The median of the values (Q,), each as often as a row of weights (R, Q) says: (R,)."""
    reached = weights[:, order].cumsum(1, dtype=np.float64)
    half = reached[:, -1:] / 2
    low, high = (reached >= half).argmax(1), (reached > half).argmax(1)
    return (values[order][low] + values[order][high]) / 2
