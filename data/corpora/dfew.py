"""DFEW: clips of films in 7 emotions, here the single-labelled ones with the five official folds.

EmoLabel_DataSplit/{train,test}(single-labeled)/set_K.csv name a clip by its number and the label 1 to 7. The picture
is taken from the face crops, Clip/clip_224x224/NNNNN/ (frames) or Clip/clip_224x224_avi/NNNNN.avi, which have no sound,
with the sound of the whole scene, Clip/original/N.mp4; or from the scene where there are no crops. Folds are by clip;
who is seen is not told.
"""

import re
from collections.abc import Iterator

from affekt.data.corpora.corpus import Corpus, Report, Row, Tree, known, lacks
from affekt.data.corpora.folds import held_out
from affekt.data.errors import SettingsError

LABELS = {
    **{"1": "happy", "2": "sad", "3": "neutral", "4": "angry", "5": "surprise", "6": "disgust", "7": "fear"},
}
LISTS = r"/EmoLabel_DataSplit/(?:train|test)\(single-labeled\)/set_[1-5]\.csv"


def rows(tree: Tree, report: Report) -> Iterator[Row]:
    lists = tree.find(LISTS)
    if not lists:
        raise lacks(tree, "EmoLabel_DataSplit/train(single-labeled)/set_1.csv", DFEW)
    crops = {int(match[1]): path for match, path in tree.clips(r"/clip_224x224_avi/(\d+)$")}
    crops |= {int(name): path for name, path in tree.frame_folders(r"/clip_224x224/(?:.*/)?\d+$").items()}
    scenes = {int(match[1]): path for match, path in tree.clips(r"/original/(?:.*/)?(\d+)$", {".mp4"})}
    for name, (fold, label) in sorted(held_out(_entries(tree, lists)).items()):
        number = int(name)
        if number in crops:
            files = {"video": crops[number]} | ({"audio": scenes[number]} if number in scenes else {})
        elif number in scenes:
            files = {"video": scenes[number]}
        else:
            report.absent.append(name)
            continue
        yield {"id": name, **files, "fold": fold, "label": label}
    if not crops:
        report.notes.append("no face crops (Clip/clip_224x224) are there, so the whole scenes are taken")
    elif not scenes:
        report.notes.append("no scenes (Clip/original) are there, so there is no sound")


def _entries(tree: Tree, lists: list[str]) -> Iterator[tuple[str, int, str, str, str]]:
    for path in lists:
        part, fold = re.search(r"(train|test)\(.*set_(\d)\.csv$", path).groups()
        for where, row in tree.table(path, "video_name", "label"):
            label = known(where, "the label", row["label"], LABELS)
            if not row["video_name"].isdigit():
                raise SettingsError(f"{where}: video_name is {row['video_name']!r}, expected a number")
            yield where, int(fold), part, f"{int(row['video_name']):05d}", label


DFEW = Corpus(
    name="dfew",
    title="DFEW",
    rows=rows,
    looks_like="EmoLabel_DataSplit/train(single-labeled)/set_1.csv, Clip/clip_224x224/00001/, Clip/original/1.mp4",
    licence="DFEW agreement, research",
    source="https://dfew-dataset.github.io",
    published={"clips": 11697},
)
