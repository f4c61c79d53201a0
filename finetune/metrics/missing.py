"""The area under a score while more and more of the input is missing."""

from collections.abc import Sequence

import numpy as np

from affekt.data.errors import SettingsError


def auilc(rates: Sequence[float], scores: Sequence[float]) -> float:
    """Area under the incomplete-learning curve (CIDer): the trapezoid rule over rates of missing data, divided by their
    range, so that a score that never falls is its own area. The usual rates are 0, 0.1, ... 1.

    Raises SettingsError unless two or more rates rise from each to the next and every score is a number.
    """
    x, y = np.asarray(rates, float), np.asarray(scores, float)
    if x.shape != y.shape or x.ndim != 1 or len(x) < 2 or not (np.diff(x) > 0).all() or not np.isfinite([x, y]).all():
        raise SettingsError(f"an area needs a score at each of two or more rising rates, not {rates} and {scores}")
    return float(np.trapezoid(y, x) / (x[-1] - x[0]))
