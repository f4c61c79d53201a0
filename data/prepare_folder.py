"""The folder that `prepare` writes: whose it is, what of it is done, and who works on it now."""

import contextlib
import fcntl
import hashlib
import json
import os
import shutil
from pathlib import Path
from typing import Any, Self

import yaml

from affekt.data.errors import DataError, SettingsError
from affekt.data.files import append_line, refuse_other_kind, write_text
from affekt.data.settings import read_yaml
from affekt.data.shard_writer import read_sidecar
from affekt.data.shards import INDEX_NAME, ShardIndex

SETTINGS, QUARANTINE, SUMMARY, NOTES = "settings.yaml", "quarantine.jsonl", "summary.json", "unfinished"
LENGTHS = "lengths.jsonl"


class PrepareFolder:
    """Use as a context, which locks the folder against a second `prepare`.

    `notes` are those of the finished blocks, in order; `complete` says that the index is written.
    """

    def __init__(self, path: str | Path, settings: dict[str, Any], source: list[Any], overwrite: bool):
        self.path = Path(path)
        self._wanted = {"settings": settings, "source": {"clips": len(source), "sha256": _digest(source)}}
        self._overwrite = overwrite
        self._lock = -1
        self.notes: list[dict[str, Any]] = []
        self.complete = False

    def __enter__(self) -> Self:
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self._lock = os.open(self.path, os.O_RDONLY)
        except OSError as error:
            raise SettingsError(f"{self.path}: cannot be used as a folder to write to: {error.strerror}") from None
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            self._claim()
        except BlockingIOError:
            os.close(self._lock)
            raise SettingsError(f"{self.path}: another `prepare` works in this folder; wait for it to end") from None
        except BaseException:
            os.close(self._lock)
            raise
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._lock)  # which gives up the lock, as the end of the process does

    @property
    def next_shard(self) -> int:
        return sum(note["shard"] is not None for note in self.notes)

    def add_note(self, note: dict[str, Any]) -> None:
        """Declare the next block done."""
        (self.path / NOTES).mkdir(exist_ok=True)
        write_text(self.path / NOTES / f"{len(self.notes):06d}.json", json.dumps(note))
        self.notes.append(note)

    def read_lengths(self) -> dict[str, dict[str, Any]]:
        """What `add_length` has kept, by id."""
        try:
            lines = (self.path / NOTES / LENGTHS).read_bytes().splitlines()
        except OSError:
            return {}
        found = {}
        for line in lines:
            with contextlib.suppress(ValueError):  # torn as the run was killed: that clip is measured again
                row = json.loads(line or b"{}")
                found |= {row.pop("id"): row} if row else {}
        return found

    def add_length(self, name: str, length: dict[str, Any]) -> None:
        """Keep `begin` and `end` in seconds of a clip, or the `cause` and `message` for which there are none."""
        (self.path / NOTES).mkdir(exist_ok=True)
        append_line(self.path / NOTES / LENGTHS, json.dumps({"id": name, **length}))

    def write_results(self, quarantine: list[dict[str, Any]], summary: dict[str, Any]) -> None:
        rows = "".join(json.dumps(row) + "\n" for row in quarantine)  # ASCII: names of files may hold anything
        write_text(self.path / QUARANTINE, rows)
        write_text(self.path / SUMMARY, json.dumps(summary, indent=1) + "\n")

    def read_summary(self) -> dict[str, Any]:
        return json.loads((self.path / SUMMARY).read_text(encoding="utf-8"))

    def remove_notes(self) -> None:
        shutil.rmtree(self.path / NOTES, ignore_errors=True)

    def _claim(self) -> None:
        """Make the folder ours, or find out what of it is done already."""
        refuse_other_kind(self.path, "shards")
        present = sorted(entry.name for entry in self.path.iterdir() if not entry.name.startswith("."))
        if present and SETTINGS not in present:
            raise SettingsError(f"{self.path}: holds other files ({', '.join(present[:3])}); choose a new folder")
        for partial in [*self.path.glob(".*.partial"), *self.path.glob(f"{NOTES}/.*.partial")]:
            partial.unlink()  # of a process that was killed
        if SETTINGS in present:
            differences = _differences(read_yaml(self.path / SETTINGS), self._wanted)
            if not differences:
                try:
                    return self._find_done()
                except DataError as error:  # complete once, and damaged since
                    if not self._overwrite:
                        raise DataError(f"{error}; --overwrite makes all of it again") from None
            elif not self._overwrite:
                told = "\n  ".join([f"{self.path}: was begun otherwise:", *differences])
                raise SettingsError(f"{told}\nchoose a new folder, or --overwrite to replace what is there")
            self._empty()
        write_text(self.path / SETTINGS, yaml.safe_dump(self._wanted, sort_keys=False, allow_unicode=True))

    def _find_done(self) -> None:
        if (self.path / INDEX_NAME).exists() and (self.path / SUMMARY).exists():
            ShardIndex.open(self.path)
            for sidecar in self.path.glob("shard-*.jsonl"):  # left when the end of the run was interrupted
                sidecar.unlink()
            self.remove_notes()
            self.complete = True
            return
        while (note := self._read_note(len(self.notes))) is not None:
            self.notes.append(note)

    def _read_note(self, number: int) -> dict[str, Any] | None:
        """The note of a finished block; None where it, or its shard, is not there in full."""
        try:
            note = json.loads((self.path / NOTES / f"{number:06d}.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None
        if note["shard"] is not None and read_sidecar(self.path, note["shard"]) is None:
            return None
        return note

    def _empty(self) -> None:
        """Remove what `prepare` writes, and nothing else."""
        for pattern in (INDEX_NAME, "shard-*.tar", "shard-*.jsonl", QUARANTINE, SUMMARY, SETTINGS):
            for path in self.path.glob(pattern):
                path.unlink()
        self.remove_notes()


def _digest(source: list[Any]) -> str:
    return hashlib.sha256(json.dumps(source, sort_keys=True).encode()).hexdigest()


def _differences(then: dict[str, Any], now: dict[str, Any]) -> list[str]:
    found = []
    for key in sorted(then.get("settings", {}).keys() | now["settings"].keys()):
        old, new = then.get("settings", {}).get(key), now["settings"].get(key)
        if old != new:
            found.append(f"{key}: {old} then, {new} now")
    old, new = then.get("source", {}), now["source"]
    if old.get("clips") != new["clips"]:
        found.append(f"source: {old.get('clips')} clips then, {new['clips']} now")
    elif old != new:
        found.append("source: as many clips, but other ids, files, file sizes or columns")
    return found
