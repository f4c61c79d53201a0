"""Batches for training and evaluation: the order says which clips, and however many workers decode them."""

import multiprocessing
import signal
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from affekt.data.accounting import worst
from affekt.data.augment import Augment
from affekt.data.batch import WHOLE_PICTURE, Batch, Row, Streams, collate, empty_pictures
from affekt.data.decode import View, Window, decode_window, random_start, window_starts
from affekt.data.errors import AffektError, DataError, SettingsError
from affekt.data.handover import POSSIBLE, Blocks, Sent
from affekt.data.machine import check_shared_memory, end_with_parent, keep_freed_memory
from affekt.data.mixture import Corpus, check_together, check_window, example, places, sources
from affekt.data.order import Plan, clip_key, speaker_number, uniform
from affekt.data.remote import FetchAhead
from affekt.data.shards import SampleError, ShardIndex

MAX_REPLACEMENTS = 20
LOOK_SECONDS = 5
LOOK_BATCHES = 512  # how far fetching ahead looks for shards; few shards would let it look to the end of the run
WAIT_SECONDS = 600  # for one batch: a worker that hangs, as on a dead network disk, is an error and no endless wait


class TrainLoader:
    """Iterates over the batches of one rank. `steps_per_epoch`, and `dropped_per_epoch` clips of each epoch's tail."""

    def __init__(self, batches: "_TrainBatches", start_step: int, total_steps: int, workers: int):
        self._batches, self._steps, self._workers = batches, range(start_step, total_steps), workers
        self.steps_per_epoch = batches.plan.steps_per_epoch
        self.dropped_per_epoch = batches.plan.dropped_per_epoch
        self.shares = batches.plan.shares  # clips of each corpus in an epoch

    def __len__(self) -> int:
        return len(self._steps)

    def __iter__(self) -> Iterator[Batch]:
        return _load_ahead(self._batches, self._steps, self._workers)

    def blank(self) -> Batch:
        """As many rows as a batch has, of no clip and without a stream: what a rank without data may go on with."""
        return self._batches.blank()


class EvalLoader:
    """Iterates over all views, in the order of the indices. A clip that cannot be read is left out and in `skipped`."""

    def __init__(self, batches: "_EvalBatches", workers: int):
        self._batches, self._workers = batches, workers

    def __len__(self) -> int:
        return len(self._batches)

    def __iter__(self) -> Iterator[Batch]:
        held = None
        for batch in _load_ahead(self._batches, range(len(self)), self._workers):
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
        if not held.ids:
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
    plan = Plan(sources(corpora), global_batch // repeats, seed, epoch_clips)
    batches = _TrainBatches(corpora, window, plan, repeats, rank, world_size, streams, augment or Augment())
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
) -> EvalLoader:
    """Views of the clips at `indices` (all by default), each at most `windows_per_clip` times, evenly spaced.

    Nothing is random: whole pictures, sound as it is. `Batch.clip` says which of the indices a row belongs to.
    """
    check_window(index, window)
    positions = list(range(len(index.samples)) if indices is None else map(int, indices))
    return EvalLoader(_EvalBatches(index, window, positions, windows_per_clip, batch_size, streams), workers)


class _Decoded(NamedTuple):
    """A clip on its way to its views: its name in the run, number among all clips, turn, window and speaker."""

    name: str
    number: int
    turn: int
    view: View
    speaker: int


class _TrainBatches(Dataset):
    """Maps a step to the rank's batch, or to the error that ends the run."""

    def __init__(self, corpora, window, plan, repeats, rank, world_size, streams, augment):
        self.corpora, self.window, self.plan, self.streams, self.augment = corpora, window, plan, streams, augment
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
        for number, turn, position in self.plan.candidates(epoch, slot):
            corpus = self.corpora[number]
            sample = corpus.index.samples[position]
            name = corpus.name_of(sample.id)
            start = random_start(sample.duration, self.window, uniform(1, self.plan.seed, turn, name, "window")[0])
            try:
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
        crop = WHOLE_PICTURE if clip.view.video is None else self.augment.crop(self.size, *key)
        gain, roll = self.augment.sound(clip.view.audio_valid, *key)
        return Row(clip.name, clip.view, crop, clip_key(*key), gain, roll, clip.speaker)


class _EvalBatches(Dataset):
    """Maps a number to a batch of views; clips that cannot be read are left out."""

    def __init__(self, index, window, positions, windows_per_clip, batch_size, streams):
        self.index, self.window, self.positions, self.streams = index, window, positions, streams
        self.batch_size = batch_size
        self.views = [
            (clip, start)
            for clip, position in enumerate(positions)
            for start in window_starts(float(index.samples.duration[position]), window, windows_per_clip)
        ]

    def __len__(self) -> int:
        return -(-len(self.views) // self.batch_size)

    def __getitem__(self, number: int) -> Batch:
        rows, clips, skipped = [], [], []
        for clip, start in self.views[number * self.batch_size : (number + 1) * self.batch_size]:
            sample = self.index.samples[self.positions[clip]]
            try:
                view = decode_window(self.index, sample, self.window, start, self.streams)
            except SampleError as error:
                skipped.append((sample.id, f"{error.cause}: {error}"))
                continue
            rows.append(Row(sample.id, view, key=clip_key(0, 0, sample.id)))
            clips.append(clip)
        batch = collate(rows, self.window, self.index.header["size"], self.streams)
        batch.skipped, batch.clip = skipped, torch.tensor(clips, dtype=torch.int64)
        return batch

    def shards(self, number: int) -> list[int]:
        views = self.views[number * self.batch_size : (number + 1) * self.batch_size]
        return [int(self.index.samples.shard[self.positions[clip]]) for clip, _ in views]

    @property
    def indices(self) -> list[ShardIndex]:
        return [self.index]


class _Handed(Dataset):
    """The same batches in the worker's own blocks."""

    def __init__(self, batches: Dataset):
        self.batches, self.blocks = batches, Blocks()

    def __getitem__(self, number: int) -> Sent | AffektError:
        batch = self.batches[number]
        return self.blocks.send(batch) if isinstance(batch, Batch) else batch


def _load_ahead(batches: "_TrainBatches | _EvalBatches", numbers: range, workers: int) -> Iterator[Batch]:
    """As `_load`; shards behind a url are fetched in the order of the batches, by a thread of this process."""
    remote = places(batches.indices)
    if not any(remote):
        yield from _load(batches, numbers, workers)
        return

    def upcoming(done: int) -> Iterator[int]:
        for number in numbers[done : done + LOOK_BATCHES]:
            yield from batches.shards(number)

    with FetchAhead(remote, upcoming) as ahead:
        for batch in _load(batches, numbers, workers):
            ahead.step += 1  # it counts batches from the first of `numbers`
            yield batch


def _load(batches: Dataset, numbers: range, workers: int) -> Iterator[Batch]:
    """The batches of these numbers in turn, each made as a whole by one worker."""
    loader = DataLoader(
        _Handed(batches) if workers and POSSIBLE else batches,
        batch_size=None,
        sampler=numbers,
        num_workers=workers,
        multiprocessing_context=_worker_context() if workers else None,
        worker_init_fn=_start_worker,
        pin_memory=torch.cuda.is_available(),
        generator=torch.Generator(),  # of its own, or it would draw from the model's
        timeout=LOOK_SECONDS if workers else 0,  # it looks after its workers at a timeout alone
    )
    items, opened, last = iter(loader), {}, time.monotonic()
    while True:
        try:
            item = next(items)
            if isinstance(item, Sent):
                item = item.open(opened)
        except StopIteration:
            return
        except (RuntimeError, OSError, EOFError) as error:
            # torch says RuntimeError; a worker that goes while its batch is being handed over is a broken connection.
            if workers and "timed out" in str(error):
                if time.monotonic() - last < WAIT_SECONDS:
                    continue
                raise DataError(
                    f"no batch came within {WAIT_SECONDS} s: a loader worker hangs, or the disk under the shards does"
                ) from error
            if not workers or (isinstance(error, RuntimeError) and "exited unexpectedly" not in str(error)):
                raise
            raise DataError(f"a loader worker died ({error}); if it ran out of memory, use fewer workers") from error
        if isinstance(item, AffektError):
            raise item
        yield item
        last = time.monotonic()


def _worker_context() -> multiprocessing.context.BaseContext:
    """Workers are forked from a small process without threads: forking this one could copy a lock that torch holds."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    check_shared_memory(context)
    return context


def _start_worker(_number: int) -> None:
    """Ctrl-C is for the parent to answer: it ends its workers. (torch limits each worker to one thread by itself.)

    Torch's own watch over the parent does not work here: the server that forked this worker would never go.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    end_with_parent()
    keep_freed_memory()  # of the batch before, for the next one
