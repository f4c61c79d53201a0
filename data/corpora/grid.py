"""GRID: 34 talkers, 1000 sentences each, of six words from a fixed grammar; no emotion.

The six letters of a name are one a word, as in the corpus's paper (Cooke et al. 2006). `label` is the colour, the word
with the fewest and evenest classes; the others stand in columns of their own. There are no folds.
"""

from collections.abc import Iterator

from affekt.data.corpora.corpus import Corpus, Report, Row, Tree, streams

COMMANDS = {"b": "bin", "l": "lay", "p": "place", "s": "set"}
COLOURS = {"b": "blue", "g": "green", "r": "red", "w": "white"}
PREPOSITIONS = {"a": "at", "b": "by", "i": "in", "w": "with"}
ADVERBS = {"a": "again", "n": "now", "p": "please", "s": "soon"}
WOMEN = frozenset({4, 7, 11, 15, 16, 18, 20, 22, 23, 24, 25, 29, 31, 33, 34})
UNKNOWN_SEX = frozenset({21})  # the only talker without film; lists made from the films do not say
# s1/bbaf2n.wav, s1/video/mpg_6000/bbaf2n.mpg, and s1_bbaf2n.mp4 as single folders have it
NAME = r"/s(?P<talker>[1-9]\d?)(?:/(?:[^/]+/)*|_)(?P<words>[blps][bgrw][abiw][a-vxyz][1-9z][anps])$"


def rows(tree: Tree, report: Report) -> Iterator[Row]:
    clips = tree.groups(NAME, lambda match: f"s{match['talker']}_{match['words']}")
    for name, (match, paths) in clips.items():
        command, colour, preposition, letter, digit, adverb = match["words"]
        talker = int(match["talker"])
        sex = {} if talker in UNKNOWN_SEX else {"sex": "F" if talker in WOMEN else "M"}
        yield {
            **{"id": name, **streams(paths, report), "speaker": f"s{talker}", **sex, "label": COLOURS[colour]},
            **{"command": COMMANDS[command], "preposition": PREPOSITIONS[preposition], "letter": letter},
            **{"digit": "0" if digit == "z" else digit, "adverb": ADVERBS[adverb]},
        }


GRID = Corpus(
    name="grid",
    title="GRID",
    rows=rows,
    looks_like="s1/bbaf2n.mpg, s1/bbaf2n.wav",
    licence="CC BY 4.0",
    source="https://spandh.dcs.shef.ac.uk/gridcorpus",
    published={"clips": 34000, "speaker": 34},
)
