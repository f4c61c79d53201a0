"""From what a manifest says of clips to what is learned and scored: by a named rule, computed anew, never stored."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from pydantic import Field, model_validator

from affekt.data.errors import DataError, SettingsError
from affekt.data.settings import Settings

Rule = Literal["label", "majority", "plurality", "soft", "all_inclusive"]
Condition = Literal["votes", "votes_voice", "votes_face"]


class LabelSettings(Settings):
    """Which classes and dimensions clips have.

    `label` takes the manifest's; the others start from the raters' votes: `majority` the class of more than half of
    them, `plurality` the one with most, `soft` their shares, `all_inclusive` every class with more than 1/K of them
    (Chou et al., EMO-SUPERB). `null` has no classes, dimensions alone.
    """

    rule: Rule | None = Field("label", description="label, majority, plurality, soft, all_inclusive; null: no classes")
    field: str = Field("label", description="manifest field of the rule `label`, as emotion")
    condition: Condition = Field("votes", description="what the raters met: both streams, the voice, the face")
    map: dict[str, str] = Field({}, description="names to names, dropping the others; empty: all as they are")
    classes: tuple[str, ...] = Field((), description="in this order; empty: those there are, sorted")
    smoothing: float = Field(
        0.0, ge=0, lt=1, description="s of vote shares p: (1 - s) p + s (1 - p) / (K - 1); EMO-SUPERB: 0.05"
    )
    dimensions: dict[str, tuple[float, float]] = Field(
        {}, description="manifest field -> smallest and largest rating, e.g. {valence: [1, 5]}"
    )

    @property
    def multi(self) -> bool:
        """Whether a clip may have several classes at once."""
        return self.rule == "all_inclusive"

    @property
    def told(self) -> str:
        """What clips are judged by, in words of the manifest."""
        if self.rule is None:
            return ", ".join(self.dimensions)
        return self.field if self.rule == "label" else self.condition

    @model_validator(mode="after")
    def _check(self) -> "LabelSettings":
        if self.rule is None and not self.dimensions:
            raise ValueError("rule null has no classes, so it needs dimensions, as {valence: [1, 5]}")
        if self.smoothing and self.rule not in ("soft", "all_inclusive"):
            raise ValueError(f"smoothing is of vote shares, which the rule {self.rule} does not learn")
        for name, (low, high) in self.dimensions.items():
            if not low < high:
                raise ValueError(f"dimensions: {name} ranges from {low} to {high}; the larger number comes second")
        if len(set(self.classes)) < len(self.classes) or len(self.classes) == 1:
            raise ValueError(f"classes {list(self.classes)}: two or more, all different")
        if self.map and self.classes and not set(self.classes) <= set(self.map.values()):
            missing = sorted(set(self.classes) - set(self.map.values()))
            raise ValueError(f"map leads to no {', '.join(missing)}, which classes lists")
        return self


@dataclass(frozen=True)
class Targets:
    """What is known of N clips. `target` float32 (N, K) is learned: one-hot, shares or multi-hot, NaN rows where there
    is none; `label` int64 (N,) and -1, `shares` float64 (N, K) and NaN rows, `ratings` float64 (N, D) and NaN are what
    predictions are compared with."""

    classes: list[str]
    dimensions: dict[str, tuple[float, float]]
    target: np.ndarray
    label: np.ndarray
    shares: np.ndarray
    ratings: np.ndarray

    @property
    def known(self) -> np.ndarray:
        """bool (N,): whether there is anything to learn or to compare with."""
        return np.isfinite(self.target).all(1) & (len(self.classes) > 0) | np.isfinite(self.ratings).any(1)


def make_targets(rows: Iterable[Mapping[str, Any]], settings: LabelSettings) -> Targets:
    """Targets of clips, given `id` and `meta` of each. Raises SettingsError where no clip has what the rule asks for,
    DataError for votes and ratings that are none."""
    rows = list(rows)
    names = [_label(row["meta"], settings) for row in rows]
    votes = [_votes(row, settings) for row in rows]
    classes = _classes(names, votes, settings)
    counts = np.array([[vote.get(name, 0.0) for name in classes] for vote in votes]).reshape(len(rows), len(classes))
    total = counts.sum(1, keepdims=True)
    shares = np.where(total > 0, counts / np.where(total > 0, total, 1), np.nan)
    if settings.rule == "label":
        label = np.array([classes.index(name) if name in classes else -1 for name in names], np.int64)
    else:
        label = top_class(counts, more_than_half=settings.rule == "majority")
    target = _learned(label, counts, shares, settings)
    ratings = np.array([[_rating(row, *item) for item in settings.dimensions.items()] for row in rows])
    ratings = ratings.reshape(len(rows), len(settings.dimensions))
    return Targets(classes, dict(settings.dimensions), target.astype(np.float32), label, shares, ratings)


def top_class(counts: np.ndarray, more_than_half: bool = False) -> np.ndarray:
    """The class (N,) with most votes (N, K), or with more than half of them; -1 where there is no single one."""
    if not counts.shape[1]:
        return np.full(len(counts), -1)
    most = counts.max(1, keepdims=True)
    single = ((counts == most).sum(1) == 1) & (most[:, 0] > 0)
    if more_than_half:
        single &= 2 * most[:, 0] > counts.sum(1)
    return np.where(single, counts.argmax(1), -1)


def all_inclusive(counts: np.ndarray) -> np.ndarray:
    """bool (N, K): every class with more than 1/K of a clip's votes (N, K), in whole numbers, so that none is lost to
    rounding; where all are equal, all of them."""
    many = counts * counts.shape[1] > counts.sum(1, keepdims=True)
    return many | (~many.any(1) & (counts.sum(1) > 0))[:, None]


def smoothed_shares(shares: np.ndarray, amount: float) -> np.ndarray:
    """(1 - a) p + a (1 - p) / (K - 1) of shares (N, K), as EMO-SUPERB's files have it with a = 0.05."""
    return (1 - amount) * shares + amount * (1 - shares) / (shares.shape[1] - 1)


def _learned(label: np.ndarray, counts: np.ndarray, shares: np.ndarray, settings: LabelSettings) -> np.ndarray:
    if settings.rule == "soft":
        return smoothed_shares(shares, settings.smoothing) if settings.smoothing else shares
    if settings.rule == "all_inclusive":
        hot = all_inclusive(counts).astype(float)
        hot = smoothed_shares(hot, settings.smoothing) if settings.smoothing else hot
        return np.where(counts.sum(1, keepdims=True) > 0, hot, np.nan)
    one_hot = np.eye(counts.shape[1])[label] if counts.shape[1] else np.zeros((len(label), 0))
    return np.where(label[:, None] >= 0, one_hot, np.nan)


def _classes(names: list[str], votes: list[dict[str, float]], settings: LabelSettings) -> list[str]:
    if settings.rule is None:
        return []
    voted = {name for vote in votes for name, count in vote.items() if count}
    found = (set(names) if settings.rule == "label" else voted) - {""}
    if settings.classes:
        absent = [name for name in settings.classes if name not in found]
        if len(absent) == len(settings.classes):
            there = ", ".join(sorted(found)) or "none"
            raise SettingsError(f"labels: no clip has one of the classes {', '.join(absent)}; those there are: {there}")
        return list(settings.classes)
    if len(found) < 2:
        what = f"field `{settings.field}`" if settings.rule == "label" else f"votes `{settings.condition}`"
        there = ", ".join(sorted(found)) or "none"
        raise SettingsError(f"labels: the {what} of these clips hold fewer than two classes ({there})")
    return sorted(found)


def _label(meta: Mapping[str, Any], settings: LabelSettings) -> str:
    return _mapped(str(meta.get(settings.field) or ""), settings) if settings.rule == "label" else ""


def _mapped(name: str, settings: LabelSettings) -> str:
    return settings.map.get(name, "") if settings.map else name


def _votes(row: Mapping[str, Any], settings: LabelSettings) -> dict[str, float]:
    """Counts by class, those of names that the map joins added up."""
    votes = row["meta"].get(settings.condition) or {}
    counts: dict[str, float] = {}
    try:
        for name, count in votes.items():
            if not 0 <= float(count) < float("inf"):
                raise ValueError(count)
            counts[_mapped(name, settings)] = counts.get(_mapped(name, settings), 0.0) + float(count)
    except (AttributeError, TypeError, ValueError):
        raise DataError(f"clip {row['id']}: {settings.condition} {votes!r} are no counts by class") from None
    counts.pop("", None)
    return counts


def _rating(row: Mapping[str, Any], name: str, span: tuple[float, float]) -> float:
    value = row["meta"].get(name)
    if value in (None, ""):
        return float("nan")
    try:
        value = float(value)
    except (TypeError, ValueError):
        raise DataError(f"clip {row['id']}: {name} is {value!r}, which is no number") from None
    if not span[0] <= value <= span[1]:
        raise DataError(f"clip {row['id']}: {name} is {value:g}, outside of labels.dimensions {list(span)}")
    return value
