"""Foreign media: one clock for both streams, constant rates, nothing but the named file is opened."""

import os
import random
import socket
import struct
from fractions import Fraction

import av
import numpy as np
import pytest
import soundfile
import torch

from affekt.data.media.container import Limits, MediaError
from affekt.data.media.picture import display_matrix, upright
from affekt.data.media.streams import read_media, to_mono
from affekt.data.transforms import log_mel
from benchmarks.media import flash_to_beep, gray, ticks, tone, write_film, write_flash_and_beep


# Begin of picture and sound; negative ones are cut off by an edit list in mp4 and moved to zero together in ts.
@pytest.mark.parametrize("kind", ["mp4", "mkv", "ts"])
@pytest.mark.parametrize(
    "begins", [(0, 0), (0.1, 0), (0, 0.436), (0.5, 0), (0, 1.0), (1.0, 0.1), (-0.2, -0.3), (0, -0.3)]
)
def test_a_flash_and_a_beep_stay_together_whatever_the_streams_begin_at(tmp_path, kind, begins):
    picture_at, sound_at = begins
    media = read_media(write_flash_and_beep(tmp_path / f"a.{kind}", picture_at, sound_at))
    assert abs(flash_to_beep(media.frames, media.waveform)) <= 0.04
    assert abs(len(media.waveform) - len(media.frames) * 640) <= 1
    if min(begins) >= 0:
        # mp4 and ts keep the encoder's 1024 samples of run-up where the sound begins late
        assert media.info["offset"] == pytest.approx(sound_at - picture_at, abs=0.07)
        assert len(media.frames) == pytest.approx((2.5 - max(begins)) * 25, abs=1)


@pytest.mark.parametrize("fps", [Fraction(24_000, 1001), Fraction(30_000, 1001), 60, 120, 12, "variable", "dropped"])
def test_frames_are_the_nearest_in_time_at_any_rate(tmp_path, fps):
    rng = random.Random(7)
    if fps == "variable":
        times = [0.0]
        while times[-1] < 2:
            times.append(times[-1] + rng.choice([0.02, 0.04, 0.08, 0.1]))
    else:
        times = [k / (25 if fps == "dropped" else fps) for k in range(int(2 * (25 if fps == "dropped" else fps)))]
        times = [float(t) for t in times if fps != "dropped" or rng.random() < 0.6 or t == 0]
    film = write_film(tmp_path / "a.mkv", lambda t: gray(round(20 + 100 * t)), times)
    media = read_media(film)
    shown = (media.frames.mean(axis=(1, 2, 3)) - 20) / 100  # seconds, burnt into the gray level
    asked = np.arange(len(shown)) / 25
    nearest = np.array([min(times, key=lambda t, a=a: abs(t - a)) for a in asked])
    assert len(shown) >= 49
    assert np.abs(np.abs(shown - asked) - np.abs(nearest - asked)).max() < 0.02


def test_a_picture_with_longer_gaps_is_flagged(tmp_path):
    media = read_media(write_film(tmp_path / "a.mkv", lambda t: gray(round(40 + 50 * t)), [0, 0.04, 1.0, 1.04]))
    assert "picture_gap" in media.flags and len(media.frames) == 27


@pytest.mark.parametrize("turn", [0, 90, 180, 270])
def test_pictures_come_out_upright(tmp_path, turn):
    scene = gray(30)
    scene[:16, :20] = (220, 30, 30)
    film = write_film(tmp_path / "a.mp4", lambda t: scene, ticks(0, 0.4), turn=turn)
    shown = read_media(film).frames[0]
    with av.open(str(film)) as container:
        raw = next(container.decode(video=0))
    assert raw.rotation % 360 == turn
    expected = np.rot90(raw.to_ndarray(format="rgb24"), raw.rotation // 90)  # FFmpeg counts counter-clockwise
    np.testing.assert_array_equal(shown, expected)
    assert read_media(film).flags == ["no_sound"]
    np.testing.assert_array_equal(upright(raw.to_ndarray(format="rgb24"), display_matrix(raw)), expected)


def test_mirroring_matrices_put_each_pixel_where_the_definition_says():
    picture = np.arange(2 * 3 * 3, dtype=np.uint8).reshape(2, 3, 3)
    for a, b, c, d in [(1, 0, 0, 1), (-1, 0, 0, 1), (1, 0, 0, -1), (-1, 0, 0, -1)] + [
        (0, b, c, 0) for b in (1, -1) for c in (1, -1)
    ]:
        points = {(a * x + c * y, b * x + d * y): picture[y, x] for x in range(3) for y in range(2)}
        left, top = min(x for x, _ in points), min(y for _, y in points)
        shown = upright(picture, (a << 16, b << 16, c << 16, d << 16))
        assert all((shown[y - top, x - left] == value).all() for (x, y), value in points.items()), (a, b, c, d)


def test_pixels_become_square_and_large_clips_shrink_to_the_memory_limit(tmp_path):
    film = write_film(tmp_path / "a.mp4", lambda t: gray(90), ticks(0, 1), aspect=Fraction(2, 1))
    assert read_media(film).frames.shape == (25, 48, 128, 3)
    for kind in ("mp4", "mkv"):  # mkv states no length of its streams
        other = write_film(tmp_path / f"b.{kind}", lambda t: gray(90), ticks(0, 1), tone(1))
        assert read_media(other, limits=Limits(frame_bytes=30 * 64 * 48 * 3)).frames.shape == (25, 48, 64, 3)
    small = read_media(film, limits=Limits(frame_bytes=25 * 32 * 12 * 3)).frames
    assert small.shape[0] == 25 and small.nbytes <= 25 * 32 * 12 * 3 * 1.1


@pytest.mark.parametrize("rate", [8_000, 11_025, 16_000, 22_050, 44_100, 48_000, 96_000])
@pytest.mark.parametrize("channels", [1, 2, 6])
def test_sound_of_any_rate_comes_out_at_16_khz(tmp_path, rate, channels):
    soundfile.write(tmp_path / "a.wav", np.tile(tone(1.0, rate)[:, None], channels), rate)
    waveform = read_media(None, tmp_path / "a.wav").waveform
    assert waveform.dtype == np.float32 and abs(len(waveform) - 16_000) <= 1
    spectrum = np.abs(np.fft.rfft(waveform[:16_000], 16_000))
    assert abs(int(spectrum.argmax()) - 1000) <= 1
    expected = tone(1.0)[2000:14_000]
    if channels <= 2:
        assert np.abs(waveform[2000:14_000] - expected).max() < 0.02  # in phase: no delay by the resampler


def test_doubtful_sound_is_flagged_and_stays_finite(tmp_path):
    wave = tone(0.5)
    cases = [("antiphase", np.stack([wave, -wave], 1)), ("clipped", np.clip(wave * 5, -1, 1))]
    cases += [("silent", wave * 1e-4), ("silent", 0 * wave), ("silent", 0 * wave + 0.5)]  # a constant is no sound
    for flag, sound in cases:
        soundfile.write(tmp_path / f"{flag}.wav", sound, 16_000, subtype="FLOAT")
        media = read_media(None, tmp_path / f"{flag}.wav")
        assert media.flags == sorted([flag, "no_picture"])
        assert np.isfinite(media.waveform).all() and (flag == "silent" or np.abs(media.waveform).max() > 0.3)
        assert torch.isfinite(log_mel(torch.from_numpy(media.waveform)[None])).all()
    for value in (np.nan, np.inf, -np.inf):
        wave[100] = value
        soundfile.write(tmp_path / "odd.wav", wave, 16_000, subtype="FLOAT")
        assert cause_of(None, tmp_path / "odd.wav") == "non_finite"
    mono, flags = to_mono(np.stack([tone(0.1), 0 * tone(0.1)]).astype(np.float32))
    assert flags == [] and np.abs(mono).max() == pytest.approx(0.2, abs=0.01)  # one empty channel is no cancellation


def test_a_gap_in_the_sound_keeps_its_length(tmp_path):
    with av.open(str(tmp_path / "a.mkv"), "w") as container:
        audio = container.add_stream("flac", rate=16_000, layout="mono")
        audio.codec_context.time_base = Fraction(1, 16_000)
        for k in [*range(10), *range(20, 30)]:  # 1024 samples each
            frame = av.AudioFrame.from_ndarray(np.full((1, 1024), 8000, np.int16), format="s16", layout="mono")
            frame.sample_rate, frame.pts, frame.time_base = 16_000, k * 1024, Fraction(1, 16_000)
            container.mux(audio.encode(frame))
        container.mux(audio.encode(None))
    media = read_media(tmp_path / "a.mkv")
    if "sound_gap" not in media.flags:
        pytest.skip("this build of FFmpeg closes the gap when it encodes")
    assert abs(len(media.waveform) - 30 * 1024) < 32
    assert np.abs(media.waveform[11 * 1024 : 19 * 1024]).max() == 0


def test_absent_streams_are_none_and_only_the_common_interval_stays(tmp_path):
    silent_film = write_film(tmp_path / "a.mp4", lambda t: gray(round(40 + 30 * t)), ticks(0, 1))
    media = read_media(silent_film)
    assert media.waveform is None and media.flags == ["blank", "no_sound"] and len(media.frames) == 25
    media = read_media(write_film(tmp_path / "b.mp4", sound=tone(1)))
    assert media.frames is None and "no_picture" in media.flags and len(media.waveform) >= 16_000
    soundfile.write(tmp_path / "c.wav", tone(0.5), 16_000)
    media = read_media(silent_film, tmp_path / "c.wav")
    assert media.frames.shape[0] == 12 and len(media.waveform) == 12 * 640


def test_no_common_interval_is_an_error(tmp_path):
    film = write_film(tmp_path / "a.mkv", lambda t: gray(80), ticks(0, 1), tone(0.5), sound_at=2.0)
    assert cause_of(film) == "no_overlap"


@pytest.mark.parametrize("kind", ["mp4", "mkv", "avi"])
def test_a_cut_by_start_and_end_is_exact_also_after_seeking(tmp_path, kind):
    rate = 44_100 if kind == "avi" else 16_000
    level = np.linspace(0.1, 0.9, 9 * rate)  # loudness tells the time too
    sound = level * tone(9, rate, 500.0, 1.0)
    film = write_film(tmp_path / f"a.{kind}", lambda t: gray(round(20 + 20 * t)), ticks(0, 9), sound, rate=rate)
    whole = read_media(film)
    for start in (1.0, 7.0):
        part = read_media(film, start=start, end=start + 1)
        assert len(part.frames) == 25 and len(part.waveform) == 16_000
        first = round(start * 25)
        difference = part.frames.astype(int) - whole.frames[first : first + 25]
        assert np.abs(difference).max() <= 3
        np.testing.assert_allclose(part.waveform, whole.waveform[round(start * 16_000) :][:16_000], atol=0.03)
    assert cause_of(film, start=20.0) == "empty"


def test_long_clips_are_cut_and_flagged(tmp_path):
    film = write_film(tmp_path / "a.mp4", lambda t: gray(round(40 + 30 * t)), ticks(0, 3), tone(3))
    media = read_media(film, limits=Limits(max_duration=1.0))
    assert "cut" in media.flags and len(media.frames) == 25 and len(media.waveform) == 16_000
    assert "cut" not in read_media(film, limits=Limits(max_duration=3.0)).flags


def test_stills_are_one_frame_and_no_pattern(tmp_path):
    for suffix in ("png", "jpg", "bmp"):
        with av.open(str(tmp_path / f"a.{suffix}"), "w", format="image2", options={"update": "1"}) as container:
            codec = {"png": "png", "jpg": "mjpeg", "bmp": "bmp"}[suffix]
            stream = container.add_stream(codec, rate=1)
            stream.width, stream.height = 64, 48
            stream.pix_fmt = {"png": "rgb24", "jpg": "yuvj420p", "bmp": "bgr24"}[suffix]
            container.mux(stream.encode(av.VideoFrame.from_ndarray(gray(120), format="rgb24")))
            container.mux(stream.encode(None))
        media = read_media(tmp_path / f"a.{suffix}", limits=Limits(frame_bytes=2 * 64 * 48 * 3))
        assert media.frames.shape == (1, 48, 64, 3) and abs(int(media.frames.mean()) - 120) < 4
        assert media.waveform is None
    (tmp_path / "img001.png").write_bytes((tmp_path / "a.png").read_bytes())
    (tmp_path / "img%03d.png").write_bytes(b"no picture at all")
    assert cause_of(tmp_path / "img%03d.png") == "unreadable"  # and not img001.png


def cause_of(video, audio=None, **arguments):
    with pytest.raises(MediaError) as error:
        read_media(video, audio, **arguments)
    assert os.path.basename(audio or video) in str(error.value)
    return error.value.cause


def test_files_that_are_no_media_say_why(tmp_path):
    film = write_film(tmp_path / "a.mp4", lambda t: gray(round(40 + 60 * t)), ticks(0, 2), tone(2))
    front = write_film(
        tmp_path / "front.mp4",
        lambda t: gray(round(40 + 60 * t)),
        ticks(0, 2),
        tone(2),
        options={"movflags": "faststart"},
    )
    (tmp_path / "text.mp4").write_text("This is no film.\n" * 50)
    (tmp_path / "empty.mp4").write_bytes(b"")
    (tmp_path / "tail.mp4").write_bytes(film.read_bytes()[:-2000])  # the table of contents stands at the end
    (tmp_path / "half.mp4").write_bytes(front.read_bytes()[: front.stat().st_size // 2])
    (tmp_path / "zero.wav").write_bytes(b"RIFF$\0\0\0WAVEfmt \x10\0\0\0\1\0\1\0\x80>\0\0\0}\0\0\2\0\x10\0data\0\0\0\0")
    causes = {name: cause_of(tmp_path / name) for name in ("text.mp4", "empty.mp4", "tail.mp4", "half.mp4", "gone.mp4")}
    assert causes == {
        "text.mp4": "unreadable",
        "empty.mp4": "empty",
        "tail.mp4": "unreadable",
        "half.mp4": "truncated",
        "gone.mp4": "missing",
    }
    assert cause_of(None, tmp_path / "zero.wav") == "no_stream"
    assert cause_of(tmp_path) == "missing"  # a folder is no file


def test_absurd_headers_are_refused_before_decoding(tmp_path):
    film = write_film(tmp_path / "a.mp4", lambda t: gray(60), ticks(0, 1), tone(1))
    assert cause_of(film, limits=Limits(max_pixels=1000)) == "too_many_pixels"
    assert cause_of(film, limits=Limits(max_source_duration=0.5)) == "too_long"
    soundfile.write(tmp_path / "slow.wav", tone(0.1), 16_000)
    raw = bytearray((tmp_path / "slow.wav").read_bytes())
    raw[24:28] = struct.pack("<I", 1)
    (tmp_path / "slow.wav").write_bytes(raw)
    assert cause_of(None, tmp_path / "slow.wav") == "bad_rate"


def test_playlists_reach_nothing(tmp_path):
    film = write_film(tmp_path / "secret.mp4", lambda t: gray(60), ticks(0, 1))
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.settimeout(0.2)
        url = f"http://127.0.0.1:{listener.getsockname()[1]}/x.ts"
        playlists = {
            "hls": f"#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\n{url}\n#EXTINF:1,\nfile://{film}\n#EXT-X-ENDLIST\n",
            "concat": f"ffconcat version 1.0\nfile '{film}'\nfile '{url}'\n",
            "sdp": "v=0\no=- 0 0 IN IP4 127.0.0.1\ns=x\nc=IN IP4 127.0.0.1\nt=0 0\nm=video 5004 RTP/AVP 96\n"
            "a=rtpmap:96 H264/90000\n",
            "dash": '<?xml version="1.0"?><MPD xmlns="urn:mpeg:dash:schema:mpd:2011" type="static"><BaseURL>'
            f"{url}</BaseURL></MPD>",
        }
        for name, text in playlists.items():
            for suffix in ("mp4", "mkv", "ts"):
                (tmp_path / f"{name}.{suffix}").write_text(text)
                assert cause_of(tmp_path / f"{name}.{suffix}") == "unreadable"
        for name in (url, f"concat:{film}", "pipe:0", f"file:{film}"):
            assert cause_of(name) == "missing"
        with pytest.raises(TimeoutError):
            listener.accept()
