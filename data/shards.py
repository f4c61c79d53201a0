"""Shards: tar files of clips that any webdataset reader opens, beside an index that says what must be in them.

A damaged tar reads as a shorter one without a complaint, so nothing here walks through tar headers: members are read by
the byte ranges of the index and checked against its checksums. `Sample` is one clip of the index, `ShardIndex` reads.
The folder holds `shard-000000.tar ...` and `index.jsonl`: a header line, then one line per clip.
"""

import errno
import hashlib
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from affekt.data.errors import DataError
from affekt.data.files import check_version

FORMAT, VERSION = "affekt-index", "1.0"
MEMBERS = ("mjpeg", "mp4", "flac", "json")
INDEX_NAME = "index.jsonl"
MAX_OPEN_SHARDS = 32


class SampleError(DataError):
    """One clip cannot be used. `cause` is a word to count by: `checksum`, `read` or `decode`."""

    def __init__(self, message: str, cause: str = "read"):
        super().__init__(message)
        self.cause = cause


@dataclass(frozen=True, slots=True)
class Sample:
    """One clip: where its bytes lie and what they hold. `duration` in seconds; `frames`, `samples` 0 when absent.

    `members` maps a kind (`mjpeg`, `mp4`, `flac`, `json`) to offset, size and sha256 in the shard's file.
    `frame_sizes` are the byte lengths of the JPEG pictures that follow each other in an `mjpeg` member.
    """

    id: str
    shard: int
    members: dict[str, tuple[int, int, str]]
    frames: int
    samples: int
    duration: float
    flags: tuple[str, ...]
    frame_sizes: tuple[int, ...]
    source_sha256: str
    meta: dict[str, Any]

    @property
    def has_video(self) -> bool:
        return self.frames > 0

    @property
    def has_audio(self) -> bool:
        return self.samples > 0

    @classmethod
    def from_row(cls, row: dict[str, Any]) -> "Sample":
        """Read an index row; keys that a newer minor version added are ignored."""
        return cls(
            id=row["id"],
            shard=int(row["shard"]),
            members={name: (int(o), int(n), str(digest)) for name, (o, n, digest) in row["members"].items()},
            frames=int(row["frames"]),
            samples=int(row["samples"]),
            duration=float(row["duration"]),
            flags=tuple(row["flags"]),
            frame_sizes=tuple(row["frame_sizes"]),
            source_sha256=row["source_sha256"],
            meta=row["meta"],
        )


class ShardIndex:
    """The clips of a folder of shards. Cheap to pickle: another process opens the folder again.

    `fingerprint` is the sha256 of the index file, which contains the checksums of all members and shards.
    """

    def __init__(self, root: Path, header: dict[str, Any], samples: list[Sample], fingerprint: str):
        self.root, self.header, self.samples, self.fingerprint = root, header, samples, fingerprint
        self._open: dict[int, int] = {}  # shard -> file descriptor, the least recently used first

    @classmethod
    def open(cls, folder: str | Path) -> "ShardIndex":
        """Read the index and compare it with the shards that lie beside it.

        Raises DataError when the index is missing, damaged or of another major version, or a shard is missing or has
        another size than it was written with.
        """
        path = Path(folder) / INDEX_NAME
        try:
            content = path.read_bytes()
        except OSError as error:
            raise DataError(
                f"{path}: {error.strerror}; `affekt prepare SRC {folder}` writes it when all clips are done"
            ) from None
        head, _, rest = content.partition(b"\n")
        try:
            header = json.loads(head)
        except ValueError as error:
            raise DataError(f"{path}: line 1 is damaged: {error}") from None
        check_version(header, FORMAT, VERSION, path)
        try:
            samples = _read_rows(header, rest, path)
            _check_shards(Path(folder), header, samples)
        except (LookupError, TypeError, ValueError) as error:
            raise DataError(
                f"{path}: damaged: {type(error).__name__} {error}; copy it again or prepare again"
            ) from None
        return cls(Path(folder), header, samples, hashlib.sha256(content).hexdigest())

    def shard_name(self, sample: Sample) -> str:
        return self.header["shards"][sample.shard]["name"]

    def read(self, sample: Sample, member: str) -> bytes:
        """The bytes of one member. Raises SampleError (cause `checksum` or `read`) naming shard, clip and member."""
        where = f"{self.root / self.shard_name(sample)}: clip {sample.id}, member {member}"
        if member not in sample.members:
            raise SampleError(f"{where}: the clip has none; it has {', '.join(sample.members)}", "read")
        offset, size, digest = sample.members[member]
        try:
            content = _pread(self._descriptor(sample.shard), offset, size)
        except OSError as error:
            raise SampleError(f"{where}: {error.strerror}", "read") from None
        if len(content) != size:
            raise SampleError(f"{where}: the shard ends {size - len(content)} bytes too early", "read")
        if hashlib.sha256(content).hexdigest() != digest:
            raise SampleError(
                f"{where}: checksum differs from the index; the shard was damaged after writing", "checksum"
            )
        return content

    def verify(self) -> None:
        """Read every shard in full and compare its checksum. Raises DataError naming the first that differs."""
        for shard in self.header["shards"]:
            with open(self.root / shard["name"], "rb") as file:
                if hashlib.file_digest(file, "sha256").hexdigest() != shard["sha256"]:
                    raise DataError(f"{self.root / shard['name']}: checksum differs from {INDEX_NAME}")

    def close(self) -> None:
        while self._open:
            os.close(self._open.popitem()[1])

    def __del__(self) -> None:
        self.close()

    def __reduce__(self):
        return _reopen, (self.root, self.fingerprint)

    def _descriptor(self, shard: int) -> int:
        descriptor = self._open.pop(shard, None)
        if descriptor is None:
            descriptor = os.open(self.root / self.header["shards"][shard]["name"], os.O_RDONLY | os.O_CLOEXEC)
        self._open[shard] = descriptor  # now the most recently used
        if len(self._open) > MAX_OPEN_SHARDS:
            os.close(self._open.pop(next(iter(self._open))))
        return descriptor


def _read_rows(header: dict[str, Any], content: bytes, path: Path) -> list[Sample]:
    if hashlib.sha256(content).hexdigest() != header["rows_sha256"]:
        raise DataError(f"{path}: the lines below the header are not those it was written with; copy it again")
    samples = [Sample.from_row(json.loads(line)) for line in content.splitlines()]
    expected = sum(shard["samples"] for shard in header["shards"])
    if len(samples) != expected:
        raise DataError(f"{path}: {len(samples)} clips, the header counts {expected}")
    return samples


def _check_shards(folder: Path, header: dict[str, Any], samples: list[Sample]) -> None:
    for shard in header["shards"]:
        name = shard["name"]
        if Path(name).name != name:
            raise DataError(f"{folder / INDEX_NAME}: shard {name!r} does not lie in the folder")
        try:
            size = (folder / name).stat().st_size
        except OSError as error:
            raise DataError(f"{folder / name}: {error.strerror}; copy the shard again or prepare again") from None
        if size != shard["bytes"]:
            raise DataError(f"{folder / name}: {size} bytes, written were {shard['bytes']}; copy the shard again")
    for sample in samples:
        end = header["shards"][sample.shard]["bytes"]
        for member, (offset, size, _) in sample.members.items():
            if offset < 0 or size < 0 or offset + size > end:
                raise DataError(f"{folder / INDEX_NAME}: clip {sample.id}: {member} lies outside its shard")


def _reopen(root: Path, fingerprint: str) -> ShardIndex:
    index = ShardIndex.open(root)
    if index.fingerprint != fingerprint:
        raise DataError(f"{root / INDEX_NAME}: changed while it was in use")
    return index


def _pread(descriptor: int, offset: int, size: int) -> bytes:
    """Up to `size` bytes; one call may return fewer than asked. An I/O error is tried three times: disks recover."""
    parts, attempts = [], 0
    while size:
        try:
            part = os.pread(descriptor, size, offset)
        except OSError as error:
            attempts += 1
            if error.errno != errno.EIO or attempts == 3:
                raise
            continue
        if not part:
            break
        parts.append(part)
        offset, size = offset + len(part), size - len(part)
    return parts[0] if len(parts) == 1 else b"".join(parts)
