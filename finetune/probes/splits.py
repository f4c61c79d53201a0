"""Which clips a probe fits on, chooses on and scores."""

import warnings

import numpy as np
from sklearn.model_selection import StratifiedGroupKFold

from affekt.data.errors import SettingsError
from affekt.data.shards import ShardIndex
from affekt.data.split import labelled_clips
from affekt.finetune.probes.menu import Task
from affekt.finetune.splits import Selector, split_clips


def make_task(
    index: ShardIndex, *, label: str, group: str, test: Selector, dev: Selector, train: Selector, seed: int
) -> tuple[np.ndarray, Task, dict[str, int]]:
    """Positions in the index of the clips in play, the task over them, and the counts of clips left out by cause.

    Raises SettingsError where a part is empty, a group stands on two sides, or a class cannot be learnt.
    """
    labelled = labelled_clips(index, label, group)
    parts = {"test": test, "dev": None if "folds" in dev else dev, "train": train}
    train_clips, dev_clips, test_clips, rest = split_clips(index, labelled, **parts, group=group, seed=seed)
    positions = np.array(sorted(train_clips + dev_clips + test_clips))
    names = [str(index.samples[p].meta[label]) for p in positions]
    groups = [index.samples[p].id if group == "id" else str(index.samples[p].meta[group]) for p in positions]
    classes = sorted(set(names))
    labels = np.array([classes.index(name) for name in names])
    places = [np.searchsorted(positions, sorted(clips)) for clips in (train_clips + dev_clips, dev_clips, test_clips)]
    fitting, chosen, scored = places
    folds = group_folds(labels, groups, fitting, dev, seed) if "folds" in dev else (chosen,)
    task = Task(classes, labels, groups, fitting, folds, scored)
    trouble = unlearnable(task)
    if trouble:
        raise SettingsError(trouble)
    left_out = {"without_label": len(index.samples) - len(labelled), "not_selected": len(rest)}
    return positions, task, left_out


def unlearnable(task: Task) -> str | None:
    """Why no linear model can be fitted, chosen and scored on these clips; None when one can."""
    for clips, what in ((task.fitting, "fit on"), (np.concatenate(task.folds), "choose on"), (task.test, "score")):
        if not len(clips):
            return f"no clips to {what}"
    for fit, choose in task.rounds:
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
