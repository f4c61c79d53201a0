"""`affekt import`: a corpus as it was downloaded, or a list, into a manifest that `affekt prepare` reads."""

import csv
import difflib
import io
import json
import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from affekt.data.corpora.affectnet import AFFECTNET
from affekt.data.corpora.corpus import Corpus, Report, Row, Tree
from affekt.data.corpora.cremad import CREMAD
from affekt.data.corpora.dfew import DFEW
from affekt.data.corpora.emodb import EMODB
from affekt.data.corpora.emotions import TO_COMMON
from affekt.data.corpora.grid import GRID
from affekt.data.corpora.iemocap import IEMOCAP
from affekt.data.corpora.kaldi import KALDI
from affekt.data.corpora.lists import EMOBOX, LISTS
from affekt.data.corpora.mafw import MAFW
from affekt.data.corpora.mead import MEAD
from affekt.data.corpora.meld import MELD
from affekt.data.corpora.mer2023 import MER2023
from affekt.data.corpora.msp_improv import MSP_IMPROV
from affekt.data.corpora.ravdess import RAVDESS
from affekt.data.corpora.voxceleb2 import VOXCELEB2
from affekt.data.errors import SettingsError
from affekt.data.files import committed

CORPORA = {
    corpus.name: corpus
    for corpus in (
        *(AFFECTNET, CREMAD, DFEW, EMODB, GRID, IEMOCAP, MAFW, MEAD, MELD, MER2023, MSP_IMPROV, RAVDESS, VOXCELEB2),
        *(LISTS, EMOBOX, KALDI),
    )
}
# The order of columns; others follow in the order of their first clip.
COLUMNS = (
    *("id", "video", "audio", "start", "end", "speaker", "session", "sex", "age", "domain", "split", "fold", "label"),
    *("emotion", "intensity", "votes", "votes_voice", "votes_face", "valence", "arousal", "dominance"),
)
NAMES_TOLD = 5


def import_corpus(
    name: str,
    source: str | Path,
    out: str | Path | None = None,
    media: str | Path | None = None,
    overwrite: bool = False,
) -> dict[str, Any]:
    """Write the manifest `out` (default: manifest.csv in the folder of `source`) and return counts and what is missing.

    Paths in it are relative to it, and the same files give the same bytes. Raises SettingsError for a corpus that is
    not known, a source without a clip of it, tables that cannot be read, and an `out` with other content, which
    `overwrite` replaces; DataError where it cannot be written.
    """
    corpus = find_corpus(name)
    if media and not corpus.is_list:
        lists = ", ".join(name for name, other in CORPORA.items() if other.is_list)
        raise SettingsError(f"--media is for lists ({lists}); the files of {corpus.title} lie in its own folder")
    tree, report = Tree(source, media), Report()
    out = Path(out) if out else tree.root / "manifest.csv"
    if out.suffix.lower() != ".csv":
        raise SettingsError(f"{out}: a manifest is written as CSV; give it the suffix .csv")
    if out.resolve() == tree.source.resolve():
        raise SettingsError(f"{out}: is what is read; choose another name for the manifest")
    rows = list(_completed(corpus, tree, report))
    if not rows:
        raise SettingsError(_nothing_found(corpus, tree, report))
    _write(out, rows, tree.root, overwrite)
    return _summary(corpus, out, rows, report)


def find_corpus(name: str) -> Corpus:
    if name not in CORPORA:
        near = difflib.get_close_matches(name.lower().replace("-", ""), CORPORA, n=1)
        hint = f"did you mean `{near[0]}`?" if near else f"known are {', '.join(CORPORA)}"
        raise SettingsError(f"`{name}` is not the name of a corpus; {hint}")
    return CORPORA[name]


def _completed(corpus: Corpus, tree: Tree, report: Report) -> Iterator[Row]:
    """The rows with what all rows share; ids and speakers begin with the corpus, so that corpora can be joined."""
    prefix = "" if corpus.is_list else f"{corpus.name}_"
    shared = {} if corpus.is_list else {"domain": corpus.title, "licence": corpus.licence}
    seen: dict[str, str] = {}
    for row in corpus.rows(tree, report):
        if row["id"] in corpus.faults:
            report.leave_out(corpus.faults[row["id"]], row["id"])
            continue
        row = {key: value for key, value in row.items() if value not in (None, "")} | shared
        for column in ("id", "speaker", "session"):
            if column in row:
                row[column] = f"{prefix}{row[column]}"
        if emotion := TO_COMMON.get(row.get("label", "")):
            row["emotion"] = emotion
        path = str(row.get("video") or row["audio"])
        if row["id"] in seen:
            raise SettingsError(f"{tree.source}: {seen[row['id']]} and {path} have the same id {row['id']}")
        seen[row["id"]] = path
        yield row


def _nothing_found(corpus: Corpus, tree: Tree, report: Report) -> str:
    told = f"{tree.source}: no clip of {corpus.title} among {len(tree.files)} files; expected {corpus.looks_like}"
    if report.absent:
        told += f"; the tables name {len(report.absent)} clips, such as {report.absent[0]}, and none is there"
        told += ", --media FOLDER says where to look" * corpus.is_list
    return told + (f". Where to get it: {corpus.source}" if corpus.source else "")


def _write(out: Path, rows: list[Row], root: Path, overwrite: bool) -> None:
    found = dict.fromkeys(column for row in rows for column in row)
    columns = [column for column in COLUMNS if column in found] + [column for column in found if column not in COLUMNS]
    folder = out.parent.resolve()
    base = os.path.relpath(root, folder)

    def cell(column: str, value: Any) -> str:
        if column in ("video", "audio") and value:
            return os.path.relpath(value, folder) if os.path.isabs(value) else os.path.normpath(f"{base}/{value}")
        return json.dumps(value, ensure_ascii=False) if isinstance(value, dict) else str(value)

    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(columns)
    writer.writerows([cell(column, row.get(column, "")) for column in columns] for row in rows)
    _replace(out, text.getvalue().encode(), overwrite)


def _replace(out: Path, content: bytes, overwrite: bool) -> None:
    if out.exists() and out.read_bytes() == content:
        return
    if out.exists() and not overwrite:
        raise SettingsError(f"{out}: is there with other content; choose another name, or --overwrite to replace it")
    out.parent.mkdir(parents=True, exist_ok=True)
    with committed(out) as file:
        file.write(content)


def _summary(corpus: Corpus, out: Path, rows: list[Row], report: Report) -> dict[str, Any]:
    def counts(column: str) -> dict[str, int]:
        return dict(sorted(Counter(str(row[column]) for row in rows if column in row).items()))

    def found(what: str) -> int:
        column, equals, value = what.partition("=")
        return len(rows) if what == "clips" else counts(column).get(value, 0) if equals else len(counts(column))

    return {
        "corpus": corpus.title,
        "manifest": str(out),
        "clips": len(rows),
        "speakers": len(counts("speaker")),
        **{f"{column}s": counts(column) for column in ("label", "emotion", "split", "fold")},
        "published": {what: [count, found(what)] for what, count in corpus.published.items()},
        "absent": report.absent,
        "left_out": report.left_out,
        "notes": report.notes,
        "licence": corpus.licence,
        "source": corpus.source,
    }


def told(summary: dict[str, Any]) -> str:
    """What `import_corpus` returns, for people."""

    def some(names: list[str]) -> str:
        more = f" and {len(names) - NAMES_TOLD:,} more" if len(names) > NAMES_TOLD else ""
        return ", ".join(names[:NAMES_TOLD]) + more

    number = summary["speakers"]
    people = f" of {number:,} speaker{'s' * (number > 1)}" if number else ""
    clips = f"{summary['clips']:,} clip{'s' * (summary['clips'] > 1)}"
    lines = [f"{clips}{people} of {summary['corpus']} are in {summary['manifest']}"]
    for what in ("labels", "splits", "folds"):
        if summary[what]:
            lines.append(f"{what}: " + ", ".join(f"{name} {count:,}" for name, count in summary[what].items()))
    for what, (count, here) in summary["published"].items():
        if count != here:
            lines.append(f"{what}: {count:,} published, {here:,} here")
    if summary["published"] and all(count == here for count, here in summary["published"].values()):
        lines.append("all counts are the published ones")
    if summary["absent"]:
        lines.append(f"named in its tables, and not there: {len(summary['absent']):,}: {some(summary['absent'])}")
    lines += [f"left out, {cause}: {len(names):,}: {some(names)}" for cause, names in summary["left_out"].items()]
    lines += [f"note: {note}" for note in summary["notes"]]
    if summary["licence"]:
        lines.append(f"licence: {summary['licence']} ({summary['source']})")
    return "\n".join(lines)
