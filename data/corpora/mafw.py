"""MAFW: clips of films, series and shows; here its 11 single emotions with the five official folds.

clips/NNNNN.mp4 as in the corpus's README; .../single/no_caption/set_K/{train,test}.txt hold `NNNNN.mp4 emotion` a line,
as HiCMAE reads them. Folds are by clip; who is seen is not told.
"""

import os
import re
from collections.abc import Iterator

from affekt.data.corpora.corpus import Corpus, Report, Row, Tree, known, lacks, streams
from affekt.data.corpora.folds import held_out

LABELS = (
    *("anger", "disgust", "fear", "happiness", "neutral", "sadness", "surprise"),
    *("contempt", "anxiety", "helplessness", "disappointment"),
)
LISTS = r"/single/no_caption/set_[1-5]/(?:train|test)\.txt"


def rows(tree: Tree, report: Report) -> Iterator[Row]:
    lists = tree.find(LISTS)
    if not lists:
        raise lacks(tree, "single/no_caption/set_1/train.txt", MAFW)
    clips = tree.groups(r"/(\d{5})$", lambda match: match[1])
    folders = tree.frame_folders(r"/\d{5}$")
    for name, (fold, label) in sorted(held_out(_entries(tree, lists)).items()):
        if name in clips:
            files = streams(clips[name][1], report)
        elif name in folders:
            files = {"video": folders[name]}
        else:
            report.absent.append(name)
            continue
        yield {"id": name, **files, "fold": fold, "label": label}


def _entries(tree: Tree, lists: list[str]) -> Iterator[tuple[str, int, str, str, str]]:
    words = {word: word for word in LABELS}
    for path in lists:
        fold, part = re.search(r"set_(\d)/(\w+)\.txt$", path).groups()
        for where, line in tree.lines(path):
            name, *label = line.split()
            yield where, int(fold), part, os.path.splitext(name)[0], known(where, "the label", " ".join(label), words)


MAFW = Corpus(
    name="mafw",
    title="MAFW",
    rows=rows,
    looks_like="data/clips/00001.mp4, Train & Test Set/single/no_caption/set_1/train.txt",
    licence="MAFW agreement, non-commercial research",
    source="https://github.com/MAFW-database/MAFW",
    published={"clips": 9172},
)
