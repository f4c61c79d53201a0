"""The loader: the same global batches for every world and worker count, resumable, exact about what it skips."""

import copy
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from affekt.data.accounting import Accounting
from affekt.data.augment import Augment
from affekt.data.batch import Batch
from affekt.data.decode import Window, decode_window
from affekt.data.errors import DataError, SettingsError
from affekt.data.loader import eval_loader, train_loader
from affekt.data.shard_writer import ShardWriter
from affekt.data.shards import ShardIndex

WINDOW = Window(num_frames=4, frame_stride=6, mel_frames=64)
TENSORS = ("video", "audio", "has_video", "has_audio", "audio_valid", "crop", "keys")


@pytest.fixture(scope="module")
def index(tiny_shards):
    return tiny_shards(22, streams="mixed", seconds=1.4, shards=4, size=32)


@pytest.fixture(scope="module")
def uneven(tmp_path_factory, encode_clip):
    writer = ShardWriter(tmp_path_factory.mktemp("uneven"))
    for shard, count in enumerate((0, 1, 37, 100)):
        clips = [encode_clip(f"clip{shard}x{i}", None, np.full(4000, 0.1), speaker="s") for i in range(count)]
        writer.write_shard(shard, clips)
    return writer.finish({"size": 16, "fps": 25, "sample_rate": 16000, "picture": "mjpeg", "prepare": {}})


def load(index, **changes):
    arguments = {"global_batch": 4, "total_steps": 11, "seed": 5, "workers": 0}
    return train_loader(index, WINDOW, **(arguments | changes))


def assert_equal(one: Batch, two: Batch):
    assert one.ids == two.ids and one.epoch == two.epoch and one.skipped == two.skipped
    for name in TENSORS:
        a, b = getattr(one, name), getattr(two, name)
        assert (a is None and b is None) or torch.equal(a, b), name


def joined(shares: list[Batch]) -> Batch:
    """The global batch from the ranks' shares."""
    whole = copy.copy(shares[0])
    whole.ids = [name for share in shares for name in share.ids]
    whole.skipped = [skip for share in shares for skip in share.skipped]
    for name in TENSORS:
        setattr(whole, name, torch.cat([getattr(share, name) for share in shares]))
    return whole


@pytest.fixture(scope="module")
def straight(index):
    return list(load(index))


def test_what_a_batch_holds(index, straight):
    batch = straight[0]
    assert batch.video.shape == (4, 4, 32, 32, 3) and batch.video.dtype == torch.uint8
    assert batch.audio.shape == (4, WINDOW.audio_samples) and batch.audio.dtype == torch.float32
    assert batch.crop.shape == (4, 4) and batch.keys.dtype == batch.audio_valid.dtype == torch.int64
    samples = {sample.id: sample for sample in index.samples}
    seen = set()
    for batch in straight:
        for i, name in enumerate(batch.ids):
            seen.add((samples[name].has_video, samples[name].has_audio))
            assert bool(batch.has_video[i]) == samples[name].has_video == bool(batch.video[i].any())
            assert bool(batch.has_audio[i]) == samples[name].has_audio == bool(batch.audio[i].any())
            assert batch.audio_valid[i] == (WINDOW.audio_samples if samples[name].has_audio else 0)
            assert batch.audio_frames(64)[i] == (64 if samples[name].has_audio else 0)
    assert seen == {(True, True), (True, False), (False, True)}


def test_every_clip_once_per_epoch_but_the_tail(index, straight):
    loader = load(index)
    assert (len(loader), loader.steps_per_epoch, loader.dropped_per_epoch) == (11, 5, 2)
    assert [batch.epoch for batch in straight] == [0] * 5 + [1] * 5 + [2]
    epochs = [[name for batch in straight[e * 5 : e * 5 + 5] for name in batch.ids] for e in (0, 1)]
    for names in epochs:
        assert len(set(names)) == len(names) == 20
    assert epochs[0] != epochs[1]
    assert len({int(key) for batch in straight for key in batch.keys}) == 44  # a key per clip and epoch


@pytest.mark.parametrize("world_size", [2, 4])
def test_any_world_sees_the_same_global_batches(index, straight, world_size):
    ranks = [list(load(index, rank=rank, world_size=world_size)) for rank in range(world_size)]
    for step, batch in enumerate(straight):
        assert_equal(joined([rank[step] for rank in ranks]), batch)


@pytest.mark.parametrize(("world_size", "workers"), [(1, 3), (2, 3), (4, 0)])
def test_uneven_shards_and_fewer_of_them_than_readers(uneven, world_size, workers):
    """Shards of 0, 1, 37 and 100 clips: every rank has as many batches, and together they have every clip once."""
    ranks = [
        list(load(uneven, rank=rank, world_size=world_size, global_batch=12, workers=workers if rank == 0 else 0))
        for rank in range(world_size)
    ]
    assert [len(batches) for batches in ranks] == [11] * world_size
    names = [name for batches in ranks for batch in batches for name in batch.ids]
    assert len(names) == len(set(names)) == 132
    views = [name for batch in eval_loader(uneven, WINDOW, batch_size=50, workers=workers) for name in batch.ids]
    assert views == [sample.id for sample in uneven.samples]


@pytest.mark.parametrize("start", [1, 5, 7, 11])
def test_a_resumed_run_repeats_the_straight_one(index, straight, start):
    again = list(load(index, start_step=start))
    assert len(again) == 11 - start
    for one, two in zip(straight[start:], again):
        assert_equal(one, two)


def test_workers_change_nothing(index, straight):
    """Also on resume with another world, from a process whose torch threads are awake."""
    torch.randn(500, 500) @ torch.randn(500, 500)
    ranks = [list(load(index, start_step=3, rank=rank, world_size=2, workers=2)) for rank in (0, 1)]
    assert len(ranks[0]) == 8
    for step, batch in enumerate(straight[3:]):
        assert_equal(joined([rank[step] for rank in ranks]), batch)


def test_another_seed_gives_other_batches(index, straight):
    other = next(iter(load(index, seed=6)))
    assert other.ids != straight[0].ids and not torch.equal(other.keys, straight[0].keys)


def test_views_do_not_depend_on_the_company(index, straight):
    """A clip's view is the same when other clips are left out or the batch has another size."""
    views = {(b.epoch, name): (b, i) for b in straight for i, name in enumerate(b.ids)}
    chosen = range(3, 22)
    compared = 0
    for batch in load(index, global_batch=3, indices=chosen, total_steps=12):
        for i, name in enumerate(batch.ids):
            assert name not in ("clip0000", "clip0001", "clip0002")
            if (batch.epoch, name) in views:
                other, j = views[batch.epoch, name]
                assert all(torch.equal(getattr(batch, t)[i], getattr(other, t)[j]) for t in TENSORS)
                compared += 1
    assert compared > 20


def test_the_loader_leaves_torchs_random_state_alone(index):
    torch.manual_seed(3)
    before = torch.get_rng_state()
    list(load(index, total_steps=2))
    assert torch.equal(torch.get_rng_state(), before)


def test_augmentation_is_that_of_the_clip(index):
    plain = Augment(crop_scales=(1.0,), gain=False)
    varied = list(load(index, total_steps=5))
    for one, two in zip(varied, load(index, total_steps=5, augment=plain)):
        assert one.ids == two.ids and torch.equal(one.video, two.video) and torch.equal(one.keys, two.keys)
        assert torch.equal(two.crop, torch.tensor([[0.0, 0, 1, 1]] * 4))
        gains = (one.audio.abs().amax(1) / two.audio.abs().amax(1))[one.has_audio]
        assert ((gains > 0.5) & (gains < 1.5)).all()
        assert torch.allclose(one.audio[one.has_audio], two.audio[one.has_audio] * gains[:, None], atol=1e-4)
    assert len({tuple(row.tolist()) for batch in varied for row in batch.crop}) > 3


@pytest.mark.parametrize("streams", ["video", "audio"])
def test_one_stream_alone(index, streams):
    for batch in load(index, streams=streams, total_steps=3):
        absent, present = ("audio", "video") if streams == "video" else ("video", "audio")
        assert getattr(batch, absent) is None and not getattr(batch, f"has_{absent}").any()
        assert getattr(batch, present) is not None and getattr(batch, f"has_{present}").any()
        assert batch.to("cpu").ids == batch.ids


def test_settings_that_cannot_be(index):
    with pytest.raises(SettingsError, match="8 clips cannot be shared evenly by 3"):
        load(index, global_batch=8, world_size=3)
    with pytest.raises(SettingsError, match="22 clips do not fill a global batch of 23"):
        load(index, global_batch=23)
    with pytest.raises(SettingsError, match="prepared with fps 25, the model's window has 30"):
        train_loader(index, Window(fps=30), global_batch=1, total_steps=1)


def test_evaluation_sees_every_window_once_in_order(index):
    chosen = [7, 3, 4, 20]
    for workers in (0, 2):
        loader = eval_loader(index, WINDOW, indices=chosen, windows_per_clip=3, batch_size=5, workers=workers)
        batches = list(loader)
        assert len(loader) == len(batches) == 4, "views of a clip stay together"
        assert [c for b in batches for c in b.clip.tolist()] == [0, 0, 0, 1, 1, 1, 2, 2, 2, 3, 3, 3]
        assert [i for b in batches for i in b.ids] == [index.samples[p].id for p in chosen for _ in range(3)]
        second = batches[1]
        assert all(torch.equal(b.crop, torch.tensor([[0.0, 0, 1, 1]]).expand(len(b.ids), 4)) for b in batches)
        view = decode_window(index, index.samples[3], WINDOW, 0.0)  # clip 3 has both streams
        assert torch.equal(second.video[0], torch.from_numpy(view.video))
        assert torch.equal(second.audio[0], torch.from_numpy(view.audio))
        last = decode_window(index, index.samples[3], WINDOW, 16 / 25)  # 0.76 s end with the clip
        assert torch.equal(second.video[2], torch.from_numpy(last.video))
        how = {"indices": chosen, "windows_per_clip": 3, "batch_size": 7, "workers": workers, "world_size": 3}
        ranks = [list(eval_loader(index, WINDOW, rank=rank, **how)) for rank in range(3)]
        assert [[b.ids for b in batches] for batches in ranks] == [
            [[index.samples[p].id for p in pair for _ in range(3)] for pair in pairs]
            for pairs in ([(7, 3)], [(4, 20)], [])
        ]
    whole = eval_loader(index, WINDOW, batch_size=4)
    assert [name for batch in whole for name in batch.ids] == [sample.id for sample in index.samples]


def damage(index, names, folder) -> ShardIndex:
    """A copy of the shards in which a byte of each member of these clips is changed."""
    shutil.copytree(index.root, folder)
    for sample in index.samples:
        if sample.id in names:
            with open(folder / index.shard_name(sample), "r+b") as file:
                for offset, size, _ in sample.members.values():
                    file.seek(offset + size // 2)
                    byte = file.read(1)[0]
                    file.seek(offset + size // 2)
                    file.write(bytes([byte ^ 0x10]))
    return ShardIndex.open(folder)


def test_bad_clips_are_replaced_alike_for_every_world_and_counted(index, tmp_path):
    bad = {"clip0002", "clip0009", "clip0017"}
    damaged = damage(index, bad, tmp_path / "damaged")
    straight, accounting = list(load(damaged)), Accounting()
    for batch in straight:
        assert len(batch.ids) == 4 and not bad & set(batch.ids)
        assert all(name in bad and cause.startswith("checksum: ") for name, cause in batch.skipped)
        accounting.add(batch)
    assert {name for batch in straight for name, _ in batch.skipped} == bad
    assert accounting.used == 44 and accounting.planned == accounting.used + accounting.skipped.total()
    for world_size in (2, 4):
        ranks = [list(load(damaged, rank=rank, world_size=world_size)) for rank in range(world_size)]
        for step, batch in enumerate(straight):
            assert_equal(joined([rank[step] for rank in ranks]), batch)
    good = list(load(index))
    for one, two in zip(good, straight):  # all other rows stay what they were
        for i, name in enumerate(one.ids):
            assert name in bad or (two.ids[i] == name and torch.equal(one.video[i], two.video[i]))


def test_nothing_readable_stops_with_the_cause(index, tmp_path):
    damaged = damage(index, {sample.id for sample in index.samples}, tmp_path / "damaged")
    for workers in (0, 1):
        with pytest.raises(DataError, match="all that could replace it are unreadable; checksum 21\\n") as error:
            list(load(damaged, workers=workers))
        assert str(error.value).count("/shard-00000") == 5 and "Traceback" not in str(error.value)
    with pytest.raises(DataError, match="not one of 22 views could be read"):
        list(eval_loader(damaged, WINDOW, batch_size=3))


def test_evaluation_leaves_bad_clips_out(index, tmp_path):
    bad = {f"clip{i:04d}" for i in (0, 1, 5, 9, 10, 11, 19, 20, 21)}
    damaged = damage(index, bad, tmp_path / "damaged")
    batches = list(eval_loader(damaged, WINDOW, batch_size=2))
    assert all(batch.ids for batch in batches)
    assert {name for batch in batches for name, _ in batch.skipped} == bad
    seen = [c for batch in batches for c in batch.clip.tolist()]
    assert seen == [i for i in range(22) if f"clip{i:04d}" not in bad]
    assert [i for batch in batches for i in batch.ids] == [index.samples[c].id for c in seen]


def test_a_worker_that_dies_is_an_error_not_a_hang(index):
    """Killed from outside in the middle of a run, as by an out-of-memory killer."""
    others = set(multiprocessing.active_children())  # of a test before this one, on their way out
    batches = iter(load(index, workers=1, total_steps=200))
    next(batches)
    (worker,) = set(multiprocessing.active_children()) - others
    os.kill(worker.pid, signal.SIGKILL)
    with pytest.raises(DataError, match="a loader worker died"):
        list(batches)


def test_a_worker_that_hangs_is_an_error_not_a_hang(tmp_path):
    """As in a read from a network disk that is gone."""
    (tmp_path / "run.py").write_text("""
import time
from affekt.data import ahead
from affekt.data.errors import DataError
class Hangs:
    def __getitem__(self, number):
        time.sleep(10**6)
if __name__ == "__main__":
    ahead.WAIT_SECONDS = 3
    try:
        next(ahead.load(Hangs(), range(5), workers=1))
    except DataError as error:
        print(error)
""")
    done = subprocess.run([sys.executable, tmp_path / "run.py"], capture_output=True, text=True, timeout=200)
    assert "no batch came within 3 s" in done.stdout, done.stderr


@pytest.mark.parametrize("ending", [signal.SIGKILL, signal.SIGINT])
def test_no_worker_outlives_its_run(index, tmp_path, ending):
    """Killed outright, or by Ctrl-C in a terminal, which reaches the whole group."""
    (tmp_path / "run.py").write_text(f"""
import multiprocessing
from affekt.data.decode import Window
from affekt.data.loader import train_loader
from affekt.data.shards import ShardIndex
if __name__ == "__main__":
    index = ShardIndex.open({str(index.root)!r})
    batches = iter(train_loader(index, Window(num_frames=4), global_batch=2, total_steps=10**6, workers=2))
    next(batches)
    print(*(child.pid for child in multiprocessing.active_children()), flush=True)
    for batch in batches:
        pass
""")
    command = [sys.executable, tmp_path / "run.py"]
    with open(tmp_path / "stderr", "w") as stderr:
        run = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=stderr, text=True, start_new_session=True)
    workers = [int(pid) for pid in run.stdout.readline().split()]
    assert len(workers) == 2
    os.killpg(run.pid, ending) if ending == signal.SIGINT else os.kill(run.pid, ending)
    run.wait(timeout=120)
    deadline = time.monotonic() + 60
    while any(Path(f"/proc/{pid}").exists() for pid in workers) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not [pid for pid in workers if Path(f"/proc/{pid}").exists()]
    if ending == signal.SIGINT:  # a worker may say that a connection broke; the interrupt is the run's alone
        said = (tmp_path / "stderr").read_text().splitlines()
        assert said.count("KeyboardInterrupt") == 1, said
