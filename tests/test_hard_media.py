"""Files that break careless readers: what they announce and hide, what they are called, where they point."""

import json
import os
import random
import socket
import tarfile
from fractions import Fraction

import numpy as np
import pytest
import soundfile

from affekt.data.manifest import Clip
from affekt.data.media.clip import PrepareSettings, prepare_clip
from affekt.data.media.container import Limits, MediaError
from affekt.data.media.picture import WHOLE, turned
from affekt.data.media.streams import read_media, read_region
from affekt.data.prepare import prepare
from affekt.data.shards import ShardIndex
from benchmarks.media import (
    Watched,
    gray,
    ticks,
    tone,
    write_bombs,
    write_film,
    write_mutated,
    write_short_film,
    write_traps,
    write_vast_film,
)


def settings(**values):
    return PrepareSettings(**{"face": "center", "size": 32, **values})


def quarantine(folder):
    return {row["id"]: row for row in map(json.loads, (folder / "quarantine.jsonl").read_text().splitlines())}


def cause_of(video, audio=None):
    with pytest.raises(MediaError) as error:
        read_media(video, audio)
    return error.value.cause


def test_files_that_announce_too_much_are_refused(tmp_path):
    bombs = write_bombs(tmp_path) | {"damaged": write_vast_film(tmp_path / "vast.avi")}
    for cause, path in bombs.items():
        assert cause_of(path) == cause, path.name


def test_a_film_with_fewer_pictures_than_it_lists_ends(tmp_path):
    """431 announced, 300 there: the kind of file that hangs decoders that trust the number."""
    film = write_short_film(tmp_path / "short.mp4")
    assert cause_of(film) == "truncated"
    assert len(read_media(film, end=10.0).frames) == 250  # what lies before the damage is good


def test_what_a_file_lacks_has_its_own_cause_or_flag(tmp_path):
    def film(name, times, sound=None):
        return write_film(tmp_path / name, lambda t: gray(60 + 30 * t), times, sound)

    film("mute.mp4", ticks(0, 1))
    write_film(tmp_path / "voice.mp4", sound=tone(1))
    film("one.mp4", [0.0], tone(1))
    film("blink.mp4", [0.0], tone(0.04))
    (tmp_path / "zero.mp4").write_bytes(b"")
    whole = film("whole.mp4", ticks(0, 1), tone(1))
    (tmp_path / "head.mp4").write_bytes(whole.read_bytes()[:48])
    prepare(tmp_path, tmp_path / "out", settings(), workers=1)
    causes = {name: row["cause"] for name, row in quarantine(tmp_path / "out").items()}
    assert causes == {"zero": "empty", "head": "unreadable", "one": "too_short", "blink": "too_short"}
    samples = {sample.id: sample for sample in ShardIndex.open(tmp_path / "out").samples}
    assert set(samples) == {"mute", "voice", "whole"}
    assert "flac" not in samples["mute"].members and "mjpeg" not in samples["voice"].members  # never zeros


FORMATS = [("yuv420p10le", "ffv1"), ("yuv444p", "ffv1"), ("gray", "ffv1"), ("gray10le", "ffv1"), ("yuva420p", "ffv1")]
FORMATS += [("bgra", "ffv1"), ("yuv420p10le", "libx264"), ("yuvj422p", "mjpeg")]


@pytest.mark.parametrize("pix_fmt, codec", FORMATS)
def test_pictures_of_any_format_and_odd_size_come_out_alike(tmp_path, pix_fmt, codec):
    width, height = (66, 50) if codec == "libx264" else (65, 49)
    scene = np.full((height, width, 4), (200, 60, 60, 255), np.uint8)
    scene[:, : width // 2] = (40, 90, 160, 255)
    film = write_film(tmp_path / "a.mkv", lambda t: scene, ticks(0, 0.2), codec=codec, pix_fmt=pix_fmt)
    shown = read_media(film).frames
    assert shown.shape == (5, height, width, 3)
    expected = scene[..., :3].astype(int)
    if pix_fmt.startswith("gray"):
        expected = np.repeat((expected @ [0.299, 0.587, 0.114])[..., None], 3, axis=2)
    inner = np.r_[4 : width // 2 - 4, width // 2 + 4 : width - 4]  # chroma of half resolution blurs the edge
    assert np.abs(shown[2].astype(int) - expected)[:, inner].mean() < 8


@pytest.mark.parametrize("turn", [0, 90, 180, 270])
def test_a_region_read_again_is_that_part_of_the_upright_picture(tmp_path, turn):
    y, x = np.mgrid[0:120, 0:160]
    scene = np.stack([x + 40, 2 * y, 255 - x], axis=2).astype(np.uint8)
    film = write_film(tmp_path / "a.mp4", lambda t: np.roll(scene, round(50 * t), axis=1), ticks(0, 4), turn=turn)
    whole = read_media(film, start=1.0, end=3.0).frames
    height, width = whole.shape[1:3]
    region = (0.25, 0.2, 0.7, 0.9)
    found, shown = read_region(film, 1.0, 50, region, fps=25, limits=Limits(), pixels=1e6)
    assert all(a <= b + 1e-9 for a, b in zip((*shown[:2], *region[2:]), (*region[:2], *shown[2:])))  # not less
    assert max(abs(a - b) for a, b in zip(shown, region)) < 3 / min(height, width)
    x0, y0, x1, y1 = (round(share * side) for share, side in zip(shown, (width, height) * 2))
    assert np.abs(found.astype(int) - whole[:, y0:y1, x0:x1]).max() <= 6
    small, _ = read_region(film, 1.0, 50, region, fps=25, limits=Limits(), pixels=found[0, ..., 0].size / 3)
    assert small.shape[1:3] == pytest.approx((found.shape[1] / 2, found.shape[2] / 2), abs=1)
    with pytest.raises(MediaError, match="100 frames at first, 75 when read again"):
        read_region(film, 1.0, 100, region, fps=25, limits=Limits(), pixels=1e6)


def test_regions_turn_there_and_back():
    rng = random.Random(3)
    for matrix in [
        None,
        *[(a, 0, 0, d) for a in (-1, 1) for d in (-1, 1)],
        *[(0, b, c, 0) for b in (-1, 1) for c in (-1, 1)],
    ]:
        region = (rng.uniform(0, 0.4), rng.uniform(0, 0.4), rng.uniform(0.6, 1), rng.uniform(0.6, 1))
        assert turned(turned(region, matrix), matrix, back=True) == pytest.approx(region)
        assert turned(WHOLE, matrix) == WHOLE


def test_a_small_face_in_a_large_picture_keeps_its_resolution(tmp_path, monkeypatch):
    """Stripes that a picture scaled down could not show."""
    (tmp_path / "corner.py").write_text(
        "def find(frame):\n    h, w, _ = frame.shape\n    return [[0.7 * w, 0.6 * h, 0.7 * w + 0.1 * h, 0.7 * h]]\n"
    )
    stripes = np.zeros((1080, 1920, 3), np.uint8)
    stripes[:, ::4] = stripes[:, 1::4] = 255
    film = write_film(tmp_path / "a.mp4", lambda t: stripes, ticks(0, 0.4))
    monkeypatch.syspath_prepend(tmp_path)
    clip = prepare_clip(Clip("a", film), PrepareSettings(face="corner:find", size=160))
    long = prepare_clip(Clip("a", film), PrepareSettings(face="corner:find", size=160, frame_mib=16))
    assert clip.frames.shape == (10, 160, 160, 3)
    assert read_media(film).frames[0, :, 400:600].std(axis=1).mean() < 50  # pictures at the size for finding faces
    assert clip.frames.std(axis=2).mean() > 65  # as sharp as the source: the crop is 151 of its pixels wide
    assert long.frames.std(axis=2).mean() > 65  # even where the memory for whole pictures is short


@pytest.mark.parametrize("picture_s, sound_s", [(1.0, 3.0), (3.0, 1.0)])
def test_a_stream_that_ends_early_ends_the_clip(tmp_path, picture_s, sound_s):
    film = write_film(tmp_path / "a.mkv", lambda t: gray(60 + 30 * t), ticks(0, picture_s), tone(sound_s))
    clip = prepare_clip(film, settings())
    assert len(clip.frames) == 25 and abs(len(clip.waveform) - 16_000) <= 1
    assert np.abs(clip.waveform[-640:]).max() > 0.3  # sound up to the end and no padding


def test_any_file_name_becomes_a_name_in_the_shard(tmp_path):
    names = ["día ß 日本.wav", "two  words.wav", "new\nline.wav", "-rf.wav", "a" * 251 + ".wav", "dots.in.it.wav"]
    names += ["e\u0301.wav", "it's $(x);`y`.wav", "%03d.wav", "same.wav", "same.flac"]
    source = tmp_path / "source"
    source.mkdir()
    for number, name in enumerate(names):
        soundfile.write(source / "t.wav", tone(0.3, hertz=300 + 20 * number), 16_000, format="WAV")
        os.rename(source / "t.wav", source / name)
    summary = prepare(source, tmp_path / "out", settings(), workers=1)
    assert summary["prepared"] == len(names) == 11
    index = ShardIndex.open(tmp_path / "out")
    with tarfile.open(tmp_path / "out" / "shard-000000.tar") as tar:
        members = tar.getnames()
    assert len(set(members)) == len(members) == 22
    for member in members:
        name = member.rpartition(".")[0]
        assert name.isprintable() and not set(name) & set("./\\ ;$`'\"") and not name.startswith("-")
    assert sum(index.read(sample, "flac")[:4] == b"fLaC" for sample in index.samples) == 11


def test_files_that_point_elsewhere_reach_nothing(tmp_path):
    canary = write_film(tmp_path / "canary.mp4", lambda t: gray(60), ticks(0, 0.2))
    source = tmp_path / "source"
    source.mkdir()
    with socket.create_server(("127.0.0.1", 0)) as listener, Watched(canary) as opened:
        listener.settimeout(0.2)
        canary.read_bytes()
        assert opened() == 1  # the watch works
        traps = write_traps(source, canary, f"http://127.0.0.1:{listener.getsockname()[1]}/x.mp4")
        opened()
        assert len(traps) >= 10
        (source / "frame001.png").unlink()
        soundfile.write(source / "good.wav", tone(0.3), 16_000)
        summary = prepare(source, tmp_path / "out", settings(), workers=1)
        assert summary["prepared"] == 1 and sum(summary["quarantined"].values()) == len(traps)
        assert opened() == 0
        with pytest.raises(TimeoutError):
            listener.accept()


REFUSALS = {"unreadable", "damaged", "truncated", "empty", "error", "too_short", "too_long", "no_stream", "no_overlap"}
REFUSALS |= {"too_many_pixels", "bad_rate", "memory", "non_finite", "no_time_stamps", "no_decoder"}


def test_mutated_files_are_all_accounted_for(tmp_path):
    seed = int(os.environ.get("AFFEKT_TEST_SEED", random.SystemRandom().randrange(10**6)))
    print(f"AFFEKT_TEST_SEED={seed}")
    source = tmp_path / "source"
    source.mkdir()
    write_mutated(source, 72, seed)
    summary = prepare(source, tmp_path / "out", settings(timeout_s=30), workers=2)
    assert summary["prepared"] + sum(summary["quarantined"].values()) == summary["clips"] >= 72
    assert summary["prepared"] == len(ShardIndex.open(tmp_path / "out").samples)
    assert summary["quarantined"] and set(summary["quarantined"]) <= REFUSALS


def test_pixels_that_are_not_square_are_made_so_in_a_region_too(tmp_path):
    film = write_film(tmp_path / "a.mp4", lambda t: gray(90), ticks(0, 0.4), aspect=Fraction(2, 1))
    found, shown = read_region(film, 0.0, 10, (0.25, 0.25, 0.75, 0.75), fps=25, limits=Limits(), pixels=1e6)
    assert found.shape[1:3] == (24, 64) and shown == (0.25, 0.25, 0.75, 0.75)
