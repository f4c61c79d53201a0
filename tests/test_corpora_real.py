"""Importers against real files: all names and votes of CREMA-D, and the clips whose manifest somebody else wrote."""

import csv
from collections import Counter

import pytest

from affekt.data.corpora.corpus import Report, Tree
from affekt.data.corpora.cremad import CREMAD
from affekt.data.corpora.importer import import_corpus
from affekt.data.manifest import read_source


def test_real_names_of_cremad_give_its_folds_and_its_votes(shared_data, tmp_path):
    """All 7,442 names of the vote tables; the figures are those of HiCMAE's lists and of the votes counted before."""
    votes = shared_data / "cremad_votes"
    with open(votes / "summaryTable.csv", encoding="utf-8") as file:
        summary = {row["FileName"]: row for row in csv.DictReader(file)}
    for table in ("tabulatedVotes.csv", "VideoDemographics.csv"):
        (tmp_path / table).symlink_to(votes / table)
    (tmp_path / "AudioWAV").mkdir()
    for name in summary:
        (tmp_path / "AudioWAV" / f"{name}.wav").touch()

    report = Report()
    rows = list(CREMAD.rows(Tree(tmp_path), report))
    assert len(rows) == 7442 and not report.absent and not report.notes
    letters = {"anger": "A", "disgust": "D", "fear": "F", "happy": "H", "neutral": "N", "sad": "S"}
    columns = {"votes_voice": "VoiceVote", "votes_face": "FaceVote", "votes": "MultiModalVote"}
    kinds = Counter()
    for row in rows:
        won = {}
        for column, named in columns.items():
            counts = row[column]
            won[column] = {letters[word] for word, count in counts.items() if count == max(counts.values())}
            assert won[column] == set(summary[row["id"]][named].split(":")), row["id"]
        voice, face, both = won["votes_voice"], won["votes_face"], won["votes"]
        if len(voice) == len(face) == 1:
            agree = "agree" if voice == face else "conflict"
            follows = "tie" if len(both) > 1 else "face" if both == face else "voice" if both == voice else "neither"
            kinds[agree, follows] += 1
    conflicts = {follows: kinds["conflict", follows] for follows in ("face", "voice", "neither", "tie")}
    assert conflicts == {"face": 1887, "voice": 548, "neither": 359, "tie": 229}
    assert kinds["agree", "face"] == 3034

    told_by_import = import_corpus("cremad", tmp_path)
    assert told_by_import["folds"] == {"1": 1463, "2": 1470, "3": 1476, "4": 1474, "5": 1555}  # HiCMAE lacks one of 3
    assert told_by_import["labels"]["neutral"] == 1086 and told_by_import["speakers"] == 91
    assert sum(map(len, told_by_import["left_out"].values())) == 4
    folds = {}
    for clip in read_source(tmp_path):
        folds.setdefault(clip.meta["speaker"], set()).add(clip.meta["fold"])
    assert all(len(numbers) == 1 for numbers in folds.values())


@pytest.mark.parametrize(
    ("name", "data_set", "folder"),
    [
        ("ravdess", "RAVDESS", "ravdess_audio"),
        ("ravdess", "RAVDESS", "ravdess_av"),
        ("emodb", "EMO-DB", "emodb"),
        ("grid", "GRID", "grid_s1"),
    ],
)
def test_real_corpora_agree_with_their_manifest(name, data_set, folder, shared_data, tmp_path):
    with open(shared_data / "manifest.csv", encoding="utf-8") as file:
        known = {row["path"]: row for row in csv.DictReader(file) if row["path"].startswith(folder + "/")}
    summary = import_corpus(name, shared_data / folder, tmp_path / "m.csv")
    clips = {(clip.video or clip.audio).name: clip for clip in read_source(tmp_path / "m.csv")}
    assert set(clips) == {path.rpartition("/")[2] for path in known} and summary["absent"] == []
    for path, row in known.items():
        clip = clips[path.rpartition("/")[2]]
        assert row["data_set"] == data_set == clip.meta["domain"]
        assert (clip.video is not None) == (row["has_video"] == "1")
        assert clip.meta["speaker"].split("_")[1] == row["actor"].split("_")[1]
        assert clip.meta["sex"] == row["sex"]
        assert row["label"] in (clip.meta["label"], clip.meta.get("emotion"))
        assert clip.meta.get("intensity", "") == row["intensity"]


def test_a_second_film_of_a_take_is_left_out(shared_data, tmp_path):
    summary = import_corpus("ravdess", shared_data, tmp_path / "m.csv")
    again = summary["left_out"]["another file of the same take"]
    films = {path.name for path in (shared_data / "ravdess_av").iterdir()}
    gray = {path.name for path in (shared_data / "ravdess_av_gray").iterdir()}
    assert {path.rpartition("/")[2] for path in again} == films & gray and len(films & gray) > 5
    rows = {clip.id: clip for clip in read_source(tmp_path / "m.csv")}
    assert summary["clips"] == len(rows) == 1200  # films of actor 01 have taken the place of his sounds
    assert sum(clip.video is not None for clip in rows.values()) == len(films | gray)
