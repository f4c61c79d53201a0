"""What each layer knows: a ridge's score over depth, beside a control task and what else can be read there.

All of it is chosen and scored on development clips, under mean pooling: test clips play no part.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from affekt.data.errors import SettingsError
from affekt.data.shards import ShardIndex
from affekt.finetune.features import FeatureTable
from affekt.finetune.probes.heads import heads_of
from affekt.finetune.probes.menu import depth_of, layer_means, try_all
from affekt.finetune.probes.settings import ProbeSettings
from affekt.finetune.probes.splits import unlearnable
from affekt.finetune.probes.task import Task
from affekt.finetune.schema import Curve, Layers, Table

USUAL = ("speaker", "sex", "sentence")
MAIN, CONTROL, SELECTIVITY = "main", "control", "selectivity"
EVERY = 3  # of a speaker's clips one in this many is held out where the split goes through speakers


@dataclass
class Depth:
    """The tasks to be read from each layer by name, `main` first, and why others were left out."""

    tasks: dict[str, Task]
    left_out: dict[str, str] = field(default_factory=dict)


def depth_tasks(index: ShardIndex, positions: np.ndarray, task: Task, settings: ProbeSettings) -> Depth:
    """The task itself, a control task and nuisance tasks, all on the clips for fitting alone.

    The control task gives every speaker one label drawn at random (Hewitt and Liang 2019, whose word types are speakers
    here): what a probe scores on held-out clips of these speakers it owes to knowing them again. So does the nuisance
    task `speaker`; both are split within speakers. Other fields are split as the task is.
    """
    found = Depth({MAIN: task})
    rows = [index.samples.row(p) for p in positions]
    ids = [row["id"] for row in rows]
    speakers = [str(row["meta"].get("speaker") or "") for row in rows]
    if settings.control and not task.dimensions:
        names = sorted({speakers[clip] for clip in task.fitting} - {""})
        drawn = np.random.default_rng(settings.seed).permutation(len(names)) % len(task.classes)
        given = dict(zip(names, (task.classes[c] for c in drawn)))
        _add(found, CONTROL, within_speakers([given.get(s, "") for s in speakers], speakers, ids, task))
    for name in USUAL if settings.nuisance is None else settings.nuisance:
        values = [str(row["meta"].get(name) or "") for row in rows]
        if not any(values) and settings.nuisance is not None:
            raise SettingsError(f"nuisance: no clip in play has the field `{name}`")
        if not any(values):
            found.left_out[name] = "no clip has it"
        elif name == "speaker":
            _add(found, name, within_speakers(values, values, ids, task))
        else:
            _add(found, name, relabelled(task, values).having(np.array([bool(value) for value in values])))
    return found


def within_speakers(values: list[str], speakers: list[str], ids: list[str], task: Task) -> Task:
    """A task on the clips for fitting that holds out every third clip of each speaker, in the order of their ids."""
    turn: dict[str, int] = {}
    held, kept = [], []
    for clip in sorted((c for c in task.fitting if values[c]), key=lambda c: ids[c]):
        turn[speakers[clip]] = turn.get(speakers[clip], -1) + 1
        kept.append(clip)
        if turn[speakers[clip]] % EVERY == EVERY - 1:
            held.append(clip)
    fitting, fold = (np.array(sorted(clips), int) for clips in (kept, held))
    other = relabelled(task, values)
    return Task(other.classes, other.labels, ids, fitting, (fold,), fold)


def relabelled(task: Task, values: list[str]) -> Task:
    """The same clips with other classes; those without a value have index 0 and are to be left out."""
    classes = sorted(set(values) - {""})
    labels = np.array([classes.index(value) if value else 0 for value in values])
    return Task(classes, labels, task.groups, task.fitting, task.folds, np.concatenate(task.folds))


def layer_scores(table: FeatureTable, stream: str, tasks: Mapping[str, Task], penalties: Sequence[float]) -> dict:
    """Development scores `{task: [of each layer]}` of a ridge on the mean of each layer, at its best penalty."""
    heads = heads_of(["ridge"], penalties)
    menu = [(name,) for name in layer_means(table, stream)]
    return {name: [trial.best for trial in try_all(table, menu, task, heads)] for name, task in tasks.items()}


def layers_of(
    features: str, stream: str, tables: Sequence[FeatureTable], depth: Depth, penalties: Sequence[float]
) -> Layers | None:
    """Curves of one kind of features over the layers of one stream, means over `tables` and their extent; None where
    no clip has the stream. Tasks that cannot be learnt from the clips with this stream are left out."""
    has = np.logical_and.reduce([table.has[stream] for table in tables])
    tasks = {name: task.having(has) for name, task in depth.tasks.items()}
    tasks = {name: task for name, task in tasks.items() if unlearnable(task) is None}
    if MAIN not in tasks:
        return None
    found = [layer_scores(table, stream, tasks, penalties) for table in tables]
    scores = {name: np.array([of_table[name] for of_table in found]) for name in tasks}  # (tables, layers)
    if CONTROL in scores:
        scores[SELECTIVITY] = scores[MAIN] - scores[CONTROL]
    x = [depth_of(name) for name in layer_means(tables[0], stream)]
    curves = []
    for name, y in scores.items():
        extent = {"low": y.min(0).tolist(), "high": y.max(0).tolist()} if len(y) > 1 else {}
        curves.append(Curve(name=name, x=x, y=y.mean(0).tolist(), **extent))
    best = layer_means(tables[0], stream)[int(scores[MAIN].mean(0).argmax())]
    name = f"{features}_{stream}"
    return Layers(system=name, stream=stream, score=tasks[MAIN].score_name, curves=curves, best=best)


def nuisance_table(layers: Sequence[Layers], depth: Depth, title: str) -> Table:
    """Beside the score at the best layer of each stream what else is read there, with the ratio of the two."""
    rows = []
    for part in layers:
        curves = {curve.name: curve for curve in part.curves}
        at = int(np.argmax(curves[MAIN].y))
        main = curves[MAIN].y[at]
        for name, curve in curves.items():
            if name in (MAIN, SELECTIVITY):
                continue
            task = depth.tasks[name]
            classes = len(np.unique(task.labels[task.test]))  # those that are asked about: a UAR is over no others
            figures = [f"{100 * main:.1f}", f"{100 * curve.y[at]:.1f}", f"{100 / classes:.1f}"]
            ratio = f"{main / curve.y[at]:.2f}" if curve.y[at] > 0 else ""
            rows.append([part.system, part.best.split("/")[0], name, *figures, ratio])
    head = ["System", "Layer", "Also read there", f"{title}, %", "That, % UAR", "Chance, %", "Ratio"]
    note = "Development clips, mean pooling, ridge. Control: a random label per speaker, split within speakers."
    left = "; ".join(f"{name}: {why}" for name, why in depth.left_out.items())
    return Table(title="What else the layers know", head=head, rows=rows, note=f"{note} {left}".strip())


def _add(found: Depth, name: str, task: Task) -> None:
    trouble = unlearnable(task)
    if trouble:
        found.left_out[name] = trouble
    else:
        found.tasks[name] = task
