"""What a corpus is here: facts from its documentation, and a function from the names of its files to rows.

Nothing is opened but tables of labels: a name says what a file is, `affekt prepare` finds out what is in it.
"""

import csv
import dataclasses
import io
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from affekt.data.errors import SettingsError
from affekt.data.manifest import AUDIO_SUFFIXES, IMAGE_SUFFIXES, VIDEO_SUFFIXES

Row = dict[str, Any]  # columns of one clip; paths relative to the folder of the corpus
SOUND_ORDER = (".wav", ".flac")  # lossless before whatever else there is of a clip


class Tree:
    """The names of all files below a folder, or of one file, in one order on every machine.

    Names that begin with a dot are left out, and so is what lies behind links to folders.
    """

    def __init__(self, source: str | Path, media: str | Path | None = None):
        """`media` is where the files of a list are looked for, see `affekt.data.corpora.lists`."""
        source = Path(source)
        if not source.exists():
            raise SettingsError(f"{source} is not there; give the folder of the corpus, or the file of a list")
        self.source, self.given_media = source, media is not None
        self.root = (source if source.is_dir() else source.parent).resolve()
        self.media = Path(media).resolve() if media else self.root
        self.files = sorted(_below(self.root)) if source.is_dir() else [source.name]

    def clips(self, pattern: str, suffixes: Iterable[str] = VIDEO_SUFFIXES | AUDIO_SUFFIXES) -> Iterator[tuple]:
        """(match, path) of the files with one of the suffixes whose path, with a slash before it and without its
        suffix, matches."""
        search = re.compile(pattern).search
        for path in self.files:
            stem, suffix = os.path.splitext(path)
            if suffix.lower() in suffixes and (match := search("/" + stem)):
                yield match, path

    def groups(self, pattern: str, key: Callable[[re.Match], str]) -> dict[str, tuple[re.Match, list[str]]]:
        """Media files that belong to one clip, by `key` of their match, in the order of the keys."""
        found: dict[str, tuple[re.Match, list[str]]] = {}
        for match, path in self.clips(pattern):
            found.setdefault(key(match), (match, []))[1].append(path)
        return dict(sorted(found.items()))

    def frame_folders(self, pattern: str) -> dict[str, str]:
        """Folders of pictures whose path, with a slash before it, matches, by their last name."""
        folders = {os.path.dirname(path) for path in self.files if os.path.splitext(path)[1].lower() in IMAGE_SUFFIXES}
        return {os.path.basename(folder): folder for folder in sorted(folders) if re.search(pattern, "/" + folder)}

    def find(self, pattern: str) -> list[str]:
        """Files whose path, with a slash before it, matches to its end."""
        search = re.compile(f"(?:{pattern})$").search
        return [path for path in self.files if search("/" + path)]

    def lines(self, path: str) -> Iterator[tuple[str, str]]:
        """(where, line) of a table that is not empty; `where` is for messages. What is not UTF-8 is replaced."""
        try:
            text = (self.root / path).read_text(encoding="utf-8-sig", errors="replace")
        except OSError as error:
            raise SettingsError(f"{self.root / path}: cannot be read: {error.strerror}") from None
        for number, line in enumerate(text.split("\n"), 1):  # splitlines would also split at MELD's control characters
            if line.strip():
                yield f"{self.root / path}, line {number}", line.removesuffix("\r")

    def table(self, path: str, *columns: str) -> Iterator[tuple[str, dict[str, str]]]:
        """(where, row) of a CSV file with a header that must have these columns; names and values stripped."""
        text = "\n".join(line for _, line in self.lines(path))
        reader = csv.DictReader(io.StringIO(text), skipinitialspace=True)
        header = [name.strip() for name in reader.fieldnames or []]
        missing = [name for name in columns if name not in header]
        if missing:
            raise SettingsError(
                f"{self.root / path}: no column {missing[0]!r} (found {', '.join(header) or 'nothing'})"
            )
        reader.fieldnames = header
        for number, row in enumerate(reader, 2):
            row = {key: (value or "").strip() for key, value in row.items() if key is not None}
            yield f"{self.root / path}, row {number}", row


@dataclasses.dataclass
class Report:
    """What an import has to say beside its rows."""

    absent: list[str] = dataclasses.field(default_factory=list)  # named by the corpus's tables, and no file is there
    left_out: dict[str, list[str]] = dataclasses.field(default_factory=dict)  # by cause: there, and not taken
    notes: list[str] = dataclasses.field(default_factory=list)

    def leave_out(self, cause: str, *names: str) -> None:
        if names:
            self.left_out.setdefault(cause, []).extend(names)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Corpus:
    """One corpus. `rows(tree, report)` yields a row per clip, without what all rows share.

    `published` maps `clips` to a number of rows, a column to its number of values, and `column=value` to a number of
    rows, as the corpus's own documentation counts them. `faults` are ids that it calls unusable, with the cause.
    """

    name: str  # what is typed; ids and speakers begin with it
    title: str
    rows: Callable[[Tree, Report], Iterator[Row]]
    looks_like: str  # names to expect, for the message when there are none
    licence: str = ""
    source: str = ""  # where to read about it and to apply for it
    published: Mapping[str, int] = dataclasses.field(default_factory=dict)
    faults: Mapping[str, str] = dataclasses.field(default_factory=dict)
    is_list: bool = False  # of files that lie elsewhere


def lacks(tree: Tree, tables: str, corpus: Corpus) -> SettingsError:
    """The error of a folder without the tables that hold the labels of its corpus."""
    missing = f"no {tables}, which hold the labels of {corpus.title}"
    hint = f"give the folder that has tables and clips in it. Where to get it: {corpus.source}"
    return SettingsError(f"{tree.source}: {missing}; {hint}")


def streams(paths: list[str], report: Report) -> dict[str, str]:
    """The film among the files of a clip, as `video`, or else its sound, as `audio`.

    A film is taken with its own sound, which is on its clock; sound that was cut out of it need not begin with it.
    """
    films = [path for path in paths if os.path.splitext(path)[1].lower() in VIDEO_SUFFIXES]
    if films:
        report.leave_out("another film of the same clip", *films[1:])
        return {"video": films[0]}
    best = best_sound(paths)
    again = [path for path in paths if path != best and os.path.basename(path) == os.path.basename(best)]
    report.leave_out("the same name in another folder", *again)
    return {"audio": best}


def best_sound(paths: list[str]) -> str:
    rank = {suffix: number for number, suffix in enumerate(SOUND_ORDER)}
    return min(paths, key=lambda path: rank.get(os.path.splitext(path)[1].lower(), len(rank)))


def number_of(where: str, column: str, text: str) -> float | None:
    """A rating as a number; None for an empty one or `NaN`. Raises SettingsError for anything else."""
    try:
        value = float(text or "nan")
    except ValueError:
        raise SettingsError(f"{where}: {column} is {text!r}, expected a number") from None
    return None if value != value else value


def known(where: str, column: str, code: str, table: Mapping[str, str]) -> str:
    """The word of a label's code. Raises SettingsError that names the known ones."""
    if code not in table:
        raise SettingsError(f"{where}: {column} is {code!r}, known are {', '.join(table)}")
    return table[code]


def _below(root: Path) -> Iterator[str]:
    for folder, folders, names in os.walk(root):
        folders[:] = [name for name in folders if not name.startswith(".")]
        base = Path(folder).relative_to(root).as_posix()
        for name in names:
            if not name.startswith("."):
                yield name if base == "." else f"{base}/{name}"
