"""Lists of files that lie elsewhere: HiCMAE's and VideoMAE's `path [audio] label`, EmoBox's JSON Lines.

A list, or a folder of lists whose names tell part and fold: split01/train.csv, fold_1/emodb_test_fold_1.jsonl. A path
may be a folder of frames. Lists of other people have the paths of their machines: `--media FOLDER` says where the files
are here, and as much of the front of each path is dropped as it takes to find it there.
"""

import json
import os
import re
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath

from affekt.data.corpora.corpus import Corpus, Report, Row, Tree
from affekt.data.errors import SettingsError
from affekt.data.manifest import AUDIO_SUFFIXES, list_words, safe_id

PART = re.compile(r"(?:^|_)(train|valid|val|dev|test)(?:_|$)")
FOLD = re.compile(r"(?:split|fold|set)_?(\d+)(?![\d])")
SPLITS = {"valid": "dev", "val": "dev"}

Entries = Callable[[Tree, str], Iterator[tuple[str, Row]]]  # (where, row with paths as they are written) of one list


def _path_entries(tree: Tree, path: str) -> Iterator[tuple[str, Row]]:
    for where, line in tree.lines(path):
        if line.lstrip().startswith("#"):
            continue
        words = list_words(where, line)
        if len(words) == 3:
            yield where, {"video": words[0], "audio": words[1], "label": words[2]}
        else:
            stream = "audio" if os.path.splitext(words[0])[1].lower() in AUDIO_SUFFIXES else "video"
            yield where, {stream: words[0], "label": words[1] if len(words) == 2 else None}


def _emobox_entries(tree: Tree, path: str) -> Iterator[tuple[str, Row]]:
    for where, line in tree.lines(path):
        try:
            record = json.loads(line)
            row: Row = {"id": safe_id(str(record["key"])), "audio": str(record["wav"]), "label": str(record["emo"])}
        except (ValueError, KeyError, TypeError) as error:
            message = f"expected an object with key, wav and emo ({type(error).__name__}: {error})"
            raise SettingsError(f"{where}: {message}") from None
        times = {"start": record.get("start_time"), "end": record.get("end_time")}
        yield where, row | times | {"domain": record.get("dataset")}


def _rows(tree: Tree, report: Report, suffixes: set[str], entries: Entries) -> Iterator[Row]:
    found: dict[tuple, Row] = {}
    folds: dict[tuple, set[tuple[int | None, str | None]]] = {}  # (fold, part) of the lists that a clip stands in
    locate = Locator(tree)
    for path in _lists(tree, suffixes):
        fold, part = _fold_and_part(path)
        for where, row in entries(tree, path):
            files = {key: locate(row[key], path) for key in ("video", "audio") if key in row}
            missing = [row[key] for key, file in files.items() if file is None]
            if missing:
                report.absent += missing
                continue
            clip = (*files.values(), row.get("start"), row.get("end"))
            before = found.setdefault(clip, row | files)
            if before["label"] != row["label"]:
                raise SettingsError(f"{where}: the label is {row['label']!r} here and {before['label']!r} elsewhere")
            folds.setdefault(clip, set()).add((fold, part))
    report.absent = sorted(set(report.absent))
    names = _names([next(iter(clip)) for clip in found])
    sides = {clip: _sides(seen) for clip, seen in folds.items()}
    if doubtful := sum(side == {"fold": None} for side in sides.values()):
        report.notes.append(f"{doubtful} clips are tested in several folds or in none, so they have no fold")
    for clip, row in found.items():
        yield {"id": names[next(iter(clip))]} | row | sides[clip]


def _lists(tree: Tree, suffixes: set[str]) -> list[str]:
    """The list that was given, or those below the folder that have a part in their name."""
    lists = [path for path in tree.files if os.path.splitext(path)[1].lower() in suffixes]
    if tree.source.is_dir():
        lists = [path for path in lists if _fold_and_part(path)[1]]
    if not lists:
        wanted = " or ".join(sorted(suffixes))
        raise SettingsError(
            f"{tree.source}: no list here; expected a file ({wanted}), or a folder of them with train, dev, val or test"
            " in their names"
        )
    return lists


def _fold_and_part(path: str) -> tuple[int | None, str | None]:
    stem = os.path.splitext(path)[0]
    folds, part = FOLD.findall(stem), PART.search(os.path.basename(stem))
    return (int(folds[-1]) if folds else None), (SPLITS.get(part[1], part[1]) if part else None)


def _sides(seen: set[tuple[int | None, str | None]]) -> Row:
    """`fold` is the one that tests on the clip where there are several; `split` where there is one."""
    folds = {fold for fold, _ in seen if fold is not None}
    tested = sorted(fold for fold, part in seen if part == "test" and fold is not None)
    if len(folds) > 1:
        return {"fold": tested[0] if len(tested) == 1 else None}
    parts = {part for _, part in seen}  # some lists have the same clips in val and test
    return {"split": next((part for part in ("test", "dev", "train") if part in parts), None)}


class Locator:
    """Where a path of a list is on this machine; None where it is not."""

    def __init__(self, tree: Tree):
        self.tree, self.cut = tree, 0  # parts dropped from the front, as for the path before

    def __call__(self, name: str, listed_in: str) -> Path | None:
        if not self.tree.given_media:
            path = (self.tree.root / listed_in).parent / name
            return path if path.exists() else None
        parts = PurePosixPath(name).parts
        if ".." in parts:
            return None
        for cut in (self.cut, *range(len(parts))):
            path = self.tree.media.joinpath(*[part for part in parts[cut:] if part != "/"])
            if parts[cut:] and path.exists():
                self.cut = cut
                return path
        return None


def _names(paths: list[Path]) -> dict[Path, str]:
    """An id for each path: its last name, or as much of it as makes all of them differ."""
    for length in (1, 2, 3, 4, 8):
        names = {path: safe_id("_".join((*path.parts[-length:-1], path.stem))) for path in paths}
        if max(Counter(names.values()).values(), default=1) == 1:
            break
    return names


def _path_rows(tree: Tree, report: Report) -> Iterator[Row]:
    return _rows(tree, report, {".csv", ".txt", ".lst"}, _path_entries)


def _emobox_rows(tree: Tree, report: Report) -> Iterator[Row]:
    return _rows(tree, report, {".jsonl"}, _emobox_entries)


LISTS = Corpus(
    name="lists", title="`path [audio] label` lists", rows=_path_rows, looks_like="split01/train.csv", is_list=True
)
EMOBOX = Corpus(
    name="emobox",
    title="EmoBox JSON Lines",
    rows=_emobox_rows,
    looks_like="fold_1/emodb_train_fold_1.jsonl",
    source="https://github.com/emo-box/EmoBox",
    is_list=True,
)
