"""Hostile archives, members and lists of shards are read as data or refused: nothing runs, nothing is written.

Everything is read in one other process, whose interpreter reports each file it opens to write, each link, process,
connection and unpickled class (`sys.addaudithook`), and whose memory is measured.
"""

import gzip
import hashlib
import io
import json
import os
import pickle
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy
from xxhash import xxh3_128_digest

from affekt.data import samples
from affekt.data.errors import SettingsError
from affekt.data.shard_writer import ShardWriter
from affekt.data.shards import ShardIndex

READER = """
import json, os, pickle, sys, time
import affekt.data.loader, affekt.data.remote, affekt.pretrain.mixture
from affekt.data.decode import Window
from affekt.data.errors import AffektError
from affekt.data.loader import eval_loader, train_loader
from affekt.data.shards import ShardIndex

MODULES = ("socket.", "subprocess.", "shutil.", "pickle.find_class")
CALLS = "link symlink mkdir chmod chown rename remove mkfifo system exec fork forkpty posix_spawn".split()
events = []

def hook(event, arguments):
    written = event == "open" and arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
    if written or event.startswith(MODULES) or event.partition("os.")[2] in CALLS:
        events.append(f"{event} {arguments}")

def peak():  # KiB
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM"))

window = Window(num_frames=2, frame_stride=1, mel_frames=4)
ShardIndex.open(sys.argv[1])
before = peak()
sys.addaudithook(hook)
open(os.devnull, "w").close()
os.system("true")
pickle.loads(pickle.dumps(Window))
assert [event.split()[0] for event in events] == ["open", "os.system", "pickle.find_class"], events  # it sees them
for place in map(json.loads, sys.stdin):
    events.clear()
    began, seen, told = time.perf_counter(), [], ""
    try:
        index = ShardIndex.open(place)
        index.verify()
        seen = [name for batch in eval_loader(index, window) for name in batch.ids]
        next(iter(train_loader(index, window, global_batch=1, total_steps=1)))
    except AffektError as error:
        told = f"{type(error).__name__}: {error}"
    print(json.dumps([seen, told, events, time.perf_counter() - began, peak() - before]), flush=True)
"""


class Payload:
    """Unpickled, it makes a file."""

    def __init__(self, canary: Path):
        self.canary = canary

    def __reduce__(self):
        return os.system, (f"touch {self.canary}",)


@pytest.fixture(scope="module")
def shards(tmp_path_factory, encode_clip) -> Path:
    writer, rng = ShardWriter(tmp_path_factory.mktemp("shards")), np.random.default_rng(0)
    writer.write_shard(
        0, [encode_clip("good", rng.integers(0, 256, (3, 16, 16, 3), np.uint8), rng.uniform(-1, 1, 2000))]
    )
    return writer.finish({"size": 16, "fps": 25, "sample_rate": 16000, "picture": "mjpeg", "prepare": {}}).root


@pytest.fixture(scope="module")
def read(shards, tmp_path_factory):
    """`read(places)` in that process: [ids delivered, error told, what it did] of each, within the limits of time and
    memory, and with the switches of other packages at their worst."""
    cwd = tmp_path_factory.mktemp("elsewhere")
    environment = {**os.environ, "AFFEKT_CACHE": str(cwd / "cache"), "OMP_NUM_THREADS": "1"}
    environment |= {"WDS_SECURE": "0", "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD": "1"}
    command, pipes = [sys.executable, "-c", READER, str(shards)], {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    process = subprocess.Popen(command, cwd=cwd, env=environment, text=True, bufsize=1, **pipes)

    def ask(places: list) -> list[list]:
        found = []
        for place in places:
            process.stdin.write(json.dumps(str(place)) + "\n")
            *answer, seconds, kib = json.loads(process.stdout.readline())
            assert seconds < 10 and kib < 256 * 1024, place
            found.append(answer)
        assert not list(cwd.iterdir())
        return found

    yield ask
    process.stdin.close()
    assert process.wait(timeout=60) == 0


def member(name: str, content: bytes = b"hostile", **changes) -> tuple[tarfile.TarInfo, bytes]:
    info = tarfile.TarInfo(name)
    info.size = len(content)
    for key, value in changes.items():
        setattr(info, key, value)
    return info, content


def link(name: str, target: str, kind: bytes = tarfile.SYMTYPE) -> tuple[tarfile.TarInfo, bytes]:
    return member(name, b"", type=kind, linkname=target)


def hostile_archives(outside: Path) -> dict[str, list[tuple[tarfile.TarInfo, bytes]]]:
    long = "/".join(["d" * 240] * 16)
    bomb = gzip.compress(bytes(64 * 2**20))
    return {
        "dots": [member("../escape"), member("../../escape.flac"), member("good/../../escape")],
        "absolute": [member(f"{outside}/escape")],
        "symlink": [link("good", str(outside)), member("good/escape")],
        "hard link": [link("good.flac", "/etc/passwd", tarfile.LNKTYPE), member("good.flac")],
        "chain of links": [link("a", long), link(f"{long}/b", "../" * 16), link("c", "a/b"), member("c/escape")],
        "empty link": [link("", ""), link("good", "", tarfile.LNKTYPE), member("good")],
        "devices": [
            member("good.mjpeg", b"", type=kind, devmajor=1, devminor=5) for kind in (tarfile.CHRTYPE, tarfile.BLKTYPE)
        ],
        "fifo": [member("good.flac", b"", type=tarfile.FIFOTYPE)],
        "setuid": [member("good.sh", b"#!/bin/sh\ntouch escape\n", mode=0o4777)],
        "gzip bomb": [member("good.flac.gz", bomb), member("good.json.gz", bomb)],
        "duplicates": [member("good.flac", b"one"), member("good.flac", b"two"), member("good.json", b"{}")],
        "pax overrides": [
            member("good.flac", pax_headers={"path": "../escape", "size": "1", "linkpath": str(outside)})
        ],
    }


def with_members(shards: Path, folder: Path, members, size: int | None = None) -> Path:
    """A copy of the shards whose tar also has these members, and an index that says so."""
    shutil.copytree(shards, folder)
    path, extra = folder / "shard-000000.tar", io.BytesIO()
    with tarfile.open(fileobj=extra, mode="w", format=tarfile.PAX_FORMAT) as tar:
        for info, content in members:
            tar.addfile(info, io.BytesIO(content))
    content = bytearray(extra.getvalue())
    if size is not None:
        content[124:136] = b"%011o\0" % size
    path.write_bytes(path.read_bytes().rstrip(b"\0").ljust(path.stat().st_size, b"\0") + bytes(content))
    return relisted(folder)


def relisted(folder: Path) -> Path:
    """The index made to fit the tar that lies there now."""
    index = folder / "index.safetensors"
    with safetensors.safe_open(index, "np") as file:
        header = json.loads(file.metadata()["affekt"])
    content = (folder / "shard-000000.tar").read_bytes()
    header["shards"][0] |= {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    columns = safetensors.numpy.load_file(index)
    safetensors.numpy.save_file(columns, index, {"affekt": json.dumps(header)})
    return folder


def state_of(folder: Path) -> dict[str, tuple[int, int]]:
    return {str(path): (path.lstat().st_mode, path.lstat().st_size) for path in folder.rglob("*")}


def test_hostile_archives_are_read_as_data(shards, read, tmp_path):
    archives = {**hostile_archives(tmp_path / "outside"), "huge": [member("good.flac")]}
    folders = [
        with_members(shards, tmp_path / name, members, size=8**11 - 1 if name == "huge" else None)
        for name, members in archives.items()
    ]
    (tmp_path / "outside").mkdir()
    bare = [Path(shutil.copytree(folder, tmp_path / "bare" / folder.name)) for folder in folders]
    for folder in bare:
        (folder / "index.safetensors").unlink()
    before = state_of(tmp_path)
    found = read([*folders, *bare])
    assert state_of(tmp_path) == before
    for (seen, told, events), name in zip(found, archives):
        assert (seen, told, events) == (["good"], "", []), name
    for seen, told, events in found[len(folders) :]:
        assert not seen and "No such file" in told and not events


def test_no_member_is_ever_unpickled(shards, read, tmp_path):
    canary = tmp_path / "canary"
    payload = pickle.dumps(Payload(canary))
    array = io.BytesIO()
    np.save(array, np.array([Payload(canary)], object))
    arrays = io.BytesIO()
    np.savez(arrays, a=np.array([Payload(canary)], object))
    contents = {"npy": array.getvalue(), "npz": arrays.getvalue(), "pkl.gz": gzip.compress(payload)}
    kinds = ["pyd", "pkl", "pickle", "pth", "pt", "npy", "npz", "cbor", "mp", "PYD", "Pkl", "pkl.gz", "pyd.gz"]
    beside = [member(f"good.{kind}", contents.get(kind, payload)) for kind in kinds]
    folders = [with_members(shards, tmp_path / "beside", beside)]
    for stream in ("flac", "mjpeg", "json"):  # a pickle under the name of a member, its checksum in the index
        folder = Path(shutil.copytree(shards, tmp_path / stream))
        index = ShardIndex.open(folder)
        offset, size, _ = index.samples[0].members[stream]
        content = payload.ljust(size, b".")
        with open(folder / "shard-000000.tar", "r+b") as file:
            file.seek(offset)
            file.write(content[:size])
        folders.append(relisted(with_digest(folder, stream, content[:size])))
    load = "import pickle, sys; pickle.load(sys.stdin.buffer)"
    subprocess.run([sys.executable, "-c", load], input=payload, check=True)
    assert canary.exists()  # so it would have run
    canary.unlink()
    found = read(folders)
    assert not canary.exists() and not any(events for *_, events in found)
    assert [seen for seen, *_ in found] == [["good"], [], [], ["good"]]
    assert all("cannot be decoded" in found[i][1] for i in (1, 2))


def with_digest(folder: Path, stream: str, content: bytes) -> Path:
    path = folder / "index.safetensors"
    header, _, _ = samples.open_samples(path)
    columns = {name: np.array(values) for name, values in safetensors.numpy.load_file(path).items()}
    digest = xxh3_128_digest(content)
    columns["member_xxh3"][0, samples.MEMBERS.index(stream)] = np.frombuffer(digest, np.uint8)
    header["columns_sha256"] = samples._digest(columns)
    safetensors.numpy.save_file(columns, path, {"affekt": json.dumps(header)})
    return folder


def test_a_list_of_shards_starts_nothing(shards, read, tmp_path):
    canary = tmp_path / "canary"
    places = [f"pipe:touch {canary}", f"pipe:touch {canary} |", f"|touch {canary}", f"; touch {canary}", "-"]
    places += [
        f"$(touch {canary})",
        f"`touch {canary}`",
        f"x; touch {canary}",
        "{0..999999999}",
        "shard-{0..999999999}.tar",
    ]
    places += ["ftp://127.0.0.1/x", "ssh://127.0.0.1/x", f"{shards}::{shards}", "data:,x", f"file://{shards}::pipe:x"]
    for (seen, told, events), place in zip(read(places), places, strict=True):
        assert not seen and told and not events, (place, told, events)
    assert not canary.exists() and not list(tmp_path.iterdir())
    with pytest.raises(SettingsError, match="other protocols, chained urls and commands are refused"):
        ShardIndex.open(places[0])
