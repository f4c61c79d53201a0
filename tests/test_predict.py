"""What `affekt predict` refuses; what it answers is in tests/test_finetune.py."""

from pathlib import Path

import pytest

from affekt.cli import run as affekt


@pytest.mark.parametrize(
    "out, told", [("clip.flac", "are written"), ("a.csv", "is one of the files"), ("no/b.csv", "there is no folder")]
)
def test_predict_replaces_nothing_but_answers(tmp_path, capsys, monkeypatch, out, told):
    monkeypatch.chdir(tmp_path)
    Path("a.csv").write_text("years of work")
    assert affekt(["predict", "clip.flac", "a.csv", "--model", "nowhere", "--out", out]) == 1
    assert told in capsys.readouterr().err and Path("a.csv").read_text() == "years of work"


def test_an_encoder_alone_cannot_predict_and_says_what_can(tmp_path, capsys):
    (tmp_path / "config.json").write_text('{"format": "affekt-export", "version": "1.1"}')
    (tmp_path / "preprocess.json").write_text("{}")
    assert affekt(["predict", "clip.flac", "--model", str(tmp_path)]) == 3
    assert "affekt finetune" in capsys.readouterr().err
