"""CREMA-D: 91 actors, 12 sentences, 6 emotions, and how raters judged voice, face and both.

File names and vote tables are those of the corpus's README; the five folds by actor and the four faulty clips are those
of HiCMAE's lists, which name the same README for the latter. A film is what raters met, with its sound; without films
the WAV is taken, as some MP3 are blank (issue 13 of the corpus's repository).
"""

from collections.abc import Iterator

from affekt.data.corpora.corpus import Corpus, Report, Row, Tree, known, number_of, streams

EMOTIONS = {"ANG": "anger", "DIS": "disgust", "FEA": "fear", "HAP": "happy", "NEU": "neutral", "SAD": "sad"}
LEVELS = {"LO": "low", "MD": "medium", "HI": "high", "XX": "unspecified"}
VOTES = dict(zip("ADFHNS", EMOTIONS.values(), strict=True))  # columns of tabulatedVotes.csv
CONDITIONS = {"1": "votes_voice", "2": "votes_face", "3": "votes"}  # first digit of a row's number: what raters met
NAME = (
    rf"/(?P<actor>1\d{{3}})_(?P<sentence>[A-Z]{{3}})_(?P<emotion>{'|'.join(EMOTIONS)})_(?P<level>{'|'.join(LEVELS)})$"
)
FAULTS = {
    "1064_IEO_DIS_MD": "holds all emotions of its sentence",
    "1064_TIE_SAD_XX": "almost without picture",
    "1076_MTI_NEU_XX": "almost empty",
    "1076_MTI_SAD_XX": "without sound",
}


def fold_of(actor: int) -> int:
    """1001-1018, 1019-1036, 1037-1054, 1055-1072, 1073-1091 -> 1 to 5."""
    return min((actor - 1001) // 18, 4) + 1


def rows(tree: Tree, report: Report) -> Iterator[Row]:
    votes, people = _votes(tree, report), _people(tree, report)
    clips = tree.groups(NAME, lambda match: match[0][1:])
    report.absent += sorted(votes.keys() - clips.keys())
    for name, (match, paths) in clips.items():
        yield {
            **{"id": name, **streams(paths, report), "speaker": match["actor"], **people.get(match["actor"], {})},
            **{"fold": fold_of(int(match["actor"])), "label": EMOTIONS[match["emotion"]]},
            **{"intensity": LEVELS[match["level"]], "sentence": match["sentence"], **votes.get(name, {})},
        }


def _votes(tree: Tree, report: Report) -> dict[str, dict[str, dict[str, int]]]:
    """Raw counts by clip and condition; the intended emotion stays the label."""
    found = tree.find(r"/tabulatedVotes\.csv")
    if not found:
        report.notes.append("processedResults/tabulatedVotes.csv is not there, so there are no votes")
    votes: dict[str, dict[str, dict[str, int]]] = {}
    for where, row in tree.table(found[0], "", "fileName", *VOTES) if found else ():
        condition = known(where, "the first digit of the number", row[""][:1], CONDITIONS)
        counts = {word: int(number_of(where, letter, row[letter]) or 0) for letter, word in VOTES.items()}
        votes.setdefault(row["fileName"], {})[condition] = counts
    return votes


def _people(tree: Tree, report: Report) -> dict[str, Row]:
    found = tree.find(r"/VideoDemographics\.csv")
    if not found:
        report.notes.append("VideoDemographics.csv is not there, so there are no age and sex")
    rows = tree.table(found[0], "ActorID", "Age", "Sex") if found else ()
    return {row["ActorID"]: {"sex": row["Sex"][:1], "age": row["Age"]} for _, row in rows}


CREMAD = Corpus(
    name="cremad",
    title="CREMA-D",
    rows=rows,
    looks_like="VideoFlash/1001_DFA_ANG_XX.flv, AudioWAV/1001_DFA_ANG_XX.wav",
    licence="ODbL 1.0",
    source="https://github.com/CheyneyComputerScience/CREMA-D",
    published={"clips": 7442, "speaker": 91},
    faults=FAULTS,
)
