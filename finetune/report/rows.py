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


def _text(text: str) -> str:
    """A spreadsheet must not take it for a formula."""
    return f"'{text}" if text.startswith(("=", "+", "-", "@", "\t", "\r")) else text
