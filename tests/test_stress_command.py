"""`affekt stress`: from a model's folder and shards to results, report and sheet; goes on, and refuses seen clips."""

import csv
import io
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from affekt import cli
from affekt.data.shard_writer import ShardWriter
from affekt.finetune import judge as judging
from affekt.finetune.finetuned import Finetuned, save_finetuned
from affekt.finetune.schema import Results
from affekt.finetune.stress import sweep
from affekt.finetune.training.heads import create_head
from affekt.finetune.training.settings import HeadSettings
from affekt.pretrain.export import create_encoder
from affekt.pretrain.registry import model_settings

CLASSES = ["neutral", "happy", "sad", "angry", "fearful", "disgust"]
SMALL = {
    "embed_dim": 32, "num_heads": 2, "depth": 2, "taps": (1, 2), "mel_frames": 64, "img_size": 64,
    "decoder_embed_dim": 16, "decoder_num_heads": 2,
}  # fmt: skip
DAMAGE = [
    "damage.alterations={white_noise: [0], blur: [4]}", "damage.missing=[RMM, SMM]", "damage.fills=[drop]",
    "damage.rates=[0, 1]", "damage.early=[0.5]", "damage.windows=1", "damage.bootstrap=100", "smallest_group=2",
]  # fmt: skip


@pytest.fixture(scope="module")
def place(tmp_path_factory, tiny_shards):
    """A folder with the fresh model `model`, that has seen speaker s0, and the roots of two shards."""
    folder = tmp_path_factory.mktemp("stress")
    encoder = create_encoder(model_settings("hicmae_nano", **SMALL), 4, {})
    model = Finetuned(create_head(encoder, len(CLASSES), "both", HeadSettings()), CLASSES, {})
    origin = {"title": "Tiny", "encoder": "fresh weights", "seed": 3, "epoch": 1, "chosen": "best", "refit": False}
    seen = {"ids": [], "sources": [], "speakers": ["s0"], "licences": [], "data_sets": [], "without_speaker": 0}
    save_finetuned(model, folder / "model", origin, {**seen, "fingerprint": "", "prepare": {}})
    return folder, str(tiny_shards(24, seconds=1.2).root), str(tiny_shards(24, "video", seconds=1.2).root)


def test_the_command_writes_results_report_and_sheet_and_goes_on(place, monkeypatch, capsys):
    folder, shards, other = place
    out = folder / "out"
    across = f"across={{other: {{shards: {other}, clips: {{split: test}}}}}}"
    args = ["stress", str(folder / "model"), shards, str(out), *DAMAGE, "data.clips={split: [dev, test]}", across]
    assert cli.run(args) == 0
    told = capsys.readouterr().out
    assert "White noise" in told and "left out: conflict" in told
    results = Results.read(out / "results.json")
    names = [s.name for s in results.stress]
    assert names == ["white_noise", "blur", "missing_RMM_drop", "missing_SMM_drop", "early"]
    nothing = results.stress[2]
    assert nothing.area is not None and "12 at 1" in nothing.note and "all answers are one" in nothing.note
    assert results.systems[0].clips == 12 and results.systems[0].seeds == [3]
    assert results.tables[0].rows[1][0] == "other" and results.tables[0].rows[0][1] == "12"
    assert {f.attribute for f in results.fairness} <= {"speaker"} and "groups by sex" in results.protocol["left_out"]
    assert [c.subsets for c in results.conflict] == [{"consistent": 12, "conflict": 12}]  # those made by swapping
    rows = list(csv.DictReader(io.StringIO((out / "stress.csv").read_text())))
    assert len(rows) == sum(len(s.levels) for s in results.stress)
    assert [float(row["value"]) for row in rows if row["damage"] == "blur"] == [results.stress[1].scores[0].value]
    html = (out / "report.html").read_text()
    assert "The model learned, with labels or without, from" in html
    assert "Beginning of the clip" in html and "spoiled in every way" in html
    assert Image.open(out / "preview.png").size[0] > 600

    asked = []
    real = judging.judge_clips
    monkeypatch.setattr(sweep, "judge_clips", lambda *a, **k: asked.append(k.get("alter")) or real(*a, **k))
    kept = out / "predictions" / "stress" / "blur@4.safetensors"
    kept.write_bytes(kept.read_bytes()[:-9])
    assert cli.run(args) == 0
    assert len(asked) == 1 and Results.read(out / "results.json").stress == results.stress


def test_seen_clips_and_wrong_settings_are_refused(place, capsys):
    folder, shards, _ = place
    args = ["stress", str(folder / "model"), shards, str(folder / "refused"), *DAMAGE]
    assert cli.run([*args, "data.clips={split: train}"]) == 1
    assert "seen test clips" in capsys.readouterr().err
    assert cli.run([*args, "damage.alterations={blurr: []}"]) == 1
    assert "no `blurr`" in capsys.readouterr().err
    assert cli.run([*args, "damage.alterations={phone: [0.5]}"]) == 1
    assert cli.run([*args, "damage.alterations={jpeg: [-5]}"]) == 1
    assert "alterations.jpeg: -5 is not within 1 and 100" in capsys.readouterr().err
    assert cli.run([*args, "across={x: {shards: /nowhere}}"]) == 2
    assert cli.run([*args, f"across={{{Path(shards).name}: {{shards: {shards}}}}}"]) == 1
    assert "have this name in the table" in capsys.readouterr().err
    assert cli.run([*args, "--device", "tpu9"]) == 1 and "device tpu9: " in capsys.readouterr().err
    assert cli.run([*args, "--device", "meta"]) == 1 and "device meta: " in capsys.readouterr().err
    assert not (folder / "refused").exists()


def test_fields_that_only_the_clips_know_are_compared_and_nameless_ones_refused(place, encode_clip, capsys):
    folder, shards, _ = place
    args = ["stress", str(folder / "model"), shards, str(folder / "fields"), *DAMAGE[1:]]
    args += ["damage.alterations={gain: [0]}", "data.clips={split: [dev, test]}", "swap=false", "fairness=[split]"]
    assert cli.run(args) == 0
    told = next(line for line in capsys.readouterr().out.splitlines() if "groups by split" in line)
    assert "dev" in told and "test" in told and "unknown" not in told, "of one speaker each"
    sound = np.random.default_rng(0).normal(0, 0.1, 19200)
    writer = ShardWriter(folder / "nameless")
    writer.write_shard(0, [encode_clip(f"n{i}", None, sound, label=CLASSES[i], split="test") for i in range(4)])
    writer.finish({"size": 64, "fps": 25, "sample_rate": 16000, "picture": "mjpeg", "prepare": {}})
    args = ["stress", str(folder / "model"), str(folder / "nameless"), str(folder / "out2"), *DAMAGE]
    assert cli.run(args) == 1 and "clip n0 has no `speaker`" in capsys.readouterr().err


def test_a_preview_alone_and_the_settings(place, capsys):
    folder, shards, _ = place
    args = ["stress", str(folder / "model"), shards, str(folder / "seen")]
    assert cli.run([*args, "--preview", "--json"]) == 0
    path = json.loads(capsys.readouterr().out)["preview"]
    assert Image.open(path).size[1] > 1000  # a row for every kind of damage
    assert cli.run([*args, "--print-config"]) == 0
    assert "fills: [zero, drop]" in capsys.readouterr().out


def test_the_benchmark_of_conflicts_knows_what_was_planted(place, tmp_path, encode_clip, capsys):
    """A fresh model finds nothing, but the figures are there and the planted share is counted."""
    from benchmarks import conflict

    rng, clips = np.random.default_rng(0), []
    for i in range(20):
        face = CLASSES[(i + (i % 4 == 0)) % 6]
        meta = {
            "label_voice": CLASSES[i % 6],
            "label_face": face,
            "speaker": f"s{i // 5}",
            "split": "dev" if i < 12 else "train" if i < 16 else "test",
        }
        pictures = rng.integers(0, 255, (30, 64, 64, 3), np.uint8)
        clips.append(encode_clip(f"c{i}", pictures, rng.normal(0, 0.1, 19200), **meta))
    writer = ShardWriter(tmp_path / "shards")
    writer.write_shard(0, clips)
    writer.finish({"size": 64, "fps": 25, "sample_rate": 16000, "picture": "mjpeg", "prepare": {}})
    model = str(place[0] / "model")
    conflict.main([str(tmp_path / "shards"), "--voice", model, "--face", model])
    figures = json.loads(capsys.readouterr().out.splitlines()[-1])["figures"]
    assert figures["conflict_share_planted"] == pytest.approx(0.25)  # clips 12 and 16 of 12 to 19
    assert all(0 <= value <= 1 for value in figures.values())
