"""Batches that go from worker to trainer in shared blocks: the same bytes, never overwritten in use, few blocks."""

import dataclasses
import gc
import multiprocessing
import os
import resource
import sys
from dataclasses import fields
from pathlib import Path

import pytest
import torch

from affekt.data import handover
from affekt.data.batch import Batch
from affekt.data.decode import Window
from affekt.data.errors import DataError
from affekt.data.handover import Blocks, Taken
from affekt.data.loader import eval_loader, train_loader

pytestmark = pytest.mark.skipif(not handover.POSSIBLE, reason="batches go by torch's way here")
WINDOW = Window(num_frames=4, frame_stride=6, mel_frames=64)


@pytest.fixture(scope="module")
def index(tiny_shards):
    return tiny_shards(12, streams="mixed", seconds=1.4, shards=3, size=32)


def make(seed: int, clips: int = 3, side: int = 8) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    video = torch.randint(0, 256, (clips, 2, side, side, 3), dtype=torch.uint8, generator=generator)
    audio, crop = torch.randn(clips, 11, generator=generator), torch.rand(clips, 4, generator=generator)
    there = torch.rand(clips, generator=generator) < 0.5
    numbers = torch.randint(-(2**62), 2**62, (clips,), generator=generator)
    ids = [f"clip{seed}_{i}" for i in range(clips)]
    return Batch(ids, video, audio, there, ~there, numbers, crop, numbers + 1, seed, [("bad", "decode: it is")])


def same(a: Batch, b: Batch) -> bool:
    pairs = [(getattr(a, f.name), getattr(b, f.name)) for f in fields(Batch)]
    return all(
        x.dtype == y.dtype and torch.equal(x, y) if isinstance(x, torch.Tensor) else x == y and type(x) is type(y)
        for x, y in pairs
    )


def handed(batch: Batch, blocks: Blocks, taken: Taken) -> Batch:
    """As the loader does it for each batch."""
    taken.give_back()
    return blocks.send(batch).open(taken)


def blocks_of(pid: int) -> set[int]:
    """Inodes of the blocks that a process has open or mapped."""
    found = set()
    for entry in Path(f"/proc/{pid}/fd").iterdir():
        try:
            if "affekt-batch" in os.readlink(entry):
                found.add(entry.stat().st_ino)
        except FileNotFoundError:
            continue  # the listing's own
    return found


@pytest.mark.parametrize("clips", [3, 1, 0])
def test_a_batch_arrives_as_it_was(clips):
    batch = make(0, clips)
    assert same(Blocks().send(batch).open(Taken()), batch)
    batch.video = batch.clip = None
    batch.audio = batch.audio[:, ::2]  # not contiguous
    assert same(Blocks().send(batch).open(Taken()), batch)


def test_a_block_is_free_when_the_last_tensor_of_its_batch_is_gone():
    blocks, taken, before = Blocks(), Taken(), blocks_of(os.getpid())
    first = handed(make(1), blocks, taken)
    kept = first.video[1].numpy()  # a view of a view, of another library
    del first
    gc.collect()
    others = [handed(make(seed), blocks, taken) for seed in (2, 3)]
    assert len(blocks_of(os.getpid()) - before) == 3
    assert (kept == make(1).video[1].numpy()).all()
    assert all(same(batch, make(seed)) for seed, batch in zip((2, 3), others, strict=True))
    del kept, others
    gc.collect()
    for seed in range(4, 20):
        assert same(handed(make(seed), blocks, taken), make(seed))
    assert len(blocks_of(os.getpid()) - before) == 3


def test_no_code_runs_when_a_batch_goes():
    """A Ctrl-C that came in it would be printed and forgotten, and the run go on."""
    batch, calls = handed(make(1), Blocks(), Taken()), []
    sys.setprofile(lambda frame, event, _: calls.append(frame.f_code.co_qualname) if event == "call" else None)
    try:
        del batch
    finally:
        sys.setprofile(None)
    assert calls == []


def test_a_larger_batch_takes_the_place_of_a_free_block_that_is_too_small():
    blocks, taken, before = Blocks(), Taken(), blocks_of(os.getpid())
    for side in (8, 64, 16, 128):
        batch = make(side, side=side)
        assert same(handed(batch, blocks, taken), batch)
    assert len(blocks_of(os.getpid()) - before) == 1


def test_blocks_that_are_no_longer_needed_go_on_both_sides():
    blocks, taken, before = Blocks(), Taken(), blocks_of(os.getpid())
    kept = [handed(make(seed), blocks, taken) for seed in range(12)]
    assert len(blocks_of(os.getpid()) - before) == len(taken.blocks) == 12
    two = kept[:2]
    del kept
    gc.collect()
    for seed in range(handover.IDLE + 12):
        assert same(handed(make(seed), blocks, taken), make(seed))
    assert len(taken.blocks) == 3 and len(blocks_of(os.getpid()) - before) == 3  # two are kept, one goes to and fro
    assert all(same(batch, make(seed)) for seed, batch in enumerate(two))


def test_a_block_that_is_free_is_not_looked_at_again():
    """A worker may take it at once, before the trainer has gone through its list."""
    blocks, taken = Blocks(), Taken()
    first = blocks.send(make(1)).open(taken)
    ((memory, block),) = taken._in_use
    sent = []

    class Eager:
        def __setitem__(self, place, value):
            block[place] = value
            sent.append(blocks.send(make(2)))

    taken._in_use = [(memory, Eager())]
    del first
    taken.give_back()
    held = sent[0].open(taken)
    taken.give_back()
    blocks.send(make(3)).open(taken)
    assert len(sent) == 1 and same(held, make(2))


def test_pinning_copies_and_frees_the_block(monkeypatch):
    monkeypatch.setattr(torch.Tensor, "pin_memory", torch.Tensor.clone)  # which needs a GPU
    blocks, before = Blocks(), blocks_of(os.getpid())
    pinned = [blocks.send(make(seed)).pin_memory() for seed in range(5)]
    assert all(same(batch, make(seed)) for seed, batch in enumerate(pinned))
    assert len(blocks_of(os.getpid()) - before) == 1


def test_too_many_open_files_are_not_called_a_dead_worker():
    sent = Blocks().send(make(1))
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (3, limits[1]))
    try:
        with pytest.raises(DataError, match=r"Too many open files.*ulimit"):
            sent.open(Taken())
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    with pytest.raises(DataError, match="a loader worker died"):
        dataclasses.replace(sent, pid=2**22 + 1).open(Taken())


@pytest.mark.parametrize("workers", [1, 2])
def test_batches_that_are_kept_stay_what_they_were(index, workers):
    options = {"global_batch": 4, "total_steps": 12, "seed": 3}
    straight = list(train_loader(index, WINDOW, **options))
    kept = list(train_loader(index, WINDOW, **options, workers=workers))  # all of them, while the worker goes on
    assert len(kept) == 12 and all(map(same, straight, kept))
    views = {"windows_per_clip": 2, "batch_size": 5}
    assert all(map(same, eval_loader(index, WINDOW, **views), list(eval_loader(index, WINDOW, **views, workers=1))))


def test_a_worker_takes_few_blocks_for_many_batches(index):
    batches = iter(train_loader(index, WINDOW, global_batch=2, total_steps=80, workers=1))
    others = set(multiprocessing.active_children())
    next(batches)
    (worker,) = set(multiprocessing.active_children()) - others
    taken = set()
    for _ in range(70):
        next(batches)
        taken.add(len(blocks_of(worker.pid)))
    assert 1 <= max(taken) <= 5  # two made ahead, one in the queue's hands, one in ours, one in work
