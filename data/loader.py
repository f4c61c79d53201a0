"""Batches for training and evaluation: the order says which clips, and however many workers decode them."""

import multiprocessing
import signal
import time
from collections.abc import Iterator, Sequence
from typing import Annotated

import numpy as np
import torch
from pydantic import Field
from torch.utils.data import DataLoader, Dataset

from affekt.data.batch import WHOLE_PICTURE, Batch, Row, Streams, collate
from affekt.data.decode import View, Window, decode_window, random_start, window_starts
from affekt.data.errors import AffektError, DataError, SettingsError
from affekt.data.handover import POSSIBLE, Blocks, Sent
from affekt.data.machine import end_with_parent, keep_freed_memory
from affekt.data.order import Plan, clip_key, uniform
from affekt.data.remote import FetchAhead, RemoteFolder
from affekt.data.settings import Settings
from affekt.data.shards import SampleError, ShardIndex

# Where a crop may lie, in quarters of the room it has: the corners, the centre, the middles of the edges, and the four
# points between centre and corners (the 13 fixed offsets of multi-scale cropping; HiCMAE 1.1).
CROP_OFFSETS = ((0, 0), (4, 0), (0, 4), (4, 4), (2, 2), (0, 2), (4, 2), (2, 4), (2, 0), (1, 1), (3, 1), (1, 3), (3, 3))
MAX_REPLACEMENTS = 20
LOOK_SECONDS = 5
LOOK_BATCHES = 512  # how far fetching ahead looks for shards; few shards would let it look to the end of the run
WAIT_SECONDS = 600  # for one batch: a worker that hangs, as on a dead network disk, is an error and no endless wait


class Augment(Settings):
    """What is varied of a training view. Each draws numbers of its own, so that one can be turned off alone."""

    crop_scales: tuple[Annotated[float, Field(gt=0, le=1)], ...] = Field(
        (1.0, 0.875, 0.75, 0.66), min_length=1, description="sides of the crop; published: these four"
    )
    flip: bool = Field(False, description="mirror half of the views; off in HiCMAE")
    gain: bool = Field(True, description="loudness times Beta(10, 10) + 0.5; published: true, in tests too")
    roll: bool = Field(
        False,
        description="turn the sound round by a random time; not with contrast; published: by 0",
    )

    def crop(self, size: int, seed: int, epoch: int, clip: str) -> tuple[float, float, float, float]:
        """A box of whole pixels in a square picture, as x0, y0, x1, y1 in 0..1; mirrored when x0 > x1."""
        sides = [int(size * scale) for scale in self.crop_scales]
        pairs = [(w, h) for i, w in enumerate(sides) for j, h in enumerate(sides) if abs(i - j) <= 1]
        u = uniform(2, seed, epoch, clip, "crop")
        width, height = pairs[int(u[0] * len(pairs))]
        across, down = CROP_OFFSETS[int(u[1] * len(CROP_OFFSETS))]
        x, y = (size - width) // 4 * across, (size - height) // 4 * down
        left, right = x / size, (x + width) / size
        if self.flip and uniform(1, seed, epoch, clip, "flip")[0] < 0.5:
            left, right = right, left
        return left, y / size, right, (y + height) / size

    def sound(self, view: View, seed: int, epoch: int, clip: str) -> View:
        """The view with its sound shifted and multiplied. The 10th of 19 sorted uniform numbers has Beta(10, 10)."""
        audio = view.audio
        if audio is None:
            return view
        if self.roll:
            shift = int(uniform(1, seed, epoch, clip, "roll")[0] * view.audio_valid)
            audio = np.concatenate((np.roll(audio[: view.audio_valid], shift), audio[view.audio_valid :]))
        if self.gain:
            audio = audio * np.float32(np.sort(uniform(19, seed, epoch, clip, "gain"))[9] + 0.5)
        return view._replace(audio=audio)


class TrainLoader:
    """Iterates over the batches of one rank. `steps_per_epoch`, and `dropped_per_epoch` clips of each epoch's tail."""

    def __init__(self, batches: "_TrainBatches", start_step: int, total_steps: int, workers: int):
        self._batches, self._steps, self._workers = batches, range(start_step, total_steps), workers
        self.steps_per_epoch = batches.plan.steps_per_epoch
        self.dropped_per_epoch = batches.plan.dropped_per_epoch

    def __len__(self) -> int:
        return len(self._steps)

    def __iter__(self) -> Iterator[Batch]:
        return _load_ahead(self._batches, self._steps, self._workers)


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
    index: ShardIndex,
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
) -> TrainLoader:
    """One rank's share of the global batches of the steps `start_step` to `total_steps`.

    The clips and views of a step depend on `seed` and the step alone: not on rank, world size, workers or where the run
    began. `indices` are the positions of the clips that may be seen (all by default). A clip that cannot be read is
    replaced by a later one of the order and listed in `Batch.skipped`. Raises SettingsError when the ranks cannot share
    the batch evenly, there are fewer clips than it holds, or the window does not fit the shards.
    """
    if global_batch % world_size:
        raise SettingsError(f"a global batch of {global_batch} clips cannot be shared evenly by {world_size} processes")
    _check_window(index, window)
    positions = np.arange(len(index.samples)) if indices is None else np.asarray(indices, np.int64)
    plan = Plan(index.samples.shard, positions, global_batch, seed)
    batches = _TrainBatches(index, window, plan, rank, world_size, streams, augment or Augment())
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
    _check_window(index, window)
    positions = list(range(len(index.samples)) if indices is None else map(int, indices))
    return EvalLoader(_EvalBatches(index, window, positions, windows_per_clip, batch_size, streams), workers)


class _TrainBatches(Dataset):
    """Maps a step to the rank's batch, or to the error that ends the run."""

    def __init__(self, index, window, plan, rank, world_size, streams, augment):
        self.index, self.window, self.plan, self.streams, self.augment = index, window, plan, streams, augment
        self.rank, self.world_size = rank, world_size

    def __getitem__(self, step: int) -> Batch | AffektError:
        epoch, slots = self.plan.slots(step, self.rank, self.world_size)
        skipped: list[tuple[str, str]] = []
        try:
            rows = [self._row(epoch, slot, skipped) for slot in slots]
        except AffektError as error:
            return error
        batch = collate(rows, self.window, self.index.header["size"], self.streams)
        batch.epoch, batch.skipped = epoch, skipped
        return batch

    def shards(self, step: int) -> list[int]:
        return self.plan.shards(step, self.rank, self.world_size)

    def _row(self, epoch: int, slot: int, skipped: list[tuple[str, str]]) -> Row:
        for attempt, position in enumerate(self.plan.candidates(epoch, slot)):
            sample = self.index.samples[position]
            try:
                return self._view(epoch, sample)
            except SampleError as error:
                skipped.append((sample.id, f"{error.cause}: {error}"))
                if attempt == MAX_REPLACEMENTS:
                    break
        raise DataError(f"clip {skipped[-1][0]} and all that could replace it are unreadable; {skipped[-1][1]}")

    def _view(self, epoch: int, sample) -> Row:
        key = (self.plan.seed, epoch, sample.id)
        start = random_start(sample.duration, self.window, uniform(1, *key, "window")[0])
        view = self.augment.sound(decode_window(self.index, sample, self.window, start, self.streams), *key)
        crop = WHOLE_PICTURE if view.video is None else self.augment.crop(self.index.header["size"], *key)
        return Row(sample.id, view, crop, clip_key(*key))


class _EvalBatches(Dataset):
    """Maps a number to a batch of views; clips that cannot be read are left out."""

    def __init__(self, index, window, positions, windows_per_clip, batch_size, streams):
        self.index, self.window, self.positions, self.streams = index, window, positions, streams
        self.batch_size = batch_size
        self.views = [
            (clip, start)
            for clip, position in enumerate(positions)
            for start in window_starts(index.samples[position].duration, window, windows_per_clip)
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


class _Handed(Dataset):
    """The same batches in the worker's own blocks."""

    def __init__(self, batches: Dataset):
        self.batches, self.blocks = batches, Blocks()

    def __getitem__(self, number: int) -> Sent | AffektError:
        batch = self.batches[number]
        return self.blocks.send(batch) if isinstance(batch, Batch) else batch


def _check_window(index: ShardIndex, window: Window) -> None:
    for name in ("fps", "sample_rate"):
        if index.header[name] != getattr(window, name):
            raise SettingsError(
                f"{index.root}: prepared with {name} {index.header[name]}, the model's window has "
                f"{getattr(window, name)}; prepare the clips again with {name}={getattr(window, name)}"
            )


def _load_ahead(batches: "_TrainBatches | _EvalBatches", numbers: range, workers: int) -> Iterator[Batch]:
    """As `_load`; shards behind a url are fetched in the order of the batches, by a thread of this process."""
    index = batches.index
    if not isinstance(index.root, RemoteFolder):
        yield from _load(batches, numbers, workers)
        return

    def upcoming(done: int) -> Iterator[int]:
        for number in numbers[done : done + LOOK_BATCHES]:
            yield from batches.shards(number)

    with FetchAhead(index.root, index.header["shards"], upcoming) as ahead:
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
    items, opened = iter(loader), {}
    last = time.monotonic()
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
    return context


def _start_worker(_number: int) -> None:
    """Ctrl-C is for the parent to answer: it ends its workers. (torch limits each worker to one thread by itself.)

    Torch's own watch over the parent does not work here: the server that forked this worker would never go.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    end_with_parent()
    keep_freed_memory()  # of the batch before, for the next one
