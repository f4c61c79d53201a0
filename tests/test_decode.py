"""One window of a clip: the right pictures, and the sound that belongs to the first of them."""

import io
import os
import random

import av
import numpy as np
import pytest

from affekt.data.decode import Window, decode_frames, decode_window, random_start, window_starts
from affekt.data.media.clip import PrepareSettings, prepare_clip
from affekt.data.media.clip import encode_clip as prepare_encode
from affekt.data.shard_writer import ShardWriter
from affekt.data.shards import SampleError, ShardIndex

FRAMES, SIZE = 75, 32
CLICKS = (0.2, 1.0, 1.48, 2.72)  # seconds


def numbered_frames(count=FRAMES):
    """Frame i is grey of brightness 3 i."""
    return np.broadcast_to((3 * np.arange(count, dtype=np.uint8))[:, None, None, None], (count, SIZE, SIZE, 3))


def clicks(count=FRAMES):
    sound = np.zeros(count * 640, np.float32)
    for second in CLICKS:
        sound[round(second * 16000)] = 0.9
    return sound


def write(folder, samples, picture="mjpeg", size=SIZE):
    writer = ShardWriter(folder)
    writer.write_shard(0, samples)
    return writer.finish({"size": size, "fps": 25, "sample_rate": 16000, "picture": picture, "prepare": {}})


@pytest.fixture(scope="module")
def index(tmp_path_factory, encode_clip):
    samples = [
        encode_clip("both", numbered_frames(), clicks()),
        encode_clip("picture", numbered_frames(), None),
        encode_clip("sound", None, clicks()),
        encode_clip("short", numbered_frames(20), clicks()[: 20 * 640]),
        encode_clip("one", numbered_frames(1), clicks()[:640]),
    ]
    return write(tmp_path_factory.mktemp("decode"), samples)


def frame_numbers(video):
    assert video.dtype == np.uint8 and np.ptp(video, axis=(1, 2, 3)).max() <= 1
    return (video.reshape(len(video), -1).mean(1) / 3).round().astype(int).tolist()


def click_times(view, start):
    return [round(start + place / 16000, 5) for place in np.flatnonzero(view.audio > 0.5)]


def test_window_sizes():
    assert Window().audio_samples == 41200
    assert Window().duration == 2.575
    assert Window(num_frames=8, frame_stride=10, mel_frames=32).duration == 71 / 25


@pytest.mark.parametrize("start", [0.0, 0.16, 0.4, 1.0, 1.4])
def test_pictures_and_sound_lie_on_one_clock(index, start):
    window = Window(num_frames=8, frame_stride=4, mel_frames=128)  # 1.16 s of pictures, 1.295 s of sound
    view = decode_window(index, index.samples[0], window, start)
    first = round(start * 25)
    assert frame_numbers(view.video) == list(range(first, first + 32, 4))
    assert view.audio.dtype == np.float32 and len(view.audio) == view.audio_valid == window.audio_samples
    expected = [second for second in CLICKS if start <= second < start + window.audio_samples / 16000]
    assert expected and click_times(view, start) == expected


def test_a_clip_that_ends_early(index):
    window = Window(num_frames=8, frame_stride=4, mel_frames=256)
    view = decode_window(index, index.samples[3], window, 0.0)
    assert frame_numbers(view.video) == [0, 4, 8, 12, 16, 19, 19, 19]
    assert view.audio_valid == 20 * 640 and len(view.audio) == window.audio_samples
    assert click_times(view, 0.0) == [0.2] and not view.audio[view.audio_valid :].any()
    view = decode_window(index, index.samples[4], window, 0.0)
    assert frame_numbers(view.video) == [0] * 8 and view.audio_valid == 640


def test_a_window_at_and_beyond_the_end(index):
    window = Window(num_frames=2, frame_stride=1, mel_frames=8)
    view = decode_window(index, index.samples[0], window, 2.96)
    assert frame_numbers(view.video) == [74, 74] and view.audio_valid == 640
    view = decode_window(index, index.samples[0], window, 5.0)
    assert frame_numbers(view.video) == [74, 74] and view.audio_valid == 0


def test_absent_streams_stay_absent(index):
    picture = decode_window(index, index.samples[1], Window(), 0.0)
    sound = decode_window(index, index.samples[2], Window(), 0.0)
    assert picture.audio is None and picture.audio_valid == 0 and picture.video.shape == (16, SIZE, SIZE, 3)
    assert sound.video is None and click_times(sound, 0.0) == [0.2, 1.0, 1.48]
    assert decode_window(index, index.samples[0], Window(), 0.0, "audio").video is None
    assert decode_window(index, index.samples[0], Window(), 0.0, "video").audio is None


def test_colours_are_red_green_blue(tmp_path, encode_clip):
    frames = np.empty((3, SIZE, SIZE, 3), np.uint8)
    frames[:] = np.array([[200, 40, 40], [40, 200, 40], [40, 40, 200]], np.uint8)[:, None, None]
    index = write(tmp_path, [encode_clip("colours", frames, None)])
    decoded = decode_frames(index, index.samples[0], np.arange(3)).astype(int)
    assert abs(decoded - frames).max() <= 4


@pytest.mark.parametrize("size", [32, 72, 96, 160])
def test_mp4_members_give_the_same_pictures(tmp_path, encode_clip, size):
    """A ramp from left to right, brighter with every frame; 32 and 96 are widths at which decord pads rows."""
    ramp = np.linspace(0, 100, size).astype(np.uint8)[None, None, :, None] + np.arange(FRAMES)[:, None, None, None] * 2
    frames = np.broadcast_to(ramp, (FRAMES, size, size, 3)).astype(np.uint8)
    record, members = encode_clip("clip", frames, clicks())
    file = io.BytesIO()
    with av.open(file, "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=25, options={"crf": "1", "g": "10", "bf": "2"})
        stream.width = stream.height = size
        stream.pix_fmt = "yuv420p"
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24")))
        container.mux(stream.encode())
    index = write(
        tmp_path, [({**record, "frame_sizes": []}, {"mp4": file.getvalue(), "flac": members["flac"]})], "mp4", size
    )
    window = Window(num_frames=8, frame_stride=4, mel_frames=64)
    for start in (1.0, 2.0):
        view = decode_window(index, index.samples[0], window, start)
        expected = frames[np.minimum(round(start * 25) + 4 * np.arange(8), FRAMES - 1)].astype(int)
        difference = abs(view.video.astype(int) - expected)
        assert difference.mean() < 1 and difference.max() <= 6
    assert click_times(decode_window(index, index.samples[0], window, 1.0), 1.0) == [1.0, 1.48]


def test_damage_is_named_by_its_cause(tmp_path, encode_clip):
    good = encode_clip("good", numbered_frames(), clicks())
    record, members = encode_clip("bad", numbered_frames(), clicks())
    cut = members["mjpeg"][: record["frame_sizes"][0] // 2]
    noise = members["mjpeg"][: sum(record["frame_sizes"][:8])] + bytes(record["frame_sizes"][8])
    samples = [
        good,
        ({**record, "id": "cut", "frame_sizes": [len(cut)], "frames": 1}, {**members, "mjpeg": cut}),
        ({**record, "id": "noise", "frame_sizes": record["frame_sizes"][:9], "frames": 9}, {**members, "mjpeg": noise}),
        ({**record, "id": "text"}, {**members, "flac": b"not a flac file"}),
        ({**record, "id": "fewer", "samples": 99999}, members),
    ]
    index = write(tmp_path, samples)
    messages = {
        "cut": "clip cut, member mjpeg: cannot be decoded",
        "noise": "clip noise, member mjpeg: cannot be decoded",
        "text": "clip text, member flac: cannot be decoded",
        "fewer": "clip fewer, member flac: cannot be decoded: .*expected",
    }
    window = Window(num_frames=9, frame_stride=1, mel_frames=400)
    for broken in index.samples[1:]:
        with pytest.raises(SampleError, match=messages[broken.id]) as error:
            decode_window(index, broken, window, 0.04 if broken.id != "fewer" else 2.0)
        assert error.value.cause == "decode"
    decode_window(index, index.samples[0], window, 0.0)
    with open(tmp_path / "shard-000000.tar", "r+b") as file:
        file.seek(index.samples[0].members["flac"][0] + 5)
        byte = file.read(1)
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte[0] ^ 1]))
    with pytest.raises(SampleError, match="checksum") as error:
        decode_window(ShardIndex.open(tmp_path), index.samples[0], window, 0.0)
    assert error.value.cause == "checksum"


def test_pictures_of_another_size_are_refused(tmp_path, encode_clip):
    index = write(tmp_path, [encode_clip("large", np.zeros((2, 24, 24, 3), np.uint8), None)])
    with pytest.raises(SampleError, match="frame 0 is 24x24, the index says 32x32"):
        decode_frames(index, index.samples[0], np.arange(2))


def test_random_starts_cover_the_clip_and_stay_inside():
    seed = random.randrange(2**32)
    print(f"seed {seed}")
    rng = random.Random(seed)
    window = Window(num_frames=8, frame_stride=4, mel_frames=128)
    last = round((3.0 - window.duration) * 25 - 0.5)
    assert random_start(3.0, window, 0.0) == 0 and random_start(3.0, window, 1 - 1e-9) == last / 25
    for _ in range(2000):
        duration = rng.uniform(0.01, 9)
        start = random_start(duration, window, rng.random())
        assert start == round(start * 25) / 25
        assert start == 0 if duration < window.duration else 0 <= start <= duration - window.duration + 1e-6


def test_even_starts():
    window = Window(num_frames=8, frame_stride=4, mel_frames=128)  # 1.295 s
    assert window_starts(3.0, window, 1) == [0.84]  # the middle of 0 .. 1.68
    assert window_starts(3.0, window, 3) == [0.0, 0.84, 1.68]
    assert window_starts(1.0, window, 3) == [0.0]
    assert window_starts(window.duration + 0.04, window, 5) == [0.0, 0.04]


def test_a_real_clip_comes_back_as_it_was_prepared(shared_data, tmp_path):
    """A clip of GRID and one of RAVDESS: what the shards give is the prepared clip, up to JPEG and 16 bits."""
    settings = PrepareSettings(size=SIZE)
    paths = [shared_data / "grid_s1" / "s1_bbaf2n.mp4", shared_data / "ravdess_audio" / "03-01-01-01-01-01-01.flac"]
    clips = [prepare_clip(path, settings) for path in paths]
    index = write(tmp_path, [prepare_encode(clip, settings) for clip in clips])
    window = Window(num_frames=8, frame_stride=5, mel_frames=128)
    face, voice = (decode_window(index, sample, window, 0.8) for sample in index.samples)
    difference = face.video.astype(int) - clips[0].frames[20:60:5]
    assert abs(difference).mean() < 6 and abs(difference.mean()) < 1
    assert voice.video is None
    for view, clip in zip((face, voice), clips):
        sound = clip.waveform[12800:][: window.audio_samples]
        assert view.audio_valid == window.audio_samples and abs(view.audio - sound).max() <= 2 / 2**15
        assert abs(view.audio).max() > 0.01
