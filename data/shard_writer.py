"""Write shards: one tar file at a time, whole or not at all, the same bytes for the same clips."""

import hashlib
import json
import re
import tarfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from webdataset import TarWriter
from xxhash import xxh3_128_hexdigest

from affekt import __version__
from affekt.data.errors import DataError
from affekt.data.files import committed
from affekt.data.samples import FORMAT, MEMBERS, VERSION, write_samples
from affekt.data.shards import INDEX_NAME, ShardIndex

# A dot ends the clip's name for webdataset, a slash makes folders of it, control characters fool terminals.
BAD_ID = re.compile(r"[./\\\x00-\x1f\x7f-\x9f\ud800-\udfff]")
RECORD_KEYS = ("frames", "samples", "duration", "flags", "source_sha256", "frame_sizes", "meta")
ORIGIN_KEYS = ("start", "end")  # seconds of the source's file; stand in `<id>.json` where the record has them


class ShardWriter:
    """Writes shards into a folder. Each keeps its index rows in a sidecar until `finish` merges them into the index."""

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        self.folder.mkdir(parents=True, exist_ok=True)

    def write_shard(self, number: int, samples: Iterable[tuple[dict[str, Any], dict[str, bytes]]]) -> None:
        """Write shard `number` and its sidecar; both exist in full when this returns.

        A sample is a record (keys `id` and RECORD_KEYS) with its members `mjpeg` or `mp4`, and `flac`; `<id>.json`,
        the record with ORIGIN_KEYS, is added. Whatever goes wrong leaves no partial file and earlier shards as they
        are; an unusable record and an I/O error such as a full disk raise DataError.
        """
        shard, sidecar = shard_path(self.folder, number), sidecar_path(self.folder, number)
        sidecar.unlink(missing_ok=True)
        with committed(shard) as file:
            writer, hashing = None, _HashingFile(file)
            try:
                # PAX so that ids may be longer than the 100 bytes of plain tar; it writes plain headers for others.
                writer = TarWriter(hashing, "affekt", "affekt", 0o444, encoder=False, mtime=0, format="PAX_FORMAT")
                records = [_write_sample(writer, record, members) for record, members in samples]
                writer.close()
            except BaseException:
                hashing.broken = True  # the tar stream flushes its buffer when it is collected
                raise
            file.flush()
            rows = _locate(Path(file.name), number, records)
        entry = {"name": shard.name, "bytes": hashing.size, "samples": len(rows), "sha256": hashing.digest.hexdigest()}
        with committed(sidecar) as file:
            file.writelines(_line(row) for row in ({"format": FORMAT, "version": VERSION, "shard": entry}, *rows))

    def finish(self, header: dict[str, Any]) -> ShardIndex:
        """Merge the sidecars into the index, remove them, and return it opened.

        `header` states size, fps, sample_rate, picture and the settings of the preparation. Raises DataError for a
        shard number that is left out, an id that two shards hold, or when there is not one clip.
        """
        numbers = sorted(int(path.stem.removeprefix("shard-")) for path in self.folder.glob("shard-??????.jsonl"))
        if numbers != list(range(len(numbers))):
            missing = sorted(set(range(numbers[-1])) - set(numbers))
            raise DataError(f"{self.folder}: shards {missing[:5]} are not written yet; run the same command again")
        shards, seen = [], {}
        for number in numbers:
            entry, rows = read_sidecar(self.folder, number)
            shards.append(entry)
            for row in rows:
                if seen.setdefault(row["id"], number) != number:
                    raise DataError(f"{self.folder}: clip {row['id']} is in shards {seen[row['id']]} and {number}")
        if not seen:
            raise DataError(f"{self.folder}: not one usable clip; see quarantine.jsonl for the causes")
        with committed(self.folder / INDEX_NAME) as file:
            rows = (read_sidecar(self.folder, number)[1] for number in numbers)  # again: all at once would not fit
            write_samples(file.name, {"affekt": __version__, **header, "shards": shards}, rows)
        for number in numbers:
            sidecar_path(self.folder, number).unlink()
        return ShardIndex.open(self.folder)


def shard_path(folder: Path, number: int) -> Path:
    return folder / f"shard-{number:06d}.tar"


def sidecar_path(folder: Path, number: int) -> Path:
    return folder / f"shard-{number:06d}.jsonl"


def read_sidecar(folder: str | Path, number: int) -> tuple[dict[str, Any], list[dict[str, Any]]] | None:
    """The header entry and the index rows of a finished shard.

    None when it is not written, or not by this version, or its tar is gone or of another size: write it again.
    """
    folder = Path(folder)
    try:
        head, *rows = map(json.loads, sidecar_path(folder, number).read_bytes().splitlines())
        size = shard_path(folder, number).stat().st_size
    except (OSError, ValueError):
        return None
    entry = head.get("shard", {})
    if head.get("version") != VERSION or entry.get("bytes") != size or entry.get("samples") != len(rows):
        return None
    return entry, rows


def check_record(record: dict[str, Any], members: dict[str, bytes]) -> None:
    """Raises DataError when a record cannot be stored or does not fit its members."""
    name = record["id"]
    if not name or BAD_ID.search(name) or len(name.encode()) > 200:
        raise DataError(
            f"clip id {name!r} cannot name a shard member: 1 to 200 bytes without dots, slashes and control characters"
        )
    missing = [key for key in RECORD_KEYS if key not in record]
    if missing:
        raise DataError(f"clip {name}: the record lacks {', '.join(missing)}")
    unknown = sorted(set(members) - (set(MEMBERS) - {"json"}))
    if unknown:
        raise DataError(f"clip {name}: members {', '.join(unknown)} are not of the format")
    pictures = [member for member in ("mjpeg", "mp4") if members.get(member)]
    if len(pictures) != (record["frames"] > 0) or bool(members.get("flac")) != (record["samples"] > 0):
        raise DataError(
            f"clip {name}: {record['frames']} frames and {record['samples']} samples, members {', '.join(members)}"
        )
    if not members:
        raise DataError(f"clip {name}: neither picture nor sound")
    sizes = record["frame_sizes"]
    if "mjpeg" in members and (len(sizes), sum(sizes)) != (record["frames"], len(members["mjpeg"])):
        raise DataError(f"clip {name}: {len(sizes)} frame sizes do not add up to the {record['frames']} frames stored")


def _write_sample(writer: TarWriter, record: dict[str, Any], members: dict[str, bytes]) -> dict[str, Any]:
    """Write one sample; the row it gets in the index, without offsets and shard."""
    check_record(record, members)
    kept = {"id": record["id"], **{key: record[key] for key in RECORD_KEYS}}
    origin = {key: record[key] for key in ORIGIN_KEYS if key in record}
    try:
        members = {**members, "json": _line(kept | origin)}
    except (TypeError, ValueError) as error:
        raise DataError(f"clip {record['id']}: the record cannot be written as JSON: {error}") from None
    writer.write({"__key__": record["id"], **members})
    digests = {member: xxh3_128_hexdigest(content) for member, content in members.items()}
    return {**kept, "members": digests}


def _locate(path: Path, number: int, records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Index rows with the byte ranges found by reading the headers back. Raises DataError for a repeated id."""
    with tarfile.open(path, "r:") as tar:
        found = {member.name: (member.offset_data, member.size) for member in tar}
    if len(found) != sum(len(record["members"]) for record in records):
        raise DataError(f"{path}: an id occurs twice, or the file does not hold what was written to it")
    rows = []
    for record in records:
        members = {m: (*found[f"{record['id']}.{m}"], digest) for m, digest in sorted(record["members"].items())}
        rows.append({**record, "shard": number, "members": members})
    return rows


class _HashingFile:
    """A file to write to that sums up size and checksum, and swallows everything once it is `broken`."""

    def __init__(self, file):
        self.file, self.digest, self.size, self.broken = file, hashlib.sha256(), 0, False

    def write(self, content: bytes) -> int:
        if not self.broken:
            self.file.write(content)
            self.digest.update(content)
            self.size += len(content)
        return len(content)


def _line(row: dict[str, Any]) -> bytes:
    return json.dumps(row, ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode() + b"\n"
