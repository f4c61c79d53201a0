"""Clips spoiled on purpose: what each alteration does, what the generators hide, and whole sweeps of a small model."""

import copy
import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from affekt.data.decode import Window
from affekt.data.errors import SettingsError
from affekt.data.loader import eval_loader
from affekt.finetune.predictions import Predictions
from affekt.finetune.stress import sound as of_sound
from affekt.finetune.stress.beginnings import Beginnings
from affekt.finetune.stress.conflict import describe_conflict
from affekt.finetune.stress.menu import ALTERATIONS, shift_sound, swap_sound
from affekt.finetune.stress.missing import GENERATORS, STEP, missing, rounded
from affekt.finetune.stress.scene import Scene
from affekt.finetune.stress.settings import StressSettings
from affekt.finetune.stress.sweep import prior_score, run_stress, unchanged

CLASSES = ["neutral", "happy", "sad", "angry", "fearful", "disgust"]
WINDOW = Window(num_frames=8, frame_stride=4, mel_frames=126)


class Ear:
    """Tells the class by the pitch of the tone and the speed of the bar of `tiny_shards`; nothing else moves it."""

    window, streams = WINDOW, "both"

    def __init__(self):
        self.asked = 0

    def __call__(self, batch):
        self.asked += 1
        logits = torch.full((len(batch.ids), len(CLASSES)), float("nan"))
        for row in range(len(batch.ids)):
            heard, seen = bool(batch.has_audio[row]), bool(batch.has_video[row])
            if heard or seen:
                logits[row] = 0
            if heard and batch.audio[row].abs().max() > 0:
                wave = batch.audio[row, : batch.audio_valid[row]].numpy()
                spectrum = np.abs(np.fft.rfft(wave * np.hanning(len(wave)), 16000))
                logits[row, self.nearest((spectrum.argmax() - 166) / 60)] += 2
            if seen and batch.video[row].any():
                places = batch.video[row, :, 10, :, 2].float().argmax(1).numpy()
                step = np.median(np.diff(places) % 64)
                logits[row, self.nearest(step / WINDOW.frame_stride - 1)] += 1
        return {"logits": logits}

    @staticmethod
    def nearest(x):
        return int(np.clip(round(float(x)), 0, len(CLASSES) - 1))


@pytest.fixture(scope="module")
def index(tiny_shards):
    return tiny_shards(24, seconds=1.6)


@pytest.fixture(scope="module")
def scene(index):
    return Scene(index, range(24), WINDOW)


@pytest.fixture(scope="module")
def batch(index):
    return next(iter(eval_loader(index, WINDOW, batch_size=24)))


def predictions_of(index):
    def make(judged):
        metas = [index.samples[p].meta for p in judged.positions]
        label = np.array([CLASSES.index(meta["label"]) for meta in metas])
        meta = {"speaker": [m["speaker"] for m in metas]}
        return Predictions(judged.ids, CLASSES, logits=judged.logits, label=label, meta=meta, about={"name": "ear"})

    return make


def same(a, b):
    return all(
        torch.equal(getattr(a, k), getattr(b, k))
        for k in ("video", "audio", "has_video", "has_audio", "audio_valid")
    )  # fmt: skip


@pytest.mark.parametrize("name", ALTERATIONS)
def test_an_alteration_changes_its_stream_alone_and_always_alike(name, scene, batch):
    one, batch = ALTERATIONS[name], batch.parts(4)[0]
    before = replace(batch, video=batch.video.clone(), audio=batch.audio.clone())
    order = list(reversed(range(len(batch.ids))))
    backwards = replace(batch._each(lambda x: x[order]), ids=[batch.ids[i] for i in order])
    for level in one.levels:
        alter = one.make(scene, level)
        after = alter(batch)
        assert same(batch, before)  # what came in is as it was
        assert same(alter(backwards)._each(lambda x: x[order]), after)  # neighbours and order change nothing
        if level == one.clean:
            assert same(after, batch)
            continue
        if name == "clipping" and level < 0.05:
            continue  # as many samples of a sine are equally loud
        assert torch.equal(after.audio, batch.audio) == (one.stream == "video")
        assert torch.equal(after.video, batch.video) == (one.stream != "video")
        assert after.audio.dtype == torch.float32 and after.video.dtype == torch.uint8
        assert after.audio.isfinite().all()


@pytest.mark.parametrize("name", ["tone", "white_noise", "pink_noise", "babble"])
def test_noise_is_as_loud_as_it_says(name, scene, batch):
    batch = batch.parts(4)[0]
    for level in (20.0, 0.0):
        after = ALTERATIONS[name].make(scene, level)(batch)
        for row, valid in enumerate(batch.audio_valid.tolist()):
            clean, noise = (x[row, :valid].double().numpy() for x in (batch.audio, after.audio - batch.audio))
            assert 10 * np.log10(np.square(clean).mean() / np.square(noise).mean()) == pytest.approx(level, abs=0.05)
            assert not after.audio[row, valid:].any()
    silent = replace(batch, audio=torch.zeros_like(batch.audio))
    assert not ALTERATIONS["white_noise"].make(scene, 0.0)(silent).audio.any()


def test_filters_clipping_and_shifts_do_what_they_say(batch):
    rng, time = np.random.default_rng(0), np.arange(16000) / 16000

    def power(function, hertz, level):
        return np.square(function(np.sin(2 * np.pi * hertz * time).astype(np.float32), level, rng)[4000:]).mean()

    assert power(of_sound.phone, 1000, 1) == pytest.approx(0.5, rel=0.05)
    assert max(power(of_sound.phone, hertz, 1) for hertz in (80, 6000)) < 1e-3
    assert power(of_sound.low_pass, 500, 1000) > 0.49 and power(of_sound.low_pass, 3000, 1000) < 1e-4
    assert power(of_sound.high_pass, 3000, 1000) > 0.49 and power(of_sound.high_pass, 300, 1000) < 1e-4
    wave = rng.standard_normal(10000).astype(np.float32)
    clipped = of_sound.clipping(wave, 0.05, rng)
    assert np.mean(clipped != wave) == pytest.approx(0.05, abs=1e-3) and np.abs(clipped).max() < np.abs(wave).max()
    late, early = shift_sound(batch, 100), shift_sound(batch, -100)
    assert torch.equal(late.audio[:, 1600:], batch.audio[:, :-1600]) and not late.audio[:, :1600].any()
    assert torch.equal(early.audio[:, :-1600], batch.audio[:, 1600:])
    assert (early.audio_valid == batch.audio_valid - 1600).all()


@pytest.mark.parametrize("name", GENERATORS)
@pytest.mark.parametrize("fill", ["zero", "repeat", "drop"])
def test_generators_hide_the_share_they_say(name, fill, scene, batch):
    loud = replace(batch, audio=torch.where(batch.audio.abs() < 0.01, 0.01, batch.audio))  # zeros are what was hidden
    steps, before = [-(-n // STEP) for n in batch.audio_valid.tolist()], None
    for rate in (0.0, 1.0, 2.0) if name == "SMM" else (0.0, 0.3, 0.7, 1.0):
        after = missing(scene, name, rate, fill)(loud)
        assert same(after, missing(scene, name, rate, fill)(loud))
        if rate == 0:
            assert same(after, loud)
        if fill != "zero":
            if rate == 1 and name != "SMM":
                assert not (after.has_video | after.has_audio).any() if fill == "drop" else not after.video.any()
            continue
        pictures = (after.video == 0).flatten(2).all(2)  # (B, T)
        sound = [[not after.audio[r, s * STEP : (s + 1) * STEP].any() for s in range(n)] for r, n in enumerate(steps)]
        seen, heard = pictures.double().mean().item(), np.mean(np.concatenate(sound))
        if name == "SMM":
            assert (seen, heard) == ((0, 0), (0, 1), (1, 0))[int(rate)]
        elif name == "RMM":
            assert (seen, heard) == (round(rate * 24) / 24,) * 2
            assert rate in (0, 1) or any(a.all() != all(b) for a, b in zip(pictures, sound))
        elif name == "RMFM":
            share = (pictures.sum().item() + sum(map(sum, sound))) / (pictures.numel() + sum(steps))
            assert share == pytest.approx(rate, abs=0.02)
        else:
            assert seen == pytest.approx(rate, abs=0.06) and heard == pytest.approx(rate, abs=0.06)
            if name == "RMFM_same":
                assert all(
                    abs(p.sum() - rate * 8) < 1 and abs(sum(s) - rate * len(s)) < 1 for p, s in zip(pictures, sound)
                )
        if name == "STMFM":
            assert (pictures.int().diff(dim=1).abs().sum(1) <= 2).all()
        if name == "TMFM":
            for p, s in zip(pictures, sound):
                at = [min(7, int((k + 0.5) * STEP / 16000 / 0.16)) for k in range(len(s))]
                assert s == p[at].tolist()
        if before is not None and name not in ("STMFM", "SMM"):
            assert (pictures >= before).all()
        before = pictures


def test_what_is_rounded_is_right_on_average():
    rng = np.random.default_rng(1)
    assert np.mean([rounded(2.3, u) for u in rng.random(20000)]) == pytest.approx(2.3, abs=0.02)
    assert {rounded(0.1 * 30, u) for u in rng.random(100)} == {3}


def test_dropped_moments_close_the_gap(scene, batch):
    after = missing(scene, "RMFM_same", 0.5, "drop")(batch)
    left = int(after.audio_valid[0])
    assert abs(left - int(batch.audio_valid[0]) / 2) <= STEP and not after.audio[0, left:].any()
    assert torch.equal(after.video[0, 3], after.video[0, 7]) and after.has_video.all()
    repeated = missing(scene, "RMFM_same", 0.5, "repeat")(batch)
    assert (repeated.audio_valid == batch.audio_valid).all() and repeated.video.flatten(2).any(2).all()


def test_a_clip_begins_and_ends_early(index):
    short = Beginnings(index, 0.25)
    for cut, whole in zip(short.samples, index.samples):
        assert (cut.frames, cut.samples, cut.duration) == (10, 6400, pytest.approx(0.4))
        assert (cut.id, cut.members, cut.frame_sizes) == (whole.id, whole.members, whole.frame_sizes)
    views, whole = (next(iter(eval_loader(i, WINDOW, batch_size=24, windows_per_clip=1))) for i in (short, index))
    assert (views.audio_valid == 6400).all() and not views.audio[:, 6400:].any()
    assert torch.equal(views.video[:, 3], views.video[:, 7]) and not torch.equal(whole.video[:, 3], whole.video[:, 7])
    assert copy.copy(short).samples == short.samples  # as a loader's worker gets it, by `__reduce__`


SETTINGS = {
    "alterations": {"white_noise": [40, -40], "cover_lower": [0, 1]},
    "rates": [0, 0.5, 1],
    "early": [0.5, 1],
    "windows": 1,
    "bootstrap": 100,
    "scores": ["uar", "war"],
}


def test_a_sweep_scores_every_level_and_goes_on_where_it_was(index, tmp_path):
    settings, judge, told = StressSettings.parse(SETTINGS), Ear(), []
    how = {"folder": tmp_path / "kept", "identity": "ear", "report": lambda done, total: told.append((done, total))}
    found = run_stress(judge, index, range(12), predictions_of(index), settings, **how)
    by = {(s.name, s.score): s for s in found}
    assert len(by) == len(found) == 2 * (2 + 6 * 2 + 1) and told[-1] == (len(told), len(told))
    clean = by["early", "uar"].scores[-1].value
    assert clean == 1 and by["early", "uar"].unchanged[-1] == 1
    assert [e.value for e in by["cover_lower", "uar"].scores] == [clean, clean]  # the ear needs no picture
    noise = by["white_noise", "uar"]
    assert noise.scores[0].value == 1 and noise.scores[1].value < 0.9 and noise.unchanged[1] < 1
    for name in ("RMFM", "RMFM_same", "RMM", "TMFM", "STMFM"):
        for fill in ("zero", "drop"):
            one = by[f"missing_{name}_{fill}", "uar"]
            assert one.levels == [0, 0.5, 1] and one.scores[0].value == 1
            assert one.scores[-1].value == pytest.approx(1 / 6)  # the same answer to every clip
            y = [e.value for e in one.scores]
            assert one.area == pytest.approx((y[0] + 2 * y[1] + y[2]) / 4)
            assert "all answers are one" in one.note and "prior alone, 0.167" in one.note
    whole, seen, heard = (e.value for e in by["missing_SMM_drop", "uar"].scores)
    assert whole == heard == 1 and 0.5 < seen <= 1

    asked = judge.asked
    again = run_stress(judge, index, range(12), predictions_of(index), settings, **how)
    assert again == found and judge.asked == asked
    fewer = StressSettings.parse({**SETTINGS, "missing": [], "early": []})
    run_stress(judge, index, range(12), predictions_of(index), fewer, **{**how, "identity": "another"})
    assert judge.asked == asked + 4  # as they are, twice noise, once covered
    json.dumps([s.model_dump() for s in found], allow_nan=False)


def test_answers_that_still_differ_with_nothing_to_go_by_are_told(index):
    class Cheat(Ear):
        def __call__(self, batch):
            number = torch.tensor([CLASSES.index(index.samples[int(name[4:])].meta["label"]) for name in batch.ids])
            return {"logits": torch.nn.functional.one_hot(number, len(CLASSES)).float()}

    settings = StressSettings.parse({**SETTINGS, "alterations": {}, "missing": ["RMM"], "early": []})
    for one in run_stress(Cheat(), index, range(6), predictions_of(index), settings):
        assert "answers still differ" in one.note


def test_settings_refuse_what_cannot_be():
    for wrong, told in (
        ({"alterations": {"nois": []}}, "no `nois`"),
        ({"rates": [0.5, 0.1]}, "larger than the one before"),
        ({"missing": ["RMFN"]}, "RMFM"),
        ({"early": [0, 0.5]}, "nothing is known"),
    ):
        with pytest.raises(SettingsError, match=told):
            StressSettings.parse(wrong)


def test_unchanged_answers_and_the_prior():
    logits, ids = np.log([[0.6, 0.4], [0.3, 0.7], [0.9, 0.1]]), ["a", "b", "c"]
    table = Predictions(
        ids, ["x", "y"], ["v"], logits=logits, values=np.array([[1.0], [2], [3]]), label=np.array([0, 1, 1])
    )
    moved = replace(table, values=table.values + np.array([[0.19], [-0.19], [0.21]]))
    assert unchanged(table, moved, np.array([4.0])) == pytest.approx(2 / 3)
    turned = replace(table, logits=logits[:, ::-1])
    assert unchanged(table, turned, np.array([4.0])) == 0
    assert unchanged(table, table.take([2, 0, 1]), np.array([4.0])) == 1
    assert prior_score(table, "war") == pytest.approx(1 / 3)  # x to all: right in one of three


def test_swapped_sounds_make_conflicts_that_the_answers_follow(index, scene, batch):
    labels = {s.id: s.meta["label"] for s in scene.samples.values()}
    partners = scene.partners(labels)
    assert sorted(partners.values()) == sorted(partners) == sorted(labels)
    assert all(scene.speakers[a] == scene.speakers[b] and labels[a] != labels[b] for a, b in partners.items())
    said = Ear()(swap_sound(scene, partners)(batch))["logits"]
    table = Predictions(batch.ids, CLASSES, logits=said.numpy(), about={"name": "ear"})
    voice, face = [labels[partners[c]] for c in batch.ids], [labels[c] for c in batch.ids]
    with pytest.raises(SettingsError, match="consistent"):
        describe_conflict(table, voice, face, bootstrap=100)
    voice[0] = face[0] = CLASSES[int(said[0].argmax())]
    found = describe_conflict(table, voice, face, bootstrap=100)
    assert found.audio_follow.value == 1 and found.bias_index.value == -1  # the ear listens
