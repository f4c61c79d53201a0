"""Shards behind a url: fetched whole into the cache, checked by their sha256, and ahead of the reader.

fsspec speaks the protocols. Its own caches are not used: `simplecache` and `filecache` check no checksums, know no
limit of size and take no lock, so two processes fetch twice. What a url may be is a short list: fsspec would also
chain urls, unpack archives and read over ssh.
"""

import contextlib
import hashlib
import os
import random
import re
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import fsspec

from affekt.data.cache import Cache
from affekt.data.errors import AffektError, DataError, SettingsError
from affekt.data.samples import open_samples

EXTRAS = {"s3": "s3", "gs": "gs", "http": "http", "https": "http", "file": None}  # protocol -> extra that brings it
PIECE = 8 * 2**20  # bytes asked for at a time
CONNECT_SECONDS, READ_SECONDS = 15, 60  # without a connection, without a byte
ATTEMPTS = 8  # in a row that bring nothing new; with the waits between them a bit over a minute
FIRST_WAIT_SECONDS, LONGEST_WAIT_SECONDS = 0.5, 30
AHEAD_SHARDS = 32  # the block of shards in work (order.py) and the next one
LOOK_SECONDS = 0.5  # how often fetching ahead looks where the reader is
PASSING_STATUS = {408, 425, 429}  # too slow, too early, too often: the 4xx that another attempt may cure


class _Stopped(Exception):
    """Nobody wants what is being fetched any more."""


class RemoteFolder:
    """A folder of shards at a url: `folder / name` is the url of a file. Pickles as url and cache."""

    def __init__(self, url: str):
        self.url, self.cache = url.rstrip("/"), Cache.from_environment()
        self._index: str | None = None  # sha256 of the index this object has seen: another process opens the same

    def __str__(self) -> str:
        return self.url

    def __truediv__(self, name: str) -> str:
        return f"{self.url}/{name}"

    def index(self, name: str) -> Path:
        """The index file, here. Raises DataError as `open` does; its checksum is compared."""
        path = self.cache.find(self._index) if self._index else None
        if path is None:
            url = self / name
            path, self._index = self.cache.latest(url, lambda file, mark: _fetch_index(url, file, mark))
        return path

    def check(self, shard: dict[str, Any]) -> None:
        """Raises DataError when the index states no checksum for a shard, or it can never lie in the cache."""
        digest, size = shard["sha256"], shard["bytes"]
        if not isinstance(digest, str) or not re.fullmatch("[0-9a-f]{64}", digest) or type(size) is not int or size < 1:
            raise DataError(f"{self / shard['name']}: sha256 {digest!r} and bytes {size!r} of the index are not usable")
        self.cache.check_fits(self / shard["name"], size)

    def open(self, shard: dict[str, Any], ahead: bool = False, stop: threading.Event | None = None) -> int | None:
        """A descriptor of a shard's content, fetched if need be; `shard` is its entry in the header of the index.

        `ahead`: see `Cache.open`. Raises DataError, naming url and way out, for what is missing, forbidden, twice of
        other content, or unreachable for more than a minute.
        """
        url, size, digest = self / shard["name"], shard["bytes"], shard["sha256"]

        def fill(descriptor: int) -> None:
            _fetch_shard(url, descriptor, size, digest, stop or threading.Event())

        return self.cache.open(url, digest, size, fill, ahead)

    def drop(self, shard: dict[str, Any]) -> None:
        self.cache.drop(shard["sha256"])


def locate(folder: str | Path | RemoteFolder) -> Path | RemoteFolder:
    """What a command calls its shards: a folder, or a url of one. Raises SettingsError for any other kind of url.

    A Path is a folder whatever it is called: it has lost the second slash of a url.
    """
    if isinstance(folder, (RemoteFolder, Path)):
        return folder
    text = folder
    scheme = re.match(r"([A-Za-z][A-Za-z0-9+.-]*):", text)
    if not scheme:
        return Path(folder)
    protocol = scheme[1]
    if protocol not in EXTRAS or not text.startswith(f"{protocol}://") or "::" in text:
        raise SettingsError(
            f"{text}: shards lie in a folder or at {', '.join(f'{name}://' for name in EXTRAS)}; other protocols, "
            f"chained urls and commands are refused (a folder of this name: ./{text})"
        )
    parts = urlsplit(text)
    if parts.query or parts.fragment or "@" in parts.netloc or not (parts.netloc or protocol == "file"):
        raise SettingsError(
            f"{protocol}://{parts.netloc.rpartition('@')[2]}{parts.path}: a url of shards is protocol://place/folder, "
            "without query or password; credentials come from the environment of the protocol's package"
        )
    return RemoteFolder(text)


def refuse_url(folder: str | Path, way_out: str) -> None:
    """Raises SettingsError where something that works in folders alone is given a url, as text or as a Path."""
    scheme = re.match(r"([A-Za-z][A-Za-z0-9+.-]*):/", str(folder))
    if scheme and scheme[1] in EXTRAS:
        raise SettingsError(f"{folder}: {way_out}")


Place = tuple[RemoteFolder, dict[str, Any]]  # a shard: the folder it lies in, its entry in the header of the index


class FetchAhead:
    """A thread that fetches the shards a reader comes to next, in its order, and protects them until it is there.

    `upcoming(step)` yields the numbers, in `places`, of the shards from a step on, repetitions allowed; those whose
    place is None need no fetching. What cannot be fetched is left to the reader, who meets the error where it belongs.
    The thread ends with the `with` block or the process.
    """

    def __init__(self, places: Sequence[Place | None], upcoming: Callable[[int], Iterable[int]]):
        self.step = 0
        self._places, self._upcoming = places, upcoming
        folders = {id(place[0]): place[0] for place in places if place}
        self._limit = min(folder.cache.limit for folder in folders.values()) // 2
        self._most = AHEAD_SHARDS * len(folders)  # each corpus has a block in work
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="fetch ahead", daemon=True)

    def __enter__(self) -> "FetchAhead":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()  # not joined: it may be waiting for a server, and holds nothing that anyone waits for

    def _wanted(self, step: int) -> list[int]:
        """The next shards, each once, the one needed first in front."""
        wanted: dict[int, None] = {}
        for shard in self._upcoming(step):
            if self._places[shard]:
                wanted[shard] = None
            if len(wanted) == self._most:
                break
        return list(wanted)

    def _run(self) -> None:
        protected: dict[int, int] = {}  # shard -> descriptor, in the order of need
        failed: set[int] = set()
        try:
            while not self._stop.is_set():
                step = self.step
                wanted = self._wanted(step)
                for number in protected.keys() - wanted:
                    os.close(protected.pop(number))
                room = self._limit
                for number in wanted:
                    folder, shard = self._places[number]
                    room -= shard["bytes"]
                    if room < 0 or self._stop.is_set() or self.step != step:
                        break
                    if number in protected or number in failed:
                        continue
                    try:
                        descriptor = folder.open(shard, ahead=True, stop=self._stop)
                    except AffektError:
                        failed.add(number)
                        continue
                    if descriptor is not None:
                        protected[number] = descriptor
                if self.step == step:
                    self._stop.wait(LOOK_SECONDS)
        except _Stopped:
            pass
        finally:
            for descriptor in protected.values():
                os.close(descriptor)


def _fetch_shard(url: str, descriptor: int, size: int, digest: str, stop: threading.Event) -> None:
    for _ in range(2):  # what arrived may have been damaged on its way, once
        if _download(url, descriptor, size, stop) and _hash(descriptor) == digest:
            return
    raise DataError(
        f"{url}: twice other content than the index states ({size} bytes, sha256 {digest}); the shard was damaged, or "
        "shard and index are not of one preparation: upload both again"
    )


def _fetch_index(url: str, descriptor: int, mark: str | None) -> str | None:
    """Write the newest index and return its mark; None when that of `mark` is the newest. See `Cache.latest`."""
    for _ in range(2):
        marks: list[str] = []
        if not _download(url, descriptor, None, threading.Event(), mark, marks):
            return None
        with contextlib.suppress(AttributeError, LookupError, TypeError, ValueError):
            open_samples(Path(f"/dev/fd/{descriptor}"))
            return marks[-1]
    raise DataError(f"{url}: twice not a sound index; upload the folder that `affekt prepare` wrote again")


def _download(
    url: str,
    descriptor: int,
    size: int | None,
    stop: threading.Event,
    mark: str | None = None,
    marks: list[str] | None = None,
) -> bool:
    """Write the content of `url`, trying again after passing errors and going on where it broke off.

    False when it has more bytes than `size`, or its state is `mark` already. The mark of its state is put into `marks`.
    """
    offset, best, attempt = 0, 0, 0
    while True:
        try:
            filesystem = _filesystem(url)
            pieces = _http_pieces if url.startswith("http") else _pieces
            with contextlib.closing(pieces(filesystem, url, offset, size, mark, marks)) as stream:
                for offset, piece in stream:
                    if stop.is_set():
                        raise _Stopped
                    if piece is None:
                        return False
                    if size is not None and offset + len(piece) > size:
                        return False
                    _write(descriptor, piece, offset)
                    offset += len(piece)
                    if offset > best:
                        best, attempt = offset, 0
            if size is not None and offset < size:
                raise EOFError(f"it ended after {offset} of {size} bytes")
            if size is None:
                os.truncate(descriptor, offset)
            return True
        except (DataError, SettingsError, _Stopped):
            raise
        except Exception as error:  # each protocol's package has errors of its own
            attempt += 1
            said = f"{type(error).__name__}: {error}"
            if _is_permanent(error):
                raise DataError(f"{url}: cannot be fetched: {said}; check the url, and who may read it") from error
            if attempt == ATTEMPTS:
                raise DataError(
                    f"{url}: cannot be fetched, {ATTEMPTS} attempts in a row failed: {said}; "
                    "run the same command again when the server can be reached"
                ) from error
            wait = min(LONGEST_WAIT_SECONDS, FIRST_WAIT_SECONDS * 2 ** (attempt - 1))
            if stop.wait(wait * random.uniform(0.5, 1.5)):  # ranks that failed together do not come back together
                raise _Stopped from None


def _pieces(filesystem, url, offset, size, mark, marks) -> Iterator[tuple[int, bytes | None]]:
    """Offset and bytes of one piece after the other; None for bytes when the state is `mark`."""
    if size is None:
        filesystem.invalidate_cache()
        about = filesystem.info(url)
        size = about["size"]
        state = [str(about.get(key)) for key in ("ETag", "etag", "LastModified", "updated", "mtime", "ino")]
        marks.append(" ".join([str(size), *state]))
        if marks[-1] == mark:
            yield 0, None
            return
    while offset < size:
        piece = filesystem.cat_file(url, start=offset, end=min(offset + PIECE, size))
        if not piece:
            return
        yield offset, piece
        offset += len(piece)


def _http_pieces(filesystem, url, offset, size, mark, marks) -> Iterator[tuple[int, bytes | None]]:
    """As `_pieces`, out of one streamed answer; from the beginning where the server knows no ranges.

    `cat_file` would hold a whole shard in memory there, and `info` calls every error FileNotFoundError.
    """
    headers = {"Accept-Encoding": "identity"}
    if offset:
        headers["Range"] = f"bytes={offset}-"
    elif mark:
        headers["If-None-Match" if mark.startswith(('"', "W/")) else "If-Modified-Since"] = mark
    with filesystem.open(url, "rb", block_size=0, size=1, headers=headers) as file:  # a size spares a HEAD
        answer = file.r
        answer.raise_for_status()
        if answer.status == 304:
            yield 0, None
            return
        if marks is not None:
            marks.append(answer.headers.get("ETag") or answer.headers.get("Last-Modified") or "")
        if answer.status != 206:
            offset = 0
        while piece := file.read(PIECE):
            yield offset, piece
            offset += len(piece)


def _filesystem(url: str) -> fsspec.AbstractFileSystem:
    """fsspec's client, which is kept for the process. Our attempts are the only ones: it tries each request once."""
    protocol = url.partition(":")[0]
    try:
        if EXTRAS[protocol] == "http":
            import aiohttp

            timeout = aiohttp.ClientTimeout(total=None, connect=CONNECT_SECONDS, sock_read=READ_SECONDS)
            return fsspec.filesystem(protocol, client_kwargs={"timeout": timeout, "trust_env": True})
        if protocol == "s3":
            config = {"connect_timeout": CONNECT_SECONDS, "read_timeout": READ_SECONDS, "retries": {"max_attempts": 0}}
            filesystem = fsspec.filesystem(protocol, config_kwargs=config)
            filesystem.retries = 1
            return filesystem
        return fsspec.filesystem(protocol)
    except ImportError as error:
        raise SettingsError(
            f"{url}: {protocol}:// needs a package that is not installed ({error}); "
            f"pip install 'affekt[{EXTRAS[protocol]}]'"
        ) from error


def _is_permanent(error: Exception) -> bool:
    status = str(getattr(error, "status", None) or getattr(error, "code", None) or "")
    if status.isdigit() and int(status) >= 400:
        return int(status) < 500 and int(status) not in PASSING_STATUS
    kinds = (FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError)
    return isinstance(error, kinds) or type(error).__name__ in ("NoCredentialsError", "PartialCredentialsError")


def _write(descriptor: int, piece: bytes, offset: int) -> None:
    try:
        while piece:
            written = os.pwrite(descriptor, piece, offset)
            piece, offset = piece[written:], offset + written
    except OSError as error:
        raise DataError(
            f"the cache of fetched shards cannot be written: {error.strerror}; make room, or set AFFEKT_CACHE"
        ) from error


def _hash(descriptor: int) -> str:
    with open(descriptor, "rb", closefd=False) as file:
        file.seek(0)
        return hashlib.file_digest(file, "sha256").hexdigest()
