"""Evaluations: every fold once, kept whole through kills, made again where something changed, honest about chance."""

import os
import random
import signal
import time
from dataclasses import dataclass, field, replace

import numpy as np
import pytest

from affekt.data.errors import DataError, SettingsError
from affekt.data.shard_writer import ShardWriter
from affekt.finetune.contenders import Classic, Majority, Outcome
from affekt.finetune.evaluate import EvaluateSettings, join_parts, plan_evaluation, pool_folds, run_folds
from affekt.finetune.predictions import Predictions
from affekt.finetune.scores import score, values
from affekt.finetune.table import to_results


@pytest.fixture(scope="module")
def shards(shards_of_tones):
    return shards_of_tones


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
    seen: dict | None = None
    spoil: dict = field(default_factory=dict)

    def identity(self):
        return {"quick": self.setting}

    def pretraining(self):
        return self.seen

    def check(self, rules, index):
        pass

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
    [fold, *_] = plan_evaluation(settings).folds

    class Peeking(Quick):
        def judge(self, part, seed, folder, progress=None):
            outcome = super().judge(part, seed, folder)
            return Outcome(outcome.test, replace(outcome.test, about=outcome.dev.about))

    with pytest.raises(DataError, match=f"fold {fold.name}: .* is no development clip of this fold"):
        run_folds(plan_evaluation(settings), [Peeking()], settings)
    with pytest.raises(SettingsError, match="different names, found quick, quick"):
        run_folds(plan_evaluation(settings), [Quick(), Quick()], settings)
    fresh = settings_of(shards, tmp_path / "fresh")
    with pytest.raises(SettingsError, match="different names"):
        run_folds(plan_evaluation(fresh), [Quick(), Quick()], fresh)
    assert not fresh.output.exists(), "what is refused leaves nothing behind"


def test_what_pre_training_saw_is_compared_before_anything_is_computed_and_told(shards, tmp_path):
    log, settings = tmp_path / "log", settings_of(shards, tmp_path / "out", folds=["2"])
    plan = plan_evaluation(settings)
    [tested] = plan.folds
    speakers = {side: plan.index.samples.row(getattr(tested, side)[0])["meta"]["speaker"] for side in ("train", "test")}
    seen = {"ids": ["a", "b"], "sources": [], "speakers": [speakers["train"]], "licences": ["CC BY-NC-SA 4.0"]}
    judged = run_folds(plan, [Majority(), Quick(seen=seen)], settings)
    results = to_results(plan, judged, settings)
    assert results.pretraining["clips"] == 2 and set(results.pretraining["shared_with_test"].values()) == {0}
    assert "CC BY-NC-SA 4.0" in results.licences
    leaky = seen | {"speakers": [speakers["test"]]}
    with pytest.raises(SettingsError, match=f"pre-training has seen test clips: shared 1 speakers .{speakers['test']}"):
        run_folds(plan, [Quick(log, setting=1), Quick(log, name="leaky", seen=leaky)], settings)
    assert not log.exists(), "nothing was computed"
    judged = run_folds(plan, [Quick(name="leaky", seen=leaky, transductive=True)], settings)
    assert to_results(plan, judged, settings).pretraining["shared_with_test"]["speakers"] == 1


def test_a_class_that_nothing_can_learn_is_noted_and_an_error_names_the_fold(tone_shards, tmp_path):
    def words(who, take):
        sound = ["angry", "sad"][take % 2]
        return sound, "rare" if (who, take) == (4, 0) else sound

    place = tone_shards(tmp_path / "s", words)
    plan = plan_evaluation(settings_of(place, tmp_path / "out"))
    [note] = [note for note in plan.notes if "nothing can learn" in note]
    [fold] = [fold for fold in plan.folds if f"fold {fold.name}:" in note]
    assert "rare (as s4_0)" in note and "s4_0" in {plan.index.samples.row(p)["id"] for p in fold.test}

    class Refusing(Quick):
        def judge(self, part, seed, folder, progress=None):
            raise SettingsError("no")

    with pytest.raises(SettingsError, match="quick, fold 1: no"):
        run_folds(plan, [Refusing()], settings_of(place, tmp_path / "out"))


def test_a_damaged_file_is_an_error_and_not_made_again_in_silence(shards, tmp_path):
    settings = settings_of(shards, tmp_path)
    plan = plan_evaluation(settings)
    [judged] = run_folds(plan, [Quick()], settings)
    path = tmp_path / judged.files[2]
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(DataError, match=r"fold-3-seed-0.*no predictions can be read"):
        run_folds(plan, [Quick()], settings)


def test_descriptors_find_what_is_planted_and_nothing_in_shuffled_labels(shards, tmp_path, tone_shards):
    rng = np.random.default_rng(0)  # one in twenty others would lie outside of its 95 % interval
    shuffled = tone_shards(
        tmp_path / "shuffled",
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
