"""Batches for training and evaluation: the order says which clips, and however many workers decode them."""

from collections import Counter
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch.utils.data import Dataset

from affekt.data.accounting import worst
from affekt.data.ahead import load_ahead
from affekt.data.augment import Augment
from affekt.data.batch import WHOLE_PICTURE, Batch, Row, Streams, collate, empty_pictures
from affekt.data.decode import View, Window, decode_window, random_start, whole_sound, window_starts
from affekt.data.errors import AffektError, DataError, SettingsError
from affekt.data.mixture import Corpus, check_together, check_window, example, sources
from affekt.data.order import Plan, clip_key, speaker_number, uniform
from affekt.data.shards import SampleError, ShardIndex

MAX_REPLACEMENTS = 20


class TrainLoader:
    """Iterates over the batches of one rank. `steps_per_epoch`, and `dropped_per_epoch` clips of each epoch's tail."""

    def __init__(self, batches: "_TrainBatches", start_step: int, total_steps: int, workers: int):
        self._batches, self._steps, self._workers = batches, range(start_step, total_steps), workers
        self.steps_per_epoch = batches.plan.steps_per_epoch
        self.dropped_per_epoch = batches.plan.dropped_per_epoch
        self.shares = [0] * len(batches.corpora)  # clips of each corpus in an epoch
        for owner, share in zip(batches.owners, batches.plan.shares, strict=True):
            self.shares[owner] += share

    def __len__(self) -> int:
        return len(self._steps)

    def __iter__(self) -> Iterator[Batch]:
        return load_ahead(self._batches, self._steps, self._workers)

    def blank(self) -> Batch:
        """As many rows as a batch has, of no clip and without a stream: what a rank without data may go on with."""
        return self._batches.blank()


class EvalLoader:
    """Iterates over all views, in the order of the indices, or over the batches of one rank. A clip that cannot be read
    is left out and in `skipped`; where none can be, `refuses` says that it is an error."""

    def __init__(self, batches: "_EvalBatches", workers: int, rank: int, world_size: int, refuses: bool):
        self._batches, self._workers = batches, workers
        self._numbers, self._refuses = range(rank, len(batches), world_size), refuses and world_size == 1

    def __len__(self) -> int:
        return len(self._numbers)

    def __iter__(self) -> Iterator[Batch]:
        held = None
        for batch in load_ahead(self._batches, self._numbers, self._workers):
            if held is None or not held.ids:  # a batch of nothing but unreadable clips gives its list to the next one
                batch.skipped = (held.skipped if held else []) + batch.skipped
                held = batch
            elif not batch.ids:
                held.skipped += batch.skipped
            else:
                yield held
                held = batch
        if held is None:
            return
        if not held.ids and self._refuses:
            raise DataError(f"not one of {len(held.skipped)} views could be read; the first: {held.skipped[0][1]}")
        yield held


def train_loader(
    corpora: ShardIndex | Sequence[Corpus],
    window: Window,
    *,
    indices: Sequence[int] | None = None,
    global_batch: int,
    rank: int = 0,
    world_size: int = 1,
    seed: int = 0,
    start_step: int = 0,
    total_steps: int,
    workers: int = 0,
    streams: Streams = "both",
    augment: Augment | None = None,
    epoch_clips: int | None = None,
    repeats: int = 1,
) -> TrainLoader:
    """One rank's share of the global batches of the steps `start_step` to `total_steps`.

    The clips and views of a step depend on `seed` and the step alone: not on rank, world size, workers or where the run
    began. Of one index, `indices` are the positions of the clips that may be seen (all by default); several corpora are
    mixed as `Plan` says. Each clip that is decoded gives `repeats` views in the same batch, which share its window and
    have crops, gains and keys of their own; `global_batch` counts views. A clip that cannot be read is replaced by a
    later one of its corpus and listed in `Batch.skipped`.

    Raises SettingsError when the ranks cannot share the batch evenly, there are fewer clips than it holds, the window
    does not fit the shards, or corpora do not fit together.
    """
    if isinstance(corpora, ShardIndex):
        corpora = [Corpus(corpora, range(len(corpora.samples)) if indices is None else indices)]
    if global_batch % world_size:
        raise SettingsError(f"a global batch of {global_batch} clips cannot be shared evenly by {world_size} processes")
    if global_batch % (world_size * repeats):
        raise SettingsError(
            f"{repeats} views of each clip do not go evenly into the {global_batch // world_size} rows that each of "
            f"{world_size} processes has of a global batch of {global_batch}"
        )
    check_together(corpora)
    for corpus in corpora:
        check_window(corpus.index, window)
    found, owners = sources(corpora)
    plan = Plan(found, global_batch // repeats, seed, epoch_clips)
    batches = _TrainBatches(corpora, owners, window, plan, repeats, rank, world_size, streams, augment or Augment())
    return TrainLoader(batches, start_step, total_steps, workers)


def eval_loader(
    index: ShardIndex,
    window: Window,
    *,
    indices: Sequence[int] | None = None,
    windows_per_clip: int = 1,
    batch_size: int = 16,
    workers: int = 0,
    streams: Streams = "both",
    speech: bool = False,
    rank: int = 0,
    world_size: int = 1,
    or_none: bool = False,
) -> EvalLoader:
    """Views of the clips at `indices` (all by default), each at most `windows_per_clip` times, evenly spaced; with
    `speech` among the windows around it (`possible_starts`).

    Nothing is random: whole pictures, sound as it is. `Batch.clip` says which of the indices a row belongs to. Ranks
    take the batches in turn, which are the same for any number of them; views of a clip stay in one batch where it
    holds as many. Raises DataError where not one view can be read, unless `or_none`.
    """
    check_window(index, window)
    positions = list(range(len(index.samples)) if indices is None else map(int, indices))
    batches = _EvalBatches(index, window, positions, windows_per_clip, batch_size, streams, speech)
    return EvalLoader(batches, workers, rank, world_size, refuses=not or_none)


class _Decoded(NamedTuple):
    """A clip on its way to its views: its name in the run, number among all clips, turn, window and speaker."""

    name: str
    number: int
    turn: int
    view: View
    speaker: int


class _TrainBatches(Dataset):
    """Maps a step to the rank's batch, or to the error that ends the run."""

    def __init__(self, corpora, owners, window, plan, repeats, rank, world_size, streams, augment):
        self.corpora, self.window, self.plan, self.streams, self.augment = corpora, window, plan, streams, augment
        self.owners = owners  # source of the plan -> corpus
        self.repeats, self.rank, self.world_size = repeats, rank, world_size
        self.size = example(corpora).header["size"]
        self.first = [sum(len(other.index.samples) for other in corpora[:number]) for number in range(len(corpora))]

    def __getitem__(self, step: int) -> Batch | AffektError:
        epoch, slots = self.plan.slots(step, self.rank, self.world_size)
        skipped: list[tuple[str, str]] = []
        pictures, places = None, [None] * len(slots)
        if self.streams != "audio":
            pictures = empty_pictures(len(slots) * self.repeats, self.window, self.size)
            places = pictures[:: self.repeats]
        try:
            clips = [self._decode(epoch, slot, skipped, into) for slot, into in zip(slots, places, strict=True)]
        except AffektError as error:
            return error
        batch = self._collate([self._row(clip, repeat) for clip in clips for repeat in range(self.repeats)], pictures)
        batch.clip = torch.tensor([clip.number for clip in clips]).repeat_interleave(self.repeats)
        batch.epoch, batch.skipped = epoch, skipped
        return batch

    def blank(self) -> Batch:
        rows = self.plan.batch // self.world_size * self.repeats
        batch = self._collate([Row("", View(None, None, 0))] * rows)
        batch.clip = torch.full((rows,), -1)
        return batch

    def shards(self, step: int) -> list[int]:
        return self.plan.shards(step, self.rank, self.world_size)

    @property
    def indices(self) -> list[ShardIndex]:
        return [corpus.index for corpus in self.corpora]

    def _collate(self, rows: list[Row], pictures: np.ndarray | None = None) -> Batch:
        batch = collate(rows, self.window, self.size, self.streams, pictures)
        batch.repeats = self.repeats
        return batch

    def _decode(self, epoch: int, slot: int, skipped: list[tuple[str, str]], into: np.ndarray | None) -> _Decoded:
        """The clip planned for a slot or, each in turn, what may take its place. Those passed over go to `skipped`;
        pictures are decoded into their place in the batch."""
        tried = Counter()
        for source, turn, position in self.plan.candidates(epoch, slot):
            number = self.owners[source]
            corpus = self.corpora[number]
            sample = corpus.index.samples[position]
            name = corpus.name_of(sample.id)
            u = uniform(1, self.plan.seed, turn, name, "window")[0]
            try:
                sound = whole_sound(corpus.index, sample) if self.augment.windows == "speech" else None
                start = random_start(sample.duration, self.window, u, sound)
                view = decode_window(corpus.index, sample, self.window, start, self.streams, into)
                speaker = speaker_number(corpus.name, sample.meta.get("speaker"))
                return _Decoded(name, self.first[number] + position, turn, view, speaker)
            except SampleError as error:
                skipped.append((name, f"{error.cause}: {error}"))
                tried[skipped[-1][1]] += 1
                if tried.total() > MAX_REPLACEMENTS:
                    break
        raise DataError(f"clip {skipped[-1][0]} and all that could replace it are unreadable; {worst(tried)}")

    def _row(self, clip: _Decoded, repeat: int) -> Row:
        """One view. The first one of a clip is the same whether there are more or not."""
        key = (self.plan.seed, clip.turn, f"{clip.name}\0{repeat}" if repeat else clip.name)
        view, crop = clip.view, WHOLE_PICTURE
        if view.video is not None:
            view, crop = (
                view._replace(video=self.augment.pictures(view.video, *key)),
                self.augment.crop(self.size, *key),
            )
        gain, roll = self.augment.sound(view.audio_valid, *key)
        return Row(clip.name, view, crop, clip_key(*key), gain, roll, clip.speaker)


class _EvalBatches(Dataset):
    """Maps a number to a batch of views; clips that cannot be read are left out."""

    def __init__(self, index, window, positions, windows_per_clip, batch_size, streams, speech):
        self.index, self.window, self.positions, self.streams = index, window, positions, streams
        self.windows_per_clip, self.speech = windows_per_clip, speech
        self.views: list[list[tuple[int, int]]] = []  # of each batch: clips, and which windows of them
        for clip, position in enumerate(positions):
            count = len(window_starts(float(index.samples.duration[position]), window, windows_per_clip))
            views = [(clip, number) for number in range(count)]
            if self.views and len(self.views[-1]) + count <= batch_size:
                self.views[-1] += views
            else:
                self.views += [views[at : at + batch_size] for at in range(0, count, batch_size)]

    def __len__(self) -> int:
        return len(self.views)

    def __getitem__(self, number: int) -> Batch:
        rows, clips, skipped = [], [], []
        for clip, which in self.views[number]:
            sample = self.index.samples[self.positions[clip]]
            try:
                sound = whole_sound(self.index, sample) if self.speech else None
                starts = window_starts(sample.duration, self.window, self.windows_per_clip, sound)
                if which >= len(starts):  # around the speech there are fewer
                    continue
                view = decode_window(self.index, sample, self.window, starts[which], self.streams)
            except SampleError as error:
                skipped.append((sample.id, f"{error.cause}: {error}"))
                continue
            rows.append(Row(sample.id, view, key=clip_key(0, 0, sample.id)))
            clips.append(clip)
        batch = collate(rows, self.window, self.index.header["size"], self.streams)
        batch.skipped, batch.clip = skipped, torch.tensor(clips, dtype=torch.int64)
        return batch

    def shards(self, number: int) -> list[int]:
        return [int(self.index.samples.shard[self.positions[clip]]) for clip, _ in self.views[number]]

    @property
    def indices(self) -> list[ShardIndex]:
        return [self.index]
