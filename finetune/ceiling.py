"""The raters as a row of the table: what one of them gets against the others, on the clips the models are scored on."""

from functools import partial

import numpy as np

from affekt.data.errors import SettingsError
from affekt.finetune.metrics import confusion, raters
from affekt.finetune.metrics.intervals import intervals
from affekt.finetune.predictions import Predictions
from affekt.finetune.schema import Estimate, System
from affekt.finetune.scores import clusters

SCORES = {
    "uar": confusion.uar,
    "war": confusion.war,
    "macro_f1": confusion.macro_f1,
    "weighted_f1": confusion.weighted_f1,
}


def describe_raters(
    predictions: Predictions,
    counts: np.ndarray,
    *,
    name: str = "raters",
    title: str = "One rater against the others",
    bootstrap: int = 2000,
    seed: int = 0,
    cluster: str | None = "speaker",
) -> System:
    """The ceiling by rater agreement, from the votes `counts (N, K)` for the clips of a table of predictions, of which
    only classes, ids and people are used.

    Expectations over which rater is held out, as `raters.rater_confusions` has them; `agreement` is the share of other
    raters who chose alike. Raises SettingsError where no clip has two raters.
    """
    if counts.shape != (len(predictions), len(predictions.classes)):
        raise SettingsError(f"votes {counts.shape} for {len(predictions)} clips, {len(predictions.classes)} classes")
    rows = counts.sum(1) > 1
    if not rows.any():
        raise SettingsError("no clip has two raters, so nothing is known of their agreement")
    table, counts = predictions.take(rows), counts[rows]
    each = raters.rater_confusions(counts)
    cells = each.reshape(len(each), -1)

    def measure(function: confusion.Score, weights: np.ndarray) -> np.ndarray:
        return function((weights @ cells).reshape(*weights.shape[:-1], *each.shape[1:]))

    measures = {score: partial(measure, function) for score, function in SCORES.items()}
    measures["agreement"] = partial(raters.agreement, counts)
    groups = clusters(table, cluster)
    found = intervals(measures, len(table), groups, bootstrap, seed, cluster=cluster or "clip")
    return System(
        name=name,
        title=title,
        kind="raters",
        streams=table.about.get("streams", "both"),
        clips=len(table),
        scores={score: Estimate(**interval.as_dict()) for score, interval in found.items()},
    )
