"""VoxCeleb2: a million utterances of celebrities on YouTube, for pre-training; no emotion.

{dev,test}/mp4/ID/VIDEO/NNNNN.mp4 are faces cut out at 25 fps, {dev,test}/aac/ID/VIDEO/NNNNN.m4a (or .wav, where it was
converted) the sound of the same utterance. `vox2_meta.csv` tells the sex of each speaker.
"""

from collections.abc import Iterator

from affekt.data.corpora.corpus import Corpus, Report, Row, Tree, best_sound
from affekt.data.manifest import VIDEO_SUFFIXES

NAME = r"/(?:(?P<part>dev|test)/(?:.*/)?)?(?P<speaker>id\d{5})/(?P<film>[\w-]{11})/(?P<number>\d{5})$"


def rows(tree: Tree, report: Report) -> Iterator[Row]:
    sexes, splits = _meta(tree, report)
    clips = tree.groups(NAME, lambda match: "_".join(match.group("speaker", "film", "number")))
    for name, (match, paths) in clips.items():
        films = [path for path in paths if path[path.rfind(".") :].lower() in VIDEO_SUFFIXES]
        sounds = [path for path in paths if path not in films]
        report.leave_out("another film of the same utterance", *films[1:])
        speaker = match["speaker"]
        yield {
            **{"id": name, "video": films[0] if films else None, "audio": best_sound(sounds) if sounds else None},
            **{"speaker": speaker, "session": f"{speaker}_{match['film']}", "sex": sexes.get(speaker)},
            **{"split": match["part"] or splits.get(speaker)},
        }


def _meta(tree: Tree, report: Report) -> tuple[dict[str, str], dict[str, str]]:
    """Sex and part of each speaker; the columns are ID, VGGFace2 ID, gender, set, with blanks or tabs around commas."""
    found = tree.find(r"/vox2_meta\.csv")
    if not found:
        report.notes.append("vox2_meta.csv is not there, so there is no sex")
    sexes, splits = {}, {}
    for _, line in tree.lines(found[0]) if found else ():
        fields = [field.strip() for field in line.replace("\t", ",").split(",") if field.strip()]
        if len(fields) == 4 and fields[0].startswith("id"):
            sexes[fields[0]], splits[fields[0]] = fields[2].upper(), fields[3]
    return sexes, splits


VOXCELEB2 = Corpus(
    name="voxceleb2",
    title="VoxCeleb2",
    rows=rows,
    looks_like="dev/mp4/id00012/21Uxsk56VDQ/00001.mp4, dev/aac/id00012/21Uxsk56VDQ/00001.m4a",
    licence="CC BY 4.0; the copyright of the videos remains with their owners",
    source="https://www.robots.ox.ac.uk/~vgg/data/voxceleb/vox2.html",
    published={"speaker": 6112, "split=dev": 1092009, "split=test": 36237},
)
