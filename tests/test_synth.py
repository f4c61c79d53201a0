"""The embedded corpus: the same bits every time, real media, cues in both streams under stronger nuisances."""

import csv
import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path

import av
import cv2
import numpy as np
import pytest

from affekt.data.errors import DataError, SettingsError
from affekt.data.synth import corpus
from affekt.data.synth.corpus import COLUMNS, Recipe, plan_corpus, render, synthesise
from affekt.data.synth.plan import EMOTIONS, LICENCE, Strengths, plan_speakers
from affekt.data.synth.voice import SAMPLE_RATE

PLAIN = Strengths(speaker=0, light=0, scene=0, channel=0, noise=0)


def recipe(strengths: Strengths = PLAIN, **changes) -> Recipe:
    values = {"speakers": 6, "seed": 5, "conflict": 0.0, "missing": 0.0, "seconds": 2.0} | changes
    return Recipe(strengths=strengths, **values)


def shown(plan, emotion: str, intensity: float = 1.0):
    """The same clip with another emotion: nothing else that is random changes."""
    return replace(plan, label_voice=emotion, label_face=emotion, intensity_voice=intensity, intensity_face=intensity)


def hashes(folder: Path) -> dict[str, str]:
    files = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def rows(manifest: Path) -> list[dict[str, str]]:
    with manifest.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def loudness(sound: np.ndarray, frames: int) -> np.ndarray:
    """Root mean square in the 40 ms around each video frame's time stamp: (frames,)."""
    padded = np.pad(sound, SAMPLE_RATE // 50)
    return np.array([np.sqrt(np.mean(padded[k * 640 : k * 640 + 640] ** 2)) for k in range(frames)])


def pitch(sound: np.ndarray) -> np.ndarray:
    """F0 in octaves above 1 Hz of the clearly voiced 50 ms frames: (n,).

    Autocorrelation of a flattened spectrum, so that formants do not pass for harmonics; against the synthesiser's own
    F0, 5 % of the frames are off by more than 0.2 octaves and the median of a clip by 0.02.
    """
    frames = np.lib.stride_tricks.sliding_window_view(sound, 800)[::320] * np.hanning(800)
    power = (frames**2).mean(1)
    correlation = np.fft.irfft(np.abs(np.fft.rfft(frames, 2048)) ** 0.7)
    low, high = SAMPLE_RATE // 500, SAMPLE_RATE // 70
    lag = correlation[:, low:high].argmax(1) + low
    clear = correlation[np.arange(len(lag)), lag] / (correlation[:, 0] + 1e-12) > 0.2
    return np.log2(SAMPLE_RATE / lag[clear & (power > np.median(power) / 4)])


def test_same_arguments_give_the_same_bytes_with_one_and_two_workers(tmp_path):
    arguments = {"speakers": 4, "seed": 11, "seconds": 1.0, "conflict": 0.2, "missing": 0.4}
    calls = []
    synthesise(tmp_path / "a", 10, **arguments, workers=1, progress=lambda done, total: calls.append((done, total)))
    synthesise(tmp_path / "b", 10, **arguments, workers=2)
    assert hashes(tmp_path / "a") == hashes(tmp_path / "b")
    assert calls == [(done, 10) for done in range(11)]
    synthesise(tmp_path / "c", 10, **{**arguments, "seed": 12}, workers=1)
    ours, others = hashes(tmp_path / "a"), hashes(tmp_path / "c")
    assert not set(ours.values()) & set(others.values())


def test_more_clips_keep_the_earlier_ones_and_a_lost_clip_comes_back(tmp_path):
    out = tmp_path / "corpus"
    synthesise(out, 3, 3, seed=1, seconds=0.6, workers=1)
    before = hashes(out / "clips")
    lost, *kept = sorted((out / "clips").iterdir())
    lost.unlink()
    stamps = [path.stat().st_mtime_ns for path in kept]
    manifest = synthesise(out, 5, 3, seed=1, seconds=0.6, workers=1)
    after = hashes(out / "clips")
    assert before.items() <= after.items() and len(after) == len(rows(manifest)) == 5
    assert stamps == [path.stat().st_mtime_ns for path in kept]
    with pytest.raises(SettingsError, match="made for 5 clips"):
        synthesise(out, 4, 3, seed=1, seconds=0.6)


def test_a_killed_run_is_finished_by_repeating_it(tmp_path):
    code = (
        "from affekt.data.synth.corpus import synthesise\nsynthesise('corpus', 30, 3, seed=2, seconds=0.6, workers=1)"
    )
    with subprocess.Popen([sys.executable, "-c", code], cwd=tmp_path, start_new_session=True) as process:
        deadline = time.monotonic() + 60
        while len(list(tmp_path.rglob("*.mp4"))) < 3 and time.monotonic() < deadline:
            time.sleep(0.02)
        os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL
    assert not (tmp_path / "corpus" / "manifest.csv").exists()
    synthesise(tmp_path / "corpus", 30, 3, seed=2, seconds=0.6, workers=2)
    found = hashes(tmp_path / "corpus")
    assert not [name for name in found if ".part" in name]
    synthesise(tmp_path / "whole", 4, 3, seed=2, seconds=0.6, workers=1)
    whole = hashes(tmp_path / "whole" / "clips")
    assert whole.items() <= {name.removeprefix("clips/"): value for name, value in found.items()}.items()


def test_a_folder_of_other_arguments_is_refused(tmp_path):
    out = tmp_path / "corpus"
    synthesise(out, 1, 2, seed=1, seconds=0.6, workers=1)
    with pytest.raises(SettingsError, match=r"seed: 1 there, 2 asked.*choose another folder"):
        synthesise(out, 1, 2, seed=2, seconds=0.6)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "letter.txt").write_text("keep me", encoding="utf-8")
    with pytest.raises(SettingsError, match="not empty"):
        synthesise(tmp_path / "mine", 1, 2)
    (out / "synth.json").write_text("{", encoding="utf-8")
    with pytest.raises(SettingsError, match=r"synth\.json"):
        synthesise(out, 1, 2, seed=1, seconds=0.6)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("clips", 0),
        ("speakers", 0),
        ("seed", -1),
        ("conflict", 1.5),
        ("missing", -0.1),
        ("seconds", 0.1),
        ("noise", -1),
    ],
)
def test_arguments_out_of_range_are_named(tmp_path, name, value):
    arguments = {"clips": 1, "speakers": 1, name: value}
    with pytest.raises(SettingsError, match=f"{name} is {value}; it must lie between"):
        synthesise(tmp_path / "corpus", **arguments)
    assert not (tmp_path / "corpus").exists()


def test_a_full_disk_is_a_data_error_and_leaves_no_half_file(tmp_path):
    code = """
import resource, signal
from affekt.data.errors import DataError
from affekt.data.synth.corpus import synthesise
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (4000, 4000))
try:
    synthesise("corpus", 2, 2, seconds=1.0, workers=1)
except DataError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert "s000_000000.mp4: cannot be written" in done.stdout and "repeat the command" in done.stdout, done.stderr
    assert list((tmp_path / "corpus" / "clips").iterdir()) == []


def test_a_worker_that_is_killed_is_a_data_error(tmp_path, monkeypatch):
    monkeypatch.setattr(corpus, "_make", _die)
    with pytest.raises(DataError, match="a worker was killed"):
        synthesise(tmp_path / "corpus", 4, 2, seconds=0.6, workers=2)


def _die(*_) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def test_a_clip_plays_for_its_length(tmp_path):
    manifest = synthesise(tmp_path / "corpus", 1, 1, seed=3, workers=1)
    (row,) = rows(manifest)
    with av.open(str(manifest.parent / row["video"])) as container:
        picture, sound = container.streams.video[0], container.streams.audio[0]
        assert (picture.codec_context.name, sound.codec_context.name) == ("h264", "aac")
        assert (picture.width, picture.height, picture.average_rate) == (224, 224, 25)
        assert (sound.rate, sound.channels) == (16000, 1)
        frames = list(container.decode(picture))
        assert [round(frame.time * 25) for frame in frames] == list(range(75))
        container.seek(0)
        waves = np.concatenate([frame.to_ndarray()[0] for frame in container.decode(sound)])
    film, original, _ = render(
        plan_corpus(recipe(Strengths(), speakers=1, seed=3, seconds=3.0), 1)[0],
        recipe(Strengths(), speakers=1, seed=3, seconds=3.0),
    )
    assert abs(len(waves) / SAMPLE_RATE - 3.0) < 0.08
    assert np.abs(frames[40].to_ndarray(format="rgb24").astype(int) - film[40]).mean() < 6
    lags = np.correlate(np.abs(waves[:48000]), np.abs(original), "full")
    assert abs(int(lags.argmax()) - (len(original) - 1)) < 160  # within 10 ms: the encoder's delay is accounted for


def test_the_manifest_describes_every_clip(tmp_path):
    plans = plan_corpus(recipe(Strengths(), speakers=20), 600)
    table = [corpus._row(plan) for plan in plans]
    assert all(tuple(row) == COLUMNS and row["licence"] == LICENCE for row in table)
    assert len({row["id"] for row in table}) == 600
    votes = [json.loads(row["votes"]) for row in table]
    assert all(sum(vote.values()) == 10 and set(vote) <= set(EMOTIONS) for vote in votes)
    agree = np.mean([max(vote, key=vote.get) == row["label"] for vote, row in zip(votes, table)])
    assert 0.8 < agree < 1.0  # raters mostly see what is meant, and sometimes do not
    assert all(-1 <= row[name] <= 1 for row in table for name in ("valence", "arousal"))
    arousal = {name: np.mean([row["arousal"] for row in table if row["label"] == name]) for name in EMOTIONS}
    assert arousal["angry"] > 0.3 > 0 > arousal["sad"]
    assert Counter(row["label"] for row in table) == dict.fromkeys(EMOTIONS, 100)
    assert all(row["label"] == row["label_voice"] == row["label_face"] for row in table)


@pytest.mark.parametrize("count", [3, 5, 12, 24, 40])
def test_splits_are_by_speaker_with_both_sexes(count):
    cast = plan_speakers(count, seed=4)
    sizes = Counter(speaker.split for speaker in cast)
    assert sizes["test"] == max(1, round(0.25 * count)) and sizes["dev"] == max(1, round(0.15 * count))
    for split in sizes:
        sexes = Counter(speaker.sex for speaker in cast if speaker.split == split)
        assert abs(sexes["male"] - sexes["female"]) <= 1
    assert len({speaker.id for speaker in cast}) == count
    assert plan_speakers(2, 0)[0].split == plan_speakers(2, 0)[1].split == "train"  # too few to hold any out


def test_conflicts_and_missing_streams_have_their_share(tmp_path):
    plans = plan_corpus(recipe(conflict=0.25, missing=0.2), 200)
    conflicts = [plan for plan in plans if plan.label_voice != plan.label_face]
    assert len(conflicts) == 50
    assert all(corpus._row(plan)["label"] == plan.label_voice for plan in conflicts)
    assert sum(not plan.sound for plan in plans) == sum(not plan.picture for plan in plans) == 20
    assert all(plan.sound or plan.picture for plan in plans)
    manifest = synthesise(tmp_path / "corpus", 6, 3, seed=1, seconds=0.6, missing=1.0, workers=1)
    for row in rows(manifest):
        assert bool(row["video"]) != bool(row["audio"])
        with av.open(str(manifest.parent / (row["video"] or row["audio"]))) as container:
            assert [stream.type for stream in container.streams] == ["video" if row["video"] else "audio"]
    assert len({bool(row["video"]) for row in rows(manifest)}) == 2


def test_lips_follow_the_sound():
    plans = plan_corpus(recipe(), 6)
    sound_to_lips, lips_to_pixels = [], []
    for plan in plans:
        film, sound, lips = render(shown(plan, "neutral"), recipe())
        sound_to_lips.append(np.corrcoef(lips.opening, loudness(sound, len(film)))[0, 1])
        mouth = film[:, 130:165, 92:132].astype(float)
        closed = mouth[lips.opening.argmin()]
        change = np.abs(mouth - closed).mean((1, 2, 3))
        lips_to_pixels.append(np.corrcoef(lips.opening, change)[0, 1])
    assert np.mean(sound_to_lips) > 0.5, sound_to_lips
    assert np.mean(lips_to_pixels) > 0.5, lips_to_pixels


def test_without_cues_the_label_changes_nothing_and_each_cue_stays_in_its_stream():
    plan = plan_corpus(recipe(), 1)[0]
    results = {}
    for voice, face in ((0, 0), (1, 0), (0, 1)):
        strengths = Strengths(voice=voice, face=face)
        for emotion in ("happy", "sad"):
            results[voice, face, emotion] = render(shown(plan, emotion), recipe(strengths, seconds=1.0))[:2]
    film, sound = results[0, 0, "happy"]
    assert np.array_equal(film, results[0, 0, "sad"][0]) and np.array_equal(sound, results[0, 0, "sad"][1])
    assert not np.array_equal(results[1, 0, "happy"][1], results[1, 0, "sad"][1])
    assert np.array_equal(results[0, 1, "happy"][1], sound)
    assert not np.array_equal(results[0, 1, "happy"][0], results[0, 1, "sad"][0])


def test_every_emotion_shows_in_the_face():
    """Nuisances off, edges of a face are nearest to those of the same emotion in clips with other texts and motions."""
    kind = recipe(speakers=1, seconds=1.0)
    edges = cv2.HOGDescriptor((96, 96), (16, 16), (8, 8), (8, 8), 9)

    def seen(plan, emotion):
        film = render(shown(plan, emotion), kind)[0][::4, 66:162, 64:160]
        return np.mean([edges.compute(cv2.cvtColor(frame, cv2.COLOR_RGB2GRAY)) for frame in film], axis=0)

    faces = np.array([[seen(plan, emotion) for emotion in EMOTIONS] for plan in plan_corpus(kind, 5)])  # (clip, 6, D)
    hits = []
    for clip in range(len(faces)):
        centres = np.delete(faces, clip, axis=0).mean(0)
        distance = ((faces[clip][:, None] - centres) ** 2).sum(-1)
        hits.extend(distance.argmin(1) == np.arange(6))
    assert np.mean(hits) >= 0.8, hits


def test_every_emotion_moves_the_voice_its_own_way():
    plans = plan_corpus(recipe(seconds=3.0), 6)
    tracks = {emotion: [] for emotion in EMOTIONS}
    for plan in plans:
        for emotion in EMOTIONS:
            _, sound, _ = render(replace(shown(plan, emotion), label_face="neutral"), recipe(seconds=3.0))
            tracks[emotion].append((np.median(pitch(sound)), np.ptp(np.percentile(pitch(sound), [10, 90]))))
    level, width = np.mean([tracks[emotion] for emotion in EMOTIONS], axis=1).T
    level = dict(zip(EMOTIONS, level - level[0]))
    width = dict(zip(EMOTIONS, width))
    assert min(level["happy"], level["angry"], level["fearful"]) > 0.05 > -0.04 > max(level["sad"], level["disgust"])
    assert all(abs(value) < 0.5 for value in level.values())  # a shift, far less than between speakers
    assert width["happy"] > 1.3 * width["neutral"] > 1.3 * width["sad"]


def test_speakers_differ_more_in_pitch_than_emotions_do():
    nuisance = recipe(replace(PLAIN, speaker=1.0), speakers=12)
    plans = plan_corpus(nuisance, 12)
    medians = np.array(
        [[np.median(pitch(render(shown(plan, emotion), nuisance)[1])) for emotion in EMOTIONS] for plan in plans[:8]]
    )
    assert medians.mean(1).std() > 2 * medians.mean(0).std()
    assert np.ptp(medians.mean(1)) > 0.8  # about an octave


def test_the_cascade_of_prepare_finds_the_faces(tmp_path):
    seed = int(np.random.default_rng().integers(1000))
    print(f"seed {seed}")
    detector = cv2.CascadeClassifier(f"{cv2.data.haarcascades}haarcascade_frontalface_alt2.xml")
    kind = recipe(Strengths(), speakers=24, seed=seed, seconds=0.6)
    found = []
    for plan in plan_corpus(kind, 24):
        for frame in render(plan, kind)[0][::7]:
            gray = cv2.cvtColor(frame, cv2.COLOR_RGB2GRAY)
            found.append(len(detector.detectMultiScale(gray, 1.1, 5)) > 0)
    assert np.mean(found) >= 0.98
