"""Long sources become equal parts that together are the whole, whatever the container says about its length."""

import json
import signal
import subprocess
import sys
from fractions import Fraction
from itertools import pairwise
from pathlib import Path

import av
import numpy as np
import pytest
import simplejpeg
import soundfile

from affekt.cli import run
from affekt.data.errors import SettingsError
from affekt.data.manifest import Clip
from affekt.data.media import segments
from affekt.data.media.clip import PrepareSettings, prepare_clip
from affekt.data.media.container import Limits, MediaError
from affekt.data.media.segments import cut, measure
from affekt.data.media.streams import read_media
from affekt.data.prepare import prepare
from affekt.data.shards import ShardIndex
from benchmarks.media import gray, ticks, tone, write_film

SECONDS = 23.0


def loud_film(path, seconds=SECONDS, **options):
    """Gray level and loudness tell the time."""
    rate = 44_100 if path.suffix == ".avi" else 16_000
    sound = np.linspace(0.1, 0.9, round(seconds * rate)) * tone(seconds, rate, 200.0, 1.0)
    return write_film(path, lambda t: gray(20 + 8 * t), ticks(0, seconds), sound, rate=rate, **options)


@pytest.mark.parametrize("longest", [5.0, 3.3, 7.0, 11.48])
def test_parts_are_equal_none_is_too_long_and_together_they_are_the_whole(longest):
    for begin, end in [(0.0, SECONDS), (0.5, 60.0), (1.234, 23.456), (0.0, 3 * longest), (0.0, 1.999 * longest)]:
        parts = cut(Clip("a", Path("a.mp4"), meta={"label": "x"}), begin, end, longest, 25)
        frames = [round(((part.end or end) - (part.start or begin)) * 25, 6) for part in parts]
        assert len(parts) == max(int(np.ceil((end - begin) * 25 / np.floor(longest * 25))), 1)  # the fewest
        assert max(frames) <= longest * 25 and max(frames) - min(frames) <= 2
        assert parts[0].start in (begin, None) and parts[-1].end in (pytest.approx(end), None)
        assert all(a.end == b.start for a, b in pairwise(parts))
        places = [(part.start - begin) * 25 for part in parts if part.start is not None]
        assert places == pytest.approx([round(place) for place in places], abs=1e-6)  # ticks of the whole
        assert [part.id for part in parts] == [f"a@{k:03d}" for k in range(len(parts))]
        assert all(part.meta == {"label": "x"} and part.video == Path("a.mp4") for part in parts)


def test_a_clip_that_fits_or_whose_end_is_not_known_stays_as_it_is():
    clip = Clip("a", Path("a.mp4"))
    assert cut(clip, 0.0, 5.02, 5.0, 25) == cut(clip, 0.0, float("inf"), 5.0, 25) == [clip]


@pytest.mark.parametrize("kind", ["mp4", "mkv", "avi", "ts"])
def test_parts_hold_the_frames_and_the_sound_of_the_whole(tmp_path, kind):
    film = loud_film(tmp_path / f"a.{kind}")
    whole = read_media(film)
    begin, end = measure(Clip("a", film), Limits())
    assert len(whole.frames) == pytest.approx((end - begin) * 25, abs=1.01)
    parts = cut(Clip("a", film), begin, end, 6.0, 25)
    read = [read_media(film, start=part.start, end=part.end, limits=Limits(max_duration=6.0)) for part in parts]
    assert len(parts) == 4 and not any("cut" in part.flags for part in read)
    assert ["offset" in part.info for part in read] == [True, False, False, False]  # after a seek it says nothing
    frames = np.concatenate([part.frames for part in read])
    assert abs(len(frames) - len(whole.frames)) <= 1
    count = min(len(frames), len(whole.frames))
    assert np.abs(frames[:count].astype(int) - whole.frames[:count]).max() <= 3
    sound = np.concatenate([part.waveform for part in read])
    count = min(len(sound), len(whole.waveform))
    assert count > 0.99 * len(whole.waveform)
    np.testing.assert_allclose(sound[:count], whole.waveform[:count], atol=0.05)


def test_lengths_are_found_where_the_header_does_not_tell(tmp_path):
    """A fragmented mp4 and a matroska stream without a length, bare mp3 of varying rate, transport streams."""
    loud_film(tmp_path / "a.mp4", options={"movflags": "frag_keyframe+empty_moov+default_base_moof"})
    loud_film(tmp_path / "a.mkv", options={"live": "1"})
    loud_film(tmp_path / "a.ts")
    with av.open(str(tmp_path / "a.mp3"), "w", options={"write_xing": "0"}) as container:
        stream = container.add_stream("mp3", rate=16_000, layout="mono", options={"q": "5"})
        sound = np.concatenate([np.zeros(160_000), 0.5 * np.random.default_rng(0).standard_normal(208_000)])
        for at in range(0, len(sound), 1152):
            piece = (np.clip(sound[None, at : at + 1152], -1, 1) * 30_000).astype(np.int16)
            frame = av.AudioFrame.from_ndarray(piece, format="s16", layout="mono")
            frame.sample_rate, frame.pts, frame.time_base = 16_000, at, Fraction(1, 16_000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    for name in ("a.mp4", "a.mkv", "a.ts"):
        assert measure(Clip("a", tmp_path / name), Limits()) == pytest.approx((0, SECONDS), abs=0.1), name
    assert measure(Clip("a", None, tmp_path / "a.mp3"), Limits()) == pytest.approx((0, SECONDS), abs=0.2)


def test_only_what_all_streams_share_is_cut(tmp_path):
    film = write_film(tmp_path / "a.mp4", lambda t: gray(20 + 8 * t), ticks(0.5, 20), tone(12))
    soundfile.write(tmp_path / "b.wav", tone(8), 16_000)
    assert measure(Clip("a", film), Limits()) == pytest.approx((0.5, 12), abs=0.08)
    assert measure(Clip("a", film, tmp_path / "b.wav"), Limits()) == pytest.approx((0.5, 8), abs=0.08)
    assert measure(Clip("a", film, start=3.0, end=5.0), Limits()) == (3.0, 5.0)


def test_a_folder_of_frames_is_cut_like_a_film(tmp_path):
    """Large frames with a small face: each part is read a second time in full resolution."""
    (tmp_path / "frames").mkdir()
    noise = np.random.default_rng(0).integers(0, 256, (600, 900, 3), np.uint8)
    for number in range(10):
        picture = np.roll(noise, 8 * number, axis=1)
        (tmp_path / "frames" / f"{number}.jpg").write_bytes(simplejpeg.encode_jpeg(picture, quality=95))
    soundfile.write(tmp_path / "b.wav", tone(2.0), 16_000)
    alone, voiced = Clip("a", tmp_path / "frames"), Clip("b", tmp_path / "frames", tmp_path / "b.wav")
    assert measure(alone, Limits(), 25) == (0, 10 / 25) and measure(voiced, Limits(), 25) == (0, 2)
    parts = cut(voiced, 0, 2, 1.2, 25)
    sizes = settings(max_duration=1.2, size=512)  # more than the half that frames of this size are read at first
    pictures = np.concatenate([prepare_clip(part, sizes).frames for part in parts])
    whole = prepare_clip(voiced, settings(max_duration=10, size=512)).frames
    np.testing.assert_array_equal(pictures, whole)
    assert len(parts) == 2 and len(whole) == 50 and whole[0].std() > 40  # five ticks for each frame


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    folder = tmp_path_factory.mktemp("long")
    for number in range(3):
        loud_film(folder / f"film{number}.mp4", SECONDS if number == 1 else 1.0)
    soundfile.write(folder / "talk.wav", tone(9.0), 16_000)
    return folder


def settings(**values):
    return PrepareSettings(**{"face": "center", "size": 32, "max_duration": 5.0, "clips_per_shard": 3, **values})


def test_prepare_cuts_long_sources_into_clips_of_their_own(corpus, tmp_path):
    summary = prepare(corpus, tmp_path / "out", settings(), workers=2)
    index = ShardIndex.open(tmp_path / "out")
    names = ["film0", *(f"film1@{k:03d}" for k in range(5)), "film2", "talk@000", "talk@001"]
    assert [sample.id for sample in index.samples] == names
    assert (summary["sources"], summary["clips"], summary["prepared"]) == (4, 9, 9)
    assert [shard["samples"] for shard in index.header["shards"]] == [3, 3, 3]  # no block grows with a long source
    samples = {sample.id: sample for sample in index.samples}
    parts = [samples[f"film1@{k:03d}"] for k in range(5)]
    assert sum(part.frames for part in parts) == pytest.approx(SECONDS * 25, abs=1)
    assert len({part.source_sha256 for part in parts}) == 1 and not any("cut" in part.flags for part in parts)
    records = [json.loads(index.read(part, "json")) for part in parts]
    assert [record["start"] for record in records] == pytest.approx([4.6 * k for k in range(5)], abs=0.021)
    assert all(record["end"] == pytest.approx(record["start"] + record["duration"]) for record in records)
    assert (samples["talk@000"].samples, samples["talk@001"].samples) == (112 * 640, 113 * 640)
    alone = prepare_clip(Clip("x", corpus / "film1.mp4", start=records[2]["start"], end=records[2]["end"]), settings())
    assert len(alone.frames) == parts[2].frames and alone.record["samples"] == parts[2].samples

    cut_off = prepare(corpus, tmp_path / "cut", settings(long_clips="cut"), workers=1)
    assert cut_off["clips"] == 4 and cut_off["flags"]["cut"] == 2 and cut_off["duration_s"]["most"] == 5.0
    with pytest.raises(SettingsError, match="long_clips"):
        PrepareSettings.parse({"long_clips": "keep"})


def test_a_damaged_end_costs_the_parts_it_is_in(corpus, tmp_path):
    source = tmp_path / "source"
    source.mkdir()
    film = loud_film(source / "a.mp4", options={"movflags": "faststart"})
    film.write_bytes(film.read_bytes()[: round(0.7 * film.stat().st_size)])
    summary = prepare(source, tmp_path / "out", settings(), workers=1)
    assert summary["clips"] == 5 and 3 <= summary["prepared"] < 5
    rows = [json.loads(line) for line in (tmp_path / "out" / "quarantine.jsonl").read_text().splitlines()]
    assert {row["cause"] for row in rows} <= {"truncated", "empty", "damaged", "no_overlap"} and rows[-1][
        "id"
    ] == "a@004"


def test_a_resumed_run_does_not_measure_again_and_gives_the_same_bytes(corpus, tmp_path, monkeypatch):
    prepare(corpus, tmp_path / "straight", settings(), workers=1)

    def stop(done, total):
        if done == 7:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        prepare(corpus, tmp_path / "out", settings(), 2, stop)
    assert measured(tmp_path / "out") == ["film0", "film1", "film2", "talk"]
    tasks = []
    from affekt.data.media.workers import MediaPool

    original = MediaPool.run
    monkeypatch.setattr(
        MediaPool, "run", lambda self, clips, task="encode": tasks.append(task) or original(self, clips, task)
    )
    prepare(corpus, tmp_path / "out", settings(), workers=2)
    assert tasks == ["encode"]
    assert_same(tmp_path / "straight", tmp_path / "out")


def measured(out):
    lines = (out / "unfinished" / "lengths.jsonl").read_text().splitlines()
    return [json.loads(line)["id"] for line in lines if line]


def assert_same(straight, out):
    for path in straight.glob("*"):
        if path.name != "summary.json":
            assert path.read_bytes() == (out / path.name).read_bytes(), path.name


SCRIPT = """
import sys, time
from affekt.data.prepare import PrepareSettings, prepare
def measuring(done, total):
    print(done, total, flush=True)
    if done == int(sys.argv[3]):
        time.sleep(60)
settings = PrepareSettings(face="center", size=32, max_duration=5.0, clips_per_shard=3)
prepare(sys.argv[1], sys.argv[2], settings, 2, measuring=measuring)
"""


def test_measuring_that_is_killed_goes_on_with_the_next_source(corpus, tmp_path):
    """Where the kill tore a line, its source alone is measured again."""
    prepare(corpus, tmp_path / "straight", settings(), workers=1)
    out, told = tmp_path / "out", []
    for stop_at in (3, -1):
        command = [sys.executable, "-c", SCRIPT, corpus, out, str(stop_at)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
            told.append([])
            for line in process.stdout:
                told[-1].append(line.strip())
                if line == f"{stop_at} 4\n":
                    process.send_signal(signal.SIGKILL)
        if stop_at == 3:
            lengths = out / "unfinished" / "lengths.jsonl"
            lengths.write_bytes(lengths.read_bytes()[:-9])
    assert told == [["0 4", "1 4", "2 4", "3 4"], ["2 4", "3 4", "4 4"]]
    assert_same(tmp_path / "straight", out)


def test_the_command_shows_measuring_as_a_phase_of_its_own(corpus, tmp_path, capsys):
    arguments = ["--face", "center", "--size", "32", "--workers", "1", "max_duration=5"]
    assert run(["prepare", str(corpus), str(tmp_path / "out"), *arguments]) == 0
    first, second = capsys.readouterr().err.splitlines()
    assert first.startswith("measure: 4/4 sources") and second.startswith("prepare: 9/9 clips")


def test_a_source_that_cannot_be_measured_is_not_cut_off_in_silence(tmp_path):
    """A day of sound that states no length takes some seconds to be measured, and milliseconds to be read for one."""
    source, piece = tmp_path / "source", tmp_path / "piece.aac"
    source.mkdir()
    with av.open(str(piece), "w", format="adts") as container:
        stream = container.add_stream("aac", rate=16_000, layout="mono")
        silence = av.AudioFrame.from_ndarray(np.zeros((1, 160_000), np.int16), format="s16", layout="mono")
        silence.sample_rate = 16_000
        container.mux([*stream.encode(silence), *stream.encode(None)])
    (source / "a_long.aac").write_bytes(piece.read_bytes() * 8_640)
    for number in range(3):
        soundfile.write(source / f"b{number}.wav", tone(2.0), 16_000)
    hasty = settings(max_duration=1.0, timeout_s=2, max_source_duration=1e6)
    assert prepare_clip(Clip("a", None, source / "a_long.aac"), hasty).record["duration"] == 1.0
    summary = prepare(source, tmp_path / "out", hasty, workers=1)
    (row,) = [json.loads(line) for line in (tmp_path / "out" / "quarantine.jsonl").read_text().splitlines()]
    assert (row["id"], row["cause"]) == ("a_long", "timeout") and summary["prepared"] == 6
    assert row["message"].startswith("its length is not known: not done after timeout_s=2;")


def test_a_source_that_breaks_off_while_it_is_measured_says_where(tmp_path, monkeypatch):
    film = loud_film(tmp_path / "a.ts", 3.0)
    opened = []

    class Broken:
        """A demuxer that fails late, which no damage does on every version of FFmpeg."""

        def __init__(self, container):
            self.container = container

        def __getattr__(self, name):
            return getattr(self.container, name)

        def __enter__(self):
            return self

        def __exit__(self, *_):
            self.container.close()

        def demux(self, streams):
            for packet in self.container.demux(streams):
                if packet.pts and packet.pts * packet.time_base - self.container.start_time / av.time_base > 2:
                    opened.append(packet)
                    raise av.InvalidDataError(1, "Invalid data")
                yield packet

    original = segments.open_media
    monkeypatch.setattr(segments, "open_media", lambda path, limits: Broken(original(path, limits)))
    with pytest.raises(MediaError, match=r"a\.ts: cannot be read after (1\.9|2)") as error:
        measure(Clip("a", film), Limits())
    assert error.value.cause == "damaged" and opened


def test_a_row_that_ends_after_its_file_is_flagged(tmp_path, capsys):
    loud_film(tmp_path / "film.mp4", 3.0)
    soundfile.write(tmp_path / "talk.wav", tone(3.0), 16_000)
    (tmp_path / "frames").mkdir()
    for number in range(75):
        (tmp_path / "frames" / f"{number}.jpg").write_bytes(simplejpeg.encode_jpeg(gray(number)))
    rows = ["whole,,", "within,1,2", "exact,1,3", "rounded,1,3.06", "beyond,1,4", "far,0,60"]
    lines = [f"{path},{path[:4]}_{row}\n" for path in ("film.mp4", "talk.wav", "frames") for row in rows]
    (tmp_path / "m.csv").write_text("path,id,start,end\n" + "".join(lines))
    flagged = {}
    for longest in (10.0, 1.2):  # in one piece, and in parts
        summary = prepare(tmp_path / "m.csv", tmp_path / f"{longest}", settings(max_duration=longest), workers=2)
        samples = ShardIndex.open(tmp_path / f"{longest}").samples
        flagged[longest] = [sample.id for sample in samples if "ends_early" in sample.flags]
        assert summary["flags"]["ends_early"] == 6 and "cut" not in summary["flags"]
        assert sum(s.duration for s in samples if "_far" in s.id) == pytest.approx(9.0, abs=0.1)
    names = ("film", "talk", "fram")
    assert flagged[10.0] == [f"{name}_{row}" for name in names for row in ("beyond", "far")]
    assert flagged[1.2] == [f"{name}_{row}" for name in names for row in ("beyond@001", "far@002")]
    run(["inspect", str(tmp_path / "10.0"), "--workers", "1"])
    assert "ends_early 6" in capsys.readouterr().out
