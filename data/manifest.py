"""What to prepare: a folder of media, a CSV or JSON Lines manifest, or a `path [audio] label` list, read into clips.

Nothing is opened here but the manifest; a mistake in it is told with its line before any work begins.
"""

import collections
import csv
import dataclasses
import json
import math
import re
import shlex
import unicodedata
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from affekt.data.errors import SettingsError

VIDEO_SUFFIXES = frozenset(
    [".mp4", ".m4v", ".mov", ".mkv", ".webm", ".avi", ".flv", ".wmv", ".mpg", ".mpeg", ".ts", ".mts", ".3gp", ".gif"]
)
AUDIO_SUFFIXES = frozenset(
    [".wav", ".flac", ".mp3", ".m4a", ".aac", ".ogg", ".oga", ".opus", ".wma", ".aiff", ".aif", ".amr", ".au", ".caf"]
)
IMAGE_SUFFIXES = frozenset([".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff"])
MEDIA_SUFFIXES = VIDEO_SUFFIXES | AUDIO_SUFFIXES | IMAGE_SUFFIXES

ALIASES = {"actor": "speaker"}
NUMBERS = frozenset({"start", "end", "valence", "arousal", "dominance"})
OWN_MANIFESTS = ("manifest.csv", "manifest.jsonl")
LIST_HEADER = frozenset(["path", "video", "audio", "file", "filename", "label", "labels", "emotion", "class"])
ID_BYTES = 180  # tar members and file systems allow 255; the rest is for suffixes


@dataclasses.dataclass(frozen=True)
class Clip:
    """One clip of a source.

    `video` is a file with a picture (whose own sound is used unless `audio` names another file) or a folder of frames,
    see `frame_files`; `audio` is a file with sound; one of them may be None. `start` and `end` are seconds from the
    beginning of the file. `meta` holds every other column that is not empty: `votes` and columns that begin with
    `votes_` as {name: count}, ratings as float, anything else as text.
    """

    id: str
    video: Path | None = None
    audio: Path | None = None
    start: float | None = None
    end: float | None = None
    meta: dict[str, Any] = dataclasses.field(default_factory=dict)
    line: int | None = None  # where the manifest names it


def read_source(source: str | Path) -> list[Clip]:
    """The clips of a folder (its `manifest.csv` or `manifest.jsonl` where it has one), a .csv, .jsonl, .txt or .lst.

    Paths in a manifest are relative to it. Raises SettingsError with file and line for a missing column, a duplicate
    id, a path that is not there or a bad number, and for a source without a single clip.
    """
    source = Path(source)
    if source.is_dir():
        own = next((source / name for name in OWN_MANIFESTS if (source / name).is_file()), None)
        return read_source(own) if own else _read_folder(source)
    if not source.exists():
        raise SettingsError(f"{source} is not there; give a folder of media or a manifest (.csv, .jsonl, .txt, .lst)")
    readers: dict[str, Callable[[Path], Iterator[tuple[int, dict[str, Any]]]]]
    readers = {".csv": _csv_rows, ".jsonl": _jsonl_rows, ".txt": _list_rows, ".lst": _list_rows}
    reader = readers.get(source.suffix.lower())
    if reader is None:
        if source.suffix.lower() in MEDIA_SUFFIXES:
            return [clip_of_file(source)]
        raise SettingsError(f"{source}: not a folder, a media file or a manifest (.csv, .jsonl, .txt, .lst)")
    return _unique([_clip(source, line, row) for line, row in _decoded(source, reader)], source)


def clip_of_file(path: str | Path, name: str | None = None) -> Clip:
    """A single media file as a clip; the suffix says whether it is taken for a picture with sound or for sound."""
    path = Path(path)
    clip_id = safe_id(name or path.stem)
    return Clip(clip_id, audio=path) if path.suffix.lower() in AUDIO_SUFFIXES else Clip(clip_id, video=path)


def list_media(folder: str | Path) -> tuple[list[Path], int]:
    """Media files below `folder` by their suffix, in one order on every machine, and the number of other files.

    Names that begin with a dot are left out.
    """
    folder = Path(folder)
    files = [path for path in folder.rglob("*") if path.is_file()]
    files = [path for path in files if not any(part.startswith(".") for part in path.relative_to(folder).parts)]
    media = [path for path in files if path.suffix.lower() in MEDIA_SUFFIXES]
    media.sort(key=lambda path: path.relative_to(folder).as_posix())
    return media, len(files) - len(media)


def frame_files(folder: str | Path) -> list[Path]:
    """The pictures of a folder of frames, in the order of the numbers in their names; none where it is no such folder.

    A folder with a film or a sound in it is none: its pictures need not be the frames of one clip.
    """
    try:
        files = [path for path in Path(folder).iterdir() if not path.name.startswith(".")]
    except OSError:
        return []
    suffixes = {path.suffix.lower() for path in files}
    if suffixes & (VIDEO_SUFFIXES | AUDIO_SUFFIXES):
        return []
    frames = [path for path in files if path.suffix.lower() in IMAGE_SUFFIXES]
    return sorted(frames, key=lambda path: [(int(n or 0), t) for t, n in re.findall(r"(\D*)(\d*)", path.name)])


def list_words(where: str, text: str) -> list[str]:
    """One to three words of a `path [audio] label` line; a name with spaces or commas stands in quotes.

    Raises SettingsError for another number of words, a header, and fields with commas or semicolons between them.
    """
    text = text.strip()
    first, *others = re.split("[,;]", text.lower())
    is_field = Path(first.strip()).suffix in MEDIA_SUFFIXES or first.strip() in LIST_HEADER
    one_word = " " not in text and Path(text.lower()).suffix not in MEDIA_SUFFIXES
    if others and first[:1] not in ("'", '"') and (is_field or one_word):
        raise SettingsError(
            f"{where}: `{text[:60]}` has commas or semicolons between its fields, expected `path [audio] label` with "
            "spaces; a CSV manifest, which `affekt prepare` reads, ends in .csv and begins with a line such as "
            "`path,label`; a name that holds a comma stands in quotes"
        )
    if " " in text and set(text.lower().split()) <= LIST_HEADER:
        raise SettingsError(f"{where}: `{text}` is a header, and a list has none; remove this line")
    try:
        words = shlex.split(text)
    except ValueError as error:
        raise SettingsError(f"{where}: {error}") from None
    if not 1 <= len(words) <= 3:
        raise SettingsError(f"{where}: expected `path [audio] label`, found {len(words)} words")
    return words


def safe_id(text: str) -> str:
    """`text` as a name for tar members: letters, digits, `_` and `-`, no dots, at most 180 bytes."""
    text = unicodedata.normalize("NFC", text)
    text = re.sub(r"[^\w-]", "_", text).lstrip("-") or "_"  # a leading dash would read as an option elsewhere
    while len(text.encode()) > ID_BYTES:
        text = text[:-1]
    return text


def _read_folder(folder: Path) -> list[Clip]:
    media, others = list_media(folder)
    if not media:
        kinds = " ".join(sorted(MEDIA_SUFFIXES))
        raise SettingsError(f"{folder}: no media file in this folder ({others} other files); looked for {kinds}")
    names = [safe_id(path.relative_to(folder).with_suffix("").as_posix()) for path in media]
    taken = {name for name, count in collections.Counter(names).items() if count > 1}
    clips = []
    for path, name in zip(media, names, strict=True):  # a.mp4 beside a.wav: two clips, a_mp4 and a_wav
        clips.append(clip_of_file(path, name + "_" + path.suffix[1:].lower() if name in taken else name))
    return _unique(clips, folder)


def _unique(clips: list[Clip], source: Path) -> list[Clip]:
    if not clips:
        raise SettingsError(f"{source}: it names no clip")
    seen: dict[str, Clip] = {}
    for clip in clips:
        other = seen.setdefault(clip.id, clip)
        if other is not clip:
            where = f"{source}, line {clip.line}" if clip.line else f"{clip.video or clip.audio}"
            first = f"line {other.line}" if other.line else f"{other.video or other.audio}"
            raise SettingsError(f"{where}: the id `{clip.id}` is taken already ({first}); ids must differ")
    return clips


def _decoded(source: Path, reader) -> Iterator[tuple[int, dict[str, Any]]]:
    try:
        yield from reader(source)
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise SettingsError(f"{source}: cannot be read as UTF-8 {source.suffix[1:]}: {error}") from None


def _csv_rows(source: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    with source.open(encoding="utf-8-sig", newline="") as file:
        lines = csv.reader(file)
        header = [name.strip() for name in next(lines, [])]
        if len(header) == 1 and " " in header[0]:  # the field's lists are often called .csv
            yield from _list_rows(source)
            return
        if not {"path", "video", "audio"} & set(header):
            found = ", ".join(header) or "nothing"
            hint = "the first line names the columns, as in `path,label`, separated by commas"
            raise SettingsError(f"{source}, line 1: no column `video`, `audio` or `path` (found {found}); {hint}")
        if len(set(header)) < len(header):
            raise SettingsError(f"{source}, line 1: a column name stands twice")
        yield from _records(source, csv.DictReader(file, header, strict=True), lines.line_num)


def _records(source: Path, reader: csv.DictReader, above: int) -> Iterator[tuple[int, dict[str, Any]]]:
    """(line in which it begins, row) of the rows with `above` lines above them.

    `reader` is a strict one: to any other a quote that is not closed holds all rows from there to the end of the file.
    """
    while True:
        begin = above + reader.line_num + 1
        try:
            row = next(reader, None)
        except csv.Error as error:
            hint = "a quote is not closed, or stands within a value (write it twice there)"
            raise SettingsError(f"{source}, line {begin}: {error}; {hint}") from None
        if row is None:
            return
        values = [value for value in row.values() if isinstance(value, str)]
        breaks = sum(len(re.findall("\r\n|\r|\n", value)) for value in values)
        last = above + reader.line_num
        if None in row or None in row.values():
            told = f"not as many values as the header has columns ({len(reader.fieldnames)})"
            told += f"; a quoted value goes on to line {last}: is its quote closed too late?" * (breaks > 0)
            raise SettingsError(f"{source}, line {last - breaks}: {told}")
        yield last - breaks, row


def _jsonl_rows(source: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    with source.open(encoding="utf-8-sig") as file:
        for line, text in enumerate(file, 1):
            if not text.strip():
                continue
            try:
                row = json.loads(text)
            except ValueError as error:
                raise SettingsError(f"{source}, line {line}: not valid JSON: {error}") from None
            if not isinstance(row, dict) or not {"path", "video", "audio"} & row.keys():
                raise SettingsError(f"{source}, line {line}: expected an object with `video`, `audio` or `path`")
            yield line, row


def _list_rows(source: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """`path label` or `path audio label`; a name with spaces stands in quotes."""
    with source.open(encoding="utf-8-sig") as file:
        for line, text in enumerate(file, 1):
            if not text.strip() or text.lstrip().startswith("#"):
                continue
            words = list_words(f"{source}, line {line}", text)
            if len(words) == 3:
                yield line, {"video": words[0], "audio": words[1], "label": words[2]}
            else:
                yield line, {"path": words[0], "label": words[1] if len(words) == 2 else ""}


def _clip(source: Path, line: int, row: dict[str, Any]) -> Clip:
    where = f"{source}, line {line}"
    values = {ALIASES.get(key, key): value for key, value in row.items() if value not in ("", None)}
    fields = {key: _value(where, key, value) for key, value in values.items()}
    streams = [key for key in ("path", "video", "audio") if key in fields]
    paths = {key: _path(where, source.parent, key, fields.pop(key)) for key in streams}
    if "path" in paths:
        path = paths.pop("path")
        if "video" in paths or "audio" in paths:
            raise SettingsError(f"{where}: `path` beside `video` or `audio`; use one or the others")
        paths["audio" if path.suffix.lower() in AUDIO_SUFFIXES else "video"] = path
    if not paths:
        raise SettingsError(f"{where}: neither `video` nor `audio` names a file")
    start, end = fields.pop("start", None), fields.pop("end", None)
    if (start or 0) < 0 or (end is not None and end <= (start or 0)):
        raise SettingsError(f"{where}: start {start} and end {end} do not make an interval of seconds")
    name = fields.pop("id", None)
    if name is None:
        first = str(next(values[key] for key in ("path", "video", "audio") if key in values))
        name = safe_id(str(Path(first).with_suffix("")))
    elif name != safe_id(name):
        raise SettingsError(
            f"{where}: the id {name!r} may only hold letters, digits, `_` and `-`; try `{safe_id(name)}`"
        )
    return Clip(name, paths.get("video"), paths.get("audio"), start, end, fields, line)


def _path(where: str, base: Path, key: str, text: str) -> Path:
    path = base / text
    if "\0" in text or not (path.is_file() or (key != "audio" and frame_files(path))):
        raise SettingsError(f"{where}: the file {path} is not there (paths are relative to the manifest)")
    return path


def _value(where: str, key: str, value: Any) -> Any:
    if key == "votes" or key.startswith("votes_"):
        return _votes(where, key, value)
    if key in NUMBERS:
        try:
            number = float(value)
        except (TypeError, ValueError):
            number = math.nan
        if not math.isfinite(number):
            raise SettingsError(f"{where}: {key} is {value!r}, expected a number")
        return number
    return value.strip() if isinstance(value, str) else json.dumps(value, ensure_ascii=False, sort_keys=True)


def _votes(where: str, key: str, value: Any) -> dict[str, float]:
    try:
        votes = json.loads(value) if isinstance(value, str) else value
        counts = {str(name): float(count) for name, count in votes.items()}
    except (ValueError, TypeError, AttributeError):
        counts = {"": -1.0}
    if not counts or any(not math.isfinite(count) or count < 0 for count in counts.values()):
        raise SettingsError(f'{where}: {key} is {value!r}, expected a JSON object such as {{"happy": 7, "calm": 3}}')
    return {name: int(count) if count.is_integer() else count for name, count in counts.items()}


def describe(clips: Iterable[Clip], base: Path) -> list[dict[str, Any]]:
    """What makes this source this source, to notice another one on resume: ids, files with sizes, intervals, columns.

    Paths below `base` are given relative to it, so that a moved source stays the same one.
    """

    def file(path: Path | None) -> list[Any] | None:
        if path is None:
            return None
        name = path.relative_to(base) if path.is_relative_to(base) else path
        frames = [] if path.is_file() else frame_files(path)
        size = (
            sum(frame.stat().st_size for frame in frames) if frames else path.stat().st_size if path.is_file() else -1
        )
        return [name.as_posix(), size]

    return [[c.id, file(c.video), file(c.audio), c.start, c.end, c.meta] for c in clips]
