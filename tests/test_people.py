"""Several people in one picture: a track each, the one that speaks is kept, or all."""

import numpy as np
import pytest

from affekt.data.manifest import Clip
from affekt.data.media.clip import PrepareSettings, prepare_clip, prepare_people
from affekt.data.media.face import Track, face_tracks, find_detectors
from affekt.data.media.lips import choose, lip_agreement
from affekt.data.media.streams import read_media
from affekt.data.prepare import prepare
from affekt.data.shards import ShardIndex
from affekt.data.synth.corpus import synthesise
from affekt.data.synth.film import write_clip
from benchmarks.prepare import choose_of_two, side_by_side

HAAR = find_detectors("haar")


@pytest.fixture(scope="module")
def heads(tmp_path_factory):
    """Talking heads of six people with their sound."""
    folder = tmp_path_factory.mktemp("heads")
    synthesise(folder / "corpus", 6, 6, seed=5, workers=1)
    return sorted((folder / "corpus" / "clips").glob("*.mp4"))


@pytest.fixture(scope="module")
def pair(heads, tmp_path_factory):
    """A film of two heads; the one on the right speaks."""
    speaks, other = read_media(heads[0]), read_media(heads[1])
    path = tmp_path_factory.mktemp("pair") / "pair.mp4"
    frames = side_by_side(speaks.frames, other.frames, left=False)
    write_clip(path, frames, speaks.waveform, 25)
    return path


def right_choices(films):
    pairs = [pair for a, b in zip(films[0::2], films[1::2], strict=True) for pair in ((a, b), (b, a))]
    chosen = [choose_of_two(*pair, left=number % 4 < 2) for number, pair in enumerate(pairs)]
    assert all(found for found, _ in chosen)
    return sum(right for _, right in chosen) / len(chosen)


def test_the_head_that_speaks_is_chosen(heads):
    assert right_choices(heads) >= 5 / 6


def test_the_real_person_who_speaks_is_chosen_more_often_than_not(shared_data):
    """The same woman says sentences of one grammar on both sides: harder than a speaker beside a listener."""
    films = sorted((shared_data / "grid_s1").glob("*.mp4"))
    assert right_choices(films[:: len(films) // 8][:8]) >= 6 / 8


def test_one_track_and_one_smooth_box_for_each(pair):
    frames = read_media(pair).frames
    tracks = face_tracks(frames, HAAR)
    assert len(tracks) == 2 and all(track.rate > 0.9 and track.boxes.shape == (len(frames), 4) for track in tracks)
    left, right = sorted(tracks, key=lambda track: track.boxes[0, 0])
    assert left.boxes[:, 2].max() < 240 and right.boxes[:, 0].min() > 200  # of 448
    assert all(np.abs(np.diff(track.boxes, axis=0)).max() < 1.5 for track in tracks)
    assert all((track.first, track.stop) == (0, len(frames)) for track in tracks)


def track(area, rate=1.0, frames=10):
    return Track(np.tile(np.array([0, 0, 96, 96], np.float32), (frames, 1)), rate, area, 0, frames)


def test_size_decides_unless_the_sound_speaks_for_another_face_of_its_size_class():
    assert choose([track(900), track(1000)], [0.3, 0.3]) == 1
    assert choose([track(900), track(1000)], [0.4, 0.3]) == 0
    assert choose([track(500), track(1000)], [0.39, 0.3]) == 1
    assert choose([track(500), track(1000)], [0.41, 0.3]) == 0
    assert choose([track(200), track(1000)], [0.9, 0.0]) == 1  # someone in the background
    assert choose([track(1000, 0.3), track(800)], [0.0, 0.0]) == 1  # seen for a third of the time


def test_agreement_is_high_for_the_sound_s_own_mouth_only():
    rng = np.random.default_rng(0)
    opening = np.convolve(rng.random(100), np.ones(5) / 5, "same")
    frames = np.full((100, 96, 96, 3), 120, np.uint8)
    for frame, wide in zip(frames, np.cumsum(opening)):
        frame[58:78, 30:66] = 60 + 40 * np.sin(4 * wide)  # moves more while it speaks
    still = track(5000, frames=100)
    level = np.repeat(np.abs(np.diff(np.sin(4 * np.cumsum(opening)), prepend=0)), 640)
    sound = (level * rng.standard_normal(64_000)).astype(np.float32)
    own = lip_agreement(frames, still, sound, 25, 16_000)
    assert own > 0.4 and all(
        lip_agreement(frames, still, np.roll(sound, shift), 25, 16_000) < own - 0.15 for shift in (16_000, 32_000)
    )
    assert lip_agreement(frames, still, 0 * sound, 25, 16_000) == 0
    assert lip_agreement(0 * frames, still, sound, 25, 16_000) == 0
    assert lip_agreement(frames[:4], track(900, frames=4), sound[:2000], 25, 16_000) == 0


def test_main_takes_the_speaker_and_all_takes_each_as_a_clip(pair, heads):
    settings = PrepareSettings(size=64)
    main = prepare_clip(Clip("pair", pair), settings)
    assert "several_people" in main.record["flags"] and main.record["id"] == "pair"
    first, second = prepare_people(Clip("pair", pair), settings.model_copy(update={"people": "all"}))
    assert (first.record["id"], second.record["id"]) == ("pair@p0", "pair@p1")
    np.testing.assert_array_equal(first.frames, main.frames)
    np.testing.assert_array_equal(first.waveform, second.waveform)
    assert "other_person" in second.record["flags"] and "other_person" not in first.record["flags"]
    own = [prepare_clip(Clip("x", head), settings).frames for head in heads[:2]]

    def apart(person, alone):
        count = min(len(person.frames), len(alone))
        return np.abs(person.frames[:count].astype(int) - alone[:count]).mean()

    for person, mine, theirs in ((first, *own), (second, *own[::-1])):
        assert apart(person, mine) < 0.6 * apart(person, theirs)


def test_someone_who_leaves_is_a_clip_as_long_as_they_were_there(pair, tmp_path):
    media = read_media(pair)
    frames = media.frames.copy()
    frames[40:, :, :224] = frames[40:, :8, :8].mean(axis=(1, 2), dtype=float).astype(np.uint8)[:, None, None]
    write_clip(tmp_path / "a.mp4", frames, media.waveform, 25)
    people = prepare_people(Clip("a", tmp_path / "a.mp4"), PrepareSettings(size=64, people="all"))
    stays, leaves = sorted(people, key=lambda person: -person.record["frames"])
    assert stays.record["frames"] == len(frames) and 32 <= leaves.record["frames"] <= 48
    assert leaves.record["samples"] == leaves.record["frames"] * 640
    assert leaves.record["start"] == 0 and leaves.record["end"] == pytest.approx(leaves.record["frames"] / 25)
    (alone,) = prepare_people(Clip("a", tmp_path / "a.mp4"), PrepareSettings(size=64, people="all", min_duration=2.5))
    assert alone.record["id"] == "a" and alone.record["frames"] == len(frames)  # too brief to be a clip, and no loss


def test_prepare_counts_people_beside_clips(pair, heads, tmp_path):
    source = tmp_path / "source"
    source.mkdir()
    (source / "pair.mp4").write_bytes(pair.read_bytes())
    (source / "single.mp4").write_bytes(heads[2].read_bytes())
    summary = prepare(source, tmp_path / "all", PrepareSettings(size=64, people="all"), workers=1)
    assert [sample.id for sample in ShardIndex.open(tmp_path / "all").samples] == ["pair@p0", "pair@p1", "single"]
    assert (summary["clips"], summary["prepared"], summary["other_people"]) == (2, 2, 1)
    summary = prepare(source, tmp_path / "main", PrepareSettings(size=64), workers=1)
    assert [sample.id for sample in ShardIndex.open(tmp_path / "main").samples] == ["pair", "single"]
    assert summary["flags"] == {"several_people": 1} and summary["other_people"] == 0
