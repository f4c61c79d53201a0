"""MSP-IMPROV: 12 actors in 6 sessions improvise, read and talk; labels of raters, not of the script.

MSP-IMPROV-S01A-F01-P-FM01 is sentence 01 with the target emotion A, actor F01 of session 1, condition P, turn FM01.
Labels stand in Evalution.txt (spelt so), where files are called UTD-IMPROV-...; counts are those of the corpus's paper
(Busso et al. 2017, tables 3 and 4), one session held out a fold. The lines of single raters are not read: their form is
not documented.
"""

from collections.abc import Iterator

from affekt.data.corpora.corpus import Corpus, Report, Row, Tree, known, lacks, number_of, streams

LABELS = {"A": "angry", "H": "happy", "N": "neutral", "S": "sad", "O": "other", "X": "no agreement"}
TARGETS = {"A": "angry", "H": "happy", "N": "neutral", "S": "sad"}
CONDITIONS = {"S": "improvised", "T": "target improvised", "R": "target read", "P": "natural"}
RATINGS = {"A": "arousal", "V": "valence", "D": "dominance", "N": "naturalness"}
NAME = (
    r"/(?:MSP|UTD)-IMPROV-(?P<clip>S(?P<sentence>\d\d)(?P<target>[AHNS])-(?P<actor>(?P<sex>[FM])0(?P<session>[1-6]))"
    r"-(?P<condition>[STRP])-[FM]{2}\d\d)$"
)


def rows(tree: Tree, report: Report) -> Iterator[Row]:
    rated = _ratings(tree)
    clips = tree.groups(NAME, lambda match: match["clip"])
    report.absent += sorted(rated.keys() - clips.keys())
    report.leave_out("without a line in Evalution.txt", *(clips.keys() - rated.keys()))
    for name in sorted(clips.keys() & rated.keys()):
        match, paths = clips[name]
        yield {
            **{"id": name, **streams(paths, report), "speaker": match["actor"], "session": match["session"]},
            **{"sex": match["sex"], "fold": match["session"], **rated[name]},
            **{"condition": CONDITIONS[match["condition"]], "target": TARGETS[match["target"]]},
            **{"sentence": match["sentence"]},
        }


def _ratings(tree: Tree) -> dict[str, Row]:
    found = tree.find(r"/Evalua?tion\.txt")
    if not found:
        raise lacks(tree, "Evalution.txt", MSP_IMPROV)
    ratings: dict[str, Row] = {}
    for where, line in tree.lines(found[0]):
        name, *fields = (field.strip() for field in line.split(";"))
        if not name.lower().endswith((".avi", ".wav")) or "-IMPROV-" not in name:
            continue  # one rater's line
        row: Row = {"label": known(where, "the label", fields[0] if fields else "", LABELS)}
        for field in fields[1:]:
            letter, colon, value = field.partition(":")
            if colon and letter.strip() in RATINGS:
                column = RATINGS[letter.strip()]
                row[column] = number_of(where, column, value.strip())
        ratings[name.rpartition(".")[0].partition("-IMPROV-")[2]] = row
    return ratings


MSP_IMPROV = Corpus(
    name="msp_improv",
    title="MSP-IMPROV",
    rows=rows,
    looks_like="Evalution.txt, session1/S01A/P/MSP-IMPROV-S01A-F01-P-FM01.wav",
    licence="MSP-IMPROV academic licence",
    source="https://ecs.utdallas.edu/research/researchlabs/msp-lab/MSP-Improv.html",
    published={
        **{"clips": 8438, "speaker": 12, "session": 6, "label=angry": 792, "label=happy": 2644},
        **{"label=neutral": 3477, "label=sad": 885, "label=other": 85, "label=no agreement": 555},
    },
)
