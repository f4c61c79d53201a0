"""`results.csv`: the scores of `results.json` as rows, for spreadsheets and other programs."""

import csv
import io

from affekt.finetune.schema import Results

HEAD = (
    "system", "title", "kind", "streams", "selected", "transductive", "score", "value", "low", "high", "unit",
    "clusters", "clips", "seeds", "folds",
)  # fmt: skip


def results_csv(results: Results) -> str:
    """One row per system and score: its value with the 95 % interval, what was resampled for it (`unit`, `clusters`),
    the seeds, separated by spaces, and the number of folds. Figures are written in full, none in percent."""
    file = io.StringIO()
    write = csv.writer(file, lineterminator="\n").writerow
    write(HEAD)
    for s in results.systems:
        about = [_text(s.name), _text(s.title), s.kind, s.streams, s.selected, str(s.transductive).lower()]
        seeds = " ".join(map(str, s.seeds))
        for score, e in s.scores.items():
            figures = [repr(e.value), repr(e.low), repr(e.high), _text(e.unit), e.clusters]
            write([*about, _text(score), *figures, s.clips, seeds, len(s.by_fold)])
    return file.getvalue()


def stress_csv(results: Results) -> str:
    """One row per level of damage: the score there with its interval, the share of answers that stay as they were, and
    for shares that are missing the area over all levels (AUILC)."""
    file = io.StringIO()
    write = csv.writer(file, lineterminator="\n").writerow
    write(("damage", "title", "system", "score", "level", "unit", "value", "low", "high", "unchanged", "auilc"))
    for s in results.stress:
        about = [s.name, _text(s.title), _text(s.system), _text(s.score)]
        for number, (level, e) in enumerate(zip(s.levels, s.scores, strict=True)):
            same = repr(s.unchanged[number]) if s.unchanged else ""
            area = "" if s.area is None else repr(s.area)
            write([*about, repr(level), s.unit, repr(e.value), repr(e.low), repr(e.high), same, area])
    return file.getvalue()


def _text(text: str) -> str:
    """A spreadsheet must not take it for a formula."""
    return f"'{text}" if text.startswith(("=", "+", "-", "@", "\t", "\r")) else text
