"""Every head on every feature table: the rows of the results, and all that was tried."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
from threadpoolctl import threadpool_limits
from torch import get_num_threads, set_num_threads

from affekt.data.machine import run_in_processes
from affekt.finetune.features import FeatureTable
from affekt.finetune.probes.heads import Head, heads_of
from affekt.finetune.probes.menu import (
    Trial,
    answer_of,
    best_of,
    by_id,
    coordinates,
    fit_choice,
    plain_blocks,
    search_both,
    search_stream,
    try_all,
)
from affekt.finetune.probes.settings import ProbeSettings
from affekt.finetune.probes.task import Task

Kind = Literal["chosen", "plain"]


@dataclass
class Answered:
    """One choice and what it says: `test` (seeds of the head, test clips, K), `dev` (clips of all folds, K) by models
    that had not seen them; `weights` over the layers of each stream, where the head has any."""

    choice: Trial
    test: np.ndarray
    dev: np.ndarray
    weights: list[np.ndarray] = field(default_factory=list)


@dataclass
class Row:
    """A cell of the table: one kind of features on one stream under one head, with the answers of each seed."""

    features: str
    stream: str
    kind: Kind
    head: str
    task: Task
    answered: list[Answered] = field(default_factory=list)

    @property
    def test(self) -> np.ndarray:
        """Answers (seeds, test clips, K), of all encoders and all seeds of the head."""
        return np.concatenate([answered.test for answered in self.answered])


def search_tables(
    tables: dict[str, list[FeatureTable]], tasks: dict[str, Task], settings: ProbeSettings
) -> tuple[list[Row], list[dict[str, Any]]]:
    """Search every feature table, side by side with `settings.workers` above 1: the rows, and all trials.

    The tables of further seeds of the same features join the rows that are there.
    """
    named = [(name, seed, table) for name, versions_of in tables.items() for seed, table in enumerate(versions_of)]
    jobs = [(table, tasks, settings, name != "statistics") for name, _, table in named]
    if settings.workers > 1:
        found = dict(run_in_processes(search_table, jobs, settings.workers, one_thread))
    else:
        with one_thread():
            found = {number: search_table(*job) for number, job in enumerate(jobs)}
    rows: dict[tuple[str, str, str, str], Row] = {}
    trials = []
    for number, (name, seed, _) in enumerate(named):
        for stream, kind, answered in found[number].rows:
            head = answered.choice.head
            row = rows.setdefault((name, stream, kind, head), Row(name, stream, kind, head, tasks[stream]))
            row.answered.append(answered)
        trials += [describe_trial(name, seed, stream, trial) for stream, trial in found[number].tried]
    return list(rows.values()), trials


@dataclass
class Found:
    """What the search of one table gives: (stream, kind, answers), and every (stream, trial)."""

    rows: list[tuple[str, Kind, Answered]] = field(default_factory=list)
    tried: list[tuple[str, Trial]] = field(default_factory=list)


def search_table(table: FeatureTable, tasks: dict[str, Task], settings: ProbeSettings, plain: bool) -> Found:
    """Choose from every stream's menu in one feature table and answer for the test clips; `plain` adds the fixed row
    of the first head that reads pooled features."""
    found, heads = Found(), heads_of(settings.heads, settings.penalties)
    best: dict[tuple[str, str], Trial] = {}
    for stream, task in tasks.items():
        if stream != "both":
            trials = search_stream(table, stream, task, heads, settings.seed)
        elif {"audio", "video"} <= set(tasks):
            trials = search_both(table, task, heads, best, settings.seed)
        else:
            continue  # stream_tasks gives `both` only to clips that have the two
        found.tried += [(stream, trial) for trial in trials]
        for head in heads:
            of_head = [trial for trial in trials if trial.head == head.name]
            if of_head:  # plain statistics have no tokens and no layers
                best[stream, head.name] = best_of(of_head)
                if stream in settings.streams:
                    found.rows.append((stream, "chosen", answer(table, best[stream, head.name], task, head, settings)))
        first = next((head for head in heads if head.reads == "pooled"), None)
        if plain and first and stream in settings.streams:
            (fixed,) = try_all(table, [plain_blocks(table, stream)], task, [first], settings.seed)
            found.rows.append((stream, "plain", answer(table, fixed, task, first, settings)))
    return found


def answer(table: FeatureTable, choice: Trial, task: Task, head: Head, settings: ProbeSettings) -> Answered:
    """Ask the choice about the test clips, fitted on all others, and about the clips of each fold, fitted without."""
    seeds = settings.head_seeds if head.seeded else settings.head_seeds[:1]
    test = [fit_choice(table, choice, task, head, task.test, seed) for seed in seeds]
    dev = []
    for fit, choose in task.rounds:
        fit = by_id(table, fit)
        train, held = coordinates(table, choice.blocks, fit, choose, head.reads)
        (said,) = head.answer(train, task.targets(fit), held, (choice.option,), settings.seed)
        dev.append(answer_of(said))
    return Answered(choice, np.stack([said for said, _ in test]), np.concatenate(dev), test[0][1])


def describe_trial(features: str, seed: int, stream: str, trial: Trial) -> dict[str, Any]:
    """A trial for results.json."""
    values = {"head": trial.head, "blocks": trial.blocks, "options": trial.options, "dev_scores": trial.dev_scores}
    return {"features": features, "seed": seed, "stream": stream, **values}


def table_of_choices(rows: Iterable[Row]) -> list[list[str]]:
    """Every choice that was made, as text: features, stream, head, blocks, option, development score."""
    return [
        [row.features, row.stream, row.head, " + ".join(a.choice.blocks), str(a.choice.option), f"{a.choice.best:.4f}"]
        for row in rows
        for a in row.answered
    ]


class one_thread(threadpool_limits):
    """The matrices of a fit are so small that BLAS and torch lose more by sharing them out than they gain."""

    def __init__(self) -> None:
        super().__init__(1)
        self.threads = get_num_threads()
        set_num_threads(1)

    def __exit__(self, *exception: Any) -> None:
        super().__exit__(*exception)
        set_num_threads(self.threads)
