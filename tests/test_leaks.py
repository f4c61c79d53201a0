"""Ways to a wrong number or to lost work that a review tried: each is refused with a message, and nothing is lost."""

import fcntl
import json

import numpy as np
import pytest
import soundfile
import torch
from pydantic import ValidationError
from safetensors import SafetensorError

from affekt.cli import run
from affekt.data.errors import CheckpointError, DataError, SettingsError
from affekt.data.mixture import Corpus
from affekt.data.shard_writer import ShardWriter
from affekt.data.shards import ShardIndex
from affekt.finetune import feature_store
from affekt.finetune.probes.probe import ProbeSettings, check_preparation
from affekt.finetune.probes.splits import make_task
from affekt.finetune.splits import check_unseen
from affekt.pretrain.export import create_encoder, save_encoder
from affekt.pretrain.log import read_metrics
from affekt.pretrain.loop import claim_run
from affekt.pretrain.mixture import open_corpora
from affekt.pretrain.registry import model_settings
from affekt.pretrain.seen import merged, seen_data
from affekt.pretrain.settings import PretrainSettings

SEEN = {"ids": ["a"], "sources": [], "speakers": ["s1"], "licences": [], "data_sets": [], "prepare": {}}
SMALL = {"embed_dim": 48, "depth": 2, "taps": (1, 2), "decoder_embed_dim": 32, "img_size": 32, "mel_frames": 64}
PARTS = {"test": {"split": ["test"]}, "dev": {"split": ["dev"]}, "train": {"split": ["train"]}}


def write_export(folder):
    save_encoder(create_encoder(model_settings("hicmae_nano", **SMALL), 4, {}), folder, {"run": "t", "step": 1}, SEEN)
    return folder


def test_a_run_folder_has_one_trainer(tmp_path):
    with open(tmp_path / ".lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(SettingsError, match="another process trains in this folder"):
            claim_run(tmp_path)
    claim_run(tmp_path).close()
    claim_run(tmp_path).close()


def test_no_command_writes_into_the_folder_of_another(tiny_shards, tmp_path, capsys):
    shards = tiny_shards(24).root
    before = {path.name: path.read_bytes() for path in shards.iterdir()}
    with pytest.raises(SettingsError, match="holds shards"):
        claim_run(shards)
    assert {path.name: path.read_bytes() for path in shards.iterdir()} == before
    claim_run(tmp_path / "run").close()
    (tmp_path / "run" / "metrics.jsonl").write_text("")
    (tmp_path / "run" / "settings.yaml").write_text("kept")
    soundfile.write(tmp_path / "tone.wav", np.zeros(16000), 16000)
    assert run(["prepare", str(tmp_path / "tone.wav"), str(tmp_path / "run"), "--overwrite"]) == 1
    assert "holds a run of `affekt pretrain`" in capsys.readouterr().err
    assert (tmp_path / "run" / "settings.yaml").read_text() == "kept"


def test_an_export_replaces_nothing_but_an_export(tmp_path, capsys):
    torch.save({}, tmp_path / "file.pth")
    for name, content in (("config.json", '{"mine": 1}'), ("thesis.txt", "years of work")):
        (tmp_path / "project").mkdir(exist_ok=True)
        (tmp_path / "project" / name).write_text(content)
    exported = write_export(tmp_path / "export")
    (exported / "notes.txt").write_text("beside")
    for folder in (tmp_path / "project", exported):
        names = {path.name for path in folder.iterdir()}
        assert run(["export", str(tmp_path / "file.pth"), str(folder)]) == CheckpointError.exit_code
        assert "not an export alone" in capsys.readouterr().err
        assert {path.name for path in folder.iterdir()} == names


def test_fresh_deletes_a_demo_alone(tmp_path, capsys):
    for part in ("corpus", "photos"):
        (tmp_path / part).mkdir()
    assert run(["demo", "--out", str(tmp_path), "--fresh"]) == 1
    assert "no demo's" in capsys.readouterr().err
    assert (tmp_path / "photos").is_dir() and (tmp_path / "corpus").is_dir()


def test_a_recording_under_two_names_stays_on_one_side(encode_clip, tmp_path):
    tone = torch.arange(16000).mul(0.1).sin().numpy() * 0.3
    clips = [
        encode_clip(f"{split}{i}", None, tone, split=split, label="ab"[i % 2], speaker=f"{split}{i % 2}")
        for split in ("train", "dev", "test")
        for i in range(4)
    ]
    clips[9][0]["source_sha256"] = clips[2][0]["source_sha256"]
    writer = ShardWriter(tmp_path)
    writer.write_shard(0, clips)
    index = writer.finish({"size": 32, "fps": 25, "sample_rate": 16000, "picture": "mjpeg", "prepare": {}})
    with pytest.raises(SettingsError, match=r"train2 and test1 stand on two sides.*same file"):
        make_task(index, label="label", group="speaker", **PARTS, seed=0)


def test_a_stream_that_nobody_has_is_not_sold_as_trained(tiny_shards):
    index = tiny_shards(16, streams="audio")
    given = {"out": "run", "model": {"name": "hicmae_nano"}, "data": {"shards": str(index.root)}, "train": {"steps": 1}}
    with pytest.raises(DataError, match=r"not one clip to learn from has video.*model\.streams=audio"):
        open_corpora(PretrainSettings.parse(given))


def test_clips_of_unknown_speakers_are_told(tiny_shards, capsys):
    index = tiny_shards(8)
    found = check_unseen(index, [0], SEEN | {"without_speaker": 3}, group="speaker", transductive=False)
    assert found["without_speaker"] == 3
    assert "3 clips that pre-training saw have no known speaker" in capsys.readouterr().err
    assert not check_unseen(index, [0], SEEN, group="speaker", transductive=False)["without_speaker"]


def test_a_session_that_pre_training_has_seen_is_refused(encode_clip, tmp_path):
    """Other clips of the same recording session, under other ids, from other files."""
    tone = torch.arange(16000).mul(0.1).sin().numpy() * 0.3
    writer = ShardWriter(tmp_path)
    rows = [("a", "Ses05", "Ses05F"), ("b", "Ses05", "Ses05M"), ("c", "Ses06", "Ses06F")]
    writer.write_shard(0, [encode_clip(clip, None, tone, session=s, speaker=p) for clip, s, p in rows])
    index = writer.finish({"size": 32, "fps": 25, "sample_rate": 16000, "picture": "mjpeg", "prepare": {}})
    how = {"group": "session", "transductive": False}
    seen = seen_data([Corpus(index, np.array([0]), None, "")])
    assert seen["sessions"] == ["Ses05"]
    with pytest.raises(SettingsError, match=r"shared 1 sessions \(Ses05\)"):
        check_unseen(index, [1], seen, **how)
    assert check_unseen(index, [2], seen, **how)["shared_with_test"] == {"ids": 0, "sources": 0, "sessions": 0}
    # An export of earlier days lists none, nor does what was trained from it: then speakers tell.
    older = {name: value for name, value in seen.items() if name != "sessions"}
    assert "sessions" not in merged(seen, older) and merged(seen, seen)["sessions"] == ["Ses05"]
    with pytest.raises(SettingsError, match=r"shared 1 speakers \(Ses05F\)"):
        check_unseen(index, [0], older | {"ids": []} | {"sources": []}, **how)


def test_clips_prepared_otherwise_are_refused(tiny_shards, tmp_path):
    index = ShardIndex.open(tiny_shards(8).root)
    index.header["prepare"] = {"size": 16, "face": "center", "fps": 25}
    with pytest.raises(SettingsError, match="size 16, not 112; face center, not haar"):
        check_preparation(index, {"size": 112, "face": "haar", "fps": 25}, tmp_path)
    check_preparation(index, {"size": 16, "face": "center", "fps": 25, "quality": 50}, tmp_path)


def test_folds_that_no_class_can_fill(tiny_shards):
    index = tiny_shards(24)
    with pytest.raises(SettingsError, match=r"no class has more than \d+ clips"):
        make_task(index, label="label", group="id", test={"split": ["test"]}, dev={"folds": 10}, train={}, seed=0)
    for share in (-3, 7, float("nan"), "abc"):
        with pytest.raises(SettingsError, match="must lie between 0 and 1"):
            make_task(
                index, label="label", group="id", test={"fraction": share}, dev={"fraction": 0.2}, train={}, seed=0
            )


@pytest.mark.parametrize("wrong", [{"penalties": [0]}, {"penalties": [-1]}, {"seed": -1}, {"device": "foo"}])
def test_probe_settings_have_bounds(wrong):
    given = {"shards": "s", "encoder": "e", "output": "o", "test": {}, "dev": {}}
    with pytest.raises((SettingsError, ValidationError), match=next(iter(wrong))):
        ProbeSettings.parse(given | wrong)


@pytest.mark.parametrize(
    "wrong", ["model.name=[1]", f"train.seed={10**20}", "data.augment.crop_scales=[0]", "model.taps=[]"]
)
def test_pretrain_settings_have_bounds(wrong, capsys):
    assert run(["pretrain", "demo", wrong, "--print-config"]) == 1
    assert wrong.partition("=")[0] in capsys.readouterr().err


def test_a_half_written_line_of_metrics_is_passed_over(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text(json.dumps({"step": 1, "time_s": 2.0}) + '\n{"step": 2, "ti\n[3]\n{"step": 4}')
    assert [row["step"] for row in read_metrics(path)] == [1, 4]
    assert read_metrics(tmp_path / "absent") == []


def test_a_full_disk_at_the_features_is_a_message(tmp_path, monkeypatch):
    """safetensors tells of it by an error class of its own."""

    def full(*_arguments, **_options):
        raise SafetensorError("No space left on device (os error 28)")

    monkeypatch.setattr("affekt.finetune.feature_store.save_file", full)
    with pytest.raises(DataError, match=r"part\.safetensors: features cannot be written: No space left"):
        feature_store.write_part(tmp_path / "part.safetensors", {}, {}, {})
    assert not list(tmp_path.glob("*.safetensors"))
