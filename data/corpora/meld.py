"""MELD: utterances of the series Friends, in the corpus's own train, dev and test parts.

{train,dev,test}_sent_emo.csv name dialogue and utterance; the film is diaD_uttU.mp4 in the folder of its part:
train_splits, dev_splits_complete, output_repeated_splits_test. Numbers begin anew in each part, and the last folder
holds films under other names beside them, so a film counts only in its own folder and under its exact name. The parts
share speakers. Counts are those of the corpus's README. Some films are cut wrongly and last minutes (issues 9 and 20 of
the corpus's repository); they stay, as the official test part holds some, and `affekt prepare` flags them `cut`.
"""

from collections.abc import Iterator

from affekt.data.corpora.corpus import Corpus, Report, Row, Tree, lacks, streams

PARTS = ("train", "dev", "test")
COLUMNS = ("Utterance", "Speaker", "Emotion", "Sentiment", "Dialogue_ID", "Utterance_ID")
FILM = r"/[^/]*(?P<part>train|dev|test)[^/]*/(?P<name>dia\d+_utt\d+)$"


def rows(tree: Tree, report: Report) -> Iterator[Row]:
    films = tree.groups(FILM, lambda match: f"{match['part']}_{match['name']}")
    named = set()
    for part in PARTS:
        tables = tree.find(rf"/{part}_sent_emo\.csv")
        if not tables:
            report.notes.append(f"{part}_sent_emo.csv is not there, so the part {part} is left out")
        for _, row in tree.table(tables[0], *COLUMNS) if tables else ():
            name = f"{part}_dia{row['Dialogue_ID']}_utt{row['Utterance_ID']}"
            named.add(name)
            if name not in films:
                report.absent.append(name)
                continue
            yield {
                **{"id": name, **streams(films[name][1], report), "speaker": row["Speaker"], "split": part},
                **{"session": f"{part}_dia{row['Dialogue_ID']}", "label": row["Emotion"]},
                **{"sentiment": row["Sentiment"], "transcript": row["Utterance"]},
            }
    if not named:
        raise lacks(tree, "train_sent_emo.csv, dev_sent_emo.csv or test_sent_emo.csv", MELD)
    report.leave_out("in none of the csv files", *sorted(films.keys() - named))


MELD = Corpus(
    name="meld",
    title="MELD",
    rows=rows,
    looks_like="train_sent_emo.csv, train_splits/dia0_utt0.mp4",
    licence="GPL 3.0 for the annotation; the films belong to their owners",
    source="https://affective-meld.github.io",
    published={"split=train": 9989, "split=dev": 1109, "split=test": 2610},
    faults={"train_dia125_utt3": "the file has no index and cannot be read"},
)
