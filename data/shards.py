"""Shards: tar files of clips that any webdataset reader opens, beside an index that says what must be in them.

A damaged tar reads as a shorter one without a complaint, so nothing here walks through tar headers: members are read by
the byte ranges of the index and checked against its checksums. `Sample` is one clip of the index, `ShardIndex` reads.
The folder holds `shard-000000.tar ...` and `index.safetensors` (`affekt.data.samples`). It may lie behind a url
(`affekt.data.remote`).
"""

import errno
import hashlib
import os
from pathlib import Path
from typing import Any

import numpy as np
from xxhash import xxh3_128_hexdigest

from affekt.data.errors import DataError
from affekt.data.remote import RemoteFolder, locate
from affekt.data.samples import Sample, Samples, open_samples

INDEX_NAME = "index.safetensors"
MAX_OPEN_SHARDS = 32


class SampleError(DataError):
    """One clip cannot be used. `cause` is a word to count by: `checksum`, `read` or `decode`."""

    def __init__(self, message: str, cause: str = "read"):
        super().__init__(message)
        self.cause = cause


class ShardIndex:
    """The clips of a folder of shards. Cheap to pickle: another process opens the folder again.

    `fingerprint` stands for the whole index, which contains the checksums of all members and shards.
    """

    def __init__(self, root: Path | RemoteFolder, header: dict[str, Any], samples: Samples, fingerprint: str):
        self.root, self.header, self.samples, self.fingerprint = root, header, samples, fingerprint
        self._open: dict[int, int] = {}  # shard -> file descriptor, the least recently used first

    @classmethod
    def open(cls, folder: str | Path | RemoteFolder, check: bool = True) -> "ShardIndex":
        """Map the index and compare it with its checksum and with the shards that lie beside it (those behind a url
        when they are fetched); another process that opens what was checked already leaves that out (`check`).

        Raises DataError when the index is missing, damaged or of another major version, or a shard is missing or has
        another size than it was written with.
        """
        folder = locate(folder)
        path = folder / INDEX_NAME
        try:
            here = folder.index(INDEX_NAME) if isinstance(folder, RemoteFolder) else path
            header, samples, fingerprint = open_samples(here, check)
            if check:
                _check_shards(folder, header, samples)
        except OSError as error:
            raise DataError(
                f"{path}: {error.strerror}; `affekt prepare SRC {folder}` writes it when all clips are done"
            ) from None
        except (AttributeError, LookupError, TypeError, ValueError) as error:
            raise DataError(
                f"{path}: damaged: {type(error).__name__} {error}; copy it again or prepare again"
            ) from None
        return cls(folder, header, samples, fingerprint)

    def shard_name(self, sample: Sample) -> str:
        return self.header["shards"][sample.shard]["name"]

    def read(self, sample: Sample, member: str) -> bytes:
        """The bytes of one member. Raises SampleError (cause `checksum` or `read`) naming shard, clip and member."""
        if member not in sample.members:
            raise self._error(sample, member, f"the clip has none; it has {', '.join(sample.members)}")
        offset, size, digest = sample.members[member]
        try:
            content = _pread(self._descriptor(sample.shard), offset, size)
        except OSError as error:
            raise self._error(sample, member, error.strerror) from None
        if len(content) != size:
            raise self._error(sample, member, f"the shard ends {size - len(content)} bytes too early")
        if xxh3_128_hexdigest(content) != digest:
            if isinstance(self.root, RemoteFolder):  # checked when it came, so it was damaged here: fetch it again
                os.close(self._open.pop(sample.shard))
                self.root.drop(self.header["shards"][sample.shard])
            what = "checksum differs from the index; the shard was damaged after writing"
            raise self._error(sample, member, what, "checksum")
        return content

    def _error(self, sample: Sample, member: str, what: str, cause: str = "read") -> SampleError:
        where = f"{self.root / self.shard_name(sample)}: clip {sample.id}, member {member}"
        return SampleError(f"{where}: {what}", cause)

    def verify(self) -> None:
        """Read every shard in full and compare its checksum. Raises DataError naming the first that differs."""
        for number, shard in enumerate(self.header["shards"]):
            with open(self._descriptor(number), "rb", closefd=False) as file:
                file.seek(0)
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
        if descriptor is None and isinstance(self.root, RemoteFolder):
            self.close()  # one at a time: the cache could remove the others, but not free their room
            descriptor = self.root.open(self.header["shards"][shard])
        elif descriptor is None:
            descriptor = os.open(self.root / self.header["shards"][shard]["name"], os.O_RDONLY | os.O_CLOEXEC)
        self._open[shard] = descriptor  # now the most recently used
        if len(self._open) > MAX_OPEN_SHARDS:
            os.close(self._open.pop(next(iter(self._open))))
        return descriptor


def _check_shards(folder: Path | RemoteFolder, header: dict[str, Any], samples: Samples) -> None:
    expected = sum(shard["samples"] for shard in header["shards"])
    if len(samples) != expected:
        raise ValueError(f"{len(samples)} clips, the header counts {expected}")
    for shard in header["shards"]:
        name = shard["name"]
        if Path(name).name != name:
            raise DataError(f"{folder / INDEX_NAME}: shard {name!r} does not lie in the folder")
        if isinstance(folder, RemoteFolder):
            folder.check(shard)
            continue
        try:
            size = (folder / name).stat().st_size
        except OSError as error:
            raise DataError(f"{folder / name}: {error.strerror}; copy the shard again or prepare again") from None
        if size != shard["bytes"]:
            raise DataError(f"{folder / name}: {size} bytes, written were {shard['bytes']}; copy the shard again")
    outside = samples.outside(np.array([shard["bytes"] for shard in header["shards"]]))
    if outside is not None:
        raise ValueError(f"clip {samples[outside].id} lies outside its shard")


def _reopen(root: Path | RemoteFolder, fingerprint: str) -> ShardIndex:
    index = ShardIndex.open(root, check=False)
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
