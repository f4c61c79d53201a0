"""Writing shards: whole or not at all, readable by stock webdataset, and nothing that would not be read back."""

import json
import os
import subprocess
import sys
import tarfile

import pytest
import webdataset

from affekt.data.errors import DataError
from affekt.data.shard_writer import ShardWriter, read_sidecar

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


def test_the_same_clips_give_the_same_bytes(tmp_path):
    one, two = write(tmp_path / "1"), write(tmp_path / "2")
    assert one.fingerprint == two.fingerprint
    for path in sorted((tmp_path / "1").iterdir()):
        assert path.read_bytes() == (tmp_path / "2" / path.name).read_bytes()
    with tarfile.open(tmp_path / "1" / "shard-000000.tar") as tar:
        for member in tar:
            assert (member.mtime, member.uname, member.gname, member.mode) == (0, "affekt", "affekt", 0o444)


def test_stock_webdataset_reads_the_shards(tmp_path):
    long = "x" * 200  # longer than a plain tar header holds
    write(tmp_path, (("a", "ünïcode name", long), ("c",)))
    urls = sorted(map(str, tmp_path.glob("*.tar")))
    found = {s["__key__"]: s for s in webdataset.WebDataset(urls, shardshuffle=False)}
    assert list(found) == ["a", "ünïcode name", long, "c"]
    for name, content in found.items():
        assert content["mjpeg"] == b"aabbb" and content["flac"] == f"sound of {name}".encode()
        assert json.loads(content["json"])["id"] == name


@pytest.mark.parametrize("name", ["", "a.b", "a/b", "..", "a\\b", "new\nline", "bell\x07", "x" * 201, "\ud800"])
def test_names_that_cannot_be_members_are_refused(tmp_path, name):
    with pytest.raises(DataError, match="cannot name a shard member"):
        ShardWriter(tmp_path).write_shard(0, [sample(name)])
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"frame_sizes": [2, 2]}, "do not add up"),
        ({"frames": 0}, "0 frames and 10 samples, members mjpeg"),
        ({"samples": 0}, "2 frames and 0 samples"),
        ({"meta": {"valence": float("nan")}}, "clip a: the record cannot be written as JSON"),
    ],
)
def test_records_that_do_not_fit_their_members_are_refused(tmp_path, changes, message):
    with pytest.raises(DataError, match=message):
        ShardWriter(tmp_path).write_shard(0, [sample("a", **changes)])


def test_unknown_members_are_refused(tmp_path):
    record, members = sample("a")
    with pytest.raises(DataError, match="members pyd are not of the format"):
        ShardWriter(tmp_path).write_shard(0, [(record, {**members, "pyd": b"\x80\x04N."})])


def test_an_id_occurs_once(tmp_path):
    with pytest.raises(DataError, match="an id occurs twice"):
        ShardWriter(tmp_path / "within").write_shard(0, [sample("a"), sample("a")])
    with pytest.raises(DataError, match="clip a is in shards 0 and 1"):
        write(tmp_path / "across", (("a",), ("b", "a")))


def test_a_full_disk_leaves_the_earlier_shards(tmp_path):
    """In a process of its own whose files may not grow beyond 64 KiB, which the kernel refuses as a full disk would."""
    script = f"""
import resource, signal
from affekt.data.errors import DataError
from affekt.data.shard_writer import ShardWriter
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (65536, 65536))
def clip(name, size):
    return ({{"id": name, "frames": 0, "samples": size, "duration": 1.0, "flags": [], "source_sha256": "",
             "frame_sizes": [], "meta": {{}}}}, {{"flac": bytes(size)}})
writer = ShardWriter({str(tmp_path)!r})
writer.write_shard(0, [clip("small", 1000)])
try:
    writer.write_shard(1, [clip("a", 40000), clip("b", 40000)])
except DataError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    assert done.stderr == ""
    assert "shard-000001.tar: cannot be written: File too large" in done.stdout
    assert "make room" in done.stdout
    assert sorted(path.name for path in tmp_path.iterdir()) == ["shard-000000.jsonl", "shard-000000.tar"]
    assert [row["id"] for row in read_sidecar(tmp_path, 0)[1]] == ["small"]


def test_an_error_in_the_middle_leaves_nothing(tmp_path):
    def samples():
        yield sample("a")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        ShardWriter(tmp_path).write_shard(0, samples())
    assert list(tmp_path.iterdir()) == []


def test_sidecars_tell_what_is_done(tmp_path):
    writer = ShardWriter(tmp_path)
    assert read_sidecar(tmp_path, 0) is None
    writer.write_shard(0, [sample("a")])
    entry, rows = read_sidecar(tmp_path, 0)
    assert entry["samples"] == 1 and rows[0]["id"] == "a"
    os.truncate(tmp_path / "shard-000000.tar", 512)
    assert read_sidecar(tmp_path, 0) is None
    writer.write_shard(0, [sample("a")])
    writer.write_shard(2, [sample("c")])
    with pytest.raises(DataError, match=r"shards \[1\] are not written yet"):
        writer.finish(HEADER)
    writer.write_shard(1, [])
    assert [s.id for s in writer.finish(HEADER).samples] == ["a", "c"]


def test_no_clip_at_all_is_an_error(tmp_path):
    writer = ShardWriter(tmp_path)
    writer.write_shard(0, [])
    with pytest.raises(DataError, match="not one usable clip"):
        writer.finish(HEADER)
