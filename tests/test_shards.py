"""Shards: whole or not at all, readable by stock webdataset, and no damage goes unnoticed."""

import copy
import errno
import json
import os
import pickle
import random
import subprocess
import sys

import numpy as np
import pytest
import safetensors.numpy

from affekt.data import samples
from affekt.data.errors import DataError
from affekt.data.shard_writer import ShardWriter
from affekt.data.shards import SampleError, ShardIndex

HEADER = {"size": 8, "fps": 25, "sample_rate": 16000, "picture": "mjpeg", "prepare": {}}


def sample(name, **changes):
    record = {"id": name, "frames": 2, "samples": 10, "duration": 0.08, "flags": ["silent"], "source_sha256": "00"}
    record |= {"frame_sizes": [2, 3], "meta": {"speaker": "anna", "votes": {"happy": 3}}}
    return record | changes, {"mjpeg": b"aabbb", "flac": f"sound of {name}".encode(errors="replace")}


def write(folder, shards=(("a", "b"), ("c",))):
    writer = ShardWriter(folder)
    for number, names in enumerate(shards):
        writer.write_shard(number, [sample(name) for name in names])
    return writer.finish(HEADER)


def rewrite_index(folder, columns=(), **changes):
    """Other entries of the header, and other or more columns, written as any program could."""
    path = folder / "index.safetensors"
    with safetensors.safe_open(path, "np") as file:
        header = json.loads(file.metadata()["affekt"]) | changes
    columns = safetensors.numpy.load_file(path) | dict(columns)
    safetensors.numpy.save_file(columns, path, {"affekt": json.dumps(header)})


def test_what_was_written_is_read_back(tmp_path):
    index = write(tmp_path)
    assert [s.id for s in index.samples] == ["a", "b", "c"]
    assert [s.shard for s in index.samples] == [0, 0, 1]
    first = index.samples[0]
    assert (first.frames, first.samples, first.flags, first.frame_sizes) == (2, 10, ("silent",), (2, 3))
    assert first.meta == {"speaker": "anna", "votes": {"happy": 3}}
    assert first.has_video and first.has_audio
    assert [index.read(s, "flac") for s in index.samples] == [b"sound of a", b"sound of b", b"sound of c"]
    assert json.loads(index.read(first, "json"))["meta"]["speaker"] == "anna"
    names = ["index.safetensors", "shard-000000.tar", "shard-000001.tar"]
    assert sorted(path.name for path in tmp_path.iterdir()) == names
    index.verify()


def test_an_absent_stream_has_no_member(tmp_path):
    record, members = sample("quiet", samples=0)
    writer = ShardWriter(tmp_path)
    writer.write_shard(0, [(record, {"mjpeg": members["mjpeg"]})])
    index = writer.finish(HEADER)
    quiet = index.samples[0]
    assert quiet.has_video and not quiet.has_audio and set(quiet.members) == {"mjpeg", "json"}
    with pytest.raises(SampleError, match="quiet, member flac"):
        index.read(quiet, "flac")


def test_a_damaged_index_is_refused(tmp_path):
    write(tmp_path)
    path = tmp_path / "index.safetensors"
    content = path.read_bytes()
    start = 8 + int.from_bytes(content[:8], "little")
    places = random.Random(0).sample(range(start, len(content)), 50)
    flipped = [content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :] for place in places]
    for damaged in (
        *flipped,
        content[:-1],
        content[:start],
        content[:8],
        b"",
        bytes(100),
        b"\xff" * 100,
        content.replace(b"anna", b"otto", 1),
        content.replace(b"columns_sha256", b"columns_sha255", 1),
        content.replace(b'"U8"', b'"I8"', 1),
        content.replace(b'"shard"', b'"shart"', 1),
        content.replace(b"affekt-index", b"another-text", 1),
    ):
        assert damaged != content
        path.write_bytes(damaged)
        with pytest.raises(DataError, match=r"index\.safetensors"):
            ShardIndex.open(tmp_path)
    path.unlink()
    with pytest.raises(DataError, match="affekt prepare"):
        ShardIndex.open(tmp_path)


def test_columns_that_contradict_each_other_are_refused(tmp_path):
    """With a checksum that is right, as a program with a mistake would write them."""
    index = write(tmp_path)
    columns = safetensors.numpy.load_file(tmp_path / "index.safetensors")
    for name, values, told in (
        ("member_offset", columns["member_offset"] + 10**6, "clip a lies outside its shard"),
        ("member_size", np.full_like(columns["member_size"], 2**63 - 1), "clip a lies outside its shard"),
        ("frames", np.full_like(columns["frames"], 2**31 - 1), "another number of pictures"),
        ("shard", columns["shard"] + 5, "shard 6 of 2"),
        ("text_end", columns["text_end"][::-1].copy(), "text_end"),
        ("frame_end", columns["frame_end"] + 1, "frame_end"),
        ("frames", columns["frames"][:2], r"columns of \[2, 3\] clips"),
    ):
        changed = {**columns, name: values}
        rewrite_index(tmp_path, changed, columns_sha256=samples._digest(changed))
        with pytest.raises(DataError, match=told):
            ShardIndex.open(tmp_path)
    rewrite_index(tmp_path, columns, columns_sha256=index.header["columns_sha256"], shards=index.header["shards"][:1])
    with pytest.raises(DataError, match="damaged"):
        ShardIndex.open(tmp_path)


def test_an_index_cannot_point_outside_its_folder(tmp_path):
    index = write(tmp_path / "shards")
    (tmp_path / "secret").write_bytes(b"x" * 10240)
    entry = {**index.header["shards"][0], "name": "../secret", "bytes": 10240}
    rewrite_index(tmp_path / "shards", shards=[entry, index.header["shards"][1]])
    with pytest.raises(DataError, match="does not lie in the folder"):
        ShardIndex.open(tmp_path / "shards")


def test_versions(tmp_path):
    """A newer minor version may add entries to the header and columns."""
    write(tmp_path)
    rewrite_index(tmp_path, {"depth": np.arange(3)}, version="3.7", something_new=[1, 2])
    assert [s.id for s in ShardIndex.open(tmp_path).samples] == ["a", "b", "c"]
    rewrite_index(tmp_path, version="4.0", affekt="9.9")
    with pytest.raises(DataError, match=r"version 4\.0, this affekt reads 3\.x.*use the affekt.*9\.9"):
        ShardIndex.open(tmp_path)


def test_a_pickled_index_opens_the_folder_again(tmp_path):
    index = write(tmp_path)
    assert len(pickle.dumps(index)) < 1000
    again = copy.copy(index)  # takes the same way as unpickling in a worker
    assert again.samples == index.samples and again.read(again.samples[2], "flac") == b"sound of c"
    rewrite_index(tmp_path, prepare={"size": 9})
    with pytest.raises(DataError, match="changed while it was in use"):
        copy.copy(index)


OPEN = """
import sys
from affekt.data.shards import ShardIndex

def own():  # memory that no other process could share, in KiB; the first index brings the code along
    return sum(int(line.split()[1]) for line in open("/proc/self/smaps_rollup") if line.startswith("Private_Dirty"))

few, many = sys.argv[1:]
ShardIndex.open(few, check=False).samples[0]
before = own()
index = ShardIndex.open(many, check=False)
print(own() - before, index.samples[19_999].id)
"""


@pytest.mark.skipif(not os.path.exists("/proc/self/smaps_rollup"), reason="Linux tells how much memory is shared")
def test_a_large_index_is_mapped_and_not_read(tmp_path):
    """20,000 clips of 75 pictures: a loader's worker that opens them has next to nothing of its own to keep."""
    write(tmp_path / "few")
    (tmp_path / "many").mkdir()
    row = {"shard": 0, "members": {"mjpeg": (0, 9, "ab" * 16)}, "frames": 75, "samples": 0, "duration": 3.0}
    row |= {"flags": [], "frame_sizes": [3000] * 75, "source_sha256": "ab" * 32, "meta": {"speaker": "anna"}}
    path = tmp_path / "many" / "index.safetensors"
    samples.write_samples(path, {}, [[{**row, "id": f"clip{i}"} for i in range(20_000)]])
    command = [sys.executable, "-c", OPEN, str(tmp_path / "few"), str(tmp_path / "many")]
    kib, last = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
    assert last == "clip19999" and int(kib) * 1024 < path.stat().st_size / 4


def test_few_files_stay_open(tmp_path):
    index = write(tmp_path, [(f"clip{i}",) for i in range(60)])
    for s in [*index.samples, *index.samples]:
        assert index.read(s, "flac") == f"sound of {s.id}".encode()
    assert len(index._open) <= 32
    index.close()
    assert index.read(index.samples[0], "mjpeg") == b"aabbb"


def test_an_io_error_is_tried_again(tmp_path, monkeypatch):
    index = write(tmp_path)
    real, failures = os.pread, [2]

    def flaky(*args):
        if failures[0]:
            failures[0] -= 1
            raise OSError(errno.EIO, "Input/output error")
        return real(*args)

    monkeypatch.setattr(os, "pread", flaky)
    assert index.read(index.samples[0], "mjpeg") == b"aabbb"
    failures[0] = 3
    with pytest.raises(SampleError, match="Input/output error") as error:
        index.read(index.samples[0], "mjpeg")
    assert error.value.cause == "read"
