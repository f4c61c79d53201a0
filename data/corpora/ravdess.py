"""RAVDESS: 24 actors speak and sing two sentences in 8 emotions, each take as film, as silent film and as sound.

The seven numbers of a file name are those of the corpus's page; six folds of four actors as in HiCMAE's lists.
"""

from collections.abc import Iterator

from affekt.data.corpora.corpus import Corpus, Report, Row, Tree, best_sound

EMOTIONS = {
    **{"01": "neutral", "02": "calm", "03": "happy", "04": "sad"},
    **{"05": "angry", "06": "fearful", "07": "disgust", "08": "surprised"},
}
FULL, SILENT, SOUND = "01", "02", "03"  # modality
CHANNELS = {"01": "speech", "02": "song"}
NAME = (
    r"/(?P<modality>0[123])-(?P<take>(?P<channel>0[12])-(?P<emotion>0[1-8])-(?P<intensity>0[12])"
    r"-(?P<statement>0[12])-(?P<repetition>0[12])-(?P<actor>[012]\d))$"
)


def rows(tree: Tree, report: Report) -> Iterator[Row]:
    """One row a take: its film, or the silent film with the sound beside it, or the sound alone."""
    files: dict[str, dict[str, list[str]]] = {}
    for match, path in tree.clips(NAME):
        files.setdefault(match["take"], {}).setdefault(match["modality"], []).append(path)
    for take, found in sorted(files.items()):
        for paths in found.values():
            report.leave_out("another file of the same take", *paths[1:])
        channel, emotion, intensity, statement, repetition, actor = take.split("-")
        yield {
            **{"id": take, **_streams(found), "speaker": actor, "sex": "FM"[int(actor) % 2]},
            **{"fold": (int(actor) - 1) // 4 + 1, "label": EMOTIONS[emotion]},
            **{"intensity": "strong" if intensity == "02" else "normal", "channel": CHANNELS[channel]},
            **{"statement": statement, "repetition": repetition},
        }


def _streams(found: dict[str, list[str]]) -> dict[str, str]:
    if FULL in found:
        return {"video": found[FULL][0]}
    video = {"video": found[SILENT][0]} if SILENT in found else {}
    return video | ({"audio": best_sound(found[SOUND])} if SOUND in found else {})


RAVDESS = Corpus(
    name="ravdess",
    title="RAVDESS",
    rows=rows,
    looks_like="Actor_01/01-01-05-01-01-01-01.mp4, Actor_01/03-01-05-01-01-01-01.wav",
    licence="CC BY-NC-SA 4.0",
    source="https://zenodo.org/record/1188976",
    published={"speaker": 24, "channel=speech": 1440, "channel=song": 1012},
)
