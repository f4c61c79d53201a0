"""All folds and seeds of a protocol for all contenders: predictions kept as they are made, scored once at the end.

Every finished fold is a file that is there whole or not at all, with a digest of what it depends on. A killed
evaluation goes on behind the last of them; a changed setting makes what depended on it again.
"""

import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import Field

from affekt.data.errors import DataError, SettingsError
from affekt.data.files import write_text
from affekt.data.manifest import safe_id
from affekt.data.settings import Settings
from affekt.data.shards import ShardIndex
from affekt.data.split import where
from affekt.finetune.contenders import Contender, Outcome, Part, Selected
from affekt.finetune.folds import Fixed, Fold
from affekt.finetune.predictions import Predictions, pooled
from affekt.finetune.protocols import Protocol, cross_classes, find_protocol
from affekt.finetune.splits import Selector, check_unseen

SETTINGS = "evaluate.yaml"
Progress = Callable[[str, int, int], None]


class EvaluateSettings(Settings):
    """What is measured, on which clips, and where it is kept."""

    protocol: str = Field(description="cremad6, ravdess20 ..., or kfold:speaker:5, loso:speaker, cross:FIELD:A:B")
    shards: str | Path = Field(description="folder written by `affekt prepare`, or its url")
    output: Path = Field(description="folder for results.json, results.csv, report.html and the predictions")
    include: Selector = Field({}, description="clips by manifest fields, as {data_set: [RAVDESS]}; empty: all")
    folds: tuple[str, ...] = Field((), description="folds to run; empty: all")
    selected: Selected = Field("dev", description="what epochs and penalties are chosen on; test: as often published")
    bootstrap: int = Field(2000, ge=100, description="resamples of the 95 % intervals")
    seed: int = Field(0, ge=0, lt=2**31)
    title: str = ""


@dataclass(frozen=True)
class Plan:
    """What an evaluation will do: the rules, the clips in play, the folds to run, and what was left out."""

    index: ShardIndex
    rules: Protocol
    classes: list[str]
    positions: list[int]
    folds: list[Fold]
    left_out: dict[str, int]
    notes: list[str]


@dataclass
class Judged:
    """The predictions of one contender: by seed those of each fold, with the files that hold them. `overlap` counts
    what its pre-training shares with the test clips."""

    contender: Contender
    tests: list[list[Predictions]]
    devs: list[list[Predictions]]
    files: list[str]
    unread: dict[str, str]
    overlap: dict[str, Any]


def plan_evaluation(settings: EvaluateSettings) -> Plan:
    """Deal the folds and check them, before anything is computed. Raises SettingsError as the protocol does, and for a
    fold that there is not."""
    rules = find_protocol(settings.protocol)
    index = ShardIndex.open(settings.shards)
    if settings.protocol.startswith("cross:"):
        rules = cross_classes(rules, index)
    among = where(index, settings.include) if settings.include else None
    positions, left_out = rules.clips_of(index, among)
    classes = [] if rules.dimensions else rules.labels(index, positions)[0]
    rules = replace(
        rules, classes=tuple(classes)
    )  # where they were those there are, votes may use other words for them
    every = rules.folds(index, positions)
    unknown = sorted(set(settings.folds) - {fold.name for fold in every})
    if unknown:
        raise SettingsError(f"folds: no fold {', '.join(unknown)}; there are {', '.join(f.name for f in every)}")
    folds = [fold for fold in every if not settings.folds or fold.name in settings.folds]
    if isinstance(rules.split, Fixed):
        used = sum(len(part) for part in (every[0].train, every[0].dev, every[0].test))
        left_out |= {"in no part of the split": len(positions) - used} if used < len(positions) else {}
    notes = [*rules.notes(every), *unlearned(index, rules, folds)]
    if len(folds) < len(every):
        notes.append(f"only {len(folds)} of {len(every)} folds; totals are over their clips alone")
    return Plan(index, rules, classes, positions, folds, left_out, notes)


def unlearned(index: ShardIndex, rules: Protocol, folds: Sequence[Fold]) -> list[str]:
    """A note for each fold whose test clips have classes that no other clip of it has."""
    notes = []
    for fold in folds if not rules.dimensions else ():
        clips = [*fold.train, *fold.dev, *fold.test]
        words = {p: rules.class_of(index.samples.row(p)["meta"][rules.label]) for p in clips}
        learned = {words[p] for p in [*fold.train, *fold.dev]}
        unknown = {words[p]: index.samples.row(p)["id"] for p in fold.test if words[p] not in learned}
        if unknown:
            names = ", ".join(f"{name} (as {clip})" for name, clip in sorted(unknown.items()))
            notes.append(f"fold {fold.name}: nothing can learn what no training clip has: {names}")
    return notes


def run_folds(
    plan: Plan, contenders: Sequence[Contender], settings: EvaluateSettings, progress: Progress | None = None
) -> list[Judged]:
    """The predictions of every contender, seed and fold; those that are there already are read. What is refused leaves
    the folder as it was. Raises SettingsError for two contenders of one name and for one whose pre-training has seen
    test clips, and what a contender raises."""
    names = [contender.name for contender in contenders]
    if len(set(names)) < len(names):
        raise SettingsError(f"contenders need different names, found {', '.join(names)}")
    for contender in contenders:
        contender.check(plan.rules, plan.index)
    overlaps = [overlap(plan, contender) for contender in contenders]  # first: a leak is not to be found after hours
    settings.output.mkdir(parents=True, exist_ok=True)
    write_text(settings.output / SETTINGS, settings.to_yaml())
    total = sum(len(contender.seeds) for contender in contenders) * len(plan.folds)
    done, results = 0, []
    for contender, shared in zip(contenders, overlaps):
        judged = Judged(contender, [], [], [], {}, shared)
        for seed in contender.seeds:
            tests, devs = [], []
            for fold in plan.folds:
                part = Part(plan.index, plan.rules, plan.classes, fold, settings.selected)
                outcome, file = run_fold(contender, part, seed, settings.output)
                tests.append(outcome.test)
                devs += [outcome.dev] if outcome.dev is not None else []
                judged.files.append(str(file.relative_to(settings.output)))
                judged.unread |= outcome.unread
                done += 1
                if progress:
                    progress(contender.name, done, total)
            judged.tests.append(tests)
            judged.devs.append(devs)
        results.append(judged)
    return results


def overlap(plan: Plan, contender: Contender) -> dict[str, Any]:
    """What a contender's pre-training shares with the test clips of all folds, see `check_unseen`; {} without any."""
    seen, test = contender.pretraining(), sorted({p for fold in plan.folds for p in fold.test})
    if seen is None:
        return {}
    how = {"group": plan.rules.group, "transductive": contender.transductive}
    return check_unseen(plan.index, np.array(test), seen, **how)


def run_fold(contender: Contender, part: Part, seed: int, output: Path) -> tuple[Outcome, Path]:
    """What a contender says of one fold, from its file where that was made with the same settings from the same clips,
    and that file. The test predictions are written last, so where they are there all is."""
    folder = output / "predictions" / f"{part.selected}-selected" / contender.name
    stem = f"fold-{safe_id(part.fold.name)}-seed-{seed}"
    test, dev = (folder / f"{stem}.{side}.safetensors" for side in ("test", "dev"))
    digest = digest_of(contender, part, seed)
    kept = _kept(test, dev, digest)
    if kept is None:
        with locked(folder, stem):
            work = work_folder(output / "work" / f"{part.selected}-selected" / contender.name, stem, digest)
            try:
                outcome = contender.judge(part, seed, work)
            except SettingsError as error:
                raise SettingsError(f"{contender.name}, fold {part.fold.name}: {error}") from error
            _check(outcome, part, contender)
            about = {"name": contender.name, "seed": seed, "fold": part.fold.name, "selected": part.selected}
            about |= {"streams": contender.streams, "has_dev": outcome.dev is not None, "digest": digest}
            about |= {"chosen": outcome.chosen, "unread": outcome.unread}
            for table, path, side in ((outcome.dev, dev, "dev"), (outcome.test, test, "test")):
                if table is not None:
                    replace(table, about={**table.about, **about, "part": side}).save(path)
        kept = _kept(test, dev, digest)  # as it is read: what is scored is what is kept
    assert kept is not None, f"{test} was just written"
    return kept, test


def work_folder(parent: Path, stem: str, digest: str) -> Path:
    """Where a contender keeps what it needs to go on. That of other settings, which nobody can go on with, goes."""
    own = parent / f"{stem}-{digest[:12]}"
    for other in parent.glob(f"{stem}-*"):
        if other != own:
            shutil.rmtree(other)
    return own


def digest_of(contender: Contender, part: Part, seed: int) -> str:
    """Of all that the predictions depend on: clips, their parts and labels, the contender's settings, the seed."""
    samples = part.index.samples
    clips = {side: [samples.row(p)["id"] for p in getattr(part.fold, side)] for side in ("train", "dev", "test")}
    truth = part.truth(sorted(part.fold.train + part.fold.dev + part.fold.test))
    what = [part.index.fingerprint, part.rules.name, part.classes, part.selected, clips, truth.tolist(), seed]
    return hashlib.sha256(json.dumps([contender.identity(), *what], default=str).encode()).hexdigest()


def pool_folds(tests: Sequence[Predictions], rules: Protocol) -> Predictions:
    """One table of all folds; the parts of a recording joined where the protocol says so."""
    table = pooled(tests, fold="all")
    return join_parts(table, rules.pool_tokens) if rules.pool_tokens else table


def join_parts(table: Predictions, tokens: int) -> Predictions:
    """Clips whose names agree in their first tokens (parted by `_`) as one, with the mean of what was said of them:
    probabilities, or values. Raises DataError where their labels differ."""
    groups: dict[str, list[int]] = {}
    for row, clip in enumerate(table.ids):
        groups.setdefault("_".join(clip.split("_")[:tokens]), []).append(row)
    joined = table.take([rows[0] for rows in groups.values()])
    arrays: dict[str, Any] = {}
    if table.label is not None:
        for name, rows in groups.items():
            if len(set(table.label[rows].tolist())) > 1:
                raise DataError(f"the parts of {name} have different labels; they are judged together")
    if table.logits is not None:
        mean = np.stack([table.probabilities[rows].mean(0) for rows in groups.values()])
        arrays["logits"] = np.log(np.clip(mean, 1e-12, 1))
        if table.kind == "multi":
            arrays["logits"] -= np.log(np.clip(1 - mean, 1e-12, 1))
    if table.values is not None:
        arrays["values"] = np.stack([table.values[rows].mean(0) for rows in groups.values()])
    return replace(joined, ids=list(groups), **arrays)


@contextmanager
def locked(folder: Path, stem: str) -> Iterator[None]:
    """One fold for one process, so that several may share the folds of an evaluation. What a killed one left half
    written is removed. Raises SettingsError where another process is at it."""
    folder.mkdir(parents=True, exist_ok=True)
    lock = os.open(folder / f".{stem}.lock", os.O_RDWR | os.O_CREAT)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        for path in folder.glob(f".{stem}.*.safetensors.*"):
            path.unlink()
        yield
    except BlockingIOError:
        raise SettingsError(
            f"{folder}: another `affekt evaluate` works on {stem}; give each its own --folds, and collect the table "
            "by a last call without"
        ) from None
    finally:
        os.close(lock)


def _kept(test: Path, dev: Path, digest: str) -> Outcome | None:
    """What the files of a fold hold, None where they are not there or were made otherwise. Raises DataError for a
    damaged one."""

    def read(path: Path) -> Predictions | None:
        table = Predictions.read(path) if path.exists() else None
        return table if table and table.about.get("digest") == digest else None

    on_test = read(test)
    on_dev = read(dev) if on_test and on_test.about["has_dev"] else None
    if on_test is None or (on_dev is None and on_test.about["has_dev"]):
        return None
    return Outcome(on_test, on_dev, on_test.about["chosen"], on_test.about["unread"])


def _check(outcome: Outcome, part: Part, contender: Contender) -> None:
    """Each test clip is judged once or accounted for; nothing else is judged, and nothing but development clips is
    what temperatures are fitted on."""
    ids = {part.index.samples.row(p)["id"] for p in part.fold.test}
    judged = set(outcome.test.ids)
    if judged - ids or ids - judged - set(outcome.unread):
        odd = sorted((judged - ids) or (ids - judged - set(outcome.unread)))[0]
        raise DataError(f"{contender.name}, fold {part.fold.name}: {odd} is no test clip, or was not judged")
    strange = set(outcome.dev.ids if outcome.dev else ()) - {part.index.samples.row(p)["id"] for p in part.fold.dev}
    if strange:
        raise DataError(f"{contender.name}, fold {part.fold.name}: {min(strange)} is no development clip of this fold")
