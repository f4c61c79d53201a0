"""What is to be read from features: a task over some clips, and the score that choices are made by."""

from dataclasses import dataclass, field, replace

import numpy as np

from affekt.finetune.metrics.confusion import confusion_matrix, uar
from affekt.finetune.metrics.dimensions import ccc
from affekt.finetune.probes.targets import Targets


@dataclass(frozen=True)
class Task:
    """What is to be told apart, and which clips are for fitting, choosing and scoring (places in a feature table).

    `fitting` are all clips that are no test clips, and each of `folds` is a part of them to choose on while the others
    are fitted on. One fold is a development set; several are a cross-validation. With `dimensions` it is `ratings`
    (N, D) that are to be told, and there are no classes.
    """

    classes: list[str]
    labels: np.ndarray
    groups: list[str]
    fitting: np.ndarray
    folds: tuple[np.ndarray, ...]
    test: np.ndarray
    dimensions: list[str] = field(default_factory=list)
    ratings: np.ndarray | None = None

    def having(self, has: np.ndarray) -> "Task":
        """The same task on the clips that `has` (N,) bool names, such as those with sound."""
        fitting, test, *folds = (clips[has[clips]] for clips in (self.fitting, self.test, *self.folds))
        return replace(self, fitting=fitting, test=test, folds=tuple(folds))

    @property
    def rounds(self) -> list[tuple[np.ndarray, np.ndarray]]:
        """(clips to fit on, clips to choose on) per fold."""
        return [(np.setdiff1d(self.fitting, fold), fold) for fold in self.folds]

    @property
    def score_name(self) -> str:
        """What is chosen by: `uar`, or `ccc`, its mean over the dimensions."""
        return "ccc" if self.dimensions else "uar"

    def targets(self, clips: np.ndarray) -> Targets:
        """What is known of these clips."""
        if self.dimensions:
            return Targets(self.ratings[clips], False)
        return Targets.of_labels(self.labels[clips], len(self.classes))

    def score(self, clips: np.ndarray, answers: np.ndarray) -> float:
        """UAR of the largest of `answers` (clips, K), or the mean CCC of the dimensions."""
        if self.dimensions:
            return float(np.mean([ccc(self.ratings[clips, d], answers[:, d]) for d in range(len(self.dimensions))]))
        return float(uar(confusion_matrix(self.labels[clips], answers.argmax(1), len(self.classes))))

    def counts(self) -> dict[str, int]:
        return {"fit": len(self.fitting), "choose": sum(map(len, self.folds)), "test": len(self.test)}
