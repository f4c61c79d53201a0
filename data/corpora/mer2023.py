"""MER2023: Chinese films and series, 6 emotions and a valence; train and three test parts.

{train,test1,test2,test3}-label.csv with the columns name, discrete and, but for test3, valence; the film NAME.avi or
NAME.mp4 stands in the folder of its part. The unlabelled clips of test3 have no line in a table and are left out. test1
to test3 are the tracks MULTI, NOISE and SEMI. Who is seen is not told.
"""

from collections.abc import Iterator

from affekt.data.corpora.corpus import Corpus, Report, Row, Tree, lacks, number_of, streams

PARTS = ("train", "test1", "test2", "test3")


def rows(tree: Tree, report: Report) -> Iterator[Row]:
    tables = {part: tree.find(rf"/{part}-label\.csv") for part in PARTS}
    if not any(tables.values()):
        raise lacks(tree, "train-label.csv or test1-label.csv", MER2023)
    for part, found in tables.items():
        if not found:
            report.notes.append(f"{part}-label.csv is not there, so the part {part} is left out")
            continue
        films = tree.groups(rf"/{part}/(?:.*/)?([^/]+)$", lambda match: match[1])
        named = set()
        for where, row in tree.table(found[0], "name", "discrete"):
            name = row["name"]
            named.add(name)
            if name not in films:
                report.absent.append(f"{part}/{name}")
                continue
            valence = number_of(where, "valence", row.get("valence", ""))
            files = streams(films[name][1], report)
            yield {"id": f"{part}_{name}", **files, "split": part, "label": row["discrete"], "valence": valence}
        report.leave_out("without a label", *(f"{part}/{name}" for name in sorted(films.keys() - named)))


MER2023 = Corpus(
    name="mer2023",
    title="MER2023",
    rows=rows,
    looks_like="train-label.csv, train/samplenew_00000001.avi",
    licence="MER2023 end user agreement, research",
    source="http://merchallenge.cn",
    published={"split=train": 3373, "split=test1": 411, "split=test2": 412, "split=test3": 834},
)
