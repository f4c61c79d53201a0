"""How well a human does it: one rater, held out, against the others, in closed form from the counts of votes.

Holding out any of a clip's n raters is equally likely, so one who chose class k is held out with c_k / n, and then the
others have cast c - e_k. Sums over k are therefore what a simulation tends to. A clip with fewer than two raters says
nothing and counts nowhere.
"""

import numpy as np

from affekt.data.errors import SettingsError
from affekt.finetune.metrics.weighted import weigh


def rater_confusions(counts: np.ndarray) -> np.ndarray:
    """Expected confusions `(N, K, K)` of clips: rows the class that most of the other raters chose, columns the choice
    of the one held out. Where others are tied, each of their classes has its part. A clip sums to 1, or to 0 where it
    has one rater or none. `counts (N, K)` are votes by class.

    Sum them over clips for the scores of `confusion`: WAR is the expected share of right answers; UAR and F1 are those
    of the expected confusion.
    """
    counts = _checked(counts)
    clips, classes = counts.shape
    total = counts.sum(1)
    found = np.zeros((clips, classes, classes))
    for chosen in range(classes):
        others = counts.copy()
        others[:, chosen] = np.maximum(others[:, chosen] - 1, 0)
        most = (others == others.max(1, keepdims=True)) & (total > 1)[:, None]
        share = counts[:, chosen] / np.maximum(total, 1)
        found[:, :, chosen] = share[:, None] * most / np.maximum(most.sum(1, keepdims=True), 1)
    return found


def agreement(counts: np.ndarray, weights: np.ndarray | None = None) -> np.ndarray:
    """Soft agreement: the share of the other raters who chose as the one held out did, mean over clips with two or
    more raters; the observed agreement of Fleiss (1971). Beside `shares.agreement` of a model."""
    counts = _checked(counts)
    total = counts.sum(1)
    pairs = (counts * (counts - 1)).sum(1) / np.where(total > 1, total * (total - 1), 1)
    weights = weigh(weights, len(counts)) * (total > 1)
    clips = weights.sum(-1)
    if not np.all(clips > 0):
        raise SettingsError("no clip has two raters, so nothing is known of their agreement")
    return weights @ pairs / clips


def _checked(counts: np.ndarray) -> np.ndarray:
    counts = np.asarray(counts, float)
    if counts.ndim != 2 or not counts.size or (counts < 0).any() or (counts != np.round(counts)).any():
        raise SettingsError("votes are whole numbers (N, K), 0 and above, one row per clip")
    return counts
