"""Shards behind a server that speaks S3, straight and through a line that breaks, refuses and spoils."""

import http.client
import os
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from affekt.data import remote
from affekt.data.decode import Window
from affekt.data.errors import DataError
from affekt.data.loader import eval_loader
from affekt.data.shards import ShardIndex

pytest.importorskip("moto", reason="needs moto[s3], a server that speaks S3")
pytest.importorskip("s3fs", reason="needs s3fs")
WINDOW = Window(num_frames=4, frame_stride=6, mel_frames=64)


class Line(ThreadingHTTPServer):
    """Passes requests on. `faults[name]` is done to the next GETs of that object, one each: status, `cut`, `wrong`."""

    daemon_threads = True

    def __init__(self, there: tuple[str, int]):
        super().__init__(("127.0.0.1", 0), Passing)
        self.there, self.faults, self.done = there, {}, []
        threading.Thread(target=self.serve_forever, args=(0.02,), daemon=True).start()


class Passing(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def _pass(self):
        name = Path(self.path.partition("?")[0]).name
        faults = self.server.faults.get(name) if self.command == "GET" else None
        fault = faults.pop(0) if faults else None
        if fault:
            self.server.done.append((name, fault))
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        there = http.client.HTTPConnection(*self.server.there)
        there.request(self.command, self.path, body, dict(self.headers))
        answer = there.getresponse()
        content = answer.read()
        if isinstance(fault, int):
            content = b""
        elif fault == "wrong":
            content = content[:-1] + bytes([content[-1] ^ 1])
        self.send_response(fault if isinstance(fault, int) else answer.status)
        for key, value in answer.getheaders():
            if key.lower() not in ("content-length", "connection", "transfer-encoding"):
                self.send_header(key, value)
        length = answer.getheader("Content-Length") if self.command == "HEAD" else len(content)
        self.send_header("Content-Length", str(length or 0))
        self.end_headers()
        self.wfile.write(content[: len(content) // 2] if fault == "cut" else content)
        self.close_connection = fault == "cut"

    do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = _pass

    def log_message(self, *_):
        pass


@pytest.fixture(scope="module")
def index(tiny_shards):
    return tiny_shards(22, streams="mixed", seconds=1.4, shards=6, size=32)


@pytest.fixture(scope="module")
def line(index):
    """A bucket with the shards, and the line to it."""
    import fsspec
    from moto.server import ThreadedMotoServer

    s3 = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    s3.start()
    with pytest.MonkeyPatch.context() as patch, Line(s3.get_host_and_port()) as line:
        patch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{line.server_address[1]}")
        for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
            patch.setenv(name, "of-nobody")
        patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        patch.setenv("NO_PROXY", "127.0.0.1")
        bucket = fsspec.filesystem("s3")
        bucket.mkdir("corpus")
        for path in index.root.iterdir():
            bucket.pipe_file(f"corpus/talks/{path.name}", path.read_bytes())
        yield line
        line.shutdown()
    s3.stop()


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch, line) -> None:
    monkeypatch.setenv("AFFEKT_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("AFFEKT_CACHE_GIB", raising=False)
    monkeypatch.setattr(remote, "FIRST_WAIT_SECONDS", 0.01)
    monkeypatch.setattr(remote, "PIECE", 20_000)  # several requests for a shard
    line.faults, line.done = {}, []


def read_all(index: ShardIndex) -> list[bytes]:
    return [index.read(sample, member) for sample in index.samples for member in sample.members]


def test_batches_and_bytes_are_those_of_the_folder(index):
    there = ShardIndex.open("s3://corpus/talks/")
    assert there.fingerprint == index.fingerprint and read_all(there) == read_all(index)
    for mine, theirs in zip(eval_loader(there, WINDOW), eval_loader(index, WINDOW), strict=True):
        assert mine.ids == theirs.ids and mine.audio.equal(theirs.audio) and mine.video.equal(theirs.video)


@pytest.mark.parametrize("faults", [["cut", "cut"], [503, "cut", "wrong", 500]], ids=str)
def test_passing_faults_are_overcome(index, line, faults):
    names = ["index.safetensors", *(shard["name"] for shard in index.header["shards"])]
    line.faults = {name: list(faults) for name in names}
    assert read_all(ShardIndex.open("s3://corpus/talks")) == read_all(index)
    assert {fault for _, fault in line.done} == set(faults) and not any(line.faults.values())


def test_what_stays_away_is_named(index, line, monkeypatch):
    import fsspec

    name = index.header["shards"][2]["name"]
    line.faults = {name: [503] * 100}
    with pytest.raises(DataError, match=rf"s3://corpus/talks/{name}: cannot be fetched, \d+ attempts in a row failed"):
        read_all(ShardIndex.open("s3://corpus/talks"))
    line.faults = {}
    monkeypatch.setenv("AFFEKT_CACHE", os.environ["AFFEKT_CACHE"] + "2")
    bucket = fsspec.filesystem("s3")
    content = bucket.cat_file(f"corpus/talks/{name}")
    bucket.rm_file(f"corpus/talks/{name}")
    try:
        with pytest.raises(DataError, match=rf"s3://corpus/talks/{name}: cannot be fetched: FileNotFound"):
            read_all(ShardIndex.open("s3://corpus/talks"))
    finally:
        bucket.pipe_file(f"corpus/talks/{name}", content)
    with pytest.raises(DataError, match=r"s3://nowhere/index\.safetensors: cannot be fetched"):
        ShardIndex.open("s3://nowhere")
