"""What takes part in an evaluation: each is given the parts of one fold and says something of its test clips."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np

from affekt.data.errors import SettingsError
from affekt.data.shards import ShardIndex
from affekt.finetune.folds import Fold
from affekt.finetune.metrics.confusion import confusion_matrix, uar
from affekt.finetune.metrics.dimensions import ccc
from affekt.finetune.predictions import Predictions
from affekt.finetune.probes.classic import COSTS, STREAM, TITLES, LinearModel, descriptors, needs
from affekt.finetune.protocols import Protocol as Rules

Selected = Literal["dev", "test"]
Report = Callable[[int, int], None]
META = ("speaker", "session", "sex", "age", "domain")


@dataclass(frozen=True)
class Part:
    """One fold as a contender meets it. Everything is chosen on `choose`: development clips, or, where `selected` is
    `test`, the test clips themselves, as is often published; then the others are all trained on."""

    index: ShardIndex
    rules: Rules
    classes: list[str]
    fold: Fold
    selected: Selected = "dev"

    @property
    def train(self) -> list[int]:
        return self.fold.train if self.selected == "dev" else self.fitting

    @property
    def choose(self) -> list[int]:
        return self.fold.dev if self.selected == "dev" else self.fold.test

    @property
    def fitting(self) -> list[int]:
        """All but the test clips: what the choice may be fitted on again."""
        return sorted(self.fold.train + self.fold.dev)

    def truth(self, positions: Sequence[int]) -> np.ndarray:
        """Class indices (N,), or ratings (N, D)."""
        metas = [self.index.samples.row(p)["meta"] for p in positions]
        if self.rules.dimensions:
            return np.array([[float(meta[name]) for name in self.rules.dimensions] for meta in metas])
        return np.array([self.classes.index(self.rules.class_of(meta[self.rules.label])) for meta in metas])

    def table(self, positions: Sequence[int], said: np.ndarray, part: Selected) -> Predictions:
        """What was said, logits (N, K) or values (N, D), beside what is known of the clips."""
        rows = [self.index.samples.row(p) for p in positions]
        meta = {name: [str(row["meta"].get(name, "")) for row in rows] for name in META}
        meta["fold"] = [self.fold.name] * len(rows)
        ids, truth = [row["id"] for row in rows], self.truth(positions)
        about = {"fold": self.fold.name, "part": part, "selected": self.selected}
        if self.rules.dimensions:
            dimensions = list(self.rules.dimensions)
            return Predictions(ids, dimensions=dimensions, values=said, ratings=truth, meta=meta, about=about)
        return Predictions(ids, self.classes, logits=said, label=truth, meta=meta, about=about)


@dataclass
class Outcome:
    """What one contender says of one fold, what was chosen for it, and clips that it could not judge, with the cause.
    `dev` is there where the choice was made on development clips."""

    test: Predictions
    dev: Predictions | None = None
    chosen: dict[str, Any] = field(default_factory=dict)
    unread: dict[str, str] = field(default_factory=dict)


class Contender(Protocol):
    """Anything that can be evaluated. `name` is that of a file and a row; `kind` and `streams` as in a schema.System;
    `identity` is what its predictions depend on beside the clips and the seed, `pretraining` the list of what its
    weights have seen before (`affekt.pretrain.seen`), None for weights that are fresh, or where there are none. `check`
    raises SettingsError for settings that speak of other classes than the protocol, which would have no effect."""

    name: str
    title: str
    kind: str
    streams: Literal["audio", "video", "both"]
    seeds: tuple[int, ...]
    transductive: bool

    def identity(self) -> dict[str, Any]: ...

    def pretraining(self) -> dict[str, Any] | None: ...

    def check(self, rules: Rules, index: ShardIndex) -> None: ...

    def judge(self, part: Part, seed: int, folder: Path, progress: Report | None = None) -> Outcome:
        """`folder` is for what it keeps to go on after a kill; the same arguments give the same answer."""


class Simple:
    """A contender without weights, and without settings that a protocol could contradict."""

    def pretraining(self) -> None:
        return None

    def check(self, rules: Rules, index: ShardIndex) -> None:
        return None


@dataclass(frozen=True)
class Majority(Simple):
    """What the training labels alone say: the logarithm of each class's share, or the mean of the ratings."""

    streams: Literal["audio", "video", "both"] = "both"
    name: str = "majority"
    title: str = "Majority class"
    kind: str = "majority"
    seeds: tuple[int, ...] = (0,)
    transductive: bool = False

    def identity(self) -> dict[str, Any]:
        return {"majority": 1}

    def judge(self, part: Part, seed: int, folder: Path, progress: Report | None = None) -> Outcome:
        def prior(clips: Sequence[int]) -> np.ndarray:
            truth = part.truth(clips)
            if truth.ndim == 2:
                return truth.mean(0)
            return np.log((np.bincount(truth, minlength=len(part.classes)) + 1) / (len(truth) + len(part.classes)))

        def said(clips: Sequence[int], fitted: Sequence[int], side: Selected) -> Predictions:
            return part.table(clips, np.tile(prior(fitted), (len(clips), 1)), side)

        test = said(part.fold.test, part.fitting, "test")
        return Outcome(test, said(part.fold.dev, part.fold.train, "dev") if part.selected == "dev" else None)


@dataclass
class Classic(Simple):
    """Fixed descriptors and a linear model, see `affekt.finetune.probes.classic`."""

    descriptors: str
    cache: Path
    costs: tuple[float, ...] = COSTS
    kind: str = "statistics"
    seeds: tuple[int, ...] = (0,)
    transductive: bool = False

    def __post_init__(self) -> None:
        needs(self.descriptors)
        self.name, self.title = f"{self.descriptors}_svm", TITLES[self.descriptors]
        self.streams = STREAM[self.descriptors]

    def identity(self) -> dict[str, Any]:
        return {"classic": 1, "descriptors": needs(self.descriptors), "costs": self.costs}

    def judge(self, part: Part, seed: int, folder: Path, progress: Report | None = None) -> Outcome:
        clips = sorted(part.fold.train + part.fold.dev + part.fold.test)
        samples = part.index.samples
        has = samples.has_audio if self.streams == "audio" else samples.has_video
        known = [p for p in clips if has[p]]
        features = descriptors(self.descriptors, part.index, known, self.cache, progress)
        rows = {p: features[i] for i, p in enumerate(known)}

        def of(positions: Sequence[int]) -> tuple[np.ndarray, list[int]]:
            kept = [p for p in positions if p in rows]
            if not kept:
                raise SettingsError(f"{self.title}: no {self.streams} in a part of fold {part.fold.name}; leave it out")
            return np.stack([rows[p] for p in kept]), kept

        (train, trained), (dev, chosen), (test, tested) = of(part.train), of(part.choose), of(part.fold.test)
        fitting, fitted = of(part.fitting)
        model, truth = LinearModel(self.costs), part.truth(chosen)
        cost, best = model.choose(train, part.truth(trained), dev, lambda said: quick_score(truth, said))
        [on_test] = model.path(fitting, part.truth(fitted), test, [cost], len(part.classes))
        outcome = Outcome(part.table(tested, on_test, "test"), chosen={"cost": cost, "score": best})
        if part.selected == "dev":
            [on_dev] = model.path(train, part.truth(trained), dev, [cost], len(part.classes))
            outcome.dev = part.table(chosen, on_dev, "dev")
        outcome.unread = {samples[p].id: f"no {self.streams}" for p in part.fold.test if p not in rows}
        return outcome


def quick_score(truth: np.ndarray, said: np.ndarray) -> float:
    """What baselines choose by: UAR of class indices (N,), or the mean CCC of ratings (N, D)."""
    if truth.ndim == 2:
        return float(np.mean([ccc(truth[:, d], said[:, d]) for d in range(truth.shape[1])]))
    classes = max(said.shape[1], int(truth.max()) + 1)
    return float(uar(confusion_matrix(truth, said.argmax(1), classes)))
