"""IEMOCAP: 10 actors talk in pairs, 5 sessions; labels, ratings and the votes of single raters per turn.

SessionN/dialog/EmoEvaluation/DIALOG.txt has a block a turn:

    [6.2901 - 8.2357]	Ses01F_impro01_F000	neu	[2.5000, 2.5000, 2.5000]     seconds, turn, label, [V, A, D] of 1 to 5
    C-E2:	Neutral;	()                                                     what rater E2 heard and saw

Who speaks is the letter before the turn's number; the one in the dialog's name only wore the markers. A fold is a
session. The films show both actors side by side and no table says who is where, so only sound is taken: the turn's own
file, or its seconds of the dialog's.
"""

import os
import re
from collections import Counter
from collections.abc import Iterator

from affekt.data.corpora.corpus import Corpus, Report, Row, Tree, known, lacks

LABELS = {
    **{"ang": "anger", "dis": "disgust", "exc": "excited", "fea": "fear", "fru": "frustration", "hap": "happiness"},
    **{"neu": "neutral", "oth": "other", "sad": "sadness", "sur": "surprise", "xxx": "no agreement"},
}
DIALOG = r"/Session\d/dialog/EmoEvaluation/Ses0\d[FM]_[a-z]+\d\d[a-z]?(?:_\d[a-z]?)?\.txt"
TURN = re.compile(
    r"\[(?P<start>[\d.]+) - (?P<end>[\d.]+)\]\s+(?P<turn>(?P<dialog>Ses0(?P<session>[1-5])\w+)_(?P<sex>[FM])\d{3})"
    r"\s+(?P<label>\w{3})\s+\[(?P<valence>[\d.]+), (?P<arousal>[\d.]+), (?P<dominance>[\d.]+)\]"
)
VOTE = re.compile(r"C-(?P<rater>[EFM])\w*:\s+(?P<words>[^()]*)")  # E: evaluators, F and M: the actors on themselves
SPOKEN = re.compile(r"(?P<turn>Ses0\w+) \[[\d.]+-[\d.]+\]: (?P<text>.*)")


def rows(tree: Tree, report: Report) -> Iterator[Row]:
    tables = tree.find(DIALOG)
    if not tables:
        raise lacks(tree, "Session1/dialog/EmoEvaluation/*.txt", IEMOCAP)
    sounds = {os.path.basename(path)[: -len(".wav")]: path for path in tree.find(r"/(?:sentences|dialog)/wav/.*\.wav")}
    texts = _texts(tree)
    for table in tables:
        for row, match in _turns(tree, table):
            if match["turn"] in sounds:
                sound = {"audio": sounds[match["turn"]]}
            elif match["dialog"] in sounds:
                sound = {"audio": sounds[match["dialog"]], "start": float(match["start"]), "end": float(match["end"])}
            else:
                report.absent.append(match["turn"])
                continue
            yield {"id": match["turn"], **sound, **row, "transcript": texts.get(match["turn"])}


def _turns(tree: Tree, table: str) -> Iterator[tuple[Row, re.Match]]:
    """Each turn of a dialog with its votes: its raters' lines follow its own."""
    row: Row = {}
    turn = None
    for where, line in tree.lines(table):
        if match := TURN.match(line):
            if turn:
                yield row, turn
            row, turn = _facts(where, match), match
        elif turn and (vote := VOTE.match(line)):
            column = "votes" if vote["rater"] == "E" else "votes_self"
            words = [word.strip().lower() for word in vote["words"].split(";")]
            row[column] = dict(Counter(row.get(column, {})) + Counter(filter(None, words)))
    if turn:
        yield row, turn


def _facts(where: str, match: re.Match) -> Row:
    session = f"Ses0{match['session']}"
    return {
        **{"speaker": session + match["sex"], "session": session, "sex": match["sex"], "fold": match["session"]},
        **{"label": known(where, "the label", match["label"], LABELS)},
        **{column: float(match[column]) for column in ("valence", "arousal", "dominance")},
        **{"scenario": "script" if "_script" in match["dialog"] else "improvised"},
    }


def _texts(tree: Tree) -> dict[str, str]:
    found = (
        SPOKEN.match(line) for path in tree.find(r"/transcriptions/Ses0[^/]*\.txt") for _, line in tree.lines(path)
    )
    return {match["turn"]: match["text"].strip() for match in found if match}


IEMOCAP = Corpus(
    name="iemocap",
    title="IEMOCAP",
    rows=rows,
    looks_like="Session1/dialog/EmoEvaluation/Ses01F_impro01.txt, Session1/sentences/wav/.../Ses01F_impro01_F000.wav",
    licence="IEMOCAP release form, research",
    source="https://sail.usc.edu/iemocap",
    published={"clips": 10039, "speaker": 10, "session": 5, "label=frustration": 1849, "label=no agreement": 2507},
)
