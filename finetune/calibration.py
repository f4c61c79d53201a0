"""Probabilities that mean what they say: temperatures fitted on development clips, and what they change on others.

Guo et al. (2017), section 4.2: logits are divided by a temperature that minimises the negative log likelihood.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from scipy.optimize import minimize_scalar

from affekt.data.errors import SettingsError
from affekt.finetune.metrics import confidence, multilabel
from affekt.finetune.metrics.intervals import resample_weights
from affekt.finetune.predictions import Kind, Predictions
from affekt.finetune.schema import Bin, Calibration, Curve

LOWEST, HIGHEST = 0.05, 20.0  # temperatures; beyond, a fit follows single clips
COVERAGE = np.arange(2, 101, 2) / 100


@dataclass(frozen=True)
class Temperatures:
    """What logits are divided by: one number `(1,)` for a softmax, one per class `(K,)` for sigmoids."""

    values: np.ndarray
    classes: list[str]
    kind: Kind

    def apply(self, predictions: Predictions) -> Predictions:
        """The same clips with scaled logits. The largest logit of a softmax stays the largest, the sign of a sigmoid's
        its sign, so no answer changes. SettingsError for predictions of other classes."""
        if (predictions.classes, predictions.kind) != (self.classes, self.kind):
            raise SettingsError(
                f"temperatures are of {self.kind} {self.classes}, the predictions of {predictions.kind} "
                f"{predictions.classes}"
            )
        logits = predictions.logits / self.values
        if self.kind == "single":
            # Two logits that differ in the last bit may become equal; then the first would win, whichever it was.
            before = predictions.logits.argmax(1)
            moved = np.flatnonzero(logits.argmax(1) != before)
            logits[moved, before[moved]] = np.nextafter(logits[moved].max(1), np.inf)
        return replace(predictions, logits=logits)


def fit_temperatures(dev: Predictions) -> Temperatures:
    """Fit on development clips: on their labels, or for sets of classes and where there are none, on their votes.

    Never raises the NLL of those clips: 1 is among what is tried. It stays 1 where no temperature is the best one:
    where every clip is right, and of a class that all clips have, or none. Raises SettingsError for predictions of
    the test part, and where nothing is known of the clips.
    """
    if dev.about.get("part") == "test":
        raise SettingsError(
            "temperatures are fitted on development clips; these predictions are of the test part, whose labels no "
            "choice may see"
        )
    dev, truth = _known(dev)
    if dev.kind == "multi":
        pairs = zip(dev.logits.T[:, :, None], truth.T[:, :, None])
        fitted = [_best(confidence.binary_nll, logits, hot) if 0 < hot.mean() < 1 else 1.0 for logits, hot in pairs]
    elif truth.ndim == 1 and (dev.logits.argmax(1) == truth).all():
        fitted = [1.0]
    else:
        fitted = [_best(confidence.nll, dev.logits, truth)]
    return Temperatures(np.array(fitted), dev.classes, dev.kind)


def calibration_errors(predictions: Predictions, *, votes: bool = False) -> dict[str, float]:
    """ece, classwise_ece, brier and nll (means over classes for sigmoids) against the labels, or with `votes` against
    the share of raters who chose each class: is a probability the share of people who would say so?"""
    predictions, truth = _known(predictions, votes)
    p, multi = predictions.probabilities, predictions.kind == "multi"
    sure, right = _pairs(predictions, truth)
    found = {
        "ece": confidence.ece(sure, right),
        "classwise_ece": confidence.classwise_ece(p, truth),
        "brier": confidence.brier(p, truth) / (len(predictions.classes) if multi else 1),
        "nll": (confidence.binary_nll if multi else confidence.nll)(predictions.logits, truth),
    }
    return {name: float(value) for name, value in found.items()}


def reliability_bins(confidences: np.ndarray, right: np.ndarray, bins: int = confidence.BINS) -> list[Bin]:
    """Bins of equal mass, those of `confidence.ece`: clips that are equally sure stay together; none is empty."""
    _, run, sizes = np.unique(confidences, return_inverse=True, return_counts=True)
    middles = 2 * np.cumsum(sizes) - sizes
    places = (bins * middles // (2 * len(confidences)))[run]
    return [
        Bin(
            confidence=float(confidences[places == place].mean()),
            share=float(right[places == place].mean()),
            clips=int((places == place).sum()),
        )
        for place in np.unique(places)
    ]


def describe_calibration(
    test: Sequence[Predictions], scaled: Sequence[Predictions], temperatures: Sequence[Temperatures]
) -> Calibration:
    """Errors of one table per seed before and after scaling, means over seeds; the bins hold the clips of all seeds."""
    values = np.stack([one.values for one in temperatures])
    single = test[0].kind == "single"
    has_votes = single and test[0].shares is not None and np.isfinite(test[0].shares).all(1).any()
    return Calibration(
        temperatures=(values[:, 0] if single else np.exp(np.log(values).mean(0))).tolist(),
        before=_means([calibration_errors(one) for one in test]),
        after=_means([calibration_errors(one) for one in scaled]),
        bins=_bins(scaled, votes=False),
        bins_before=_bins(test, votes=False),
        votes=_means([calibration_errors(one, votes=True) for one in scaled]) if has_votes else {},
        vote_bins=_bins(scaled, votes=True) if has_votes else [],
    )


def risk_coverage(
    tables: Sequence[Predictions],
    name: str,
    groups: Sequence[str] | None,
    bootstrap: int = 2000,
    seed: int = 0,
) -> Curve:
    """Share of errors among the most confident clips over the share that is kept, mean over one table per seed, with
    95 % intervals at each point. Tables hold the same labelled clips; `groups` are their speakers."""
    parts = [_pairs(one, one.label) for one in tables]

    def measure(weights: np.ndarray | None) -> np.ndarray:
        return np.mean([confidence.risks(sure, right, COVERAGE, weights) for sure, right in parts], axis=0)

    blocks = resample_weights(len(tables[0]), groups, bootstrap, seed)
    low, high = np.quantile(np.concatenate([measure(weights) for weights in blocks]), [0.025, 0.975], axis=0)
    y = measure(None)
    return Curve(name=name, x=COVERAGE.tolist(), y=y.tolist(), low=low.tolist(), high=high.tolist())


def _known(predictions: Predictions, votes: bool = False) -> tuple[Predictions, np.ndarray]:
    """The clips of which the truth is known, and what their probabilities should be: class indices `(n,)`, sets of
    classes or, with `votes` and where there is no label, shares `(n, K)`."""
    labelled = predictions.label is not None and (predictions.label >= 0).any()
    if predictions.kind == "single" and labelled and not votes:
        rows = predictions.label >= 0
    elif predictions.shares is not None:
        rows = np.isfinite(predictions.shares).all(1)
    else:
        rows = np.zeros(0, bool)
    if not rows.any() or predictions.logits is None:
        raise SettingsError("calibration needs logits of clips whose label or votes are known, and there are none")
    predictions = predictions.take(rows)
    if predictions.kind == "multi":
        return predictions, multilabel.above_chance(predictions.shares).astype(float)
    return predictions, predictions.label if labelled and not votes else predictions.shares


def _pairs(predictions: Predictions, truth: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Confidence and what it is to be, 0 to 1: of each clip's answer, or of each class where sets are said."""
    p = predictions.probabilities
    if predictions.kind == "multi":
        return p.ravel(), truth.ravel()
    answer = p.argmax(1)
    right = answer == truth if truth.ndim == 1 else truth[np.arange(len(answer)), answer]
    return p.max(1), right.astype(float)


def _best(loss, logits: np.ndarray, truth: np.ndarray) -> float:
    """The temperature of least loss; the loss is convex in 1 / temperature, so there is one minimum."""

    def at(log_temperature: float) -> float:
        return float(loss(logits / np.exp(log_temperature), truth))

    found = minimize_scalar(at, bounds=(np.log(LOWEST), np.log(HIGHEST)), method="bounded", options={"xatol": 1e-6})
    temperature = float(np.exp(found.x))
    return temperature if loss(logits / temperature, truth) < loss(logits, truth) else 1.0


def _bins(tables: Sequence[Predictions], votes: bool) -> list[Bin]:
    pairs = [_pairs(*_known(table, votes)) for table in tables]
    return reliability_bins(np.concatenate([sure for sure, _ in pairs]), np.concatenate([right for _, right in pairs]))


def _means(found: Sequence[dict[str, float]]) -> dict[str, float]:
    return {name: float(np.mean([one[name] for one in found])) for name in found[0]}
