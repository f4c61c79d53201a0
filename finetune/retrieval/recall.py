"""How well clips are found: sound for a picture, a picture for sound, and clips of the same label.

What is right: across the streams the other stream of the same clip; for labels every clip of the same one. What is
neither right nor wrong, and left out of a query's list: by label the clip itself; other clips cut from the same source
file (their moments are near, so they would be hard to tell apart across streams and too easy by label); and by label,
with `apart="speaker"`, all clips of the same speaker. Ties count as chance decides them (`ranks`).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import numpy as np

from affekt.data.errors import SettingsError
from affekt.data.shards import ShardIndex
from affekt.finetune.retrieval.features import clip_features, plain_features, time_segments, unread_clips
from affekt.finetune.retrieval.ranks import Ranks, rank
from affekt.finetune.retrieval.space import Features, Space, aligned, centred, default_space, menu
from affekt.pretrain.encoder import Encoder

Apart = Literal["source", "speaker"]


@dataclass(frozen=True)
class Task:
    """Queries by one stream, answers by one; `by_label` or the same clip. Tasks of one `choice` share a space."""

    name: str
    query: str
    target: str
    by_label: bool
    choice: str


CROSS = (
    Task("audio_to_video", "audio", "video", False, "across streams"),
    Task("video_to_audio", "video", "audio", False, "across streams"),
)
ALIKE = tuple(Task(f"same_label_{s}", s, s, True, f"same label, {s}") for s in ("audio", "video", "both"))


@dataclass
class Clips:
    """What is known of n clips beside their features, as numbers (n,): of the label and the speaker (-1 without), and
    of the source file."""

    ids: list[str]
    labels: np.ndarray
    speakers: np.ndarray
    sources: np.ndarray

    @classmethod
    def of(cls, index: ShardIndex, positions: Sequence[int], label: str | None) -> "Clips":
        rows = [index.samples.row(p) for p in positions]
        sources = [row["source_sha256"] or f"clip {row['id']}" for row in rows]
        labels = [row["meta"].get(label) if label else None for row in rows]
        speakers = [row["meta"].get("speaker") for row in rows]
        return cls([row["id"] for row in rows], _numbers(labels), _numbers(speakers), _numbers(sources))

    def __len__(self) -> int:
        return len(self.ids)


@dataclass
class Found:
    """One task: the space it was done in, what its queries found, how many items there were, the scores that scores
    without any difference have, and the clips that could not be read."""

    task: Task
    space: Space
    ranks: Ranks
    items: int
    chance: dict[str, float]
    unread: list[str] = field(default_factory=list)


def evaluate(
    encoder: Encoder,
    index: ShardIndex,
    positions: Sequence[int],
    *,
    dev: Sequence[int] = (),
    fit: Sequence[int] = (),
    label: str | None = None,
    apart: Apart = "source",
    plain: bool = False,
    windows: int = 4,
    batch_size: int = 16,
    workers: int = 0,
    on_batch: Callable[[int], None] | None = None,
) -> dict[str, dict[str, Found]]:
    """Search among the clips at `positions`, each asked for in turn: `{"contrast": {task: Found}, "chosen": ...}`.

    `contrast` is the space that pre-training compared in, `chosen` that of `menu` with the best mean average precision
    among the clips of `dev`; it is there with `dev` alone. `fit` are the clips whose means are taken off and whose
    pairs are aligned, no label of theirs is used. With `plain`, features that need no learning take the place of the
    encoder's, with a menu of alignments alone; that needs both `dev` and `fit`. Raises SettingsError where no query has
    a right answer in reach.
    """
    parts = [np.asarray(part, int) for part in (positions, dev, fit)]
    segments = time_segments(encoder) if len(dev) else 0  # steps are only ever chosen
    how = {"windows": windows, "segments": segments, "batch_size": batch_size, "workers": workers, "on_batch": on_batch}
    extract = plain_features if plain else clip_features
    together = extract(encoder, index, np.concatenate(parts).tolist(), **how)
    ends = np.cumsum([len(part) for part in parts])[:-1]
    split = [dict(zip(together, rows)) for rows in zip(*(np.split(x, ends) for x in together.values()))]
    base, choosing, fitting = (part if len(where) else None for part, where in zip(split, parts))
    clips, tasks = Clips.of(index, positions, label), tasks_of(index, positions, encoder.streams, label)
    spaces: dict[str, dict[str, Space]] = {}
    if plain:
        steps = Space("steps", (0,), segments=segments)
        candidates = aligned(centred(steps, fitting), fitting)
    else:
        spaces["contrast"] = dict.fromkeys((task.choice for task in tasks), default_space(encoder, fitting or base))
        candidates = list(menu(encoder, fitting, segments)) if choosing else []
    if candidates:
        spaces["chosen"] = choose(candidates, tasks, choosing, Clips.of(index, dev, label), apart)
    unread = unread_clips(together, index, np.concatenate(parts).tolist(), encoder.streams)
    found = {
        kind: {task.name: measure(task, chosen[task.choice], base, clips, apart) for task in tasks}
        for kind, chosen in spaces.items()
    }
    return {kind: {name: replace(one, unread=unread) for name, one in of.items()} for kind, of in found.items()}


def tasks_of(index: ShardIndex, positions: Sequence[int], streams: str, label: str | None) -> list[Task]:
    """What can be asked among these clips of an encoder of `streams`. Raises SettingsError when that is nothing."""
    there = {
        s for s in ("video", "audio") if streams in ("both", s) and getattr(index.samples, f"has_{s}")[positions].any()
    }
    there |= {"both"} if len(there) == 2 else set()
    tasks = [task for task in (*CROSS, *(ALIKE if label else ())) if {task.query, task.target} <= there]
    if not tasks:
        raise SettingsError(
            f"{index.root}: nothing to search for: the clips have {' and '.join(sorted(there)) or 'no stream'} of the "
            "encoder; across streams both are needed, within one the field of a label (`label`)"
        )
    return tasks


def choose(spaces: list[Space], tasks: list[Task], features: Features, clips: Clips, apart: Apart) -> dict[str, Space]:
    """By choice, the space with the highest mean average precision over its tasks; of equal ones the first."""
    best: dict[str, tuple[float, Space]] = {}
    for choice in dict.fromkeys(task.choice for task in tasks):
        ours = [task for task in tasks if task.choice == choice]
        for space in spaces:
            score = np.mean([measure(task, space, features, clips, apart).ranks.precision.mean() for task in ours])
            if choice not in best or score > best[choice][0] + 1e-9:
                best[choice] = float(score), space
    return {choice: space for choice, (_, space) in best.items()}


def measure(task: Task, space: Space, features: Features, clips: Clips, apart: Apart = "source") -> Found:
    """Every clip that has the query's stream asks all that have the target's."""
    queries, items = (space.vectors(features, stream).astype(np.float64) for stream in (task.query, task.target))
    usable = clips.labels >= 0 if task.by_label else np.ones(len(clips), bool)
    asking, asked = (np.flatnonzero(usable & np.isfinite(x).all(1)) for x in (queries, items))
    queries, items = queries[asking], items[asked]

    def same(numbers: np.ndarray, rows: slice) -> np.ndarray:
        return (numbers[asking[rows], None] == numbers[asked]) & (numbers[asking[rows], None] >= 0)

    itself = np.arange(len(clips))

    def right(rows: slice) -> np.ndarray:
        return same(clips.labels if task.by_label else itself, rows)

    def left_out(rows: slice) -> np.ndarray:
        if not task.by_label:
            return same(clips.sources, rows) & ~same(itself, rows)
        return same(clips.sources, rows) | (same(clips.speakers, rows) if apart == "speaker" else False)

    ranks = rank(len(asking), lambda rows: queries[rows] @ items.T, right, left_out)
    if not len(ranks.first):
        what = "a clip of the same label" if task.by_label else "both streams"
        raise SettingsError(
            f"{task.name}: none of {len(asking)} clips has {what} among the {len(asked)} to search"
            + (", speakers apart (`apart: source` keeps only recordings apart)" if apart == "speaker" else "")
        )
    ranks.queries = asking[ranks.queries]
    nothing = rank(len(asking), lambda rows: np.zeros((rows.stop - rows.start, len(asked))), right, left_out)
    return Found(task, space, ranks, len(asked), nothing.scores())


def _numbers(values: Sequence[object]) -> np.ndarray:
    """A number for each text, -1 for none."""
    names = {name: n for n, name in enumerate(sorted({str(v) for v in values if v not in (None, "")}))}
    return np.array([-1 if v in (None, "") else names[str(v)] for v in values], int)
