"""A bounded folder of files named by their sha256, shared by all processes of one user on one machine.

A file is there in full and checked, or not at all. Whoever fetches one holds an exclusive flock on its `.partial`;
whoever has fetched one ahead holds a shared one until it is read. The kernel drops both when a process dies, however
it dies. flock excludes reliably on local disks alone, so the folder should not lie on a network disk.
"""

import contextlib
import fcntl
import hashlib
import json
import os
import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from affekt.data.errors import DataError, SettingsError
from affekt.data.files import flush

DEFAULT_GIB = 20
OURS = re.compile(r"[0-9a-f]{64}(\.partial)?")
WAIT_SECONDS = 0.02


class Cache:
    """`limit` is in bytes and holds for all files of the folder together, those in work included."""

    def __init__(self, folder: Path, limit: int):
        self.folder, self.limit = folder, limit
        try:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        except OSError as error:
            raise SettingsError(
                f"{folder}: cannot hold fetched shards: {error.strerror}; set AFFEKT_CACHE to another folder"
            ) from None

    @classmethod
    def from_environment(cls) -> "Cache":
        """The cache at AFFEKT_CACHE, of AFFEKT_CACHE_GIB GiB. Environment and no settings: folder and size belong to a
        machine, not to an experiment, and the machines of one run may differ. Raises SettingsError for a bad size."""
        home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
        folder = os.environ.get("AFFEKT_CACHE") or Path(home, "affekt", "shards")
        text = os.environ.get("AFFEKT_CACHE_GIB") or str(DEFAULT_GIB)
        try:
            limit = int(float(text) * 2**30)
        except (ValueError, OverflowError):
            limit = 0
        if limit <= 0:
            raise SettingsError(f"AFFEKT_CACHE_GIB={text}: not a size in GiB, such as {DEFAULT_GIB} or 0.5")
        return cls(Path(folder), limit)

    def check_fits(self, name: str, size: int) -> None:
        """Raises DataError when a file of `size` bytes can never be held."""
        if size > self.limit:
            raise DataError(
                f"{name}: {size / 2**30:.3g} GiB, more than the {self.limit / 2**30:.3g} GiB that the cache "
                f"{self.folder} may hold; set AFFEKT_CACHE_GIB to several times the size of a shard"
            )

    def open(self, name: str, digest: str, size: int, fill: Callable[[int], None], ahead: bool = False) -> int | None:
        """A descriptor of the file with this sha256 and size, which `fill(descriptor)` writes and checks where it is
        not there yet; `name` is for messages. Another process that is at it is waited for.

        With `ahead` the file is protected from eviction until the descriptor is closed, nothing is waited for, and the
        answer is None when there is no room beside what is protected already or another process is at it. Raises
        DataError when the disk refuses, and whatever `fill` raises.
        """
        self.check_fits(name, size)
        partial = self.folder / f"{digest}.partial"
        while True:
            with self._disk_errors():
                descriptor = self._present(digest, size, ahead)
                if descriptor is not None:
                    return descriptor
                with self._held(partial, wait=not ahead) as descriptor:
                    if descriptor is None:
                        return None
                    if (self.folder / digest).exists():
                        continue  # the holder we waited for has finished
                    os.truncate(descriptor, 0)  # what a killed process left
                    if not self._reserve(descriptor, size, ahead):
                        return None
                    fill(descriptor)
                    os.fsync(descriptor)
                    os.replace(partial, self.folder / digest)
                    flush(self.folder)
                    kept = os.dup(descriptor)  # the same lock: closing one of them leaves it with the other
                    fcntl.flock(kept, fcntl.LOCK_SH if ahead else fcntl.LOCK_UN)
                    return kept

    def latest(self, url: str, fetch: Callable[[int, str | None], str | None]) -> tuple[Path, str]:
        """The file at a url whose sha256 is not known beforehand: its path here and its sha256.

        `fetch(descriptor, mark)` writes it and returns a mark by which the server knows this state of it (or "");
        None when the file of state `mark`, which is here already, is still the newest. Raises what `fetch` raises.
        """
        key = hashlib.sha256(url.encode()).hexdigest()
        partial = self.folder / f"{key}.partial"
        with self._disk_errors(), self._held(self.folder / f"{key}.url", wait=True) as note:
            known = _read_note(note)
            here = self._present(known["sha256"], known["bytes"], ahead=True) if known else None  # nobody may evict it
            try:
                with self._held(partial, wait=True) as descriptor:
                    os.truncate(descriptor, 0)
                    mark = fetch(descriptor, known["mark"] if here is not None else None)
                    if mark is None:
                        return self.folder / known["sha256"], known["sha256"]
                    os.fsync(descriptor)
                    size = os.fstat(descriptor).st_size
                    self.check_fits(url, size)
                    with open(descriptor, "rb", closefd=False) as file:
                        file.seek(0)
                        digest = hashlib.file_digest(file, "sha256").hexdigest()
                    self._reserve(descriptor, 0, ahead=False)  # what was written counts already
                    os.replace(partial, self.folder / digest)
            finally:
                if here is not None:
                    os.close(here)
            os.truncate(note, 0)
            os.pwrite(note, json.dumps({"mark": mark, "sha256": digest, "bytes": size}).encode(), 0)
            flush(self.folder)
        return self.folder / digest, digest

    def find(self, digest: str) -> Path | None:
        path = self.folder / digest
        return path if path.is_file() else None

    def drop(self, digest: str) -> None:
        """Remove a file that turned out to be damaged here, so that the next reader fetches it again."""
        (self.folder / digest).unlink(missing_ok=True)

    def _present(self, digest: str, size: int, ahead: bool) -> int | None:
        path = self.folder / digest
        try:
            descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            return None
        if ahead:
            fcntl.flock(descriptor, fcntl.LOCK_SH)
        if os.fstat(descriptor).st_size == size and (not ahead or _named(descriptor, path)):
            with contextlib.suppress(OSError):
                os.utime(descriptor)  # now the most recently used; the times of the disk may not follow reads
            return descriptor
        os.close(descriptor)
        if not ahead:
            path.unlink(missing_ok=True)
        return None

    @contextlib.contextmanager
    def _held(self, path: Path, wait: bool) -> Iterator[int | None]:
        """A file, made if need be, under an exclusive lock; a `.partial` that is still there afterwards is removed.
        None when somebody else holds it and `wait` is off.

        Waits by looking: a lock asked for on a file that gets its final name meanwhile, and is then protected until it
        is read, would never come.
        """
        while True:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            try:
                if _try_lock(descriptor, fcntl.LOCK_EX) and _named(
                    descriptor, path
                ):  # not renamed or removed meanwhile
                    try:
                        yield descriptor
                    finally:
                        if path.suffix == ".partial" and _named(descriptor, path):
                            path.unlink()
                    return
            finally:
                os.close(descriptor)
            if not wait:
                yield None
                return
            time.sleep(WAIT_SECONDS)

    def _reserve(self, descriptor: int, size: int, ahead: bool) -> bool:
        """Give the file `size` bytes on the disk before one is fetched: then sizes are all the accounting there is,
        also of other processes, and a full disk shows at once."""
        while True:
            with self._held(self.folder / "lock", wait=True):
                if self._make_room(size, ahead):
                    if size:
                        os.posix_fallocate(descriptor, 0, size)
                    return True
            if ahead:
                return False
            time.sleep(WAIT_SECONDS)  # all room is taken by what others fetch now, which ends

    def _make_room(self, size: int, ahead: bool) -> bool:
        """Remove files, the least recently used first, until `size` bytes more fit. None that is in work, and none that
        is protected, unless a reader finds no other room: it could wait for ever for the readers of those."""
        files = sorted(self._files())
        if ahead and sum(bytes for _, bytes, path in files if _is_held(path)) + size > self.limit // 2:
            return False  # the other half stays for what is read now
        over = sum(bytes for _, bytes, _ in files) + size - self.limit
        for lock in (fcntl.LOCK_EX,) if ahead else (fcntl.LOCK_EX, fcntl.LOCK_SH):
            left = []
            for file in files:
                if over > 0 and _remove(file[2], lock):
                    over -= file[1]
                else:
                    left.append(file)
            files = left[::-1]  # of those fetched ahead, the last one is needed last
        return over <= 0

    def _files(self) -> Iterator[tuple[float, int, Path]]:
        """Last use, size and path of everything that counts."""
        for entry in os.scandir(self.folder):
            if OURS.fullmatch(entry.name):
                with contextlib.suppress(FileNotFoundError):
                    about = entry.stat(follow_symlinks=False)
                    yield about.st_mtime, about.st_size, Path(entry.path)

    @contextlib.contextmanager
    def _disk_errors(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise DataError(
                f"{self.folder}: cannot hold fetched shards: {error.strerror or error}; make room, lower "
                "AFFEKT_CACHE_GIB, or set AFFEKT_CACHE to a folder on another disk"
            ) from error


def _named(descriptor: int, path: Path) -> bool:
    """Whether the open file is still the one of this name."""
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(path))
    except FileNotFoundError:
        return False


def _is_held(path: Path) -> bool:
    return not _locking(path, fcntl.LOCK_EX, lambda: None)


def _remove(path: Path, lock: int) -> bool:
    """Remove a file unless a lock that excludes `lock` is held on it. Who has it open reads on."""
    return _locking(path, lock, lambda: path.unlink(missing_ok=True))


def _locking(path: Path, lock: int, act: Callable[[], None]) -> bool:
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return True
    try:
        if not _try_lock(descriptor, lock):
            return False
        act()
        return True
    finally:
        os.close(descriptor)


def _try_lock(descriptor: int, lock: int) -> bool:
    try:
        fcntl.flock(descriptor, lock | fcntl.LOCK_NB)
        return True
    except BlockingIOError:
        return False


def _read_note(descriptor: int) -> dict | None:
    """What `latest` has noted about a url; None for nothing and for what a killed process wrote in part."""
    try:
        note = json.loads(os.pread(descriptor, 2**16, 0))
        valid = isinstance(note["mark"], str) and OURS.fullmatch(note["sha256"]) and isinstance(note["bytes"], int)
        return note if valid and note["mark"] else None
    except (ValueError, KeyError, TypeError):
        return None
