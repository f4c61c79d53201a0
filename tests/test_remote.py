"""Shards behind urls: the same batches as from the folder, whatever the network and the other processes do."""

import email.utils
import errno
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import safetensors.numpy
import torch

from affekt.data import remote
from affekt.data.batch import Batch
from affekt.data.decode import Window
from affekt.data.errors import DataError, SettingsError
from affekt.data.loader import eval_loader, train_loader
from affekt.data.mixture import Corpus
from affekt.data.remote import RemoteFolder, locate
from affekt.data.shards import ShardIndex

WINDOW = Window(num_frames=4, frame_stride=6, mel_frames=64)


class Server(ThreadingHTTPServer):
    """Serves a folder on loopback. `faults[name]` is done to the next requests of that file, one each; `asked` lists
    (name, offset, status); `ranges` says whether it knows them; `drip` is the wait in s between kilobytes."""

    daemon_threads = True

    def __init__(self, folder: Path):
        super().__init__(("127.0.0.1", 0), Handler)
        self.folder, self.faults, self.asked, self.ranges, self.drip = folder, {}, [], True, 0.0
        self.url = f"http://127.0.0.1:{self.server_address[1]}/data"
        threading.Thread(target=self.serve_forever, args=(0.02,), daemon=True).start()

    def handle_error(self, request, client_address):
        pass  # a client that hangs up is part of the tests

    def counted(self) -> Counter:
        return Counter(name for name, _, _ in self.asked)


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self):
        name = Path(self.path).name
        path = self.server.folder / name
        faults = self.server.faults.get(name, [])
        fault = faults.pop(0) if faults else None
        wanted = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", "")) if self.server.ranges else None
        start = int(wanted[1]) if wanted else 0
        if fault is None and not path.is_file():
            fault = 404
        if isinstance(fault, int):
            return self._answer(name, start, fault, b"")
        modified = email.utils.formatdate(path.stat().st_mtime, usegmt=True)
        if self.headers.get("If-Modified-Since") == modified:
            return self._answer(name, start, 304, b"")
        content = path.read_bytes()[start:]
        if fault == "wrong":
            content = content[:-1] + bytes([content[-1] ^ 1])
        self._answer(name, start, 206 if wanted else 200, content, fault, modified)

    def _answer(self, name, start, status, content, fault=None, modified=None):
        self.server.asked.append((name, start, status))
        if fault == "slow":
            time.sleep(1.2)
        self.send_response(status)
        if status != 304:
            self.send_header("Content-Length", str(len(content)))
        if modified:
            self.send_header("Last-Modified", modified)
        if status == 206:
            self.send_header("Content-Range", f"bytes {start}-{start + len(content) - 1}/{start + len(content)}")
        self.end_headers()
        sent = content[: len(content) // 2] if fault in ("cut", "late cut") else content
        for at in range(0, len(sent), 1024 if self.server.drip else max(1, len(sent))):
            self.wfile.write(sent[at : at + 1024] if self.server.drip else sent)
            time.sleep(self.server.drip)
        if fault == "late cut":
            time.sleep(1)  # the half has been read by then; a client may drop what it holds when a connection breaks
        self.close_connection = fault in ("cut", "late cut")

    def log_message(self, *_):
        pass


@pytest.fixture(scope="module")
def index(tiny_shards):
    return tiny_shards(22, streams="mixed", seconds=1.4, shards=6, size=32)


@pytest.fixture
def server(index):
    with Server(index.root) as server:
        yield server
        server.shutdown()


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch) -> Path:
    """An empty cache, and a network that fails faster."""
    folder = tmp_path / "cache"
    monkeypatch.setenv("AFFEKT_CACHE", str(folder))
    monkeypatch.delenv("AFFEKT_CACHE_GIB", raising=False)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr(remote, "FIRST_WAIT_SECONDS", 0.01)
    monkeypatch.setattr(remote, "LOOK_SECONDS", 0.02)
    return folder


def limit_to(monkeypatch, size: float) -> None:
    monkeypatch.setenv("AFFEKT_CACHE_GIB", repr(size / 2**30))


def names(index) -> list[str]:
    return [shard["name"] for shard in index.header["shards"]]


def files(cache: Path, suffix: str = "") -> list[Path]:
    return [path for path in cache.iterdir() if re.fullmatch(rf"[0-9a-f]{{64}}{suffix}", path.name)]


def read_all(index: ShardIndex) -> list[bytes]:
    return [index.read(sample, member) for sample in index.samples for member in sample.members]


def assert_same(one: list[Batch], two: list[Batch]) -> None:
    assert len(one) == len(two) > 0
    for a, b in zip(one, two):
        assert vars(a).keys() == vars(b).keys()
        for key, value in vars(a).items():
            other = getattr(b, key)
            assert torch.equal(value, other) if isinstance(value, torch.Tensor) else value == other, key


def batches(index, workers=0):
    train = train_loader(index, WINDOW, global_batch=4, total_steps=11, seed=5, workers=workers)
    return list(train), list(eval_loader(index, WINDOW, batch_size=5, workers=workers))


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_from_a_url_are_those_from_the_folder(index, server, workers):
    """And the index and every shard cross the network once, though reader, workers and fetching ahead all want them."""
    there = ShardIndex.open(server.url)
    assert there.fingerprint == index.fingerprint and str(there.root) == server.url
    for mine, theirs in zip(batches(there, workers), batches(index)):
        assert_same(mine, theirs)
    assert server.counted() == Counter(["index.safetensors", *names(index)])
    there.verify()


def test_batches_from_a_file_url(index):
    for mine, theirs in zip(batches(ShardIndex.open(f"file://{index.root}")), batches(index)):
        assert_same(mine, theirs)


@pytest.mark.parametrize("ranges", [True, False])
@pytest.mark.parametrize("faults", [[500, 503, 429], ["late cut"], ["cut", 500, "cut"], ["wrong"], ["slow"]], ids=str)
def test_passing_faults_are_overcome(index, server, monkeypatch, faults, ranges):
    if faults == ["slow"]:
        monkeypatch.setattr(remote, "READ_SECONDS", 0.6)
    server.ranges = ranges
    server.faults = {name: list(faults) for name in ("index.safetensors", names(index)[1])}
    assert read_all(ShardIndex.open(server.url)) == read_all(index)
    requests = server.counted()[names(index)[1]]
    assert requests > 1 if faults == ["slow"] else requests == len(faults) + 1  # a busy machine is slow by itself
    size = index.header["shards"][1]["bytes"]
    offsets = [offset for name, offset, _ in server.asked if name == names(index)[1]]
    if faults == ["late cut"] and ranges:
        assert offsets == [0, size // 2]
    if not ranges:
        assert set(offsets) == {0}


@pytest.mark.parametrize("fault", [404, 403, 401, 410])
def test_a_permanent_error_is_not_tried_again_and_names_the_url(index, server, cache, fault):
    server.faults = {names(index)[3]: [fault] * 9}
    with pytest.raises(DataError, match=rf"{server.url}/{names(index)[3]}: cannot be fetched.*check the url"):
        read_all(ShardIndex.open(server.url))
    assert server.counted()[names(index)[3]] == 1 and not files(cache, r"\.partial")
    with pytest.raises(DataError, match=r"elsewhere/index\.safetensors: cannot be fetched: FileNotFoundError"):
        server.folder = server.folder / "elsewhere"
        ShardIndex.open(f"{server.url}/elsewhere")


def test_wrong_content_is_never_taken(index, server, cache):
    server.faults = {names(index)[0]: ["wrong", "wrong"]}
    with pytest.raises(DataError, match=rf"{names(index)[0]}: twice other content than the index states"):
        read_all(ShardIndex.open(server.url))
    assert len(files(cache)) == 1 and not files(cache, r"\.partial")  # the index alone
    assert read_all(ShardIndex.open(server.url)) == read_all(index)


def test_a_server_that_stays_away_is_given_up(index, server):
    server.faults = {"index.safetensors": [500] * 99}
    with pytest.raises(
        DataError, match=r"index\.safetensors: cannot be fetched, 8 attempts in a row failed: .*500.*run the"
    ):
        ShardIndex.open(server.url)
    assert len(server.asked) == remote.ATTEMPTS


def test_an_index_is_fetched_again_when_it_has_changed_alone(index, server, tmp_path, tiny_shards):
    """Shards of the same names in another corpus do not take the place of the first one's."""
    other = tiny_shards(12, seconds=1.0, shards=6, size=32)
    assert names(other) == names(index)
    server.folder = Path(shutil.copytree(index.root, tmp_path / "served"))
    first = ShardIndex.open(server.url)
    wanted = read_all(first)
    assert ShardIndex.open(server.url).fingerprint == index.fingerprint
    assert [status for name, _, status in server.asked if name == "index.safetensors"] == [200, 304]

    shutil.copytree(other.root, server.folder, dirs_exist_ok=True)
    os.utime(server.folder / "index.safetensors", (10**9, 10**9))
    assert read_all(ShardIndex.open(server.url)) == read_all(other)
    assert read_all(first) == wanted == read_all(index)
    assert server.counted() == Counter(["index.safetensors"] * 3 + names(index) * 2)


READER = """
import sys
from affekt.data.shards import ShardIndex
index = ShardIndex.open(sys.argv[1])
print("open", flush=True)
for sample in index.samples:
    for member in sample.members:
        index.read(sample, member)
print("read", flush=True)
"""


def reader(server) -> subprocess.Popen:
    return subprocess.Popen([sys.executable, "-c", READER, server.url], stdout=subprocess.PIPE, text=True)


def test_two_processes_fetch_each_shard_once(index, server):
    server.drip = 0.01  # so that they meet
    readers = [reader(server) for _ in range(2)]
    assert [process.communicate(timeout=100)[0] for process in readers] == ["open\nread\n"] * 2
    assert server.counted() == Counter(["index.safetensors"] * 2 + names(index))
    assert [status for name, _, status in server.asked if name == "index.safetensors"].count(200) == 1


def test_a_reader_killed_in_the_middle_of_a_shard_leaves_nothing_half(index, server, cache):
    process = reader(server)
    server.faults = {}
    assert process.stdout.readline() == "open\n" or process.wait()
    server.drip = 0.05
    wanted = {shard["sha256"] for shard in index.header["shards"]}
    killed = None
    deadline = time.monotonic() + 30
    while killed is None and time.monotonic() < deadline and process.poll() is None:
        killed = next((path for path in files(cache, r"\.partial") if path.stat().st_size), None)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert killed is not None and killed.name[:64] in wanted and killed.is_file()
    server.drip = 0.0
    assert read_all(ShardIndex.open(server.url)) == read_all(index)  # takes over the lock at once
    assert not files(cache, r"\.partial")


def test_a_tight_limit_holds_while_shards_are_read_at_random(index, server, cache, monkeypatch):
    sizes = [shard["bytes"] for shard in index.header["shards"]]
    limit = 2 * max(sizes) + (index.root / "index.safetensors").stat().st_size
    limit_to(monkeypatch, limit)
    there, most = ShardIndex.open(server.url), 0
    seed = random.randrange(2**32)
    print(f"seed {seed}")
    for sample in random.Random(seed).choices(index.samples, k=60):
        assert there.read(sample, "json") == index.read(sample, "json")
        most = max(most, sum(path.stat().st_size for path in files(cache)))
    assert limit / 2 < most <= limit
    assert server.counted().total() > 12  # shards went and came again


def test_what_was_fetched_ahead_is_not_evicted_before_it_is_read(index, server, monkeypatch):
    shards = index.header["shards"]
    limit_to(monkeypatch, 4.5 * max(shard["bytes"] for shard in shards))
    there = ShardIndex.open(server.url)
    ahead = [there.root.open(shards[number], ahead=True) for number in (0, 1)]
    assert None not in ahead
    assert there.root.open(shards[2], ahead=True) is None  # half of the cache is for what is read now
    for _ in range(2):
        for sample in index.samples:
            if sample.shard > 1:
                assert there.read(sample, "json") == index.read(sample, "json")
    assert server.counted()[names(index)[5]] > 1  # there was not room for all
    assert server.counted()[names(index)[0]] == server.counted()[names(index)[1]] == 1
    assert read_all(there) == read_all(index)
    for descriptor in ahead:
        os.close(descriptor)
    assert server.counted()[names(index)[0]] == server.counted()[names(index)[1]] == 1


def test_a_reader_finds_room_even_where_all_is_protected(index, server, monkeypatch):
    """Else two runs that share a cache could wait for each other."""
    shards = index.header["shards"]
    limit_to(monkeypatch, 2.2 * max(shard["bytes"] for shard in shards))
    there = ShardIndex.open(server.url)
    descriptors = []
    for shard in shards[:2]:  # read, and only then protected: more than fetching ahead would take
        os.close(there.root.open(shard))
        descriptors.append(there.root.open(shard, ahead=True))
    assert None not in descriptors
    assert read_all(there) == read_all(index)
    for descriptor in descriptors:
        os.close(descriptor)


def test_a_cache_smaller_than_a_shard_says_so(index, server, monkeypatch):
    limit_to(monkeypatch, max(shard["bytes"] for shard in index.header["shards"]) - 1)
    with pytest.raises(DataError, match=r"shard-00000\d\.tar: .* GiB, more than the .*set AFFEKT_CACHE_GIB to several"):
        ShardIndex.open(server.url)
    for size in ("0", "-1", "much", "nan", "inf"):
        monkeypatch.setenv("AFFEKT_CACHE_GIB", size)
        with pytest.raises(SettingsError, match=f"AFFEKT_CACHE_GIB={size}: not a size"):
            ShardIndex.open(server.url)


def test_a_full_disk_names_the_cache(index, server, cache, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    there = ShardIndex.open(server.url)
    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(DataError, match=f"{cache}: cannot hold fetched shards: No space left on device; make room"):
        read_all(there)
    assert not files(cache, r"\.partial") and server.counted() == Counter(["index.safetensors"])


def test_damage_in_the_cache_is_found_and_fetched_anew(index, server, cache):
    there = ShardIndex.open(server.url)
    read_all(there)
    there.close()
    sample = index.samples[0]
    path = cache / index.header["shards"][0]["sha256"]
    offset = sample.members["json"][0]
    with open(path, "r+b") as file:
        file.seek(offset)
        file.write(b"\0")
    with pytest.raises(DataError, match=r"shard-000000\.tar: clip clip0000, member json: checksum"):
        there.read(sample, "json")
    assert there.read(sample, "json") == index.read(sample, "json")
    there.close()
    os.truncate(path, 1000)
    assert read_all(there) == read_all(index)
    assert server.counted()[names(index)[0]] == 3


def wait_for(condition) -> None:
    deadline = time.monotonic() + 30
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert condition()


def fetchers() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "fetch ahead"]


def test_shards_are_fetched_ahead_in_the_order_of_the_plan(tiny_shards, monkeypatch):
    index = tiny_shards(40, seconds=0.3, shards=40, size=16)  # a shard a clip
    monkeypatch.setattr(remote, "AHEAD_SHARDS", 10)
    with Server(index.root) as server:
        loader = train_loader(ShardIndex.open(server.url), WINDOW, global_batch=2, total_steps=20, seed=3)
        order = [shard for step in range(20) for shard in loader._batches.plan.shards(step)]
        running = iter(loader)
        next(running)
        for _ in range(3):
            next(running)
        wait_for(lambda: server.counted().total() == 1 + 8 + 10)  # the index, 4 steps of 2 clips, 10 ahead of them
        time.sleep(0.2)
        asked = [int(name[6:12]) for name, _, _ in server.asked if name != "index.safetensors"]
        assert sorted(asked) == sorted(order[:18]) and asked[-8:] == order[10:18]
        assert len(fetchers()) == 1
        running.close()
        wait_for(lambda: not fetchers())
        server.shutdown()


def test_a_mixture_of_urls_and_folders_is_fetched_ahead(index, server, tiny_shards):
    """The batches are those from folders; each shard comes once and nothing of the folder is asked for."""
    voices, faces = tiny_shards(9, seconds=0.4, size=32, streams="audio", shards=3), tiny_shards(8, size=32, shards=2)
    with Server(voices.root) as second:

        def batches(first, other):
            parts = {"a": first, "b": faces, "c": other}
            mixture = [Corpus(part, range(len(part.samples)), name=name) for name, part in parts.items()]
            return list(train_loader(mixture, WINDOW, global_batch=6, total_steps=13, seed=2))

        assert_same(batches(ShardIndex.open(server.url), ShardIndex.open(second.url)), batches(index, voices))
        assert server.counted() == Counter(["index.safetensors", *names(index)])
        assert second.counted() == Counter(["index.safetensors", *names(voices)])
        wait_for(lambda: not fetchers())
        second.shutdown()


def test_an_error_ahead_appears_where_the_shard_is_read(tiny_shards):
    index = tiny_shards(10, seconds=0.3, shards=10, size=16)
    straight = list(train_loader(index, WINDOW, global_batch=2, total_steps=5, seed=3))
    with Server(index.root) as server:
        loader = train_loader(ShardIndex.open(server.url), WINDOW, global_batch=2, total_steps=5, seed=3)
        bad = names(index)[loader._batches.plan.shards(3)[0]]
        server.faults = {bad: [404] * 99}
        found = []
        with pytest.raises(DataError, match=f"{bad}: cannot be fetched"):
            for batch in loader:
                found.append(batch)
                wait_for(lambda: server.counted()[bad])
        assert_same(found, straight[:3])
        wait_for(lambda: not fetchers())
        server.shutdown()


@pytest.mark.parametrize(
    "url",
    [
        "pipe:cat x",
        "simplecache::s3://bucket/x",
        "s3://bucket/x::zip://y",
        "ssh://host/x",
        "ftp://host/x",
        "memory://x",
        "github://a:b@c/x",
        "S3://bucket/x",
        "http:/host/x",
        "http:",
        "http://",
        "https://host/x?token=secret",
        "https://user:secret@host/x",
        "https://host/x#secret",
    ],
)
def test_other_urls_are_refused_without_a_secret_or_a_connection(url, cache):
    with pytest.raises(SettingsError, match=r"shards lie in a folder or at s3://|a url of shards is") as error:
        ShardIndex.open(url)
    assert "secret" not in str(error.value) and not cache.exists()


def test_folders_stay_folders(tmp_path):
    for folder in (tmp_path, "shards", "./pipe:x", "-", "a;b", "{0..9}"):
        assert locate(folder) == Path(folder)
    assert str(locate("gs://bucket/a/") / "b") == "gs://bucket/a/b"
    assert isinstance(locate("file:///x"), RemoteFolder)
    assert locate(Path("a:b")) == locate(Path("./a:b")) == Path("a:b")  # also in a worker, which gets the Path


def test_a_missing_package_names_the_extra(monkeypatch):
    def missing(protocol, **_):
        raise ImportError(f"Please install {protocol}fs")

    monkeypatch.setattr(remote.fsspec, "filesystem", missing)
    for url, extra in (("gs://a/b", "gs"), ("s3://a/b", "s3"), ("https://a/b", "http")):
        with pytest.raises(SettingsError, match=rf"{url}/index.safetensors: .*pip install 'affekt\[{extra}\]'"):
            ShardIndex.open(url)


@pytest.mark.parametrize(
    "changes",
    [{"sha256": "../../../escape"}, {"sha256": "A" * 64}, {"bytes": -1}, {"bytes": "9"}, {"name": "../x.tar"}],
)
def test_an_index_that_reaches_out_is_refused(index, server, tmp_path, changes):
    server.folder = Path(shutil.copytree(index.root, tmp_path / "served"))
    path = server.folder / "index.safetensors"
    header = {**index.header, "shards": [{**index.header["shards"][0], **changes}, *index.header["shards"][1:]]}
    columns = safetensors.numpy.load_file(path)
    safetensors.numpy.save_file(columns, path, {"affekt": json.dumps(header)})
    with pytest.raises(DataError, match=r"are not usable|does not lie in the folder"):
        ShardIndex.open(server.url)
    assert server.counted() == Counter(["index.safetensors"])
