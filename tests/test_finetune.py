"""Fine-tuning as real processes: it learns, a kill -9 changes nothing, two ranks are one, and leaks are refused."""

import csv
import io
import json

import numpy as np
import pytest
import soundfile
import yaml

from affekt.cli import run as affekt
from affekt.data.errors import SettingsError
from affekt.data.shard_writer import ShardWriter
from affekt.data.shards import ShardIndex
from affekt.finetune.finetuned import load_finetuned
from affekt.finetune.judge import judge_clips
from affekt.finetune.predictions import Predictions
from affekt.finetune.schema import Results
from affekt.finetune.training.clips import check_leaks, make_table, open_clips
from affekt.finetune.training.settings import FinetuneSettings
from benchmarks.faults import child
from benchmarks.faults.child import Fault
from benchmarks.faults.rig import Rig

TONES = {"high": 3000, "low": 250, "middle": 900}
MODEL = {"name": "hicmae_nano", "streams": "audio", "embed_dim": 32, "num_heads": 2, "depth": 2, "taps": [1, 2]}


def make_shards(folder, classes=tuple(TONES), speakers="012345678", prefix="s", takes=6, mark="", data_set=""):
    """Tones by label under noise, one second each; the pitch also says how aroused, and rated, a clip is."""
    rng, clips = np.random.default_rng(0), []
    for number, speaker in enumerate(speakers):
        for take in range(takes):
            label = classes[take % len(classes)]
            time = np.arange(16000) / 16000
            wave = 0.1 * np.sin(2 * np.pi * TONES[label] * (1 + 0.02 * number) * time)
            sound = io.BytesIO()
            soundfile.write(sound, wave + 0.03 * rng.standard_normal(16000), 16000, format="FLAC")
            arousal = 1 + 4 * list(TONES).index(label) / 2
            other = classes[(take + 1) % len(classes)]
            meta = {"label": label, "speaker": prefix + speaker, "arousal": arousal, "votes": {label: 3, other: 2}}
            meta |= {"split": "train" if number < 4 else "dev" if number < 6 else "test", "licence": "CC0-1.0"}
            meta |= {"data_set": data_set} if data_set else {}
            name = f"{prefix}{speaker}_{mark}{take}"
            record = {"id": name, "frames": 0, "samples": 16000, "duration": 1.0, "flags": [], "frame_sizes": []}
            clips.append(({**record, "source_sha256": f"{name:0>64}", "meta": meta}, {"flac": sound.getvalue()}))
    writer = ShardWriter(folder)
    writer.write_shard(0, clips)
    writer.finish({"size": 32, "fps": 25, "sample_rate": 16000, "picture": "mjpeg", "prepare": {}})
    return folder


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with the shards `tones`, and `other`, of other speakers without one of the classes."""
    folder = tmp_path_factory.mktemp("finetune")
    make_shards(folder / "tones")
    make_shards(folder / "other", classes=("high", "low"), speakers="0123", prefix="t")
    return folder


@pytest.fixture(scope="module")
def run(place):
    """`run(name, ranks=1, fault=None, **changes)` fine-tunes in processes of their own: (folder, exit codes, told)."""
    rig = Rig(place / "rig", preload=("affekt.finetune.training.loop",))

    def run(name, *, ranks=1, fault=None, **changes):
        config = place / f"{name}.yaml"
        config.write_text(yaml.safe_dump(values(place, name, **changes)))
        job = rig.call(child.finetune, str(config), ranks=ranks, fault=fault)
        assert job.wait()
        return place / name, job.codes, job.told

    return run


def values(place, name="run", **changes):
    data = {"shards": str(place / "tones"), "test": {"split": "test"}, "dev": {"split": "dev"}, "workers": 0}
    train = {"epochs": 12, "global_batch": 8, "precision": "fp32", "threads": 1, "windows": 1, "watchdog_s": None}
    settings = {
        "out": str(place / name),
        "model": {**MODEL, "mel_frames": 64, "decoder_embed_dim": 16, "decoder_num_heads": 2},
        "data": data | changes.pop("data", {}),
        "head": {"kind": "bands", "dropout": 0.1},
        "optim": {"base_lr": 0.1, "layer_decay": 0.9},
        "train": train | changes.pop("train", {}),
        "bootstrap": 100,
    }
    return settings | changes


def parsed(place, **changes):
    return FinetuneSettings.parse(values(place, **changes))


@pytest.fixture(scope="module")
def straight(run):
    """Everything that draws numbers is on."""
    return run("straight", **VARIED)


VARIED = {
    "drop_path": 0.1,
    "ema": 0.5,
    "refit": True,
    "varied": {"mixing": {"mixup": 0.2, "share": 0.5}, "sound": {"time_masks": 1}},
}


def test_it_learns_what_was_planted_and_leaves_what_is_promised(straight, place):
    out, codes, told = straight
    assert codes == [0], told
    results = Results.read(out / "results.json")
    (system,) = results.systems
    assert system.scores["uar"].value >= 0.9, told
    assert system.seeds == [0] and system.kind == "scratch" and system.selected == "dev" and system.clips == 18
    assert system.scores["uar"].clusters == 3 and system.calibration is not None
    assert np.trace(system.confusion) == round(system.scores["war"].value * 18)
    assert results.task == "single" and results.main_score == "uar" and results.licences == ["CC0-1.0"]
    assert "uar" in (out / "results.csv").read_text() and "To choose on" in (out / "report.html").read_text()
    test = results.clips["parts"]["test"]
    assert test["clips"] == sum(test["classes"].values()) == 18 and len(test["speakers"]) == 3
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert {(row["seed"], row["refit"]) for row in rows} == {(0, 0), (0, 1)}
    scores = [row["dev_score"] for row in rows if "dev_score" in row]
    chosen = Predictions.read(out / "predictions" / "seed-0-dev.safetensors").about["epoch"]
    assert scores.index(max(scores)) + 1 == chosen, "the earliest best look at development clips"
    assert not list(out.glob("seed-*/*/checkpoints"))


def test_the_map_holds_the_test_clips_by_what_the_head_reads(straight, run):
    out, *_ = straight
    points = Results.read(out / "results.json").map
    table = Predictions.read(out / "predictions" / "seed-0-test.safetensors")
    assert [p.id for p in points] == table.ids
    assert [p.label for p in points] == [table.classes[i] for i in table.label]
    assert [p.speaker for p in points] == table.meta["speaker"]
    at = np.array([[p.x, p.y] for p in points])
    apart = np.linalg.norm(at[:, None] - at, axis=2) + np.diag(np.full(len(at), np.inf))
    near = [points[i].label == points[j].label for i, j in enumerate(apart.argmin(1))]
    assert np.mean(near) >= 0.8, "what was learned lies together"
    assert "Map of 18 clips" in (out / "report.html").read_text()
    (out / "map.json").write_text("{}")
    for map_clips, expected in ((0, []), (1000, points)):
        assert run("straight", **VARIED, map_clips=map_clips)[1] == [0]
        found = Results.read(out / "results.json").map
        assert [p.id for p in found] == [p.id for p in expected]
        assert np.allclose([[p.x, p.y] for p in found], [[p.x, p.y] for p in expected], atol=1e-4)


def test_the_saved_model_says_what_was_scored(straight, place):
    out, *_ = straight
    model = load_finetuned(out / "seed-0" / "model")
    assert model.classes == ["high", "low", "middle"] and len(model.temperatures) == 1
    table = Predictions.read(out / "predictions" / "seed-0-test.safetensors")
    index = ShardIndex.open(place / "tones")
    positions = {row["id"]: p for p, row in enumerate(index.samples.rows())}
    judged = judge_clips(model, index, [positions[clip] for clip in table.ids], windows=1, batch_size=32)
    scaled = table.logits / model.temperatures[0]
    scaled -= np.log(np.exp(scaled).sum(1, keepdims=True))
    assert judged.ids == table.ids and np.abs(judged.logits - scaled).max() < 1e-5


def test_predict_says_of_a_file_what_was_said_of_its_clip(straight, place, tmp_path):
    out, *_ = straight
    table = Predictions.read(out / "predictions" / "seed-0-test.safetensors")
    index = ShardIndex.open(place / "tones")
    sample = next(sample for sample in index.samples if sample.id == table.ids[4])
    (tmp_path / "clip.flac").write_bytes(index.read(sample, "flac"))
    model, answers = out / "seed-0" / "model", tmp_path / "answers.csv"
    files = [str(tmp_path / "clip.flac"), str(tmp_path / "absent.wav")]
    assert affekt(["predict", *files, "--model", str(model), "--windows", "1", "--out", str(answers)]) == 2
    (row,) = csv.DictReader(answers.open())
    logits = table.logits[4] / load_finetuned(model).temperatures[0]
    p = np.exp(logits - logits.max())
    assert np.allclose([float(row[f"p_{name}"]) for name in table.classes], p / p.sum(), atol=1e-3)
    assert row["label"] == table.classes[logits.argmax()] and row["file"] == files[0]


def test_a_kill_changes_nothing(run, straight, place):
    """In the fit on all that are no test clips, so that the choice before it is found again too."""
    _, codes, told = run("killed", fault=Fault("after-rename", 13), **VARIED)
    assert codes == [-9], told
    out, codes, told = run("killed", **VARIED)
    assert codes == [0], told
    for side in ("dev", "test"):
        path = f"predictions/seed-0-{side}.safetensors"
        ours, theirs = Predictions.read(out / path), Predictions.read(straight[0] / path)
        assert ours.ids == theirs.ids and np.array_equal(ours.logits, theirs.logits)
        assert ours.about == theirs.about


def test_a_folder_goes_on_with_its_own_settings_alone(run, straight):
    begun = json.loads((straight[0] / "finetune.json").read_text())
    del begun["settings"]["model"]["edges_weight"]  # as of a version that did not know it
    (straight[0] / "finetune.json").write_text(json.dumps(begun))
    _, codes, told = run("straight", **{**VARIED, "ema": 0.0})
    assert codes == [1] and "ema: 0.5 -> 0.0" in told and "edges_weight" not in told


def test_two_ranks_are_one(run, straight, place):
    """Where nothing is drawn per rank; the smallest score of a clip differs by rounding alone."""
    alone, codes, told = run("alone", train={"epochs": 1, "eval_batch": 5}, head={"kind": "layers"})
    assert codes == [0], told
    both, codes, told = run("both", ranks=2, train={"epochs": 1, "eval_batch": 5}, head={"kind": "layers"})
    assert codes == [0, 0], told
    for side in ("dev", "test"):
        ours, theirs = (Predictions.read(f / "predictions" / f"seed-0-{side}.safetensors") for f in (alone, both))
        assert ours.ids == theirs.ids and np.abs(ours.logits - theirs.logits).max() < 1e-4, told
    ours, theirs = (Results.read(folder / "results.json").map for folder in (alone, both))
    apart = [abs(a.x - b.x) + abs(a.y - b.y) for a, b in zip(ours, theirs, strict=True)]
    assert len(ours) == 18 and max(apart) < 1e-2 * max(abs(p.x) for p in ours), "each rank computed a share"


def test_corpora_with_other_classes_and_ratings_share_a_head(run, place):
    common = {"test": {"split": "test"}, "dev": {"split": "dev"}}
    mixture = [
        {"shards": str(place / "tones"), "labels": {"dimensions": {"arousal": [1, 5]}}, **common},
        {"shards": str(place / "other"), "labels": {"map": {"high": "sharp", "low": "low"}}},
    ]
    data = {"shards": None, "test": None, "dev": None, "mixture": mixture, "temperature": 2}
    train, loss = {"epochs": 10, "choose": "last"}, {"dimensions": "ccc+mse", "dimensions_weight": 1}
    out, codes, told = run("mixture", data=data, loss=loss, train=train, seeds=[3, 4])
    assert codes == [0], told
    results = Results.read(out / "results.json")
    assert results.task == "joint" and results.classes == ["high", "low", "middle"]
    assert results.systems[0].scores["uar"].value >= 0.6 and results.systems[0].scores["ccc_arousal"].value >= 0.3
    assert results.systems[0].seeds == [3, 4] and len(results.systems[0].by_seed) == 2
    table = Predictions.read(out / "predictions" / "seed-3-test.safetensors")
    assert table.ratings.min() == 1 and table.ratings.max() == 5 and 0 < table.values.mean() < 6


@pytest.mark.parametrize(
    ("labels", "task", "score"),
    [
        ({"rule": "soft"}, "soft", "kl"),
        ({"rule": "all_inclusive"}, "multi", "multi_macro_f1"),
        ({"rule": None, "dimensions": {"arousal": [1, 5]}}, "dimensions", "ccc"),
    ],
)
def test_other_tasks(run, labels, task, score):
    data = {"labels": labels}
    more = {"loss": {"balance": True, "penalty": 0.1}} if task != "dimensions" else {}
    out, codes, told = run(task, data=data, train={"epochs": 1}, **more)
    assert codes == [0], told
    results = Results.read(out / "results.json")
    assert results.task == task and score in results.systems[0].scores


def test_several_corpora_have_one_table_of_targets(place):
    mixture = [
        {"shards": str(place / "tones"), "test": {"split": "test"}, "dev": {"split": "dev"}},
        {"shards": str(place / "other"), "labels": {"rule": None, "dimensions": {"arousal": [1, 5]}}},
    ]
    settings = parsed(place, data={"shards": None, "test": None, "dev": None, "mixture": mixture})
    clips = open_clips(settings, "audio")
    table = make_table(clips)
    assert len(table.target) == 54 + 24 and table.target[54:].isnan().all() and not table.known[54:].any()
    assert table.ratings[:54].isnan().all() and table.ratings[54].tolist() == [-1] and table.ratings[55].tolist() == [0]
    assert table.group[0] != table.group[54]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data": {"dev": None}}, "needs both `test` and `dev`"),
        ({"data": {"test": None, "dev": None}}, "say which clips are to be scored"),
        (
            {"data": {"dev": {"id": ["s6_0"]}, "test": {"id": ["s6_1"]}}},
            "value.s. of `speaker` stand on both sides: s6",
        ),
        ({"data": {"test": {"split": ["nowhere"]}}}, "no clip left has"),
        ({"data": {"group": "session"}}, "has no `session`"),
        ({"data": {"labels": {"field": "speaker"}}}, "classes that no training clip has"),
        ({"encoder": "x"}, "set one of encoder"),
        ({"scratch": True}, "a model has none"),
        ({"train": {"choose": "last", "patience": 3}}, "does not look at"),
        ({"data": {"labels": {"rule": "soft"}}, "train": {"accumulate": 2}, "loss": {"smothing": 1}}, "smoothing"),
        ({"data": {"labels": {"dimensions": {"arousal": [1, 5]}}}, "train": {"accumulate": 2}}, "needs all clips"),
        ({"data": {"temperature": 2}}, "several corpora"),
        ({"seeds": [1, 1]}, "all different"),
    ],
)
def test_what_cannot_be_done_is_refused_before_it_begins(place, changes, message):
    with pytest.raises(SettingsError, match=message):
        open_clips(parsed(place, **changes), "audio")


def test_a_test_clip_that_pre_training_has_seen_is_refused(place):
    seen = {"ids": [], "sources": [], "speakers": ["s7"], "licences": [], "data_sets": []}
    settings = parsed(place)
    clips = open_clips(settings, "audio")
    with pytest.raises(SettingsError, match=r"seen test clips: shared 1 speakers \(s7\)"):
        check_leaks(clips, settings, seen)
    allowed = settings.model_copy(update={"transductive": True})
    assert check_leaks(clips, allowed, seen)["tones"]["shared_with_test"]["speakers"] == 1
    assert check_leaks(clips, settings, None) == {}


def test_a_file_behind_two_corpora_is_refused(place, tmp_path):
    make_shards(tmp_path / "again", speakers="78", takes=3)  # ids and files of test speakers
    mixture = [
        {"shards": str(place / "tones"), "test": {"split": "test"}, "dev": {"split": "dev"}},
        {"shards": str(tmp_path / "again")},
    ]
    with pytest.raises(SettingsError, match="made from the same file as one that tones has in `test`"):
        open_clips(parsed(place, data={"shards": None, "test": None, "dev": None, "mixture": mixture}), "audio")


@pytest.mark.parametrize(
    ("speaker", "data_sets", "refused"),
    [
        ("8", ("A", "A"), "test"),
        ("8", ("", ""), "test"),
        ("8", ("A", "B"), ""),
        ("8", ("", "B"), "test"),
        ("5", ("A", "A"), "dev"),
    ],
)
def test_a_person_judged_in_one_corpus_is_not_learned_from_in_another(tmp_path, speaker, data_sets, refused):
    """Other recordings of a test or development speaker, under other ids, from other files."""
    make_shards(tmp_path / "tones", data_set=data_sets[0])
    make_shards(tmp_path / "more", speakers=speaker, takes=3, mark="more", data_set=data_sets[1])
    mixture = [
        {"shards": str(tmp_path / "tones"), "test": {"split": "test"}, "dev": {"split": "dev"}},
        {"shards": str(tmp_path / "more")},
    ]
    settings = parsed(tmp_path, data={"shards": None, "test": None, "dev": None, "mixture": mixture})
    if not refused:
        assert len(open_clips(settings, "audio").parts[1].train) == 3
        return
    with pytest.raises(SettingsError, match=rf"has the same speaker \(s{speaker}\).* that tones has in `{refused}`"):
        open_clips(settings, "audio")
