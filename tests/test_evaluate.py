"""Evaluations: every fold once, kept whole through kills, made again where something changed, honest about chance."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field, replace
from importlib.metadata import PackageNotFoundError

import numpy as np
import pytest
import torch
import yaml
from sklearn.svm import LinearSVC

from affekt.cli import run
from affekt.data.decode import Window
from affekt.data.errors import DataError, SettingsError
from affekt.data.shard_writer import ShardWriter
from affekt.data.shards import ShardIndex
from affekt.finetune.contenders import Classic, Majority, Outcome, Part
from affekt.finetune.entry import enter, fold_settings, retold
from affekt.finetune.evaluate import EvaluateSettings, join_parts, plan_evaluation, pool_folds, run_folds
from affekt.finetune.imported import read_table
from affekt.finetune.predictions import Predictions
from affekt.finetune.probes import classic
from affekt.finetune.probes.baselines import statistics
from affekt.finetune.probes.classic import LinearModel, descriptors
from affekt.finetune.probes.linear import standardise
from affekt.finetune.schema import Results
from affekt.finetune.scored import score_files
from affekt.finetune.scores import score, values
from affekt.finetune.table import to_results
from affekt.finetune.training.settings import FinetuneSettings
from affekt.pretrain.export import create_encoder, save_encoder
from affekt.pretrain.hicmae import HiCMAESettings

TONES = {"angry": 2500, "sad": 300}


def write_shards(folder, encode_clip, label_of, people=6, takes=4):
    """Half a second of a tone by `label_of(speaker, take)[0]`, labelled [1]; a shard of sound alone."""
    rng = np.random.default_rng(0)
    clips = []
    for speaker in range(people):
        for take in range(takes):
            sound, label = label_of(speaker, take)
            wave = 0.1 * np.sin(2 * np.pi * TONES[sound] * np.arange(8000) / 16000) + 0.01 * rng.standard_normal(8000)
            meta = {"speaker": f"s{speaker}", "label": label, "sex": "FM"[speaker % 2]}
            meta["votes"] = {"anger": 3, "sadness": 1} if label == "angry" else {"sad": 4}
            clips.append(encode_clip(f"s{speaker}_{take}", None, wave, **meta))
    writer = ShardWriter(folder)
    writer.write_shard(0, clips)
    writer.finish({"size": 32, "fps": 25, "sample_rate": 16000, "picture": "mjpeg", "prepare": {}})
    return folder


@pytest.fixture(scope="module")
def shards(tmp_path_factory, encode_clip):
    def true(speaker, take):
        return ["angry", "sad"][take % 2], ["angry", "sad"][take % 2]

    return write_shards(tmp_path_factory.mktemp("shards"), encode_clip, true)


def settings_of(shards, output, **changes):
    values = {"protocol": "kfold:speaker:3", "shards": str(shards), "output": str(output), "bootstrap": 200}
    return EvaluateSettings.parse(values | changes)


@dataclass
class Quick:
    """A contender that says something made of the seed and the clips' names, in `seconds`, and counts its calls."""

    log: object = None
    name: str = "quick"
    title: str = "Quick"
    kind: str = "other"
    streams: str = "audio"
    seeds: tuple = (0, 1)
    transductive: bool = False
    seconds: float = 0.0
    setting: int = 0
    spoil: dict = field(default_factory=dict)

    def identity(self):
        return {"quick": self.setting}

    def judge(self, part, seed, folder, progress=None):
        folder.mkdir(parents=True, exist_ok=True)
        if self.log:
            with open(self.log, "a") as file:
                file.write(f"{part.fold.name} {seed}\n")
        time.sleep(self.seconds)

        def said(clips):
            return np.stack([np.random.default_rng([seed, self.setting, p]).normal(size=2) for p in clips])

        test = part.table(part.fold.test, said(part.fold.test), "test")
        return Outcome(self.spoil.get("test", lambda t: t)(test), part.table(part.choose, said(part.choose), "dev"))


def tables(judged):
    return [[p.logits.tolist() for p in seed] for seed in judged[0].tests]


def test_every_fold_and_seed_is_judged_once_and_pooled(shards, tmp_path):
    log, settings = tmp_path / "log", settings_of(shards, tmp_path / "out")
    plan = plan_evaluation(settings)
    heard = []
    [judged] = run_folds(plan, [Quick(log)], settings, lambda *what: heard.append(what))
    assert log.read_text().split("\n")[:-1] == ["1 0", "2 0", "3 0", "1 1", "2 1", "3 1"]
    assert heard[-1] == ("quick", 6, 6) and len(judged.files) == 6
    for seed in judged.tests:
        whole = pool_folds(seed, plan.rules)
        assert sorted(whole.ids) == sorted(plan.index.samples.row(p)["id"] for p in range(24))
        assert [len(fold) for fold in seed] == [8, 8, 8]
        assert {fold.about["part"] for fold in seed} == {"test"} and whole.meta["sex"].count("F") == 12
    assert (tmp_path / "out" / judged.files[0]).parent.parent.name == "dev-selected"
    assert all(set(a.ids).isdisjoint(b.ids) for a, b in zip(judged.devs[0], judged.tests[0]))
    # Once more: all is read. One setting or the shards' labels changed: made again.
    assert tables(run_folds(plan, [Quick(log)], settings)) == tables([judged])
    assert len(log.read_text().split("\n")) == 7
    assert tables(run_folds(plan, [Quick(log, setting=1)], settings)) != tables([judged])
    assert len(log.read_text().split("\n")) == 13
    assert len(list((tmp_path / "out" / "work").rglob("fold-1-seed-0-*"))) == 1  # what nobody can go on with is gone
    only = plan_evaluation(settings_of(shards, tmp_path / "out", folds=["2"]))
    assert [fold.name for fold in only.folds] == ["2"] and "only 1 of 3 folds" in only.notes[-1]
    with pytest.raises(SettingsError, match="no fold 7; there are 1, 2, 3"):
        plan_evaluation(settings_of(shards, tmp_path / "out", folds=["7"]))


def test_kills_leave_no_half_file_and_lose_no_finished_fold(shards, tmp_path):
    seed = random.SystemRandom().randrange(2**32)
    print("seed", seed)
    rng, log, settings = random.Random(seed), tmp_path / "log", settings_of(shards, tmp_path / "out")
    plan = plan_evaluation(settings)
    contender = Quick(log, seeds=tuple(range(8)), seconds=0.01)
    for _ in range(10):
        child = os.fork()
        if not child:
            run_folds(plan, [contender], settings)
            os._exit(0)
        time.sleep(rng.uniform(0.01, 0.1))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        for path in (tmp_path / "out").rglob("*.safetensors"):
            if not path.name.startswith("."):
                assert Predictions.read(path).about["digest"]
    survived = tables(run_folds(plan, [contender], settings))
    assert len(log.read_text().split("\n")) - 1 <= 24 + 10  # what a kill can cost is the fold that it met
    assert not [p for p in (tmp_path / "out").rglob(".*.safetensors*")]
    assert survived == tables(run_folds(plan, [contender], settings_of(shards, tmp_path / "fresh")))


def test_two_processes_may_share_the_folds_but_not_one_fold(shards, tmp_path):
    settings = settings_of(shards, tmp_path / "out")
    plan = plan_evaluation(settings)
    child = os.fork()
    if not child:
        run_folds(plan, [Quick(seconds=60)], settings)
        os._exit(0)
    try:
        deadline = time.monotonic() + 20
        while not list((tmp_path / "out").rglob("*.lock")) and time.monotonic() < deadline:
            time.sleep(0.01)
        time.sleep(0.05)
        with pytest.raises(SettingsError, match="another `affekt evaluate` works on fold-1-seed-0"):
            run_folds(plan, [Quick()], settings)
        run_folds(plan_evaluation(settings_of(shards, tmp_path / "out", folds=["2", "3"])), [Quick()], settings)
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    assert len(run_folds(plan, [Quick()], settings)[0].files) == 6


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda t: t.take(range(len(t) - 1)), "quick, fold 1: .* is no test clip, or was not judged"),
        (lambda t: replace(t, ids=["s9_9", *t.ids[1:]]), "quick, fold 1: s9_9 is no test clip"),
        (lambda t: replace(t, logits=np.full_like(t.logits, np.nan)), "NaN or infinite"),
    ],
)
def test_what_a_contender_may_not_say(shards, tmp_path, spoil, message):
    settings = settings_of(shards, tmp_path)
    with pytest.raises((SettingsError, DataError), match=message):
        run_folds(plan_evaluation(settings), [Quick(spoil={"test": spoil})], settings)
    assert not list(tmp_path.rglob("*.test.safetensors"))
    with pytest.raises(SettingsError, match="different names, found quick, quick"):
        run_folds(plan_evaluation(settings), [Quick(), Quick()], settings)


def test_a_damaged_file_is_an_error_and_not_made_again_in_silence(shards, tmp_path):
    settings = settings_of(shards, tmp_path)
    plan = plan_evaluation(settings)
    [judged] = run_folds(plan, [Quick()], settings)
    path = tmp_path / judged.files[2]
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(DataError, match=r"fold-3-seed-0.*no predictions can be read"):
        run_folds(plan, [Quick()], settings)


def test_descriptors_find_what_is_planted_and_nothing_in_shuffled_labels(shards, tmp_path, encode_clip):
    rng = np.random.default_rng(0)  # one in twenty others would lie outside of its 95 % interval
    shuffled = write_shards(
        *(tmp_path / "shuffled", encode_clip),
        lambda speaker, take: (["angry", "sad"][rng.integers(2)], ["angry", "sad"][take % 2]),
        people=12,
        takes=6,
    )
    for folder, planted in ((shards, True), (shuffled, False)):
        settings = settings_of(folder, tmp_path / f"out{planted}")
        plan = plan_evaluation(settings)
        contenders = [Classic("mel", tmp_path / "cache"), Majority()]
        mel, majority = (pool_folds(one.tests[0], plan.rules) for one in run_folds(plan, contenders, settings))
        estimate = score(mel, ["uar"], bootstrap=500)["uar"]
        if planted:
            assert estimate.value == 1.0
        else:
            assert estimate.low <= 0.5 <= estimate.high and estimate.clusters == 12
        assert values(majority, ["uar"])["uar"] == 0.5
        assert mel.about["selected"] == "dev" and mel.about["chosen"]["cost"] > 0
    assert len(list((tmp_path / "cache").glob("mel-*.safetensors"))) == 1


def test_choosing_on_test_clips_is_kept_apart_by_name(shards, tmp_path):
    settings = settings_of(shards, tmp_path, selected="test")
    plan = plan_evaluation(settings)
    [judged] = run_folds(plan, [Classic("mel", tmp_path / "cache")], settings)
    assert not judged.devs[0] and judged.tests[0][0].about["selected"] == "test"
    assert all("test-selected" in file and "dev-selected" not in file for file in judged.files)
    run_folds(plan, [Classic("mel", tmp_path / "cache")], settings_of(shards, tmp_path))
    assert {path.name for path in (tmp_path / "predictions").iterdir()} == {"dev-selected", "test-selected"}


def test_parts_of_a_recording_are_joined():
    table = Predictions(
        ["p1_task_1_a", "p1_task_1_b", "p1_task_2_a"],
        ["low", "high"],
        logits=np.log([[0.9, 0.1], [0.3, 0.7], [0.2, 0.8]]),
        label=np.array([0, 0, 1]),
        meta={"speaker": ["p1", "p1", "p1"]},
    )
    joined = join_parts(table, 3)
    assert joined.ids == ["p1_task_1", "p1_task_2"] and joined.label.tolist() == [0, 1]
    np.testing.assert_allclose(joined.probabilities, [[0.6, 0.4], [0.2, 0.8]], atol=1e-12)
    with pytest.raises(DataError, match="parts of p1_task_1 have different labels"):
        join_parts(replace(table, label=np.array([0, 1, 1])), 3)


def test_tables_of_other_models_are_read(tmp_path):
    path = tmp_path / "theirs.csv"
    path.write_text("id,label,p_sad,p_happy,speaker\na,sad,8,2,x\nb,happy,0.5,0.5,y\n")
    table = read_table(path)
    assert table.classes == ["sad", "happy"] and table.label.tolist() == [0, 1] and table.meta["speaker"] == ["x", "y"]
    np.testing.assert_allclose(table.probabilities, [[0.8, 0.2], [0.5, 0.5]], atol=1e-12)
    path.write_text("id,value_valence,rating_valence\na,0.5,0.25\nb,1,\n")
    table = read_table(path)
    assert table.dimensions == ["valence"] and table.ratings[0, 0] == 0.25 and np.isnan(table.ratings[1, 0])
    path.write_text("id,multi_sad,multi_happy,share_sad,share_happy\na,0.5,0.9,0.2,0.8\n")
    table = read_table(path)
    assert table.kind == "multi" and table.shares.tolist() == [[0.2, 0.8]]
    np.testing.assert_allclose(table.probabilities, [[0.5, 0.9]], atol=1e-12)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("id,label\na,sad\n", "no column p_CLASS"),
        ("name,p_a,p_b\na,1,0\n", "header with the column `id`"),
        ("id,p_a,p_b\na,1,x\n", "line 2: p_b is 'x', expected a number"),
        ("id,p_a,p_b\na,1,0\nb,-1,2\n", "line 3: p_... are .*no probabilities"),
        ("id,p_a,p_b\na,0,0\n", "line 2: p_... are .*no probabilities"),
        ("id,p_a,p_b,label\na,1,0,c\n", "line 2: the label 'c' is none of a, b"),
        ("id,p_a,p_b\na,1,0\na,0,1\n", "predicted more than once, first a"),
        ("id,p_a,p_b\na,1\n", "line 2: not as many values"),
        ("id,logit_a,logit_b\na,1,nan\n", "NaN or infinite"),
    ],
)
def test_a_table_with_a_mistake_is_refused_with_its_line(tmp_path, text, message):
    (tmp_path / "bad.csv").write_text(text)
    with pytest.raises(DataError, match=message):
        read_table(tmp_path / "bad.csv")


def test_dimensions_are_measured_by_ccc_over_sessions(tmp_path, encode_clip):
    rng, clips = np.random.default_rng(0), []
    for session in range(8):
        for take in range(5):
            loud = rng.uniform(-1, 1)
            wave = 0.2 * np.exp(2 * loud) * rng.standard_normal(8000) / 10
            meta = {"session": f"v{session}", "split": "train" if session < 6 else "test"}
            clips.append(encode_clip(f"v{session}_{take}", None, wave, valence=loud, arousal=-loud, **meta))
    writer = ShardWriter(tmp_path)
    writer.write_shard(0, clips)
    writer.finish({"size": 32, "fps": 25, "sample_rate": 16000, "picture": "mjpeg", "prepare": {}})
    settings = settings_of(tmp_path, tmp_path / "out", protocol="affwild2")
    plan = plan_evaluation(settings)
    judged = run_folds(plan, [Classic("mel", tmp_path / "cache"), Majority()], settings)
    results = to_results(plan, judged, settings)
    mel, mean = results.systems
    assert mel.scores["ccc"].value > 0.8 and mean.scores["ccc"].value == 0 and results.main_score == "ccc"
    assert mel.scores["ccc"].clusters == 2 and "session" in mel.scores["ccc"].unit
    assert results.differences[0].estimate.low > 0 and {"ccc_valence", "mae_arousal"} <= set(mel.scores)


@pytest.fixture(scope="module")
def place(shards, tmp_path_factory):
    """A tiny fine-tuning, and a probe of an encoder that has seen speaker s0."""
    folder = tmp_path_factory.mktemp("command")
    model = {"name": "hicmae_nano", "streams": "audio", "embed_dim": 32, "num_heads": 2, "depth": 2, "taps": [1, 2]}
    tuned = {
        "out": "nowhere",
        "title": "Tiny",
        "model": {**model, "mel_frames": 48, "decoder_embed_dim": 16, "decoder_num_heads": 2},
        "data": {"shards": str(shards), "test": {"split": "test"}, "dev": {"split": "dev"}, "workers": 0},
        "train": {"steps": 2, "global_batch": 8, "precision": "fp32", "threads": 1, "windows": 1, "watchdog_s": None},
    }
    tiny = HiCMAESettings.parse(
        {**tuned["model"], "num_frames": 4, "img_size": 32, "fusion_depth": 1, "streams": "both"}
    )
    torch.manual_seed(0)
    seen = {"ids": [], "speakers": ["s0"], "sources": [], "licences": [], "data_sets": [], "prepare": {}}
    save_encoder(create_encoder(tiny, 4, {}), folder / "export", {"run": "test", "step": 1}, seen)
    probe = {"shards": str(shards), "encoder": str(folder / "export"), "output": "nowhere", "streams": ["audio"]}
    probe |= {"test": {"split": "test"}, "dev": {"split": "dev"}, "windows": 1, "random_seeds": [0], "heads": ["ridge"]}
    for name, settings in (("tuned", tuned), ("probe", probe)):
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(settings))
    return folder


def test_the_command_runs_experiments_and_baselines_into_one_table(place):
    arguments = ["evaluate", str(place / "tuned.yaml"), "--protocol", "kfold:speaker:3", "--out", str(place / "out")]
    arguments += ["--baselines", "mel,majority", "--folds", "1,2", "--bootstrap", "100", "--json", "train.steps=3"]
    done = subprocess.run([sys.executable, "-m", "affekt", *arguments], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout.splitlines()[-1])
    results = Results.read(place / "out" / "results.json")
    assert told == results.model_dump(mode="json")
    names = [f"{name}:dev-selected" for name in ("tuned", "mel_svm", "majority")]
    assert [system.name for system in results.systems] == [*names, "raters"]
    tuned, mel, majority, raters = results.systems
    assert raters.kind == "raters" and raters.clips == 16  # three of four call angry clips so, all call sad ones sad
    assert tuned.kind == "scratch" and tuned.clips == 16 and tuned.calibration and tuned.streams == "audio"
    assert [fold.name for fold in tuned.by_fold] == ["1", "2"] and tuned.by_fold[0].chosen["epoch"] >= 0
    assert mel.scores["uar"].value == 1 and majority.scores["uar"].value == 0.5
    assert results.differences[0].estimate.value == pytest.approx(tuned.scores["uar"].value - 1)
    assert "only 2 of 3 folds" in results.protocol["notes"][-1]
    rows = (place / "out" / "folds.csv").read_text().splitlines()
    assert rows[0] == "system,fold,clips,score,dev_selected"
    assert (place / "out" / "report.html").stat().st_size > 10_000 and (place / "out" / "results.csv").exists()
    # What it left behind is what `--predictions` reads, and a table of a model of one's own stands beside it.
    folder = place / "out" / "predictions" / "dev-selected"
    mine = place / "mine.csv"
    mine.write_text(
        "id,label,p_angry,p_sad\n"
        + "".join(f"s{s}_{t},{'angry,1,0' if t % 2 == 0 else 'sad,0,1'}\n" for s in range(6) for t in range(4))
    )
    scored = score_files([mine, folder / "tuned"], place / "scored", bootstrap=100)
    assert [s.name for s in scored.systems] == ["mine:dev-selected", "tuned:dev-selected"]
    assert scored.systems[1].scores["uar"].value == tuned.scores["uar"].value and scored.differences[0].clips == 16
    with pytest.raises(SettingsError, match=r"holds predictions of several runs: majority \(dev-selected\), mel_svm"):
        score_files([folder])


def test_a_probe_takes_part_and_refuses_what_its_encoder_has_seen(place, shards, tmp_path):
    [probe, chance], found = enter([str(place / "probe.yaml")], ["penalties=[0.01]"], [], tmp_path / "cache")
    assert found == str(shards) and (probe.kind, chance.kind) == ("probe", "random")
    settings = settings_of(shards, tmp_path / "out", folds=["2", "3"])
    plan = plan_evaluation(settings)
    assert "s0_0" in {
        plan.index.samples.row(p)["id"] for p in plan_evaluation(settings_of(shards, tmp_path)).folds[0].test
    }
    for one in run_folds(plan, [probe, chance], settings):
        table = pool_folds(one.tests[0], plan.rules)
        assert values(table, ["uar"])["uar"] > 0.9 and table.about["chosen"]["head"] == "ridge"
    leaky = settings_of(shards, tmp_path / "out")
    with pytest.raises(SettingsError, match=r"pre-training has seen test clips: shared 1 speakers \(s0\)"):
        run_folds(plan_evaluation(leaky), [probe], leaky)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["tuned.yaml"], "--protocol: say by which"),
        (["--protocol", "ravdess9", "--shards", "x"], "did you mean `ravdess`"),
        (["--protocol", "cremad6", "--baselines", "majority"], "--shards: say where the clips are"),
        (["--protocol", "cremad6", "--baselines", "guess"], "--baselines guess: known are majority, mel"),
        (["--protocol", "cremad6", "train.steps=3"], "changes a setting of a CONFIG, and there is none"),
        (["--protocol", "cremad6", "--baselines", ""], "nothing to evaluate"),
        (["demo", "--protocol", "cremad6"], "neither of `affekt finetune` nor of `affekt probe`"),
        (["--predictions"], "--predictions: name files"),
    ],
)
def test_what_is_missing_in_a_command_is_told(place, arguments, message, capsys, monkeypatch):
    monkeypatch.chdir(place)
    assert run(["evaluate", *arguments]) == 1
    assert message in capsys.readouterr().err


def test_descriptors_are_kept_by_what_they_come_from(tmp_path, encode_clip, monkeypatch):
    rng = np.random.default_rng(0)
    frames = rng.integers(0, 255, (2, 12, 32, 32, 3), dtype=np.uint8)
    clips = [encode_clip(f"c{i}", frames[i], 0.1 * rng.standard_normal(7680), label="a") for i in range(2)]
    writer = ShardWriter(tmp_path)
    writer.write_shard(0, clips)
    writer.finish({"size": 32, "fps": 25, "sample_rate": 16000, "picture": "mjpeg", "prepare": {}})
    index = ShardIndex.open(tmp_path)
    pixels = descriptors("pixels", index, [0, 1], tmp_path / "cache")
    table = statistics(index, [0, 1], Window(frame_stride=2), windows=3, streams="video")
    np.testing.assert_array_equal(pixels, table.take("video_statistics/grid8", np.arange(2)))
    mel = descriptors("mel", index, [1], tmp_path / "cache")
    heard = []
    both = descriptors("mel", index, [0, 1], tmp_path / "cache", lambda *counts: heard.append(counts))
    assert heard == [(2, 2)] and np.array_equal(both[1], mel[0]) and not np.array_equal(both[0], both[1])
    monkeypatch.setattr(classic, "whole_sound", lambda *_: pytest.fail("decoded again"))
    assert np.array_equal(descriptors("mel", index, [0, 1], tmp_path / "cache"), both)
    for path in (tmp_path / "cache").glob("mel-*"):
        path.write_bytes(b"no features")
    with pytest.raises(DataError, match="no descriptors can be read"):
        descriptors("mel", index, [0], tmp_path / "cache")


def test_opensmile_is_asked_for_where_it_is_needed(monkeypatch):
    def missing(name):
        raise PackageNotFoundError(name)

    monkeypatch.setattr(classic, "version", missing)
    assert classic.needs("mel") == "mel 1"
    with pytest.raises(SettingsError, match="needs openSMILE, which is not installed: pip install opensmile"):
        Classic("compare", None)
    with pytest.raises(SettingsError, match="descriptors `cry`: known are mel"):
        classic.needs("cry")


def test_opensmile_gives_the_published_numbers_of_features(shards, tmp_path):
    pytest.importorskip("opensmile", reason="the extra `opensmile` is not installed")
    index = ShardIndex.open(shards)
    assert descriptors("egemaps", index, [0, 1], tmp_path).shape == (2, 88)
    assert descriptors("compare", index, [0], tmp_path).shape == (1, 6373)


def test_an_svm_is_scikit_learns_on_features_that_are_not_turned():
    rng = np.random.default_rng(0)
    train, other, truth = rng.normal(size=(30, 100)), rng.normal(size=(12, 100)), rng.integers(0, 3, 30)
    model = LinearModel((0.01, 0.1))
    for cost, said in zip(model.costs, model.path(train, truth, other, model.costs, 4)):
        rows, others = standardise([train], [other])
        plain = LinearSVC(C=cost, class_weight="balanced", random_state=0, max_iter=5000).fit(rows, truth)
        np.testing.assert_allclose(said[:, :3], plain.decision_function(others), atol=1e-3)
        assert (said[:, 3] < said[:, :3].min()).all()  # no row has this class
    [constant] = model.path(np.ones((6, 4)), np.array([0, 1] * 3), np.ones((2, 4)), [1.0])
    assert np.isfinite(constant).all()
    [alone] = model.path(train, np.zeros(30, int), other, [1.0], 2)
    assert alone.argmax(1).tolist() == [0] * 12


def test_a_fold_states_its_own_clips_classes_and_nothing_else(place, shards, tmp_path):
    plan = plan_evaluation(settings_of(shards, tmp_path))
    part = Part(plan.index, plan.rules, plan.classes, plan.folds[1], "test")
    config = yaml.safe_load((place / "tuned.yaml").read_text())
    own, other = config["data"] | {"name": "own"}, {"shards": str(tmp_path / "elsewhere"), "train": {"split": "train"}}
    own.pop("workers")
    mixed = FinetuneSettings.parse(config | {"data": {"mixture": [other, own], "workers": 0}})
    settings = fold_settings(mixed, part, 3, tmp_path / "work")
    kept, judged = settings.data.mixture
    assert kept == mixed.data.parts[0] and kept.test is None
    ids = {
        side: [plan.index.samples.row(p)["id"] for p in getattr(part.fold, side)] for side in ("train", "dev", "test")
    }
    assert {side: getattr(judged, side)["id"] for side in ids} == ids and judged.group == "speaker"
    assert judged.labels.map == {"angry": "angry", "sad": "sad"} and judged.labels.classes == ("angry", "sad")
    assert settings.seeds == (3,) and settings.train.choose_on == "test" and settings.out == str(tmp_path / "work")
    voted = FinetuneSettings.parse(config | {"data": config["data"] | {"labels": {"rule": "plurality"}}})
    labels = fold_settings(voted, part, 0, tmp_path).data.labels
    assert labels.map == {"anger": "angry", "sadness": "sad", "sad": "sad"} and labels.rule == "plurality"
    with pytest.raises(SettingsError, match="one of its corpora must be"):
        elsewhere = config | {"data": {"mixture": [other, own | {"shards": str(tmp_path / "third")}]}}
        fold_settings(FinetuneSettings.parse(elsewhere), part, 0, tmp_path)
    rated = replace(part, rules=replace(part.rules, dimensions=("valence",)))
    with pytest.raises(SettingsError, match=r"say the range of valence, as `valence: \[1, 5\]`"):
        fold_settings(FinetuneSettings.parse(config), rated, 0, tmp_path)
    with pytest.raises(SettingsError, match="refit learns the clips that decide"):
        FinetuneSettings.parse(config | {"refit": True, "train": config["train"] | {"choose_on": "test"}})


def test_what_a_model_said_is_told_in_the_order_of_the_protocol(shards, tmp_path):
    plan = plan_evaluation(settings_of(shards, tmp_path))
    part = Part(plan.index, plan.rules, plan.classes, plan.folds[0])
    place = {plan.index.samples.row(p)["id"]: p for p in part.fold.test}
    ids = sorted(place, reverse=True)
    said = Predictions(ids, ["sad", "other", "angry"], logits=np.tile([1.0, 2.0, 3.0], (len(ids), 1)))
    table = retold(said, part, place, "test")
    assert table.classes == ["angry", "sad"] and table.ids == ids and table.logits[0].tolist() == [3, 1]
    assert table.label.tolist() == [
        ["angry", "sad"].index(plan.rules.class_of(label_of(plan.index, place[i]))) for i in ids
    ]


def label_of(index, position):
    return index.samples.row(position)["meta"]["label"]
