"""`prepare`: from files to shards, whatever the files are and whatever happens on the way."""

import hashlib
import io
import json
import os
import sys
import time
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
import simplejpeg
import soundfile

from affekt.data.errors import DataError, SettingsError
from affekt.data.media.container import MediaError
from affekt.data.prepare import PrepareSettings, encode_clip, prepare, prepare_clip, prepare_clip_safely
from affekt.data.shards import ShardIndex

CENTER = {"face": "center", "size": 32}

# A detector that a user might bring, and what detectors and decoders in native code do on some files.
DETECTOR = """
import ctypes, os, signal, sys, time
def find(frame):
    red, green, blue = (int(channel) for channel in frame.reshape(-1, 3).mean(axis=0))
    if red > 200:
        os.kill(os.getpid(), signal.SIGSEGV)
    if green > 200:
        ctypes.PyDLL(None).sleep(1000)  # in native code and with the interpreter's lock, as real hangs are
    if blue > 200:
        os._exit(0)
    if red > 150:
        raise RuntimeError("no idea")
    if green > 150:
        return bytearray(1 << 40)
    print("noise on standard output", flush=True)
    return [[4, 4, 40, 40]]
"""


def write_film(path, colour=(90, 90, 90), seconds=0.6, sound=True, picture=True):
    """A small mp4 whose colour drifts so that every frame differs."""
    with av.open(str(path), "w", options={"fflags": "+bitexact"}) as container:
        if picture:
            video = container.add_stream(
                "libx264", rate=25, options={"preset": "ultrafast", "crf": "16", "threads": "1"}
            )
            video.width, video.height, video.pix_fmt = 64, 48, "yuv420p"
        if sound:
            audio = container.add_stream("aac", rate=16_000, layout="mono")
        if picture:
            for k in range(round(seconds * 25)):
                frame = np.full((48, 64, 3), colour, np.uint8)
                frame[:24] = np.clip(frame[:24].astype(int) + k, 0, 255)
                container.mux(video.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
            container.mux(video.encode(None))
        if sound:
            wave = np.sin(np.arange(round(seconds * 16_000)) * (0.1 + sum(colour) / 3000))
            for at in range(0, len(wave), 1024):
                piece = (wave[None, at : at + 1024] * 9000).astype(np.int16)
                frame = av.AudioFrame.from_ndarray(piece, format="s16", layout="mono")
                frame.sample_rate, frame.pts, frame.time_base = 16_000, at, Fraction(1, 16_000)
                container.mux(audio.encode(frame))
            container.mux(audio.encode(None))
    return path


@pytest.fixture(scope="module")
def films(tmp_path_factory):
    """Ten different small films with sound."""
    folder = tmp_path_factory.mktemp("films")
    for number in range(10):
        write_film(folder / f"film{number}.mp4", (20 + 12 * number, 60, 140 - 10 * number))
    return folder


def settings(**values):
    return PrepareSettings(**{**CENTER, **values})


def digests(folder):
    """sha256 by name of the files that must not depend on how they were made."""
    files = [path for path in folder.iterdir() if path.is_file() and path.name != "summary.json"]
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def quarantine(folder):
    return [json.loads(line) for line in (folder / "quarantine.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def straight(films, tmp_path_factory):
    """The shards of an undisturbed run with one process."""
    out = tmp_path_factory.mktemp("straight") / "out"
    prepare(films, out, settings(clips_per_shard=3), workers=1)
    return out


def test_shards_hold_what_prepare_clip_gives(films, straight):
    index = ShardIndex.open(straight)
    assert [sample.id for sample in index.samples] == [f"film{k}" for k in range(10)]
    assert index.header["size"] == 32 and index.header["prepare"]["face"] == "center"
    assert [shard["samples"] for shard in index.header["shards"]] == [3, 3, 3, 1]
    sample = index.samples[4]
    clip = prepare_clip(films / "film4.mp4", settings())
    record, members = encode_clip(clip, settings())
    assert index.read(sample, "mjpeg") == members["mjpeg"] and index.read(sample, "flac") == members["flac"]
    assert sample.frame_sizes == tuple(record["frame_sizes"]) and sample.frames == len(clip.frames)
    first = simplejpeg.decode_jpeg(members["mjpeg"][: sample.frame_sizes[0]])
    assert first.shape == (32, 32, 3) and np.abs(first.astype(int) - clip.frames[0]).mean() < 3
    sound, rate = soundfile.read(io.BytesIO(members["flac"]), dtype="float32")
    assert rate == 16_000 and np.abs(sound - clip.waveform).max() < 1e-4
    assert soundfile.info(io.BytesIO(members["flac"])).subtype == "PCM_16"
    assert sample.source_sha256 == hashlib.sha256((films / "film4.mp4").read_bytes()).hexdigest()
    with av.open(io.BytesIO(members["mjpeg"]), format="mjpeg") as stream:  # the member plays by itself
        assert sum(1 for _ in stream.decode(video=0)) == sample.frames


def test_the_result_does_not_depend_on_processes_or_on_the_place_of_the_source(films, straight, tmp_path):
    moved = tmp_path / "moved"
    moved.mkdir()
    for film in reversed(sorted(films.iterdir())):
        (moved / film.name).write_bytes(film.read_bytes())
    calls = []
    summary = prepare(
        moved,
        tmp_path / "out",
        settings(clips_per_shard=3, recycle=2),
        3,
        lambda done, total: calls.append((done, total)),
    )
    assert digests(tmp_path / "out") == digests(straight)
    assert calls == [(k, 10) for k in range(11)]
    assert summary["prepared"] == summary["clips"] == 10 and summary["quarantined"] == {} and summary["shards"] == 4
    assert summary["hours"] == pytest.approx(10 * 0.6 / 3600, abs=1e-4)
    assert summary == json.loads((tmp_path / "out" / "summary.json").read_text())


def test_absent_streams_have_no_member(tmp_path):
    source = tmp_path / "source"
    source.mkdir()
    write_film(source / "both.mp4")
    write_film(source / "mute.mp4", sound=False)
    write_film(source / "voice.mp4", picture=False)
    soundfile.write(source / "voice2.wav", np.sin(np.arange(44_100) / 20), 44_100)
    with av.open(str(source / "face.png"), "w", format="image2", options={"update": "1"}) as container:
        stream = container.add_stream("png", rate=1)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "rgb24"
        picture = av.VideoFrame.from_ndarray(np.full((48, 64, 3), 70, np.uint8), format="rgb24")
        container.mux(stream.encode(picture))
        container.mux(stream.encode(None))
    summary = prepare(source, tmp_path / "out", settings(), workers=1)
    members = {sample.id: set(sample.members) for sample in ShardIndex.open(tmp_path / "out").samples}
    assert members == {
        "both": {"mjpeg", "flac", "json"},
        "face": {"mjpeg", "json"},
        "mute": {"mjpeg", "json"},
        "voice": {"flac", "json"},
        "voice2": {"flac", "json"},
    }
    assert summary["share_without_sound"] == 0.4 and summary["share_without_picture"] == 0.4
    samples = {sample.id: sample for sample in ShardIndex.open(tmp_path / "out").samples}
    assert samples["face"].frames == 1 and samples["mute"].samples == 0 and samples["voice2"].samples == 16_000
    assert "no_sound" in samples["mute"].flags and "no_picture" in samples["voice"].flags


def test_manifest_columns_reach_the_index(films, tmp_path):
    (tmp_path / "m.csv").write_text(
        f'id,video,start,end,speaker,label,votes,valence\nx,{films}/film1.mp4,0.2,0.5,s1,happy,"{{""happy"": 7}}",0.5\n'
    )
    prepare(tmp_path / "m.csv", tmp_path / "out", settings(), workers=1)
    (sample,) = ShardIndex.open(tmp_path / "out").samples
    assert sample.meta == {"speaker": "s1", "label": "happy", "votes": {"happy": 7}, "valence": 0.5}
    assert sample.duration == pytest.approx(0.28, abs=0.03)


def test_mp4_as_the_picture_member(films, tmp_path):
    with_mp4 = settings(picture="mp4", clips_per_shard=20, size=64)
    prepare(films, tmp_path / "a", with_mp4, workers=1)
    prepare(films, tmp_path / "b", with_mp4, workers=2)
    assert digests(tmp_path / "a") == digests(tmp_path / "b")
    index = ShardIndex.open(tmp_path / "a")
    clip = prepare_clip(films / "film3.mp4", with_mp4)
    with av.open(io.BytesIO(index.read(index.samples[3], "mp4"))) as container:
        frames = np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])
    assert frames.shape == clip.frames.shape == (index.samples[3].frames, 64, 64, 3)
    assert np.abs(frames.astype(int) - clip.frames).mean() < 4


def test_bad_files_are_quarantined_with_their_cause(films, tmp_path):
    source = tmp_path / "source"
    source.mkdir()
    good = write_film(source / "good.mp4")
    (source / "text.mp4").write_text("no film")
    (source / "zero.mp4").write_bytes(b"")
    (source / "cut.mp4").write_bytes(good.read_bytes()[: good.stat().st_size // 2])
    soundfile.write(source / "blip.wav", np.ones(80) * 0.1, 16_000)
    write_film(source / "noface.mp4")
    (tmp_path / "m.csv").write_text(
        "id,video,audio\n"
        + "\n".join(
            f"{p.stem},{'' if p.suffix == '.wav' else p},{p if p.suffix == '.wav' else ''}"
            for p in sorted(source.iterdir())
        )
        + "\n"
    )
    summary = prepare(tmp_path / "m.csv", tmp_path / "out", settings(face="haar", face_fallback="center"), workers=2)
    rows = {row["id"]: row for row in quarantine(tmp_path / "out")}
    assert {name: row["cause"] for name, row in rows.items()} == {
        "text": "unreadable",
        "zero": "empty",
        "cut": "unreadable",
        "blip": "too_short",
    }
    assert rows["text"]["path"] == str(source / "text.mp4") and rows["text"]["line"] == 6
    assert "text.mp4" in rows["text"]["message"]
    assert summary["quarantined"] == {"empty": 1, "too_short": 1, "unreadable": 2}
    assert summary["prepared"] == 2 and summary["flags"]["no_face"] == 2 and summary["face_rate"] == 0
    strict = settings(face="haar", face_fallback="quarantine")
    with pytest.raises(DataError, match=r"none of 6 clips can be used.*2 no_face") as error:
        prepare(tmp_path / "m.csv", tmp_path / "out2", strict, workers=1)
    assert error.value.exit_code == 2
    assert "face_fallback=center" in next(r for r in quarantine(tmp_path / "out2") if r["id"] == "good")["message"]


def test_a_missing_face_does_not_cost_the_sound(tmp_path):
    source = tmp_path / "source"
    source.mkdir()
    write_film(source / "both.mp4")
    write_film(source / "mute.mp4", sound=False)
    summary = prepare(source, tmp_path / "out", PrepareSettings(size=32), workers=1)
    (sample,) = ShardIndex.open(tmp_path / "out").samples
    assert sample.id == "both" and sample.flags == ("no_face",) and sample.samples == 0.6 * 16_000
    assert set(sample.members) == {"flac", "json"} and sample.duration == 0.6
    assert summary["quarantined"] == {"no_face": 1}
    (row,) = quarantine(tmp_path / "out")
    assert row["id"] == "mute" and "a face in 0% of the frames" in row["message"]


def test_what_is_wrong_with_the_source_is_told_before_anything_is_written(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "m.csv").write_text("id,label\nx,y\n")
    for source in (tmp_path / "empty", tmp_path / "m.csv", tmp_path / "gone"):
        with pytest.raises(SettingsError):
            prepare(source, tmp_path / "out", settings(), workers=1)
    assert not (tmp_path / "out").exists()
    with pytest.raises(SettingsError, match="unknown setting `qualty`; did you mean `quality`"):
        PrepareSettings.parse({"qualty": 3})


@pytest.fixture
def detector(tmp_path, monkeypatch):
    (tmp_path / "modules").mkdir()
    (tmp_path / "modules" / "moody.py").write_text(DETECTOR)
    monkeypatch.syspath_prepend(tmp_path / "modules")
    yield "moody:find"
    sys.modules.pop("moody", None)


def test_hangs_and_crashes_cost_their_own_clip_only(tmp_path, detector):
    source = tmp_path / "source"
    source.mkdir()
    colours = {"segv": (250, 0, 0), "hang": (0, 250, 0), "exit": (0, 0, 250), "raise": (180, 0, 0), "vast": (0, 180, 0)}
    for name, colour in colours.items():
        write_film(source / f"{name}.mp4", colour, 0.2)
    for number in range(6):
        write_film(source / f"{'azf'[number % 3]}{number}.mp4", (40, 40, 40 + number), 0.2)
    began = time.monotonic()
    summary = prepare(source, tmp_path / "out", PrepareSettings(size=32, face=detector, timeout_s=3), workers=2)
    assert time.monotonic() - began < 25
    rows = {row["id"]: row for row in quarantine(tmp_path / "out")}
    assert {name: row["cause"] for name, row in rows.items()} == {
        "segv": "crash",
        "hang": "timeout",
        "exit": "crash",
        "raise": "error",
        "vast": "memory",
    }
    assert "SIGSEGV" in rows["segv"]["message"] and "exit code 0" in rows["exit"]["message"]
    assert "RuntimeError: no idea" in rows["raise"]["message"]
    assert "timeout_s=3" in rows["hang"]["message"]
    assert summary["prepared"] == 6 and not children()


def test_a_clip_is_prepared_safely_and_alike(films, tmp_path, detector):
    safe, plain = (function(films / "film2.mp4", settings()) for function in (prepare_clip_safely, prepare_clip))
    np.testing.assert_array_equal(safe.frames, plain.frames)
    np.testing.assert_array_equal(safe.waveform, plain.waveform)
    assert safe.record == plain.record
    soundfile.write(tmp_path / "a.wav", np.sin(np.arange(8000) / 9), 16_000)
    assert prepare_clip_safely(tmp_path / "a.wav").frames is None
    with pytest.raises(MediaError, match=r"gone\.mp4") as error:
        prepare_clip_safely(tmp_path / "gone.mp4")
    assert error.value.cause == "missing"
    write_film(tmp_path / "hang.mp4", (0, 250, 0), 0.2)
    with pytest.raises(MediaError, match="not done after timeout_s=1") as error:
        prepare_clip_safely(tmp_path / "hang.mp4", PrepareSettings(size=32, face=detector, timeout_s=1))
    assert error.value.cause == "timeout" and not children()


def children():
    """Workers that this process has started and that are still there; other tests leave a forkserver of their own."""
    started = Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()
    return [pid for pid in started if b"affekt.data.media.workers" in Path(f"/proc/{pid}/cmdline").read_bytes()]


def test_processes_that_cannot_start_are_an_error_and_no_endless_loop(films, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "executable", "/bin/false")
    with pytest.raises(DataError, match="do not start"):
        prepare(films, tmp_path / "out", settings(), workers=2)
