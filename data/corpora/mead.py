"""MEAD: talking faces in 8 emotions and 3 strengths, filmed from 7 sides at once.

Folders as in the corpus's parts: ACTOR/video/VIEW/EMOTION/level_N/NNN.mp4 and ACTOR/audio/EMOTION/level_N/NNN.m4a; the
same number is the same take. Each view is a row, so choose one, `--where view=front`, or the same words are seen up to
seven times. There are no folds of its own.
"""

from collections.abc import Iterator

from affekt.data.corpora.corpus import Corpus, Report, Row, Tree, best_sound

EMOTIONS = ("angry", "contempt", "disgusted", "fear", "happy", "neutral", "sad", "surprised")
VIEWS = ("down", "front", "left_30", "left_60", "right_30", "right_60", "top")
TAKE = rf"(?P<emotion>{'|'.join(EMOTIONS)})/level_(?P<level>[123])/(?P<number>\d{{3}})$"
FILM = rf"/(?P<actor>[MW]\d{{3}})/video/(?P<view>{'|'.join(VIEWS)})/{TAKE}"
SOUND = rf"/(?P<actor>[MW]\d{{3}})/audio/{TAKE}"


def _take(match) -> str:
    return "_".join(match.group("actor", "emotion", "level", "number"))


def rows(tree: Tree, report: Report) -> Iterator[Row]:
    sounds, heard = tree.groups(SOUND, _take), set()
    for name, (match, paths) in tree.groups(FILM, lambda match: f"{_take(match)}_{match['view']}").items():
        take = _take(match)
        heard.add(take)
        sound = {"audio": best_sound(sounds[take][1])} if take in sounds else {}
        report.leave_out("another film of the same take", *paths[1:])
        yield {"id": name, "video": paths[0], **sound, **_facts(match), "view": match["view"]}
    for take, (match, paths) in sounds.items():
        if take not in heard:
            yield {"id": take, "audio": best_sound(paths), **_facts(match)}


def _facts(match) -> Row:
    return {
        **{"speaker": match["actor"], "sex": "M" if match["actor"][0] == "M" else "F", "label": match["emotion"]},
        **{"intensity": match["level"], "utterance": _take(match)},
    }


MEAD = Corpus(
    name="mead",
    title="MEAD",
    rows=rows,
    looks_like="M003/video/front/angry/level_1/001.mp4, M003/audio/angry/level_1/001.m4a",
    licence="terms of use of MEAD, research",
    source="https://wywu.github.io/projects/MEAD/MEAD.html",
    published={"speaker": 48, "utterance": 31729},
)
