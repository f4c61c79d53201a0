"""A model before the same clips again and again, each time spoiled in one way: score, and answers that stayed."""

import hashlib
import json
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from affekt.data.errors import DataError, SettingsError
from affekt.data.shards import ShardIndex
from affekt.finetune.judge import Judge, Judged, judge_clips
from affekt.finetune.metrics.missing import auilc
from affekt.finetune.predictions import Kind, Predictions
from affekt.finetune.schema import Stress
from affekt.finetune.scores import in_order, main_score, score, task_of, values
from affekt.finetune.stress.beginnings import Beginnings
from affekt.finetune.stress.menu import ALTERATIONS, Alter, Alteration
from affekt.finetune.stress.missing import FILLS, SUBSETS, TITLES, missing
from affekt.finetune.stress.scene import Scene
from affekt.finetune.stress.settings import StressSettings

VERSION = 2  # of what is done to clips; raise it when that changes, so that kept answers are not taken for new ones
TOLERANCE = 0.05  # of ratings on a scale of 0 to 1 (audEERING's ser-tests)
SAME = 1e-4  # of probabilities: answers to nothing at all


@dataclass(frozen=True)
class Level:
    """One level of damage: of batches, of the clips' length, or (neither) none."""

    level: float
    alter: Alter | None = None
    share: float = 1.0


@dataclass(frozen=True)
class Damage:
    name: str
    title: str
    unit: str
    levels: list[Level]
    note: str = ""
    area: bool = False


def run_stress(
    judge: Judge,
    index: ShardIndex,
    positions: Sequence[int],
    predictions_of: Callable[[Judged], Predictions],
    settings: StressSettings,
    *,
    kind: Kind = "single",
    folder: Path | None = None,
    identity: str = "",
    report: Callable[[int, int], None] | None = None,
) -> list[Stress]:
    """The scores at every level of every kind of damage, with 95 % intervals; deterministic.

    `predictions_of` puts what is known of the clips beside what was said. Where damage leaves a clip no stream that the
    model knows, it gets the mean of the answers to clips as they are, and a note says for how many. In `folder` the
    answers are kept, by `identity` (of the model's weights) and all else that they depend on, so that a run that was
    ended goes on. `report(done, total)` counts levels.

    Raises SettingsError for a score that these clips do not allow, DataError where no clip can be judged.
    """
    scene = Scene(index, positions, judge.window)
    damages = list(plan(scene, judge, settings))
    ask = _Asker(judge, index, list(positions), predictions_of, settings, kind, folder, identity)
    clean = ask(Level(0.0), "clean")
    names = settings.scores or (main_score(task_of(clean)),)
    before, total, done = values(clean, names), sum(len(d.levels) for d in damages), 0
    spans, found = spans_of(judge, clean), []
    for damage in damages:
        tables = []
        for level in damage.levels:
            tables.append(ask.or_prior(level, damage.name, clean))
            done += 1
            if report:
                report(done, total)
        kept = [unchanged(clean, table, spans) for table, _ in tables]
        note = " ".join(filter(None, (damage.note, _told(damage, tables))))
        for name in names:
            estimates = [score(table, [name], bootstrap=settings.bootstrap)[name] for table, _ in tables]
            levels = [level.level for level in damage.levels]
            found.append(
                Stress(
                    name=damage.name,
                    title=damage.title,
                    unit=damage.unit,
                    system=clean.about.get("name", ""),
                    score=name,
                    levels=levels,
                    scores=estimates,
                    unchanged=kept,
                    area=auilc(levels, [e.value for e in estimates]) if damage.area else None,
                    note=f"{note} As they are: {before[name]:.3f}.".strip(),
                )
            )
    return found


def plan(scene: Scene, judge: Judge, settings: StressSettings) -> Iterator[Damage]:
    """All damage that the settings ask for and that touches a stream which the model knows and the clips have."""
    samples = scene.samples.values()
    there = {
        "audio": judge.streams != "video" and any(s.has_audio for s in samples),
        "video": judge.streams != "audio" and any(s.has_video for s in samples),
    }
    there["both"] = all(there.values())
    for name, levels in settings.alterations.items():
        if there[ALTERATIONS[name].stream]:
            yield _altered(ALTERATIONS[name], scene, levels)
    for generator in settings.missing:
        for fill in settings.fills:
            if generator == "SMM":
                levels, unit, note = SUBSETS, "", "0: both streams, 1: the pictures alone, 2: the sound alone;"
            else:
                levels, unit, note = settings.rates, "share", "When missing,"
            if generator != "SMM" or there["both"]:
                yield Damage(
                    f"missing_{generator}_{fill}",
                    f"{TITLES[generator]} ({generator}, {fill})",
                    unit,
                    [Level(rate, missing(scene, generator, rate, fill) if rate else None) for rate in levels],
                    f"{note} {FILLS[fill]}.",
                    area=generator != "SMM",
                )
    if settings.early:
        levels = [Level(share, share=share) for share in settings.early]
        yield Damage("early", "Beginning of the clip", "share", levels, "As if the clip ended there.")


def _altered(alteration: Alteration, scene: Scene, levels: Sequence[float]) -> Damage:
    made = [
        Level(level, None if level == alteration.clean else alteration.make(scene, level))
        for level in levels or alteration.levels
    ]
    return Damage(alteration.name, alteration.title, alteration.unit, made, alteration.note)


def _read(path: Path) -> Predictions | None:
    """What was kept; None where nothing is, or a file is damaged: it is made again."""
    try:
        return Predictions.read(path) if path.is_file() else None
    except DataError:
        return None


@dataclass
class _Asker:
    """Asks the model about all clips, or reads what it said before."""

    judge: Judge
    index: ShardIndex
    positions: list[int]
    predictions_of: Callable[[Judged], Predictions]
    settings: StressSettings
    kind: Kind
    folder: Path | None
    identity: str

    def __call__(self, level: Level, name: str, clean: Predictions | None = None) -> Predictions:
        """Answers in the order of `positions`, without the clips that could not be judged. `clean` are those to clips
        as they are, once these are known."""
        if level.alter is None and level.share == 1:
            name, level = "clean", Level(0.0)
        key, path = self._key(name, level.level), None
        if self.folder is not None:
            path = self.folder / f"{name}@{level.level:g}.safetensors"
            kept = _read(path)
            if kept is not None and kept.about.get("stress") == key:
                return kept
        s = self.settings
        judged = judge_clips(
            self.judge,
            self.index if level.share == 1 else Beginnings(self.index, level.share),
            self.positions,
            kind=self.kind,
            windows=s.windows,
            speech=s.speech,
            batch_size=s.batch,
            workers=s.workers,
            alter=level.alter,
        )
        if not judged.ids and clean is None:
            causes = ", ".join(list(judged.unread.values())[:1])
            raise DataError(f"not one of {len(self.positions)} clips could be judged: {causes}")
        found = self.predictions_of(judged) if judged.ids else clean.take([])
        found = replace(found, about={**found.about, "stress": key})
        if path is not None:
            found.save(path)
        return found

    def or_prior(self, level: Level, name: str, clean: Predictions) -> tuple[Predictions, int]:
        """The answers to all clips of `clean`, and for how many of them it is the prior."""
        table = self(level, name, clean)
        place = {clip: row for row, clip in enumerate(table.ids)}
        lost = np.array([clip not in place for clip in clean.ids])
        arrays: dict[str, np.ndarray] = {}
        prior = prior_answer(clean)
        for what in prior:
            said, rest = getattr(table, what), np.broadcast_to(prior[what], getattr(clean, what).shape)
            rows = [place.get(clip, 0) for clip in clean.ids]
            arrays[what] = np.where(lost[:, None], rest, said[rows]) if len(table) else rest.copy()
        return replace(clean, **arrays), int(lost.sum())

    def _key(self, name: str, level: float) -> str:
        s = self.settings
        parts = [VERSION, self.identity, self.index.fingerprint, self.positions, s.windows, s.speech, self.kind]
        return hashlib.sha256(json.dumps([*parts, name, level]).encode()).hexdigest()


def prior_answer(table: Predictions) -> dict[str, np.ndarray]:
    """What is answered without looking: the mean of a model's probabilities, as logits (K,), and of its values (D,)."""
    found = {}
    if table.logits is not None:
        p = table.probabilities.mean(0).clip(1e-12, 1 - 1e-12)
        found["logits"] = np.log(p) - np.log1p(-p) if table.kind == "multi" else np.log(p)
    if table.values is not None:
        found["values"] = table.values.mean(0)
    return found


def prior_score(table: Predictions, name: str) -> float:
    """What the mean of these answers scores when every clip gets it."""
    same = {
        what: np.broadcast_to(answer, getattr(table, what).shape).copy() for what, answer in prior_answer(table).items()
    }
    return values(replace(table, **same), [name])[name]


def unchanged(before: Predictions, after: Predictions, spans: np.ndarray | None = None) -> float:
    """Share of clips with the same class (of several at once, the same set) and with every value within 0.05 of
    `spans` (D,), the ranges of the ratings."""
    after, same = in_order(after, before.ids), np.ones(len(before), bool)
    if before.logits is not None and before.classes:
        said = [t.logits > 0 if before.kind == "multi" else t.logits.argmax(1)[:, None] for t in (before, after)]
        same &= (said[0] == said[1]).all(1)
    if before.values is not None and before.dimensions:
        same &= (np.abs(after.values - before.values) / spans < TOLERANCE).all(1)
    return float(same.mean())


def spans_of(judge: Judge, clean: Predictions) -> np.ndarray | None:
    """The ranges (D,) of the ratings: those that the model states, or else of the ratings of these clips."""
    if not clean.dimensions:
        return None
    stated: Any = getattr(judge, "dimensions", None)
    if isinstance(stated, dict) and set(clean.dimensions) <= set(stated):
        return np.array([stated[name][1] - stated[name][0] for name in clean.dimensions], float)
    if clean.ratings is None or not np.isfinite(clean.ratings).any(0).all():
        raise SettingsError(
            "the model states no range of its dimensions and no clip is rated, so that nothing is small"
        )
    return np.maximum(np.nanmax(clean.ratings, 0) - np.nanmin(clean.ratings, 0), 1e-9)


def _told(damage: Damage, tables: list[tuple[Predictions, int]]) -> str:
    """How many clips were left without any stream, and whether nothing was left to tell clips by at a rate of 1."""
    told = []
    lost = {level.level: count for level, (_, count) in zip(damage.levels, tables) if count}
    if lost:
        many = ", ".join(f"{count} at {level:g}" for level, count in lost.items())
        told.append(f"Clips that are left without a stream get the mean answer: {many}.")
    if damage.area and math.isclose(damage.levels[-1].level, 1):
        told.append(check_prior(tables[-1][0]))
    return " ".join(told)


def check_prior(table: Predictions) -> str:
    """With all of the input missing every answer must be one and the same, and its score that of the prior alone."""
    name = main_score(task_of(table))
    found, prior = values(table, [name])[name], prior_score(table, name)
    said = [table.probabilities] if table.logits is not None else []
    said += [table.values] if table.values is not None else []
    spread = max(float(np.ptp(x, axis=0).max(initial=0)) for x in said)
    if spread < SAME and abs(found - prior) < 1e-9:
        return f"At 100 % all answers are one, and {name} is that of the prior alone, {prior:.3f}."
    return (
        f"At 100 % answers still differ (by up to {spread:.2g}), and {name} is {found:.3f}; that of the prior alone is "
        f"{prior:.3f}: something besides the streams, such as which of them a clip has, tells these clips apart."
    )
