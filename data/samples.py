"""The clips of an index as columns of one file that is mapped and not read: a million clips are there at once, and the
loader's workers share its pages. The file is in the safetensors format, its header in the metadata under `affekt`."""

import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.numpy

from affekt.data.files import check_version

FORMAT, VERSION = "affekt-index", "3.0"
MEMBERS = ("mjpeg", "mp4", "flac", "json")
# One entry per clip; a member that a clip lacks lies at -1. What has no fixed length stands end to end in `frame_size`
# and `text`, and each clip says where its part ends. `text` is JSON: id, source_sha256, flags and meta.
COLUMNS = {
    "duration": ("<f8", ()),
    "frame_end": ("<i8", ()),
    "member_offset": ("<i8", (len(MEMBERS),)),
    "member_size": ("<i8", (len(MEMBERS),)),
    "samples": ("<i8", ()),
    "text_end": ("<i8", ()),
    "frames": ("<i4", ()),
    "shard": ("<i4", ()),
    "member_xxh3": ("|u1", (len(MEMBERS), 16)),  # against damage; SHA-256 took a tenth of the time of a clip
}
RUNS = {"frame_size": "<u4", "text": "|u1"}
TYPES = {"F64": "<f8", "I64": "<i8", "I32": "<i4", "U32": "<u4", "U8": "|u1"}  # names of safetensors
LARGEST_HEADER = 100 * 2**20


@dataclass(frozen=True, slots=True)
class Sample:
    """One clip: where its bytes lie and what they hold. `duration` in seconds; `frames`, `samples` 0 when absent.

    `members` maps a kind (`mjpeg`, `mp4`, `flac`, `json`) to offset, size and xxh3 (128 bits) in the shard's file.
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


class Samples(Sequence):
    """The clips of an index. `samples[i]` makes a `Sample`; to look at all of a million, take `rows()` or a column."""

    def __init__(self, columns: dict[str, np.ndarray]):
        self._columns = columns
        self.shard: np.ndarray = columns["shard"]  # (N,)
        self.duration: np.ndarray = columns["duration"]
        self.has_video: np.ndarray = columns["frames"] > 0
        self.has_audio: np.ndarray = columns["samples"] > 0

    def __len__(self) -> int:
        return len(self.shard)

    def __getitem__(self, position: int | slice) -> Sample | list[Sample]:
        if isinstance(position, slice):
            return [self[i] for i in range(*position.indices(len(self)))]
        i = range(len(self))[position]  # raises IndexError, takes negative ones
        c, row = self._columns, self.row(i)
        places = zip(MEMBERS, c["member_offset"][i].tolist(), c["member_size"][i].tolist(), strict=True)
        digests = c["member_xxh3"][i]
        return Sample(
            id=row["id"],
            shard=int(c["shard"][i]),
            members={
                kind: (offset, size, digests[k].tobytes().hex())
                for k, (kind, offset, size) in enumerate(places)
                if offset >= 0
            },
            frames=int(c["frames"][i]),
            samples=int(c["samples"][i]),
            duration=float(c["duration"][i]),
            flags=tuple(row["flags"]),
            frame_sizes=tuple(self._run("frame_size", "frame_end", i).tolist()),
            source_sha256=row["source_sha256"],
            meta=row["meta"],
        )

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Samples) and len(self) == len(other) and all(map(Sample.__eq__, self, other))

    def row(self, position: int) -> dict[str, Any]:
        """`id`, `source_sha256`, `flags` and `meta` of one clip."""
        return json.loads(self._run("text", "text_end", position).tobytes())

    def rows(self) -> Iterator[dict[str, Any]]:
        """`row` of every clip in turn."""
        return map(self.row, range(len(self)))

    def beginnings(self, share: float) -> "Samples":
        """The same clips as if they ended after this share of their length, of which a picture and a sample are left
        where there were any; for decoding, which reads the bytes of the whole clip."""
        c = self._columns
        shorter = {name: np.ceil(c[name] * share - 1e-9).astype(c[name].dtype) for name in ("frames", "samples")}
        return Samples({**c, **shorter, "duration": c["duration"] * share})

    def outside(self, shard_bytes: np.ndarray) -> int | None:
        """The first clip with a member that does not lie within its shard, given the size of every shard."""
        if len(self) and not 0 <= self.shard.min() <= self.shard.max() < len(shard_bytes):
            raise ValueError(f"shard {self.shard.max()} of {len(shard_bytes)}")
        offset, size = self._columns["member_offset"], self._columns["member_size"]
        room = shard_bytes[self.shard, None] - offset  # no sum of the two, which could overflow
        bad = ((offset >= 0) & ((size < 0) | (size > room))).any(1)
        return int(bad.argmax()) if bad.any() else None

    def _run(self, values: str, ends: str, i: int) -> np.ndarray:
        ends = self._columns[ends]
        return self._columns[values][ends[i - 1] if i else 0 : ends[i]]


def write_samples(path: str | Path, header: dict[str, Any], shards: Iterable[list[dict[str, Any]]]) -> None:
    """Write the rows of each shard, dictionaries with the fields of `Sample`, and a header that JSON can hold."""
    parts = [_columns_of(rows) for rows in shards if rows]
    columns = {name: np.concatenate([part[name] for part in parts]) for name in (*COLUMNS, *RUNS)}
    columns |= {name: columns[name].cumsum() for name in ("frame_end", "text_end")}
    header = {"format": FORMAT, "version": VERSION, **header, "columns_sha256": _digest(columns)}
    safetensors.numpy.save_file(columns, path, {"affekt": json.dumps(header, ensure_ascii=False)})


def open_samples(path: Path, check: bool = True) -> tuple[dict[str, Any], Samples, str]:
    """The header of an index file, its clips, and a fingerprint that is another one when any bit of them is.

    `check` reads the file once and compares its checksum. Raises DataError for another major version; OSError,
    LookupError, TypeError and ValueError for a file that is missing or damaged.
    """
    content = np.memmap(path, np.uint8, "r")
    start = 8 + int.from_bytes(content[:8].tobytes(), "little")
    if not 8 < start <= min(len(content), LARGEST_HEADER):
        raise ValueError("its first bytes are no header")
    head = content[8:start].tobytes()
    entries = json.loads(head)
    header = json.loads(entries.pop("__metadata__")["affekt"])
    fingerprint = hashlib.sha256(head).hexdigest()
    check_version(header, FORMAT, VERSION, path)
    columns = {}
    for name, (dtype, inner) in {**COLUMNS, **{name: (dtype, ()) for name, dtype in RUNS.items()}}.items():
        begin, end = entries[name]["data_offsets"]
        if TYPES.get(entries[name]["dtype"]) != dtype or not 0 <= begin <= end <= len(content) - start:
            raise ValueError(f"column {name} is not as it should be")
        columns[name] = np.asarray(content[start + begin : start + end].view(dtype)).reshape(-1, *inner)
    lengths = {len(columns[name]) for name in COLUMNS}
    if len(lengths) != 1:
        raise ValueError(f"columns of {sorted(lengths)} clips")
    for values, ends in (("frame_size", "frame_end"), ("text", "text_end")):
        if not (np.diff(columns[ends], prepend=0) >= 0).all() or columns[ends][-1:].sum() != len(columns[values]):
            raise ValueError(f"column {ends} is not as it should be")
    if check:
        if _digest(columns) != header["columns_sha256"]:
            raise ValueError("its checksum differs")
        pictures = np.diff(columns["frame_end"], prepend=0)  # none are listed where they lie in an mp4
        if ((pictures > 0) & (pictures != columns["frames"])).any():
            raise ValueError("a clip has another number of pictures than of their sizes")
    return header, Samples(columns), fingerprint


def _columns_of(rows: list[dict[str, Any]]) -> dict[str, np.ndarray]:
    places = np.full((len(rows), len(MEMBERS), 2), -1, np.int64)
    digests = np.zeros((len(rows), len(MEMBERS), 16), np.uint8)
    texts = []
    for i, row in enumerate(rows):
        for kind, (offset, size, digest) in row["members"].items():
            places[i, MEMBERS.index(kind)] = offset, size
            digests[i, MEMBERS.index(kind)] = np.frombuffer(bytes.fromhex(digest), np.uint8)
        kept = {key: row[key] for key in ("id", "source_sha256", "flags", "meta")}
        texts.append(json.dumps(kept, ensure_ascii=False, separators=(",", ":")).encode())
    columns = {
        "member_offset": places[..., 0],
        "member_size": places[..., 1],
        "member_xxh3": digests,
        "frame_end": [len(row["frame_sizes"]) for row in rows],  # lengths here, summed up when all shards are there
        "text_end": [len(text) for text in texts],
        **{name: [row[name] for row in rows] for name in ("duration", "samples", "frames", "shard")},
    }
    columns = {name: np.ascontiguousarray(values, COLUMNS[name][0]) for name, values in columns.items()}
    columns["frame_size"] = np.array([size for row in rows for size in row["frame_sizes"]], RUNS["frame_size"])
    columns["text"] = np.frombuffer(b"".join(texts), np.uint8)
    return columns


def _digest(columns: dict[str, np.ndarray]) -> str:
    digest = hashlib.sha256()
    for name in (*COLUMNS, *RUNS):
        digest.update(memoryview(columns[name]).cast("B") if columns[name].size else b"")
    return digest.hexdigest()
