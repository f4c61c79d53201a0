"""`affekt inspect`: what it counts, what it finds again, what it calls damaged, and what it says cannot be told."""

import csv
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import av
import cv2
import numpy as np
import pytest

from affekt.cli import run
from affekt.data.decode import decode_sound
from affekt.data.errors import SettingsError
from affekt.data.inspect import copies
from affekt.data.inspect.corpus import inspect
from affekt.data.inspect.look import look_at, measure_sound
from affekt.data.inspect.report import write_page
from affekt.data.inspect.sync import av_offset
from affekt.data.inspect.traces import (
    PICTURE_ROW,
    SOUND_ROW,
    TraceFile,
    picture_changes,
    picture_hash,
    sound_changes,
    sound_trace,
)
from affekt.data.prepare import PrepareSettings, prepare
from affekt.data.shard_writer import ShardWriter
from affekt.data.shards import ShardIndex
from affekt.data.synth.corpus import synthesise

CLIPS, SPEAKERS, COPIED = 24, 8, 6
KEYS = {
    *(
        "affekt",
        "shards",
        "definitions",
        "label",
        "split",
        "clips",
        "hours",
        "duration_s",
        "streams",
        "flags",
        "splits",
    ),
    *("looked_at", "sound", "faces", "speakers", "duplicates", "av_offset", "quarantine", "damage", "problems"),
}


def encode_anew(source: Path, target: Path, begin: float, end: float) -> None:
    """The same recording as someone else would pass it on: without its first and last part, smaller, lighter, quieter,
    at a third of the bits."""
    with av.open(str(source)) as container:
        frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    with av.open(str(source)) as container:
        sound = np.concatenate([frame.to_ndarray()[0] for frame in container.decode(audio=0)])
    sound = 0.4 * sound[round(begin * 16000) : round((len(frames) / 25 - end) * 16000)]
    frames = frames[round(begin * 25) : len(frames) - round(end * 25)]
    with av.open(str(target), "w") as container:
        picture = container.add_stream("libx264", rate=25, options={"crf": "30", "preset": "veryfast"})
        picture.width, picture.height, picture.pix_fmt = 160, 160, "yuv420p"
        voice = container.add_stream("aac", rate=16000, layout="mono")
        voice.bit_rate = 32000
        for pixels in frames:
            pixels = cv2.resize(pixels, (160, 160), interpolation=cv2.INTER_AREA) * 1.15
            frame = av.VideoFrame.from_ndarray(np.clip(pixels, 0, 255).astype(np.uint8), format="rgb24")
            container.mux(picture.encode(frame))
        container.mux(picture.encode(None))
        for start in range(0, len(sound), 1024):
            frame = av.AudioFrame.from_ndarray(sound[None, start : start + 1024].copy(), "fltp", "mono")
            frame.sample_rate, frame.pts = 16000, start
            container.mux(voice.encode(frame))
        container.mux(voice.encode(None))


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """Shards of synthetic clips: the first six stand in them a second time, encoded anew and on another side of the
    split, one file a third time as it is, and one file is no video at all."""
    folder = tmp_path_factory.mktemp("inspect")
    manifest = synthesise(folder / "corpus", CLIPS, SPEAKERS, seed=7)
    with manifest.open() as file:
        rows = list(csv.DictReader(file))
    for row in rows:
        row["split"] = "train"
    for number, row in enumerate(rows[:COPIED]):
        name = f"copy{number}"
        encode_anew(manifest.parent / row["video"], manifest.parent / f"{name}.mp4", 0.2 + 0.04 * number, 0.28)
        rows.append({**row, "id": name, "video": f"{name}.mp4", "split": "test", "speaker": "unknown", "votes": ""})
    rows.append({**rows[8], "id": "again", "split": "dev", "speaker": "other"})
    (manifest.parent / "broken.mp4").write_bytes(b"not a video")
    rows.append({**rows[0], "id": "broken", "video": "broken.mp4"})
    with manifest.open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    prepare(manifest, folder / "shards", PrepareSettings(size=96, clips_per_shard=16), workers=2)
    return folder / "shards"


@pytest.fixture(scope="module")
def result(corpus):
    return inspect(corpus, label="label_face", verify=True, workers=2)


@pytest.fixture(scope="module")
def looks(corpus):
    """The traces of the clips as they were made, without the copies."""
    index = ShardIndex.open(corpus)
    return index, look_at(corpus, index.fingerprint, range(CLIPS), False)


def traces_of(arrays, columns):
    traces = TraceFile(columns)
    for clip, array in arrays:
        traces.add(clip, array)
    return traces


def test_counts_are_those_of_the_manifest(corpus, result):
    samples = ShardIndex.open(corpus).samples
    assert set(result) == KEYS
    assert result["clips"] == len(samples) == CLIPS + COPIED + 1
    assert {name: part["clips"] for name, part in result["splits"].items()} == {"train": 24, "test": 6, "dev": 1}
    train = result["splits"]["train"]
    assert train["speakers"] == SPEAKERS and train["with_sound"] == train["with_picture"] == CLIPS
    faces = [sample.meta["label_face"] for sample in samples if sample.meta["split"] == "train"]
    assert train["labels"] == {name: faces.count(name) for name in sorted(set(faces))}
    votes = [sample.meta["votes"] for sample in samples if sample.meta["split"] == "train"]
    assert train["votes"]["happy"] == sum(vote.get("happy", 0) for vote in votes) > 0
    assert result["splits"]["test"]["votes"] == {} and result["splits"]["test"]["without_label"] == 0
    assert result["hours"] == pytest.approx(sum(sample.duration for sample in samples) / 3600, abs=1e-4)
    assert result["streams"]["both"]["clips"] == CLIPS + COPIED + 1
    assert result["quarantine"]["clips"] == 1 and result["quarantine"]["examples"][0]["id"] == "broken"


def test_copies_encoded_anew_are_found_and_nothing_else(corpus, result):
    ids = [sample.id for sample in ShardIndex.open(corpus).samples]
    expected = [[ids[number], f"copy{number}"] for number in range(COPIED)] + [[ids[8], "again"]]
    found = result["duplicates"]
    heard = [group["ids"] for group in found["near_sound"]["examples"]]
    assert sorted(heard) == sorted(expected)
    seen = [group["ids"] for group in found["near_picture"]["examples"]]
    assert all(group in expected for group in seen) and len(seen) >= COPIED
    for kind in ("same_source", "same_picture", "same_sound"):
        assert [group["ids"] for group in found[kind]["examples"]] == [[ids[8], "again"]], kind
        assert found[kind]["across_splits"] == 1
    assert found["near_sound"]["across_splits"] == COPIED + 1
    assert any("near sound" in problem for problem in result["problems"])


def test_a_copy_cut_between_two_rows_is_found(looks):
    """The worst place to cut is half a row (20 ms) beside the original's rows."""
    index, seen = looks
    arrays = [(look.clip, look.sound) for look in seen]
    for clip in range(6):
        sound = decode_sound(index, index.samples[clip], 0, 48000)[9600 + 320 :] * 0.1
        arrays.append((100 + clip, sound_trace(sound, 16000)))
    pairs = copies.find_copies(traces_of(arrays, SOUND_ROW), sound_changes, copies.SAME_SOUND, between=True)
    assert [(pair.a, pair.b) for pair in pairs] == [(clip, 100 + clip) for clip in range(6)]
    assert all(abs(pair.lag - 0.62) <= 0.03 for pair in pairs)


def test_no_two_synthetic_clips_are_taken_for_copies(looks):
    """Every pair compared in full, at every lag: far below the bars, so that a larger corpus has room."""
    _, seen = looks
    for stream, changes, bar in (
        ("sound", sound_changes, copies.SAME_SOUND),
        ("picture", picture_changes, copies.SAME_PICTURE),
    ):
        traces = [changes(getattr(look, stream).astype(np.float32)) for look in seen]
        highest = max(
            copies.compare(a, b, lag, between=stream == "sound")[0]
            for i, a in enumerate(traces)
            for b in traces[i + 1 :]
            for lag in range(-30, 31, 3)
        )
        assert 0.1 < highest < bar - 0.05, (stream, highest)


def test_neighbours_are_those_of_comparing_all():
    rng = np.random.default_rng(0)
    vectors = rng.standard_normal((3000, 32)).astype(np.float32)
    vectors[2000:2100] = vectors[:100] + 0.2 * rng.standard_normal((100, 32)).astype(np.float32)
    unit = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    cosines = np.triu(unit @ unit.T, 1)
    expected = {(int(i), int(j)) for i, j in np.argwhere(cosines > 0.8)}
    found = {(min(pair), max(pair)) for pair in copies.neighbours(vectors, 8, 0.8)}
    assert len(expected) >= 100 and found <= expected
    assert len(found) >= 0.98 * len(expected)


def test_pictures_without_motion_are_compared_by_their_hash():
    rng = np.random.default_rng(1)
    stills = [cv2.resize(rng.integers(0, 256, (12, 12, 3), np.uint8), (96, 96)) for _ in range(40)]
    _, jpeg = cv2.imencode(".jpg", stills[3], [cv2.IMWRITE_JPEG_QUALITY, 30])
    again = cv2.resize(cv2.imdecode(jpeg, cv2.IMREAD_COLOR), (64, 64), interpolation=cv2.INTER_AREA)
    hashes = {clip: picture_hash(still) for clip, still in enumerate([*stills, again])}
    assert [(pair.a, pair.b) for pair in copies.find_same_pictures(hashes)] == [(3, 40)]


def test_pairs_make_groups():
    assert copies.groups([(5, 2), (9, 5), (1, 7)]) == [[1, 7], [2, 5, 9]]
    assert copies.same([(0, "a"), (1, ""), (2, "a"), (3, ""), (4, "a"), (5, "b")]) == [(0, 2), (0, 4)]


@pytest.mark.parametrize("late", [-0.2, 0.0, 0.13])
def test_the_offset_of_the_sound_is_measured(looks, late):
    index, seen = looks
    pictures = traces_of([(look.clip, look.picture) for look in seen], PICTURE_ROW)
    shifted = []
    for look in seen:
        sound = np.roll(decode_sound(index, index.samples[look.clip], 0, 48000), round(late * 16000))
        shifted.append((look.clip, sound_trace(sound, 16000)))
    found = av_offset(pictures, traces_of(shifted, SOUND_ROW))
    assert found["told"], found["why"]
    assert abs(found["ms"] - 1000 * late) < 20
    assert found["low"] <= found["ms"] <= found["high"] and found["high"] - found["low"] < 80
    assert found["strangers"] < 0.5 * found["correlation"]


def test_single_clips_out_of_step_are_named(looks):
    index, seen = looks
    pictures = traces_of([(look.clip, look.picture) for look in seen], PICTURE_ROW)
    sounds = [(look.clip, look.sound) for look in seen]
    for clip in (3, 10, 17):
        late = np.roll(decode_sound(index, index.samples[clip], 0, 48000), 4800)
        sounds[clip] = (clip, sound_trace(late, 16000))
    found = av_offset(pictures, traces_of(sounds, SOUND_ROW))
    assert found["told"] and abs(found["ms"]) < 20
    apart = dict(found["apart"])
    assert len(apart.keys() & {3, 10, 17}) >= 2 and len(apart.keys() - {3, 10, 17}) <= 1
    assert all(abs(apart[clip] - 300) <= 40 for clip in apart.keys() & {3, 10, 17})


def test_an_offset_is_not_told_where_the_streams_have_nothing_in_common(looks):
    _, seen = looks
    pictures = traces_of([(look.clip, look.picture) for look in seen], PICTURE_ROW)
    others = traces_of([(look.clip, seen[look.clip - 5].sound) for look in seen], SOUND_ROW)
    found = av_offset(pictures, others)
    assert not found["told"] and found["ms"] is None and found["why"]
    few = av_offset(pictures, traces_of([(look.clip, look.sound) for look in seen[:8]], SOUND_ROW))
    assert not few["told"] and "8 clips" in few["why"]


def test_silent_and_clipped_sound(tmp_path, encode_clip):
    time = np.arange(32000) / 16000
    tone = np.sin(2 * np.pi * 220 * time)
    assert measure_sound(0.5 * tone, 16000)["clipped_share"] == 0
    assert measure_sound(np.clip(2 * tone, -1, 1), 16000)["clipped_share"] == pytest.approx(2 / 3, abs=0.02)
    assert measure_sound(0.5 * tone, 16000)["loudest_db"] == pytest.approx(-9.03, abs=0.05)
    sounds = {
        "quiet": 3e-4 * tone,
        "zero": 0 * tone,
        "zero2": 0 * tone,
        "loud": np.clip(2 * tone, -1, 1),
        "fine": tone / 2,
    }
    writer = ShardWriter(tmp_path / "shards")
    writer.write_shard(0, [encode_clip(name, None, sound) for name, sound in sounds.items()])
    writer.finish({"size": 64, "fps": 25, "sample_rate": 16000, "picture": "mjpeg", "prepare": {}})
    result = inspect(tmp_path / "shards", workers=1)
    assert result["sound"]["silent"] == {"clips": 3, "ids": ["quiet", "zero", "zero2"]}
    assert result["sound"]["clipped"] == {"clips": 1, "ids": ["loud"]}
    assert result["duplicates"]["same_sound"]["groups"] == 0, "silence is no copy of silence"
    assert result["streams"]["sound_only"]["clips"] == 5 and result["faces"]["share"] is None
    assert not result["av_offset"]["told"] and not result["quarantine"]["known"]
    assert result["splits"]["(none)"]["without_label"] == 5 and result["problems"] == []


def test_speakers_on_two_sides_and_faceless_clips_are_counted(tmp_path, encode_clip):
    rng = np.random.default_rng(2)
    clips = []
    for number, (speaker, split) in enumerate([("a", "train"), ("a", "test"), ("b", "train"), ("", "test")]):
        frames = rng.integers(0, 256, (30, 64, 64, 3), np.uint8)
        record, members = encode_clip(f"c{number}", frames, None, speaker=speaker, split=split)
        clips.append((record | {"flags": ["no_face"] * (number == 2)}, members))
    writer = ShardWriter(tmp_path / "shards")
    writer.write_shard(0, clips)
    writer.finish({"size": 64, "fps": 25, "sample_rate": 16000, "picture": "mjpeg", "prepare": {}})
    result = inspect(tmp_path / "shards", workers=1)
    assert result["speakers"] == {
        "count": 2,
        "without": 1,
        "across_splits": [{"speaker": "a", "splits": ["test", "train"]}],
    }
    assert result["faces"] == {"with_picture": 4, "faceless": 1, "share": 0.25, "ids": ["c2"]}
    assert result["problems"] == ["1 speaker on several sides of `split` (a)"]
    with pytest.raises(SettingsError, match=r"`emotion`; known here: speaker, split"):
        inspect(tmp_path / "shards", label="emotion", workers=1)


def test_verify_names_every_damaged_clip_and_shard(tiny_shards, capsys):
    index = tiny_shards(12, "mixed", seconds=0.4, shards=3)
    damaged = []
    for number, sample in enumerate(index.samples[:8]):
        member = sorted(sample.members)[number % len(sample.members)]
        offset, size, _ = sample.members[member]
        flip(index.root / index.shard_name(sample), offset + size // 2)
        damaged.append((sample.id, member))
    assert {member for _, member in damaged} >= {"json", "flac", "mjpeg"}
    flip(index.root / "shard-000002.tar", index.header["shards"][2]["bytes"] - 1)  # padding: it belongs to no clip
    assert run(["inspect", str(index.root), "--verify", "--json", "--workers", "1"]) == 2
    out, error = capsys.readouterr()
    found = json.loads(out)["damage"]
    assert [row["id"] for row in found["clips"]] == [name for name, _ in damaged]
    assert all(f"member {member}" in row["message"] for row, (_, member) in zip(found["clips"], damaged))
    assert [re.search(r"shard-\d+", message)[0] for message in found["shards"]] == [f"shard-{n:06d}" for n in range(3)]
    assert "8 damaged clips" in error and "3 damaged shard files" in error and "Traceback" not in error


def test_the_command_writes_text_json_and_a_page(corpus, result, tmp_path, capsys):
    page = tmp_path / "page.html"
    assert run(["inspect", str(corpus), "--label", "label_face", "--html", str(page), "--clips", "5"]) == 2
    out, error = capsys.readouterr()
    assert "copy0" in out and "neutral" in out and "sound against picture" in out and str(page) in out
    assert "on several sides of `split`" in error and "flags of the preparation: none" in out
    html = page.read_text()
    assert html.count('class="row"') == html.count('class="mel"') == html.count('class="wave"') == 5
    assert not re.search(r'(src|href)="(?!data:)', html) and "<script" not in html
    assert "copy0" in html and "not_a_video" not in html and "broken" in html
    assert run(["inspect", str(corpus), "--label", "label_face", "--verify", "--json", "--workers", "1"]) == 2
    out, _ = capsys.readouterr()
    assert json.loads(out) == result, "the same whatever the number of workers"


def test_what_clips_say_of_themselves_is_no_html(tmp_path, encode_clip):
    evil = "<img src=x onerror=alert(1)>"
    frames = np.zeros((2, 64, 64, 3), np.uint8)
    writer = ShardWriter(tmp_path / "shards")
    writer.write_shard(0, [encode_clip("<b>", frames, None, label=evil, split=evil, speaker=evil)])
    writer.finish({"size": 64, "fps": 25, "sample_rate": 16000, "picture": "mjpeg", "prepare": {}})
    result = inspect(tmp_path / "shards", workers=1)
    html = write_page(tmp_path / "page.html", result, ShardIndex.open(tmp_path / "shards")).read_text()
    assert evil not in html and "&lt;img src=x" in html


def test_a_sample_is_decoded_and_everything_counted(corpus, result, tmp_path, capsys):
    drawn = {n: inspect(corpus, label="label_face", sample=n, workers=1) for n in (6, 12, 10**6)}
    assert [drawn[n]["looked_at"] for n in drawn] == [6, 12, result["clips"]]
    counted = ("clips", "hours", "streams", "flags", "speakers", "faces", "quarantine")
    assert all(found[key] == result[key] for found in drawn.values() for key in counted)
    silent = [set(found["sound"]["silent"]["ids"]) for found in drawn.values()]
    assert silent[0] <= silent[1] <= silent[2]
    assert drawn[10**6]["duplicates"] == result["duplicates"]
    fewer = drawn[6]["duplicates"]
    assert fewer["same_source"] == result["duplicates"]["same_source"], "the index tells"
    assert fewer["near_sound"]["clips"] <= 6 < result["duplicates"]["near_sound"]["clips"]
    run(["inspect", str(corpus), "--label", "label_face", "--sample", "6", "--html", str(tmp_path / "page.html")])
    assert "decoded 6 clips drawn from all" in " ".join(capsys.readouterr().out.split())
    assert "decoded 6 clips drawn from all" in (tmp_path / "page.html").read_text()


def test_an_interrupt_ends_it_without_a_traceback(corpus):
    command = [sys.executable, "-m", "affekt", "inspect", str(corpus), "--workers", "1"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, start_new_session=True)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    deadline = time.monotonic() + 60
    while not children.read_text() and time.monotonic() < deadline:
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGINT)  # the workers are starting; Ctrl-C reaches them too
    _, error = process.communicate(timeout=60)
    assert process.returncode == 130 and "interrupted" in error and "Traceback" not in error


def flip(path: Path, place: int) -> None:
    path.chmod(0o644)
    content = bytearray(path.read_bytes())
    content[place] ^= 0xFF
    path.write_bytes(content)
