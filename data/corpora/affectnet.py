"""AffectNet: still faces with one of eight expressions, valence and arousal.

Two forms are in use: the whole release, training.csv and validation.csv over Manually_Annotated_Images/, and the one of
eight classes, {train,val}_set/images/N.jpg with annotations/N_{exp,val,aro}.npy. Counts are those of the second. Labels
8 to 10 (none, uncertain, no face) are left out. Who is seen is not told.
"""

import os
from collections.abc import Iterator

import numpy as np

from affekt.data.corpora.corpus import Corpus, Report, Row, Tree, known, number_of
from affekt.data.errors import SettingsError
from affekt.data.manifest import IMAGE_SUFFIXES

LABELS = (
    *("neutral", "happy", "sad", "surprise", "fear", "disgust", "anger", "contempt"),
    *("none", "uncertain", "no face"),
)
CODES = {str(code): word for code, word in enumerate(LABELS)}
CLASSES = 8
LISTS = {"train": r"/training\.csv", "val": r"/validation\.csv"}


def rows(tree: Tree, report: Report) -> Iterator[Row]:
    lists = {split: found[0] for split, pattern in LISTS.items() if (found := tree.find(pattern))}
    images = tree.clips(r"/(?P<split>train|val)_set/images/(?P<number>\d+)$", IMAGE_SUFFIXES)
    yield from _from_lists(tree, report, lists) if lists else _from_arrays(tree, report, images)


def _from_lists(tree: Tree, report: Report, lists: dict[str, str]) -> Iterator[Row]:
    images = {path.partition("Manually_Annotated_Images/")[2]: path for path in tree.files}
    for split, path in lists.items():
        for where, row in tree.table(path, "subDirectory_filePath", "expression", "valence", "arousal"):
            name = row["subDirectory_filePath"]
            label = known(where, "the expression", row["expression"], CODES)
            if name not in images:
                report.absent.append(name)
            elif int(row["expression"]) >= CLASSES:
                report.leave_out(f"labelled {label}", name)
            else:
                ratings = {key: number_of(where, key, row[key]) for key in ("valence", "arousal")}
                clip_id = os.path.splitext(name)[0].replace("/", "_")
                yield {"id": clip_id, "video": images[name], "split": split, "label": label, **ratings}


def _from_arrays(tree: Tree, report: Report, images: Iterator[tuple]) -> Iterator[Row]:
    for match, path in images:
        base = path.rpartition("/images/")[0] + f"/annotations/{match['number']}"
        values = {key: _value(tree, f"{base}_{key}.npy") for key in ("exp", "val", "aro")}
        if values["exp"] is None:
            report.leave_out("without annotations", path)
            continue
        where = str(tree.root / f"{base}_exp.npy")
        yield {
            **{"id": f"{match['split']}_{match['number']}", "video": path, "split": match["split"]},
            **{"label": known(where, "the expression", str(int(values["exp"])), CODES)},
            **{"valence": values["val"], "arousal": values["aro"]},
        }


def _value(tree: Tree, path: str) -> float | None:
    """The one number of an array file, written as a number or as text; None where there is no file."""
    file = tree.root / path
    if not file.is_file():
        return None
    try:
        return float(np.load(file, allow_pickle=False).item())
    except (OSError, ValueError) as error:
        raise SettingsError(f"{file}: not one number: {error}") from None


AFFECTNET = Corpus(
    name="affectnet",
    title="AffectNet",
    rows=rows,
    looks_like="train_set/images/0.jpg with train_set/annotations/0_exp.npy, or training.csv",
    licence="AffectNet agreement, non-commercial research",
    source="http://mohammadmahoor.com/affectnet",
    published={"split=train": 287651, "split=val": 4000},
)
