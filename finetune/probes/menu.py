"""Choosing layer, pooling and penalty on development clips, and scoring the choice once on test clips."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from affekt.finetune.features import POOLINGS, FeatureTable, stream_of
from affekt.finetune.metrics.confusion import confusion_matrix, uar
from affekt.finetune.probes.linear import Path, rotate, standardise, strongest_first

Blocks = tuple[str, ...]


@dataclass(frozen=True)
class Task:
    """What is to be told apart, and which clips are for fitting, choosing and scoring (places in a feature table).

    `fitting` are all clips that are no test clips, and each of `folds` is a part of them to choose on while the others
    are fitted on. One fold is a development set; several are a cross-validation.
    """

    classes: list[str]
    labels: np.ndarray
    groups: list[str]
    fitting: np.ndarray
    folds: tuple[np.ndarray, ...]
    test: np.ndarray

    def having(self, has: np.ndarray) -> "Task":
        """The same task on the clips that `has` (N,) bool names, such as those with sound."""
        fitting, test, *folds = (clips[has[clips]] for clips in (self.fitting, self.test, *self.folds))
        return replace(self, fitting=fitting, test=test, folds=tuple(folds))

    @property
    def rounds(self) -> list[tuple[np.ndarray, np.ndarray]]:
        """(clips to fit on, clips to choose on) per fold."""
        return [(np.setdiff1d(self.fitting, fold), fold) for fold in self.folds]

    def counts(self) -> dict[str, int]:
        return {"fit": len(self.fitting), "choose": sum(map(len, self.folds)), "test": len(self.test)}


@dataclass(frozen=True)
class Trial:
    """A point of the menu: joined feature blocks, and the UAR on development clips for each penalty (strong first)."""

    blocks: Blocks
    penalties: tuple[float, ...]
    dev_uar: tuple[float, ...]

    @property
    def best(self) -> float:
        return max(self.dev_uar)

    @property
    def penalty(self) -> float:
        """The best penalty, on a tie the strongest."""
        return self.penalties[self.dev_uar.index(self.best)]


def try_all(table: FeatureTable, menu: Sequence[Blocks], task: Task, penalties: Sequence[float]) -> list[Trial]:
    """Fit and choose for every point of the menu and every penalty; predictions of all folds are scored together."""
    penalties = strongest_first(penalties)
    truth = task.labels[np.concatenate(task.folds)]
    trials = []
    for blocks in menu:
        predicted: list[list[np.ndarray]] = [[] for _ in penalties]
        for fit, choose in task.rounds:
            train, dev = coordinates(table, blocks, fit, choose)
            path = Path(train, task.labels[fit])
            for predictions, penalty in zip(predicted, penalties):
                predictions.append(path.fit(penalty).predict(dev))
        matrices = (confusion_matrix(truth, np.concatenate(p), len(task.classes)) for p in predicted)
        trials.append(Trial(blocks, tuple(penalties), tuple(float(uar(matrix)) for matrix in matrices)))
    return trials


def best_of(trials: Sequence[Trial]) -> Trial:
    """The trial with the best development score, on a tie the first of the menu."""
    return max(trials, key=lambda trial: trial.best)


def predict_test(table: FeatureTable, choice: Trial, task: Task) -> np.ndarray:
    """Fit the choice again on all clips for fitting and predict the test clips: class indices `(test,)`."""
    train, test = coordinates(table, choice.blocks, task.fitting, task.test)
    return Path(train, task.labels[task.fitting]).fit(choice.penalty).predict(test)


def search_stream(table: FeatureTable, stream: str, task: Task, penalties: Sequence[float]) -> list[Trial]:
    """Trials of audio or of video: every layer under every pooling."""
    return try_all(table, [(name,) for name in table.blocks if stream_of(name) == stream], task, penalties)


def search_both(table: FeatureTable, joined: Blocks, task: Task, penalties: Sequence[float]) -> list[Trial]:
    """Trials of both streams: `joined` (the best of audio beside the best of video), the fused streams under every
    pooling, and `joined` beside the best of those."""
    trials = try_all(table, [joined], task, penalties)
    fused = [(f"fusion_audio/{pooling}", f"fusion_video/{pooling}") for pooling in POOLINGS]
    fused = [blocks for blocks in fused if set(blocks) <= set(table.blocks)]
    if fused:
        fused_trials = try_all(table, fused, task, penalties)
        trials += fused_trials + try_all(table, [joined + best_of(fused_trials).blocks], task, penalties)
    return trials


def plain_blocks(table: FeatureTable, stream: str) -> Blocks:
    """The fixed row beside the menu: mean pooling of the last layer, for both streams the two joined."""
    blocks: Blocks = ()
    for part in ("audio", "video") if stream == "both" else (stream,):
        layers = [name for name in table.blocks if stream_of(name) == part and name.endswith("/mean")]
        blocks += (max(layers, key=lambda name: int(name.split("_")[1].split("/")[0])),)
    return blocks


def coordinates(
    table: FeatureTable, blocks: Blocks, fitting: np.ndarray, other: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """The joined blocks of the clips to fit on and of other clips, standardised and rotated for the fit."""
    return rotate(*standardise(*([table.take(block, clips) for block in blocks] for clips in (fitting, other))))
