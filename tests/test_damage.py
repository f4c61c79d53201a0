"""Damaged shards: whatever is done to a tar, no clip comes out of it that is not the one that went in, and no clip is
lost whose own bytes are whole. Against the tar readers of the field, which end in silence or hand out half samples."""

import errno
import io
import json
import os
import random
import shutil
import tarfile
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy
import torch

from affekt.data import samples
from affekt.data.accounting import Accounting
from affekt.data.decode import Window
from affekt.data.errors import DataError
from affekt.data.inspect.look import check_shard
from affekt.data.loader import eval_loader, train_loader
from affekt.data.shard_writer import ShardWriter
from affekt.data.shards import ShardIndex

WINDOW = Window(num_frames=2, frame_stride=1, mel_frames=4)
HEADER = {"size": 16, "fps": 25, "sample_rate": 16000, "picture": "mjpeg", "prepare": {}}
CLIPS = 20  # of the first shard; the second has 5


@pytest.fixture(scope="module")
def whole(tmp_path_factory, encode_clip) -> ShardIndex:
    rng, writer = np.random.default_rng(0), ShardWriter(tmp_path_factory.mktemp("whole"))
    for shard, count in enumerate((CLIPS, 5)):
        clips = [
            encode_clip(
                f"clip{shard}{number:02d}", rng.integers(0, 256, (3, 16, 16, 3), np.uint8), rng.uniform(-1, 1, 2000)
            )
            for number in range(count)
        ]
        writer.write_shard(shard, clips)
    return writer.finish(HEADER)


@pytest.fixture(scope="module")
def views(whole) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    return delivered(whole)[0]


@pytest.fixture
def folder(whole, tmp_path) -> Path:
    return Path(shutil.copytree(whole.root, tmp_path / "shards"))


def delivered(index):
    """What the loader makes of an index: name -> picture and sound, and the skipped clips with their causes."""
    found, skipped = {}, {}
    for batch in eval_loader(index, WINDOW, batch_size=25):
        assert batch.has_video.all() and batch.has_audio.all()  # these clips have both, so none may come with one
        found |= {name: (batch.video[i], batch.audio[i]) for i, name in enumerate(batch.ids)}
        skipped |= dict(batch.skipped)
    return found, skipped


def assert_whole(found, views):
    for name, (video, audio) in found.items():
        assert torch.equal(video, views[name][0]) and torch.equal(audio, views[name][1])


DAMAGES = {  # what becomes of a shard's bytes, given one member of it
    "a byte of a header's checksum": lambda c, m, rng: flipped(c, m.offset + rng.randrange(148, 154), rng),
    "a header of garbage": lambda c, m, rng: c[: m.offset] + rng.randbytes(512) + c[m.offset + 512 :],
    "a header of zeros": lambda c, m, rng: c[: m.offset] + bytes(512) + c[m.offset + 512 :],
    "a cut in a header": lambda c, m, rng: c[: m.offset + rng.randrange(1, 512)],
    "a cut between members": lambda c, m, rng: c[: m.offset],
    "a cut in a payload": lambda c, m, rng: c[: m.offset_data + rng.randrange(m.size)],
    "a bit of a payload": lambda c, m, rng: flipped(c, m.offset_data + rng.randrange(m.size), rng),
}


def flipped(content: bytes, place: int, rng: random.Random) -> bytes:
    return content[:place] + bytes([content[place] ^ 1 << rng.randrange(8)]) + content[place + 1 :]


@pytest.mark.parametrize("kind", DAMAGES)
def test_damage_is_detected_and_costs_the_clips_it_touches(whole, views, folder, kind):
    seed = random.randrange(2**32)
    print(f"seed {seed}")
    rng = random.Random(seed)
    path = folder / "shard-000000.tar"
    content = path.read_bytes()
    with tarfile.open(path) as tar:
        members = tar.getmembers()
    assert len(members) == 3 * CLIPS
    running = ShardIndex.open(folder)  # by a run that had begun before the damage
    detected = 0
    for number in range(CLIPS):
        damaged = DAMAGES[kind](content, members[3 * number + rng.randrange(3)], rng)
        path.write_bytes(damaged)
        try:
            ShardIndex.open(folder).verify()
        except DataError as error:
            assert str(path) in str(error)
            detected += 1
        assert "checksum differs" in check_shard(path, running.header["shards"][0])  # as `inspect --verify` does
        found, skipped = delivered(running)
        untouched = {
            sample.id
            for sample in whole.samples
            if sample.shard == 1
            or all(
                damaged[offset : offset + size] == content[offset : offset + size]
                for member, (offset, size, _) in sample.members.items()
                if member != "json"  # a copy of what the index says, for other programs
            )
        }
        assert found.keys() == untouched and skipped.keys() == views.keys() - untouched
        assert_whole(found, views)
        if "header" in kind and "cut" not in kind:
            assert len(found) == len(views)  # where a tar reader would have ended
        if "bit" in kind:
            assert len(skipped) <= 1
    assert detected == CLIPS


@pytest.mark.parametrize("kind", ["missing", "empty", "cut", "longer", "replaced", "renamed"])
def test_a_shard_that_is_not_the_one_is_refused_on_opening(folder, kind):
    one, two = (folder / f"shard-00000{number}.tar" for number in (0, 1))
    {
        "missing": two.unlink,
        "empty": lambda: os.truncate(two, 0),
        "cut": lambda: os.truncate(two, two.stat().st_size - 1),
        "longer": lambda: os.truncate(two, two.stat().st_size + 512),
        "replaced": lambda: shutil.copy(one, two),
        "renamed": lambda: two.rename(folder / "shard-000009.tar"),
    }[kind]()
    with pytest.raises(DataError, match=r"shard-000001\.tar: .*(No such file|bytes, written were).*again"):
        ShardIndex.open(folder)


def test_a_shard_of_the_same_size_is_no_substitute(folder, views, tmp_path, encode_clip):
    """Opening cannot tell without reading all of it; reading can, clip by clip, and so can `verify`."""
    shutil.copy(folder / "shard-000000.tar", folder / "shard-000007.tar")  # what the index does not list is not read
    assert delivered(ShardIndex.open(folder))[0].keys() == views.keys()
    path = folder / "shard-000001.tar"
    content = path.read_bytes()
    path.write_bytes(content[512:] + content[:512])
    index = ShardIndex.open(folder)
    found, skipped = delivered(index)
    assert_whole(found, views)
    assert skipped.keys() == {name for name in views if name.startswith("clip1")}
    assert all(cause.startswith("checksum: ") for cause in skipped.values())
    with pytest.raises(DataError, match=r"shard-000001\.tar: checksum differs"):
        index.verify()


@pytest.mark.parametrize("kind", ["deleted", "emptied", "input/output error"])
def test_a_shard_that_goes_while_it_is_read(folder, views, monkeypatch, kind):
    """The run goes on with the other one, every batch is full, and every clip is accounted for."""
    index, path, read = ShardIndex.open(folder), folder / "shard-000001.tar", os.pread
    loader = train_loader(index, WINDOW, global_batch=5, total_steps=10, seed=1)
    batches, accounting = [], Accounting()
    for step, batch in enumerate(loader):
        accounting.add(batch, step)
        batches.append(batch)
        if step == 1:
            if kind == "deleted":
                index.close()  # as the workers of a resumed run
                path.unlink()
            elif kind == "emptied":
                os.truncate(path, 0)
            else:
                inode = path.stat().st_ino

                def failing(descriptor, *args, inode=inode):
                    if os.fstat(descriptor).st_ino == inode:
                        raise OSError(errno.EIO, "Input/output error")
                    return read(descriptor, *args)

                monkeypatch.setattr(os, "pread", failing)
    assert [len(batch.ids) for batch in batches] == [5] * 10
    lost = {name for batch in batches for name, cause in batch.skipped if cause.startswith("read: ")}
    assert lost == {name for name in views if name.startswith("clip1")}
    assert all(not name.startswith("clip1") for batch in batches[2:] for name in batch.ids)
    assert accounting.used == 50 and accounting.planned == 50 + accounting.skipped.total()
    assert set(accounting.causes) == {"read"}


def rewritten(folder: Path, change) -> ShardIndex:
    """The index with other columns, and a checksum that is right: as a program with a mistake would write it."""
    path = folder / "index.safetensors"
    header, _, _ = samples.open_samples(path)
    columns = {name: np.array(values) for name, values in safetensors.numpy.load_file(path).items()}
    change(columns)
    header = {**header, "columns_sha256": samples._digest(columns)}
    safetensors.numpy.save_file(columns, path, {"affekt": json.dumps(header)})
    return ShardIndex.open(folder)


@pytest.mark.parametrize("member", ["mjpeg", "flac"])
def test_a_half_clip_is_never_delivered(folder, views, member):
    """The index says that clip 3 has both streams, and one of them is not there."""

    def lose(columns):
        columns["member_offset"][3, samples.MEMBERS.index(member)] = -1

    found, skipped = delivered(rewritten(folder, lose))
    assert found.keys() == views.keys() - {"clip003"}
    assert_whole(found, views)
    assert skipped["clip003"].startswith("read: ") and "the clip has none" in skipped["clip003"]


def test_members_in_any_order_make_whole_clips(whole, views, folder):
    """A tar packed by hand, all pictures before all sounds, between members of other kinds."""
    path = folder / "shard-000000.tar"
    content = path.read_bytes()
    ours = [sample for sample in whole.samples if sample.shard == 0]
    with tarfile.open(path, "w") as tar:
        for member in ("flac", "txt", "mjpeg", "json"):
            for sample in reversed(ours):
                offset, size, _ = sample.members.get(member, (0, 9, ""))
                info = tarfile.TarInfo(f"{sample.id}.{member}")
                info.size = size
                tar.addfile(info, io.BytesIO(content[offset : offset + size]))
    with tarfile.open(path) as tar:
        places = {info.name: info.offset_data for info in tar}

    def move(columns):
        for row, sample in enumerate(ours):
            for kind, name in enumerate(samples.MEMBERS):
                if name in sample.members:
                    columns["member_offset"][row, kind] = places[f"{sample.id}.{name}"]

    header, _, _ = samples.open_samples(folder / "index.safetensors")
    header["shards"][0]["bytes"] = path.stat().st_size
    columns = safetensors.numpy.load_file(folder / "index.safetensors")
    safetensors.numpy.save_file(columns, folder / "index.safetensors", {"affekt": json.dumps(header)})
    found, skipped = delivered(rewritten(folder, move))
    assert found.keys() == views.keys() and not skipped
    assert_whole(found, views)


def test_tars_without_an_index_are_not_read(folder):
    (folder / "index.safetensors").unlink()
    with pytest.raises(DataError, match=r"No such file.*affekt prepare"):
        ShardIndex.open(folder)
