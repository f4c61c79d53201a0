"""Files that are there in full or not at all, and the versions of the formats they are in."""

import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from affekt.data.errors import AffektError, DataError, SettingsError


@contextmanager
def committed(path: Path) -> Iterator[BinaryIO]:
    """A binary file that takes the name `path` only when it is complete and on the disk.

    Until then it is `.NAME.partial` beside it. Raises DataError naming `path` when the disk refuses.
    """
    partial = path.with_name(f".{path.name}.partial")
    try:
        with open(partial, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
        flush(path.parent)
    except OSError as error:
        raise _refused(path, error) from error
    finally:
        partial.unlink(missing_ok=True)


def append_line(path: Path, text: str) -> None:
    """Add a line, which is kept from then on whatever happens to this process. Raises DataError as `committed`.

    A line begins with its line break, so that one which a kill or a full disk tore spoils none after it.
    """
    try:
        with open(path, "ab") as file:
            file.write(f"\n{text}".encode())
    except OSError as error:
        raise _refused(path, error) from error


def _refused(path: Path, error: OSError) -> DataError:
    return DataError(
        f"{path}: cannot be written: {error.strerror or error}; what was finished before it is kept: make room or "
        "repair the folder, then run the same command again"
    )


# What each command's folder holds at its top, so that no command writes into another's.
MARKS = {
    "finetune.json": "a fine-tuning",
    "synth.json": "a corpus of `affekt synth`",
    "index.safetensors": "shards",
    "quarantine.jsonl": "shards",
    "metrics.jsonl": "a run of `affekt pretrain`",
    "config.json": "an export",
    "evaluate.yaml": "results of `affekt evaluate`",
    "retrieval.json": "an index of `affekt index`",
}


def refuse_other_kind(folder: Path, own: str) -> None:
    """SettingsError where `folder` holds what another command wrote; `own` is a value of MARKS, or results of one."""
    for mark, kind in [*MARKS.items(), *results_in(folder).items()]:
        if kind != own and (folder / mark).exists():
            raise SettingsError(f"{folder}: holds {kind} ({mark}); choose another folder")


def results_in(folder: Path) -> dict[str, str]:
    """`{"results.json": whose they are}`; nothing where there are none, or they are of a version that does not tell."""
    try:
        values = json.loads((folder / "results.json").read_text(encoding="utf-8"))
        if values["format"] == "affekt-results" and not values.get("command"):
            return {}
        return {"results.json": f"results of `affekt {values['command']}`"}
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except (OSError, ValueError, LookupError, TypeError):
        return {"results.json": "a file of unknown origin"}


def write_text(path: Path, text: str) -> None:
    """Replace a small file in one step: a reader finds the old text or the new. Raises DataError as `committed`."""
    with committed(path) as file:
        file.write(text.encode("utf-8"))


def replace_text(path: Path, text: str) -> None:
    """As `write_text`, for what is soon written anew: it is not waited for until it is on the disk."""
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, path)


def flush(path: Path) -> None:
    """Wait until a file or the entries of a folder are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def hash_file(path: Path) -> str:
    """SHA-256 of a file's content, in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def check_version(header: Any, name: str, ours: str, path: Path, error: type[AffektError] = DataError) -> None:
    """Same format and same major version, or `error` with both versions and the way out."""
    if not isinstance(header, dict) or header.get("format") != name or "version" not in header:
        found = header.get("format") if isinstance(header, dict) else type(header).__name__
        raise error(f"{path}: not in the format {name} (found {found!r})")
    found, major = str(header["version"]), ours.partition(".")[0]
    if found.partition(".")[0] != major:
        raise error(
            f"{path}: {name} version {found}, this affekt reads {major}.x; use the affekt that wrote it "
            f"({header.get('affekt', 'its release is not named')}), or make it again with this one"
        )
