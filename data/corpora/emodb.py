"""EMO-DB, the Berlin database of emotional speech: 10 actors, 10 German sentences, 7 emotions, sound alone.

Names and speakers as on the corpus's page. It has no folds of its own; `fold` holds out one speaker at a time.
"""

from collections.abc import Iterator

from affekt.data.corpora.corpus import Corpus, Report, Row, Tree, streams

EMOTIONS = {  # the letters are those of the German words
    **{"W": "anger", "L": "boredom", "E": "disgust", "A": "fear", "F": "happiness", "T": "sadness", "N": "neutral"},
}
SPEAKERS = {
    **{"03": ("M", 31), "08": ("F", 34), "09": ("F", 21), "10": ("M", 32), "11": ("M", 26)},
    **{"12": ("M", 30), "13": ("F", 32), "14": ("F", 35), "15": ("M", 25), "16": ("F", 31)},
}
NAME = rf"/(?P<speaker>{'|'.join(SPEAKERS)})(?P<text>[ab]\d\d)(?P<emotion>[{''.join(EMOTIONS)}])(?P<version>[a-z]?)$"


def rows(tree: Tree, report: Report) -> Iterator[Row]:
    for name, (match, paths) in tree.groups(NAME, lambda match: match[0][1:]).items():
        sex, age = SPEAKERS[match["speaker"]]
        fold = list(SPEAKERS).index(match["speaker"]) + 1
        yield {
            **{"id": name, **streams(paths, report), "speaker": match["speaker"], "sex": sex, "age": age},
            **{"fold": fold, "label": EMOTIONS[match["emotion"]], "sentence": match["text"]},
        }


EMODB = Corpus(
    name="emodb",
    title="EMO-DB",
    rows=rows,
    looks_like="wav/03a01Fa.wav",
    licence="free for research",
    source="http://emodb.bilderbar.info",
    published={
        **{"clips": 535, "speaker": 10, "label=anger": 127, "label=boredom": 81, "label=disgust": 46},
        **{"label=fear": 69, "label=happiness": 71, "label=neutral": 79, "label=sadness": 62},
    },
)
