"""The probe on real shards and a real export: honest splits, an exact fit, choices on development clips alone."""

import io
import json

import numpy as np
import pytest
import simplejpeg
import soundfile
import torch
from rich.console import Console

from affekt.data.errors import CheckpointError, DataError, SettingsError
from affekt.data.shard_writer import ShardWriter
from affekt.data.shards import ShardIndex
from affekt.finetune.features import FeatureTable
from affekt.finetune.predictions import Predictions
from affekt.finetune.probes import heads as heads_module
from affekt.finetune.probes.depth import depth_tasks, layers_of
from affekt.finetune.probes.heads import heads_of
from affekt.finetune.probes.linear import Path, standardise
from affekt.finetune.probes.menu import try_all
from affekt.finetune.probes.probe import ProbeSettings, probe
from affekt.finetune.probes.results import find_row, row_name, show_table
from affekt.finetune.probes.splits import make_task
from affekt.finetune.schema import Results
from affekt.pretrain.export import create_encoder, save_encoder
from affekt.pretrain.hicmae_settings import HiCMAESettings
from affekt.pretrain.seen import stamped

CLASSES = ("high", "low", "middle")
TONES = {"high": 3000, "middle": 900, "low": 250}
TINY = HiCMAESettings(
    embed_dim=16,
    num_heads=2,
    depth=2,
    fusion_depth=1,
    decoder_embed_dim=16,
    decoder_num_heads=2,
    taps=(1, 2),
    img_size=32,
    num_frames=4,
    mel_frames=64,
)


def clip(name, label, speaker, split, rng, *, video=True, seconds=1.0):
    """Sound: a tone by label with noise. Picture: a bright spot by label under a speaker's own colour and noise."""
    frames = rng.normal(90, 30, (int(25 * seconds), 32, 32, 3)) + 40 * np.array([speaker % 2, speaker % 3, 1])
    row = 8 * CLASSES.index(label)
    frames[:, row : row + 8, 8:24] += 60
    jpegs = [simplejpeg.encode_jpeg(np.clip(f, 0, 255).astype(np.uint8)) for f in frames] if video else []
    seconds_of = np.arange(int(16000 * seconds)) / 16000
    wave = 0.1 * np.sin(2 * np.pi * TONES[label] * seconds_of) + 0.05 * rng.standard_normal(len(seconds_of))
    sound = io.BytesIO()
    soundfile.write(sound, wave.astype(np.float32), 16000, format="FLAC")
    record = {
        "id": name,
        "frames": len(jpegs),
        "samples": len(wave),
        "duration": seconds,
        "flags": [],
        "source_sha256": f"{name:0>64}",
        "frame_sizes": [len(jpeg) for jpeg in jpegs],
        "meta": {"label": label, "speaker": f"s{speaker}", "split": split, "licence": "CC0-1.0"}
        | {"sex": "mf"[speaker % 2], "valence": round(CLASSES.index(label) - 1 + 0.1 * speaker, 2)},
    }
    return record, ({"mjpeg": b"".join(jpegs)} if video else {}) | {"flac": sound.getvalue()}


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    """Nine speakers with six clips each; one clip of each part has no picture, one more has no label."""
    folder, rng = tmp_path_factory.mktemp("shards"), np.random.default_rng(0)
    clips = []
    for speaker, split in enumerate(["train"] * 4 + ["dev"] * 2 + ["test"] * 3):
        for take in range(6):
            name = f"s{speaker}_{take}"
            video = not (take == 0 and speaker in (0, 4, 6))
            clips.append(clip(name, CLASSES[take % 3], speaker, split, rng, video=video))
    clips[1][0]["meta"].pop("label")
    writer = ShardWriter(folder)
    writer.write_shard(0, clips)
    writer.finish({"size": 32, "fps": 25, "sample_rate": 16000, "picture": "mjpeg", "prepare": {}})
    return folder


@pytest.fixture(scope="module")
def export(tmp_path_factory):
    return make_export(tmp_path_factory.mktemp("export") / "export")


def make_export(folder, seed=123, **seen):
    torch.manual_seed(seed)
    before = {"ids": ["s0_1"], "speakers": ["s0"], "sources": ["ab" * 32], "licences": ["CC-BY-4.0"]}
    before |= {"data_sets": [], "prepare": {}}
    save_encoder(create_encoder(TINY, 4, {}), folder, {"run": "test", "step": 1}, before | seen)
    return folder


def settings_of(shards, export, output, **changes):
    values = {
        "shards": str(shards),
        "encoder": str(export),
        "output": str(output),
        "test": {"split": ["test"]},
        "dev": {"split": "dev"},
        "windows": 1,
        "random_seeds": [0, 1],
        "penalties": [0.1, 0.01],
        "bootstrap": 200,
    }
    return ProbeSettings.parse(values | changes)


@pytest.fixture(scope="module")
def results(shards, export, tmp_path_factory):
    output = tmp_path_factory.mktemp("probe")
    heard = []
    console = Console(file=io.StringIO(), width=120)
    found = probe(settings_of(shards, export, output), lambda *counts: heard.append(counts))
    show_table(found, console)
    return found, output, heard, console.file.getvalue()


def test_every_row_is_there_with_scores_intervals_and_choices(results):
    found, output, heard, printed = results
    assert json.loads((output / "results.json").read_text()) == json.loads(json.dumps(found))
    assert ProbeSettings.read(output / "settings.yaml").test == {"split": ["test"]}
    for stream in ("audio", "video", "both"):
        for features in ("pretrained", "random"):
            for kind in ("chosen", "plain"):
                row = find_row(found, features, stream, kind)
                assert len(row["choices"]) == (2 if features == "random" else 1)
                assert 0 <= row["test"]["uar"]["low"] <= row["test"]["uar"]["value"] <= row["test"]["uar"]["high"] <= 1
                assert np.sum(row["confusion"]) == row["clips"]["test"] * len(row["choices"])
        assert find_row(found, "statistics", stream)["test"]["uar"]["value"] > 0.8  # what was planted is plain to see
        assert find_row(found, "majority", stream)["test"]["uar"]["value"] == pytest.approx(1 / 3)
    assert find_row(found, "pretrained", "audio")["choices"][0]["blocks"][0].startswith("audio_")
    assert {d["minus"].split("_")[0] for d in found["differences"]} == {"random", "statistics", "pretrained"}
    checked = Results.read(output / "results.json")
    assert {system.name for system in checked.systems} == {row["system"] for row in found["rows"]}
    for system in checked.systems:
        tables = [Predictions.read(output / file) for file in system.predictions]
        recall = [(t.logits.argmax(1) == t.label)[t.label == c].mean() for t in tables for c in range(3)]
        assert system.scores["uar"].value == pytest.approx(np.mean(recall))
    assert heard and heard[-1][0] == heard[-1][1]
    assert "Pre-trained encoder" in printed and "UAR on test clips" in printed
    assert found["licences"] == ["CC-BY-4.0", "CC0-1.0"]


def test_clips_without_a_stream_are_left_out_of_its_rows_and_counted(results):
    found, *_, printed = results
    assert find_row(found, "pretrained", "audio")["clips"] == {"fit": 35, "choose": 12, "test": 18}
    assert find_row(found, "pretrained", "video")["clips"] == {"fit": 33, "choose": 11, "test": 17}
    assert find_row(found, "statistics", "both")["clips"] == {"fit": 33, "choose": 11, "test": 17}
    assert found["clips"]["left_out"] == {"without_label": 1, "not_selected": 0}
    assert found["clips"]["parts"]["test"]["with_video"] == 17
    assert "3 clips without it left out" in printed


def test_same_settings_same_numbers(results, shards, export, tmp_path):
    """Also where two processes decode and fit side by side."""
    again = probe(settings_of(shards, export, tmp_path, workers=2))
    for part in ("rows", "differences", "trials", "layers", "systems"):
        assert again[part] == results[0][part]


def test_other_ranks_compute_features_and_leave_the_rest_to_the_first(results, shards, export, tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    settings = settings_of(shards, export, tmp_path, streams=["audio"])
    assert probe(settings) == {} and {path.name for path in tmp_path.iterdir()} == {"features"}
    made = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("part-*")}
    assert len(made) == 4, "one rank alone makes up for the other: an encoder, two random ones, statistics"
    monkeypatch.setenv("RANK", "0")
    found = probe(settings)
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("part-*")} == made, "and nothing is made twice"
    for name in ("pretrained", "random", "statistics"):
        assert find_row(found, name, "audio") == find_row(results[0], name, "audio")


def test_speaker_on_both_sides_is_refused(shards, export, tmp_path):
    with pytest.raises(SettingsError, match="s6"):
        probe(settings_of(shards, export, tmp_path, test={"id": ["s6_1", "s6_2", "s6_3"]}, dev={"speaker": ["s1"]}))
    assert not list(tmp_path.iterdir())


def table_of(blocks, clips):
    everyone = {stream: np.ones(clips, bool) for stream in ("audio", "video", "both")}
    return FeatureTable([f"c{i}" for i in range(clips)], everyone, blocks)


def test_folds_choose_on_every_speaker_once(shards):
    index = ShardIndex.open(shards)
    parts = {"test": {"split": ["test"]}, "dev": {"folds": 3}, "train": {}}
    positions, task, _ = make_task(index, label="label", group="speaker", **parts, seed=0)
    assert np.array_equal(np.sort(np.concatenate(task.folds)), task.fitting) and len(task.folds) == 3
    speakers = [{task.groups[clip] for clip in fold} for fold in task.folds]
    assert sum(map(len, speakers)) == len(set.union(*speakers)) == 6
    for fit, choose in task.rounds:
        assert not {task.groups[clip] for clip in fit} & {task.groups[clip] for clip in choose}
        assert np.array_equal(np.union1d(fit, choose), task.fitting)
    rng = np.random.default_rng(0)
    table = table_of({"audio_1/mean": rng.normal(size=(len(positions), 5))}, len(positions))
    (trial,) = try_all(table, [("audio_1/mean",)], task, heads_of(["logistic"], [0.1]))
    recalls = []
    for label in range(3):  # the slow twin: recall by class over the predictions of all folds
        right = []
        for fit, choose in task.rounds:
            train, dev = standardise([table.take("audio_1/mean", fit)], [table.take("audio_1/mean", choose)])
            predicted = Path(train, task.labels[fit]).fit(0.1).answers(dev, 3).argmax(1)
            right += (predicted == label)[task.labels[choose] == label].tolist()
        recalls.append(np.mean(right))
    assert trial.dev_scores == (pytest.approx(np.mean(recalls)),)
    with pytest.raises(SettingsError, match="2 to the 6 groups"):
        make_task(index, label="label", group="speaker", **parts | {"dev": {"folds": 7}}, seed=0)


def test_intervals_of_a_split_by_clip_are_over_speakers_too(shards, export, tmp_path):
    changes = {"group": "id", "test": {"fraction": 0.3}, "dev": {"fraction": 0.3}, "streams": ["audio"]}
    found = probe(settings_of(shards, export, tmp_path, random_seeds=[0], **changes))
    row = find_row(found, "pretrained", "audio")
    speakers = found["clips"]["parts"]["test"]["speakers"]
    assert row["test"]["uar"]["unit"] == "speakers, then their clips"
    assert row["test"]["uar"]["clusters"] == len(speakers) < row["clips"]["test"]
    assert {r["stream"] for r in found["rows"]} == {"audio"}


def test_heads_on_tokens_and_layers_and_curves_over_depth(shards, export, tmp_path, monkeypatch):
    monkeypatch.setattr(heads_module, "STEPS", (10, 30))
    heads = ["ridge", "attentive", "layer_weights"]
    changes = {"heads": heads, "random_seeds": [0], "streams": ["audio"], "head_seeds": [0, 1], "token_layers": "all"}
    found = probe(settings_of(shards, export, tmp_path, poolings=["mean", "segments_2"], **changes))
    checked = Results.read(tmp_path / "results.json")
    for head, seeds in (("ridge", 1), ("attentive", 2), ("layer_weights", 2)):
        row = find_row(found, "pretrained", "audio", head=head)
        assert np.sum(row["confusion"]) == 18 * seeds and row["main"] == (head == "ridge")
    assert find_row(found, "pretrained", "audio", head="attentive")["choices"][0]["blocks"][0].endswith("/tokens")
    assert [r["head"] for r in found["rows"] if r["features"] == "statistics"] == ["ridge"]
    tried = {tuple(t["blocks"]) for t in found["trials"] if t["features"] == "pretrained"}
    expected = {(f"audio_{n}/{what}",) for n in (1, 2) for what in ("mean", "segments_2", "tokens")}
    assert tried == expected | {("audio_1/mean", "audio_2/mean")}
    assert {(d.of, d.minus) for d in checked.differences} >= {("pretrained_audio_attentive", "pretrained_audio")}
    pretrained, random = checked.layers
    assert (pretrained.system, random.system) == ("pretrained_audio", "random_audio")
    curves = {curve.name: curve for curve in pretrained.curves}
    assert set(curves) == {"main", "control", "selectivity", "speaker", "sex"} and curves["main"].x == [1, 2]
    for main, control, gap in zip(*(curves[name].y for name in ("main", "control", "selectivity"))):
        assert gap == pytest.approx(main - control)
    trials = [t for t in found["trials"] if (t["features"], t["head"]) == ("pretrained", "ridge")]
    by_layer = {t["blocks"][0]: max(t["dev_scores"]) for t in trials}
    assert curves["main"].y == [by_layer["audio_1/mean"], by_layer["audio_2/mean"]]
    assert len(pretrained.weights.y) == 2 and sum(pretrained.weights.y) == pytest.approx(1)
    assert "sentence: no clip has it" in checked.tables[0].note and len(checked.tables[0].rows) == 6
    with pytest.raises(SettingsError, match="no clip in play has the field `accent`"):
        probe(settings_of(shards, export, tmp_path / "other", nuisance=["accent"]))


def test_dimensions_are_told_and_scored_by_ccc(shards, export, tmp_path):
    changes = {"dimensions": ["valence"], "heads": ["ridge", "knn"], "random_seeds": [0], "streams": ["audio"]}
    found = probe(settings_of(shards, export, tmp_path, **changes, dev={"folds": 2}, train={"split": "train"}))
    console = Console(file=io.StringIO(), width=120)
    show_table(found, console)
    assert "CCC on test clips" in console.file.getvalue()
    checked = Results.read(tmp_path / "results.json")
    assert checked.main_score == "ccc" and checked.task == "dimensions" and checked.dimensions == ["valence"]
    assert find_row(found, "statistics", "audio")["test"]["ccc"]["value"] > 0.5
    assert find_row(found, "majority", "audio")["test"]["ccc"]["value"] == 0
    table = Predictions.read(tmp_path / "predictions" / "statistics_audio_seed0.safetensors")
    x, y = table.ratings[:, 0], table.values[:, 0]
    twin = 2 * np.cov(x, y, bias=True)[0, 1] / (x.var() + y.var() + (x.mean() - y.mean()) ** 2)
    assert find_row(found, "statistics", "audio")["test"]["ccc"]["value"] == pytest.approx(twin)
    with pytest.raises(DataError, match=r"clip s\d_\d: licence is 'CC0-1.0', which is no number"):
        probe(settings_of(shards, export, tmp_path / "other", **changes | {"dimensions": ["valence", "licence"]}))


def test_control_and_speaker_are_split_within_speakers_and_leave_test_clips_alone(shards):
    index = ShardIndex.open(shards)
    settings = settings_of(shards, "export", "out")
    parts = {"test": settings.test, "dev": settings.dev, "train": {}}
    positions, task, _ = make_task(index, label="label", group="speaker", **parts, seed=0)
    depth = depth_tasks(index, positions, task, settings)
    assert set(depth.tasks) == {"main", "control", "speaker", "sex"} and depth.left_out == {
        "sentence": "no clip has it"
    }
    speakers = np.array([index.samples[p].meta["speaker"] for p in positions])
    for name in ("control", "speaker"):
        of = depth.tasks[name]
        (held,) = of.folds
        assert not set(of.fitting) & set(task.test) and set(held) < set(of.fitting)
        assert [np.sum(speakers[held] == s) for s in sorted(set(speakers[of.fitting]))] == [1, 2, 2, 2, 2, 2]
        given = {(s, of.labels[c]) for s, c in zip(speakers[of.fitting], of.fitting)}
        assert len(given) == 6, "one label per speaker"
    assert len({label for _, label in given}) == 6
    assert np.bincount(depth.tasks["control"].labels[depth.tasks["control"].fitting]).tolist() in (
        [11, 12, 12],
        [12, 11, 12],
        [12, 12, 11],
    )
    rng = np.random.default_rng(0)
    who = rng.normal(size=(9, 20))[[int(s[1:]) for s in speakers]] + 0.1 * rng.normal(size=(len(speakers), 20))
    table = table_of({"audio_1/mean": who, "audio_2/mean": rng.normal(size=(len(speakers), 20))}, len(speakers))
    layers = layers_of("pretrained", "audio", [table], depth, [0.1, 0.01])
    curves = {curve.name: curve.y for curve in layers.curves}
    assert curves["control"][0] == curves["speaker"][0] == 1 and max(curves["control"][1], curves["main"][0]) < 0.8
    assert (
        layers_of("pretrained", "audio", [table], depth_tasks(index, positions, task, settings), [0.1, 0.01]) == layers
    )


@pytest.mark.parametrize(
    "seen", [{"ids": ["s7_2"]}, {"sources": [f"{'s7_2':0>64}"]}, {"speakers": ["s7", "elsewhere"]}]
)
def test_test_clips_that_pretraining_has_seen_are_refused(shards, tmp_path, seen):
    export = make_export(tmp_path / "export", **seen)
    settings = settings_of(shards, export, tmp_path / "out", random_seeds=[0], streams=["audio"])
    with pytest.raises(SettingsError, match=r"pre-training has seen test clips.*s7.*transductive"):
        probe(settings)
    found = probe(settings.model_copy(update={"transductive": True}))
    assert all(row_name(row).endswith("(transductive)") for row in found["rows"])
    assert "transductive" in (tmp_path / "out" / "report.html").read_text()


def test_seen_speakers_do_not_matter_where_clips_are_split(shards, tmp_path):
    export = make_export(tmp_path / "export", speakers=["s7"])
    changes = {"group": "id", "streams": ["audio"], "random_seeds": [0]}
    found = probe(settings_of(shards, export, tmp_path / "out", **changes))
    assert found["pretraining"]["shared_with_test"] == {"ids": 0, "sources": 0}


def test_export_that_cannot_be_trusted_is_refused(shards, tmp_path):
    untold = make_export(tmp_path / "untold")
    (untold / "pretrain_data.json").unlink()
    with pytest.raises(CheckpointError, match="pretrain_data"):
        probe(settings_of(shards, untold, tmp_path / "out"))
    told = {"ids": [], "sources": [], "licences": [], "data_sets": [], "prepare": {}}
    (untold / "pretrain_data.json").write_text(json.dumps(stamped(told)))
    with pytest.raises(CheckpointError, match="speakers"):
        probe(settings_of(shards, untold, tmp_path / "out"))
    with pytest.raises(SettingsError, match="never trained"):
        probe(settings_of(shards, make_export(tmp_path / "fresh", seed=1), tmp_path / "out"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"label": "mood"}, "no clip has the field `mood`.*label"),
        ({"test": {"split": ["exam"]}}, "test: no clip left has.*train"),
        ({"dev": {"split": ["test"]}}, "dev: no clip left"),
        ({"test": {}}, "test: say which clips"),
        ({"label": "speaker"}, "development clips have classes that no training clip has: s4, s5"),
        ({"label": "licence"}, "one class alone"),
    ],
)
def test_split_that_cannot_be_used_says_why(shards, export, tmp_path, changes, message):
    with pytest.raises(SettingsError, match=message):
        probe(settings_of(shards, export, tmp_path, **changes))


def test_unknown_setting_offers_the_nearest(shards, export, tmp_path):
    with pytest.raises(SettingsError, match="did you mean `windows`"):
        settings_of(shards, export, tmp_path, window=3)
