"""Experiments in protocols: fine-tunings and probes on the clips of a fold, and the command that runs them all."""

import json
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from affekt.cli import run
from affekt.data.errors import SettingsError
from affekt.finetune.contenders import Part
from affekt.finetune.entry import check_labels, enter, fold_settings, retold
from affekt.finetune.evaluate import EvaluateSettings, plan_evaluation, pool_folds, run_folds
from affekt.finetune.predictions import Predictions
from affekt.finetune.protocols import find_protocol
from affekt.finetune.schema import Results
from affekt.finetune.scored import score_files
from affekt.finetune.scores import values
from affekt.finetune.training.settings import FinetuneSettings
from affekt.pretrain.export import create_encoder, save_encoder
from affekt.pretrain.hicmae_settings import HiCMAESettings

LAUNCH = Path(__file__).parents[1] / "launch"


@pytest.fixture(scope="module")
def shards(shards_of_tones):
    return shards_of_tones


def settings_of(shards, output, **changes):
    values = {"protocol": "kfold:speaker:3", "shards": str(shards), "output": str(output), "bootstrap": 200}
    return EvaluateSettings.parse(values | changes)


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
    assert [s.name for s in scored.systems] == ["mine", "tuned:dev-selected"]  # a CSV tells of no choice
    assert scored.systems[1].scores["uar"].value == tuned.scores["uar"].value and scored.differences[0].clips == 16
    with pytest.raises(SettingsError, match=r"holds predictions of several runs: majority \(dev-selected\), mel_svm"):
        score_files([folder])


def test_a_class_of_one_speaker_does_not_end_an_evaluation(place, tone_shards, tmp_path):
    def words(who, take):
        sound = ["angry", "sad"][take % 2]
        return sound, "rare" if who == 4 and take < 2 else sound

    shards = tone_shards(tmp_path / "rare", words)
    arguments = ["evaluate", str(place / "tuned.yaml"), "--protocol", "kfold:speaker:3", "--out", str(tmp_path / "out")]
    arguments += [f"data.shards={shards}", "--bootstrap", "100"]
    done = subprocess.run([sys.executable, "-m", "affekt", *arguments], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "rare: test clips have classes that no training clip has: rare, which nothing can learn" in done.stderr
    tuned, *_ = Results.read(tmp_path / "out" / "results.json").systems
    rare = tuned.confusion[["angry", "rare", "sad"].index("rare")]
    assert tuned.clips == 24 and sum(rare) == 2 and sum(map(sum, tuned.confusion)) == 24
    assert np.isfinite([tuned.scores[name].value for name in ("uar", "war", "ece", "nll")]).all()


def test_what_would_have_no_effect_on_an_evaluation_is_refused(place, shards, tmp_path, capsys):
    tuned, probe = str(place / "tuned.yaml"), str(place / "probe.yaml")
    start = ["evaluate", "--protocol", "kfold:speaker:3", "--out", str(tmp_path / "out"), "--baselines", "majority"]
    for words, told in (
        ([tuned, "data.labels.field=speaker"], "tuned, labels.field: speaker; but kfold:speaker:3 judges label"),
        ([tuned, "data.labels.classes=[sad, happy]"], "labels.classes: sad, happy; but .* judges angry, sad"),
        ([tuned, "data.labels.map={angry: bad, sad: bad}"], "labels.map: angry is bad; but .* it is angry"),
        ([probe, "label=speaker"], "probe_audio, label: speaker; but .* judges label"),
        ([probe, "dimensions=[valence]"], "dimensions: valence; but .* judges classes of label"),
        ([tuned, "data.test.split=[dev]"], "data.test.split: without effect on an evaluation; the protocol says"),
        ([probe, "train.split=[train]"], "train: without effect on the probe"),
        ([tuned, "map_clips=9"], "map_clips: without effect on an evaluation; no map"),
        ([tuned, "out=elsewhere"], "out: without effect on an evaluation; use --out"),
        ([tuned, "--main-score", "uar"], "--main-score: without effect without --predictions"),
        (["x.csv", "--predictions"], "--protocol: without effect beside --predictions"),
    ):
        assert run([*start, *words]) == 1
        assert re.search(told, " ".join(capsys.readouterr().err.split())), words
    assert not list(tmp_path.rglob("*.safetensors"))


@pytest.mark.parametrize("name, protocol", [("cremad_finetune", "cremad6"), ("mafw_finetune", "mafw11")])
def test_shipped_experiments_agree_with_their_protocols(name, protocol):
    labels = FinetuneSettings.read(LAUNCH / f"{name}.yaml").data.parts[0].labels
    check_labels(labels, find_protocol(protocol), name)
    swapped = labels.model_copy(update={"map": {"happy": "sad"}})
    with pytest.raises(SettingsError, match=r"happy is sad; but for .* it is happy"):
        check_labels(swapped, find_protocol(protocol), name)


def test_scores_of_files_take_no_folder_of_another_command(place, tmp_path):
    mine = tmp_path / "mine.csv"
    mine.write_text("id,label,p_a,p_b\nx,a,1,0\ny,b,0,1\n")
    with pytest.raises(SettingsError, match="holds an export"):
        score_files([mine], place / "export", bootstrap=100)
    assert not (place / "export" / "results.json").exists()
    with pytest.raises(SettingsError, match="nope"):
        score_files([mine], tmp_path / "out", bootstrap=100, main="nope")
    assert not (tmp_path / "out").exists()
    for _ in range(2):
        score_files([mine], tmp_path / "out", bootstrap=100)
    written = Results.read(tmp_path / "out" / "results.json")
    assert written.command == "evaluate --predictions"
    written.model_copy(update={"command": "stress"}).write(tmp_path / "out" / "results.json")
    with pytest.raises(SettingsError, match="holds results of `affekt stress`"):
        score_files([mine], tmp_path / "out", bootstrap=100)


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
    # What was let through stays marked: without the word it is not read back as if nothing had been shared.
    [allowed, _], _ = enter([str(place / "probe.yaml")], ["penalties=[0.01]", "transductive=true"], [], probe.cache)
    assert allowed.transductive and run_folds(plan_evaluation(leaky), [allowed], leaky)[0].files
    with pytest.raises(SettingsError, match="pre-training has seen test clips"):
        run_folds(plan_evaluation(leaky), [probe], leaky)


def test_a_corpus_that_is_learned_from_beside_the_judged_one_counts_as_a_setting(place, shards, tone_shards, tmp_path):
    """A fold is made again where other clips lie under the same path."""

    def tuned():
        values = yaml.safe_load((place / "tuned.yaml").read_text())
        own = values.pop("data")
        mixture = [{k: v for k, v in own.items() if k != "workers"}, {"shards": str(tmp_path / "more")}]
        (tmp_path / "mixed.yaml").write_text(yaml.safe_dump(values | {"data": {"mixture": mixture}}))
        return enter([str(tmp_path / "mixed.yaml")], [], [], tmp_path / "cache")[0][0].identity()

    tone_shards(tmp_path / "more", lambda speaker, take: (["angry", "sad"][take % 2],) * 2, people=2, takes=2)
    before = tuned()
    assert tuned() == before
    shutil.rmtree(tmp_path / "more")
    tone_shards(tmp_path / "more", lambda speaker, take: (["angry", "sad"][take % 2],) * 2, people=3, takes=2)
    assert tuned() != before


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
