"""From settings to clips: what each corpus has to learn from, to choose on and to score, and the classes of all."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from affekt.data.batch import Streams
from affekt.data.errors import SettingsError
from affekt.data.labels import Targets, make_targets
from affekt.data.mixture import Corpus, check_together
from affekt.data.shards import ShardIndex
from affekt.data.split import group_of
from affekt.finetune.splits import check_unseen, split_clips
from affekt.finetune.training.settings import CorpusSettings, FinetuneSettings


@dataclass
class Part:
    """A corpus with the targets of all its clips, and positions in its index by what they are for."""

    name: str
    index: ShardIndex
    targets: Targets
    train: list[int]
    dev: list[int]
    test: list[int]
    weight: float | None
    columns: list[int]  # of its classes among those of all corpora
    dimensions: list[int]

    @property
    def judged(self) -> bool:
        return bool(self.test)


@dataclass
class Clips:
    """All corpora, and the classes and dimensions of the head, which are those of any of them. `notes` tell the user
    which classes are judged that nothing teaches."""

    parts: list[Part]
    classes: list[str]
    dimensions: dict[str, tuple[float, float]]
    notes: list[str] = field(default_factory=list)

    def corpora(self, with_dev: bool = False, balance: bool = False) -> list[Corpus]:
        """What is trained on, for the loader; with `balance` the classes of each corpus in equal shares."""
        corpora = []
        for part in self.parts:
            positions = np.array(sorted(part.train + part.dev if with_dev else part.train))
            labels = part.targets.label[positions]
            strata = [positions[labels == k] for k in np.unique(labels)] if balance else None
            name = "" if len(self.parts) == 1 else part.name
            corpora.append(Corpus(part.index, positions, part.weight, name, strata))
        return corpora


def open_clips(settings: FinetuneSettings, streams: Streams) -> Clips:
    """Open the shards, choose the sides and make the targets. Raises SettingsError where sides share a group or a
    source file, also those of two corpora, a part is empty, or none of the classes that it judges is taught; DataError
    for labels that are none."""
    parts = [_open_part(corpus, streams) for corpus in settings.data.parts]
    _check_apart(parts, settings.data.parts)
    for part in parts if settings.train.choose_on == "test" else ():
        if part.judged:
            part.train, part.dev = sorted(part.train + part.dev), part.test
    check_together([Corpus(p.index, p.train, None, p.name) for p in parts])
    classes = sorted({name for p in parts for name in p.targets.classes})
    if len(parts) == 1:
        classes = parts[0].targets.classes
    dimensions: dict[str, tuple[float, float]] = {}
    for part in parts:
        for name, span in part.targets.dimensions.items():
            dimensions.setdefault(name, span)
        part.columns = [classes.index(name) for name in part.targets.classes]
        part.dimensions = [list(dimensions).index(name) for name in part.targets.dimensions]
    stated, temperature = parts[0].weight is not None, settings.data.temperature
    for part in parts if temperature > 1 and not stated else ():
        part.weight = len(part.train) ** (1 / temperature)
    clips = Clips(parts, classes, dimensions)
    clips.notes = _untaught(clips)
    return clips


def _open_part(settings: CorpusSettings, streams: Streams) -> Part:
    index = ShardIndex.open(settings.shards)
    targets = make_targets(index.samples.rows(), settings.labels)
    has_audio, has_video = index.samples.has_audio, index.samples.has_video
    has = {"audio": has_audio, "video": has_video, "both": has_audio | has_video}[streams]
    usable = np.flatnonzero(targets.known & has).tolist()
    if not usable:
        raise SettingsError(
            f"{settings.shards}: none of {len(has)} clips has {streams if streams != 'both' else 'a stream'} and a "
            f"target by the rule {settings.labels.rule}"
        )
    for position in usable if settings.test is not None else ():
        group_of(index, position, settings.group)  # who cannot be told apart cannot be kept apart
    sides = {"test": settings.test, "dev": settings.dev, "train": settings.train}
    train, dev, test, _ = split_clips(index, usable, **sides, group=settings.group, seed=0)
    if not train:
        raise SettingsError(f"{settings.shards}: no clips are left to learn from; data.test and data.dev take all")
    return Part(settings.name, index, targets, train, dev, test, settings.weight, [], [])


def _check_apart(parts: list[Part], corpora: Sequence[CorpusSettings]) -> None:
    """No file, clip or person (session ...) that one corpus judges is learned from in another: the same recordings may
    be prepared twice, from other files. The same names are others where both sides tell a `data_set` and these differ.
    """
    for judged, settings in zip(parts, corpora):
        for side, clips in (("test", judged.test), ("dev", judged.dev)):
            theirs: dict[tuple[str, str], set[str]] = {}
            for row in map(judged.index.samples.row, clips):
                for mark in _marks(row, settings.group):
                    theirs.setdefault(mark, set()).add(str(row["meta"].get("data_set") or ""))
            for part in (p for p in parts if p is not judged and theirs):
                for row in map(part.index.samples.row, part.train + part.dev if side == "test" else part.train):
                    own = str(row["meta"].get("data_set") or "")
                    for what, name in _marks(row, settings.group):
                        there = theirs.get((what, name), set())
                        if there and (what == "file" or not own or there & {own, ""}):
                            how = "made from the same file" if what == "file" else f"has the same {what} ({name})"
                            raise SettingsError(
                                f"{part.index.root}: clip {row['id']} is learned from and {how} as one that "
                                f"{judged.name} has in `{side}`; put both on one side"
                                + ("" if what == "file" else ", or tell them apart by a column `data_set`")
                            )


def _marks(row: dict[str, Any], group: str) -> list[tuple[str, str]]:
    marks = [("file", row["source_sha256"]), (group, str(row["meta"].get(group) or "")), ("id", row["id"])]
    return [(what, name) for what, name in marks if name]


def _untaught(clips: Clips) -> list[str]:
    """Classes that are judged and that no training clip has: as in a fold that leaves the one speaker out who has a
    rare class. Raises SettingsError where all are so."""
    taught: set[str] = set()
    for part in clips.parts:
        hot = np.nan_to_num(part.targets.target[part.train]).max(0, initial=0)
        taught |= {name for name, most in zip(part.targets.classes, hot) if most > 0}
    if clips.classes and len(taught) < 2:
        raise SettingsError(
            f"the clips to learn from have one class alone ({', '.join(taught) or 'none'}); it takes two"
        )
    notes = []
    for part in clips.parts:
        for side, positions in (("development", part.dev), ("test", part.test)):
            labels = part.targets.label[positions]
            judged = {part.targets.classes[k] for k in labels[labels >= 0]}
            if missing := sorted(judged - taught):
                note = f"{part.name}: {side} clips have classes that no training clip has: {', '.join(missing)}"
                if not judged & taught:
                    raise SettingsError(note)
                notes.append(f"{note}, which nothing can learn")
    return notes


def check_leaks(clips: Clips, settings: FinetuneSettings, seen: dict[str, Any] | None) -> dict[str, Any]:
    """Compare all test clips with what pre-training has seen; see `check_unseen`. Counts for the results."""
    found: dict[str, Any] = {}
    for part, corpus in zip(clips.parts, settings.data.parts):
        if seen is not None and part.judged:
            rules = {"group": corpus.group, "transductive": settings.transductive}
            found[part.name] = check_unseen(part.index, np.array(part.test), seen, **rules)
    return found


@dataclass(frozen=True)
class Table:
    """Targets of all clips of all corpora, by `Batch.clip`, on the device: `target` (N, K) with NaN rows where there is
    none, `known` bool (N, K) the classes of the clip's corpus, `ratings` (N, D) from -1 to 1, NaN where absent; `group`
    int64 (N,) differs where corpora do, or what is known of clips, which are then not to be mixed."""

    target: Tensor
    known: Tensor
    ratings: Tensor
    group: Tensor

    def of(self, clip: Tensor) -> "Table":
        """The rows of a batch; those of no clip (-1) know nothing."""
        nobody = (clip < 0)[:, None]
        at = clip.clamp(min=0)
        return Table(
            self.target[at].masked_fill(nobody, float("nan")),
            self.known[at],
            self.ratings[at].masked_fill(nobody, float("nan")),
            self.group[at].masked_fill(nobody[:, 0], -1),
        )

    def to(self, device: torch.device) -> "Table":
        tensors = (self.target, self.known, self.ratings, self.group)
        return Table(*(x.to(device, non_blocking=True) for x in tensors))


def make_table(clips: Clips) -> Table:
    """One table for the head of all classes and dimensions. What a corpus does not know counts neither for nor
    against."""
    rows = sum(len(part.index.samples) for part in clips.parts)
    target = torch.zeros(rows, len(clips.classes))
    known = torch.zeros(rows, len(clips.classes), dtype=torch.bool)
    ratings = torch.full((rows, len(clips.dimensions)), float("nan"))
    group = torch.zeros(rows, dtype=torch.int64)
    first = 0
    for number, part in enumerate(clips.parts):
        here = slice(first, first + len(part.index.samples))
        known[here, part.columns] = True
        target[here, part.columns] = torch.from_numpy(part.targets.target)
        if not part.columns:
            target[here] = float("nan")
        low, high = (np.array([span[i] for span in part.targets.dimensions.values()]) for i in (0, 1))
        scaled = (2 * part.targets.ratings - low - high) / (high - low)
        ratings[here, part.dimensions] = torch.from_numpy(scaled).float()
        rated = (~ratings[here].isnan()).long() @ (2 ** torch.arange(len(clips.dimensions)))
        group[here] = (rated * 2 + ~target[here].isnan().any(1)) * len(clips.parts) + number
        first = here.stop
    return Table(target, known, ratings, group)
