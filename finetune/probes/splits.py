"""Which clips a probe fits on, chooses on and scores."""

import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np
from sklearn.model_selection import StratifiedGroupKFold

from affekt.data.errors import DataError, SettingsError
from affekt.data.shards import ShardIndex
from affekt.data.split import labelled_clips
from affekt.finetune.probes.task import Task
from affekt.finetune.splits import Selector, split_clips


def make_task(
    index: ShardIndex,
    *,
    label: str,
    group: str,
    test: Selector,
    dev: Selector,
    train: Selector,
    seed: int,
    dimensions: Sequence[str] = (),
) -> tuple[np.ndarray, Task, dict[str, int]]:
    """Positions in the index of the clips in play, the task over them, and the counts of clips left out by cause.

    Raises SettingsError where a part is empty, a group stands on two sides, or a class cannot be learnt, DataError for
    a rating that is no number.
    """
    labelled = labelled_clips(index, dimensions[0] if dimensions else label, group)
    for other in dimensions[1:]:
        also = set(labelled_clips(index, other, group))
        labelled = [p for p in labelled if p in also]
    parts = {"test": test, "dev": None if "folds" in dev else dev, "train": train}
    train_clips, dev_clips, test_clips, rest = split_clips(index, labelled, **parts, group=group, seed=seed)
    positions = np.array(sorted(train_clips + dev_clips + test_clips))
    rows = [index.samples.row(p) for p in positions]
    groups = [row["id"] if group == "id" else str(row["meta"][group]) for row in rows]
    classes, labels, ratings = [], np.zeros(len(rows), int), None
    if dimensions:
        ratings = np.array([[_rating(row, name) for name in dimensions] for row in rows])
    else:
        names = [str(row["meta"][label]) for row in rows]
        classes = sorted(set(names))
        labels = np.array([classes.index(name) for name in names])
    places = [np.searchsorted(positions, sorted(clips)) for clips in (train_clips + dev_clips, dev_clips, test_clips)]
    fitting, chosen, scored = places
    folds = group_folds(labels, groups, fitting, dev, seed) if "folds" in dev else (chosen,)
    task = Task(classes, labels, groups, fitting, folds, scored, list(dimensions), ratings)
    trouble = unlearnable(task)
    if trouble:
        raise SettingsError(trouble)
    left_out = {"without_label": len(index.samples) - len(labelled), "not_selected": len(rest)}
    return positions, task, left_out


def unlearnable(task: Task) -> str | None:
    """Why no simple model can be fitted, chosen and scored on these clips; None when one can."""
    for clips, what in ((task.fitting, "fit on"), (np.concatenate(task.folds), "choose on"), (task.test, "score")):
        if not len(clips):
            return f"no clips to {what}"
    for fit, choose in task.rounds:
        if not len(fit):
            return "no clips to fit on beside those to choose on"
        if task.dimensions:
            continue
        known = np.unique(task.labels[fit])
        if len(known) < 2:
            names = ", ".join(task.classes[c] for c in known) or "none"
            return f"the clips to fit on have one class alone ({names}); a probe needs two"
        missing = np.setdiff1d(task.labels[choose], known)
        if len(missing):
            return f"development clips have classes that no training clip has: {_names(task, missing)}"
    missing = np.setdiff1d(task.labels[task.test], task.labels[task.fitting])
    return f"test clips have classes that no training clip has: {_names(task, missing)}" if len(missing) else None


def group_folds(
    labels: np.ndarray, groups: list[str], fitting: np.ndarray, dev: Selector, seed: int
) -> tuple[np.ndarray, ...]:
    """The folds of `{folds: k}`: whole groups, classes as even as that allows."""
    names = [groups[p] for p in fitting]
    count, number = dev["folds"], len(set(names))
    if set(dev) != {"folds"} or not isinstance(count, int) or not 2 <= count <= number:
        raise SettingsError(f"dev: {dev}: folds stand alone and are a whole number from 2 to the {number} groups left")
    splitter = StratifiedGroupKFold(count, shuffle=True, random_state=seed)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The least populated class")  # as even as can be is what was asked for
        try:
            return tuple(fitting[held] for _, held in splitter.split(fitting, labels[fitting], names))
        except ValueError:
            most = max(np.bincount(labels[fitting]))
            raise SettingsError(
                f"dev: {dev}: no class has more than {most} clips to choose on; use fewer folds or more clips"
            ) from None


def _names(task: Task, labels: np.ndarray) -> str:
    return ", ".join(task.classes[c] for c in labels)


def _rating(row: dict[str, Any], name: str) -> float:
    try:
        value = float(row["meta"][name])
    except (TypeError, ValueError):
        value = float("nan")
    if not np.isfinite(value):
        raise DataError(f"clip {row['id']}: {name} is {row['meta'][name]!r}, which is no number")
    return value
