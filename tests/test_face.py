"""The face's track and its crops: found, smooth, steady, inside the frame."""

import sys
import time
from pathlib import Path

import cv2
import numpy as np
import pytest

from affekt.data.errors import SettingsError
from affekt.data.media.face import LEVELS, center_boxes, crop, face_tracks, find_detectors, haar
from affekt.data.media.streams import read_media

REAL = Path(__file__).resolve().parents[2] / "shared" / "data"
HAAR = find_detectors("haar")


def draw_face(frame, x, y, radius):
    """A face plain enough to draw and enough of one for the cascades; `radius` is half the head's width in pixels."""

    def spot(dx, dy, width, height, colour):
        axes = max(round(2 * width * radius), 1), max(round(2 * height * radius), 1)
        cv2.ellipse(frame, (round(x + 2 * dx * radius), round(y + 2 * dy * radius)), axes, 0, 0, 360, colour, -1)

    spot(0, -0.15, 0.62, 0.75, (50, 35, 30))
    spot(0, 0, 0.5, 0.68, (215, 175, 150))
    for side in (-1, 1):
        spot(side * 0.22, -0.18, 0.17, 0.05, (60, 40, 35))
        spot(side * 0.22, -0.05, 0.15, 0.08, (165, 120, 105))
        spot(side * 0.22, -0.05, 0.11, 0.05, (240, 240, 240))
        spot(side * 0.22, -0.05, 0.05, 0.05, (30, 20, 20))
        spot(side * 0.07, 0.2, 0.05, 0.03, (140, 95, 80))
    spot(0, 0.1, 0.06, 0.16, (228, 190, 168))
    spot(0, 0.38, 0.2, 0.06, (150, 60, 60))
    return frame


def film_of(places, height=224, width=300):
    """uint8 (T, H, W, 3) with one face at each (x, y, radius)."""
    frames = []
    for place in places:
        frame = draw_face(np.full((height, width, 3), (90, 120, 150), np.uint8), *place)
        frames.append(cv2.GaussianBlur(frame, (0, 0), max(place[2] / 30, 0.5)))
    return np.stack(frames)


def main_track(film, detectors):
    return face_tracks(film, detectors)[0]


@pytest.mark.parametrize("radius", [24, 40, 60])
def test_the_box_holds_the_whole_face_with_little_around_it(radius):
    film = film_of([(140, 110, radius)] * 20)
    track = main_track(film, HAAR)
    x0, y0, x1, y1 = track.boxes[0]
    assert track.rate == 1 and track.boxes.shape == (20, 4)
    assert x0 < 140 - radius and x1 > 140 + radius  # ears
    assert y0 < 110 - 1.0 * radius and y1 > 110 + 1.3 * radius  # forehead and chin
    assert x1 - x0 < 4.3 * radius and x1 - x0 == pytest.approx(y1 - y0, abs=1e-3)
    assert abs((x0 + x1) / 2 - 140) < 0.2 * radius


def test_the_box_follows_a_walk_without_shaking():
    xs = np.linspace(90, 210, 75)
    boxes = main_track(film_of([(x, 112, 36) for x in xs]), HAAR).boxes
    centre = (boxes[:, 0] + boxes[:, 2]) / 2
    assert np.abs(centre - xs)[15:-15].max() < 5
    assert np.abs(np.diff(centre, n=2)).max() < 0.2  # pixels per frame per frame
    assert np.abs(np.diff(boxes[:, 2] - boxes[:, 0])).max() < 0.3


def test_a_nod_moves_the_face_within_the_crop_and_not_the_box():
    ys = 112 + 8 * np.sin(2 * np.pi * 1.5 * np.arange(75) / 25)  # 1.5 nods a second
    boxes = main_track(film_of([(150, y, 40) for y in ys]), HAAR).boxes
    assert np.ptp((boxes[:, 1] + boxes[:, 3]) / 2) < 4 < np.ptp(ys)


def test_looks_without_a_face_are_bridged():
    film = film_of([(150, 112, 40)] * 75)
    film[20:45] = 90
    track = main_track(film, HAAR)
    assert 0.5 < track.rate < 0.8 and np.abs(track.boxes - track.boxes[0]).max() < 3
    assert face_tracks(np.full((50, 120, 160, 3), 90, np.uint8), HAAR) == []


def test_the_largest_face_is_kept_and_a_wrong_box_in_between_ignored():
    film = film_of([(200, 120, 44)] * 30)
    for frame in film:
        draw_face(frame, 50, 60, 22)
    boxes = main_track(film, HAAR).boxes
    assert np.abs((boxes[:, 0] + boxes[:, 2]) / 2 - 200).max() < 10

    calls = []

    def sometimes_wrong(frame):
        calls.append(frame.shape)
        good = [80, 60, 160, 140, 0.9]  # a fifth column, as detectors with a score have
        return [[90, 75, 175, 160, 0.8]] if len(calls) == 4 else [good, [0, 0, 30, 30, 0.99]]

    boxes = main_track(np.zeros((75, 224, 300, 3), np.uint8), [sometimes_wrong]).boxes
    assert np.ptp(boxes, axis=0).max() < 0.5 and len(calls) == 9
    assert (boxes[0, 0] + boxes[0, 2]) / 2 == pytest.approx(120, abs=0.5)


def test_a_small_face_in_a_wide_shot_is_found():
    film = film_of([(700, 150, 26)] * 5, 480, 960)
    assert len(haar(film[0], *LEVELS[0])) == 0
    track = main_track(film, HAAR)
    assert track.rate == 1 and abs(track.boxes[0, ::2].mean() - 700) < 8


@pytest.mark.parametrize("large", [36, 44, 52, 60])
def test_a_face_of_half_the_size_beside_another_is_found_in_a_wide_shot(large):
    film = film_of([(250, 240, large)] * 5, 480, 840)
    for frame in film:
        draw_face(frame, 600, 240, large / 2 + 2)
    centres = sorted(float(track.boxes[0, ::2].mean()) for track in face_tracks(film, HAAR) if track.rate == 1)
    assert len(centres) == 2 and abs(centres[0] - 250) < 8 and abs(centres[1] - 600) < 8


def test_boxes_stay_inside_and_square_at_the_rim():
    for place in [(30, 40, 40), (280, 200, 40), (150, 112, 100)]:
        track = main_track(film_of([place] * 10), HAAR)
        boxes = track.boxes
        assert boxes.min() >= 0 and boxes[:, [0, 2]].max() <= 300 and boxes[:, [1, 3]].max() <= 224
        np.testing.assert_allclose(boxes[:, 2] - boxes[:, 0], boxes[:, 3] - boxes[:, 1], atol=1e-3)


def test_crop_takes_the_pixels_of_the_box():
    rng = np.random.default_rng(3)
    frames = rng.integers(0, 256, (2, 60, 80, 3), np.uint8)
    boxes = np.array([[10, 20, 42, 52], [48, 0, 80, 32]], np.float32)
    same = crop(frames, boxes, 32)
    np.testing.assert_array_equal(same[0], frames[0, 20:52, 10:42])
    np.testing.assert_array_equal(same[1], frames[1, 0:32, 48:80])
    half = crop(frames, boxes, 16)
    means = frames[0, 20:52, 10:42].reshape(16, 2, 16, 2, 3).mean(axis=(1, 3))
    assert np.abs(half[0] - means).max() <= 1
    wave = np.tile((128 + 100 * np.sin(np.arange(80) / 6)).astype(np.uint8)[None, None, :, None], (1, 60, 1, 3))
    shifted = crop(wave, np.array([[10.5, 20, 42.5, 52]], np.float32), 32)  # half a pixel counts
    expected = 128 + 100 * np.sin((np.arange(32) + 10.5) / 6)
    assert np.abs(shifted[0, 5, :, 0] - expected).max() < 3


def test_the_named_fallback_is_the_centred_square():
    np.testing.assert_array_equal(center_boxes(2, 60, 100), [[20, 0, 80, 60]] * 2)
    track = main_track(np.zeros((3, 60, 100, 3), np.uint8), find_detectors("center"))
    np.testing.assert_array_equal(track.boxes, center_boxes(3, 60, 100))


def test_detectors_are_named_by_a_dotted_path(tmp_path, monkeypatch):
    (tmp_path / "my_faces.py").write_text("limit = 3\ndef find(frame):\n    return [[1, 2, 9, 10]]\n")
    monkeypatch.syspath_prepend(tmp_path)
    (found,) = find_detectors("my_faces:find")
    assert found(None) == [[1, 2, 9, 10]]
    for name in ("my_faces:lost", "my_faces:limit", "nowhere:find", "my_faces"):
        with pytest.raises(SettingsError, match=name):
            find_detectors(name)
    sys.modules.pop("my_faces")


def test_results_do_not_depend_on_what_was_seen_before():
    film, other = film_of([(140, 110, 40)] * 10), film_of([(90, 100, 30)] * 10)
    first = main_track(film, HAAR).boxes
    face_tracks(other, HAAR)
    np.testing.assert_array_equal(main_track(film, HAAR).boxes, first)


@pytest.mark.skipif(not REAL.is_dir(), reason="the folder of real clips beside the checkout is not there")
@pytest.mark.parametrize("folder, pattern, count", [("grid_s1", "*.mp4", 5), ("ravdess_av", "*.mp4", 3)])
def test_real_faces_are_found_and_fill_the_crop(folder, pattern, count):
    files = sorted((REAL / folder).glob(pattern))
    spent = 0.0
    for file in files[:: len(files) // count][:count]:
        media = read_media(file)
        began = time.process_time()
        track = main_track(media.frames, HAAR)
        crops = crop(media.frames, track.boxes, 160)
        spent += time.process_time() - began
        assert track.rate > 0.9 and np.abs(np.diff(track.boxes, axis=0)).max() < 1.5
        again = haar(crops[len(crops) // 2], *LEVELS[0])  # the detector's own box in the middle of the crop
        assert len(again) == 1
        x0, y0, x1, y1 = again[0]
        assert 95 < x1 - x0 < 135 and abs((x0 + x1) / 2 - 80) < 12 and abs((y0 + y1) / 2 - 75) < 12
    assert spent / count < 0.5  # seconds of one core per clip; about 0.06 on an idle one


def test_the_box_of_a_mouth_holds_it_and_not_the_eyes():
    film = film_of([(140, 110, 50)] * 6)
    x0, y0, x1, y1 = main_track(film, find_detectors("affekt.data.media.face:mouth")).boxes[0]
    assert x0 < 140 - 20 and x1 > 140 + 20 and y0 < 148 - 6 and y1 > 148 + 6  # as it is drawn
    assert y0 > 110 - 0.05 * 100 + 8 and x1 - x0 < 100
