"""Where faces are: detection on a few frames, tracks, a smooth box for each, square crops.

The same code runs when shards are prepared and when a trained model meets a new video.
"""

import dataclasses
import importlib
import math
from collections.abc import Callable, Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from affekt.data.errors import SettingsError

cv2.setNumThreads(1)  # parallel over clips, not within one; also keeps results apart from the number of cores

Detector = Callable[[np.ndarray], np.ndarray]  # uint8 (H, W, 3) RGB -> (N, 4 or more): x0, y0, x1, y1 in pixels
Linked = tuple[np.ndarray, np.ndarray]  # frame numbers (N,) and boxes (N, 4) of one face

DETECTIONS_PER_SECOND = 3
# What the cascades try one after the other until a face is found in most frames: width of the gray picture, share of it
# added at each side. Small is fast and enough for a talking head, the rim helps where the frame cuts the head, wide
# shots need the larger ones. (alt2 gives fewer false faces, default finds more turned ones.)
LEVELS = (("alt2", 120, 0.0), ("alt2", 120, 0.15), ("default", 120, 0.15), ("alt2", 320, 0.0), ("alt2", 640, 0.0))
# Pixels of the smallest box looked for in that picture, and of the largest box below which a picture of twice the width
# is looked at too: its boxes are sharper, and faces of half the size beside it are found.
SMALLEST, COARSE = 20, 50
ENOUGH = 0.6  # share of looks with a face at which no further level is tried
SAME_FACE = 0.3  # least overlap (intersection over union) of two neighbouring detections of a face
# Side of the crop in widths of the cascade's box, and how far below its centre the crop's centre lies. The box ends
# at the brows and the lower lip; these two leave the whole forehead and chin and about a tenth of room on each side.
MARGIN, LOWER = 1.4, 0.05
SMOOTH_CENTRE, SMOOTH_SIZE = 0.6, 1.5  # seconds (standard deviation): follows a walk, keeps nods and shakes inside


@dataclasses.dataclass(frozen=True)
class Track:
    """`boxes` float32 (T, 4) x0, y0, x1, y1 of the square crop of each frame; `rate` is the share of looked-at frames
    in which the face was found, `area` the mean of the face's over those. The face is there in the frames from `first`
    to before `stop`, half the time between two looks more or less; elsewhere the box stands still."""

    boxes: np.ndarray
    rate: float
    area: float
    first: int
    stop: int


def find_detectors(name: str) -> tuple[Detector, ...]:
    """What to try in turn for `haar`, `center` (nothing) or `package.module:callable`. Raises SettingsError."""
    if name == "haar":
        return tuple(partial(haar, cascade=cascade, width=width, rim=rim) for cascade, width, rim in LEVELS)
    if name == "center":
        return ()
    module, colon, attribute = name.partition(":")
    try:
        if not colon:
            raise ImportError("expected `haar`, `center` or `package.module:callable`")
        detector = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError, ValueError) as error:
        raise SettingsError(f"face detector `{name}`: {error}") from None
    if not callable(detector):
        raise SettingsError(f"face detector `{name}` is not callable")
    return (detector,)


def haar(frame: np.ndarray, cascade: str = "alt2", width: int = 160, rim: float = 0.0) -> np.ndarray:
    """Boxes (N, 4) in pixels of frame (H, W, 3) uint8 RGB by one of OpenCV's frontal face cascades."""
    gray = cv2.cvtColor(frame, cv2.COLOR_RGB2GRAY)
    boxes = _detect(gray, cascade, width, rim)
    scale = width / gray.shape[1]
    if len(boxes) and scale < 1 and scale * (boxes[:, 2] - boxes[:, 0]).max() < COARSE:
        finer = _detect(gray, cascade, 2 * width, rim)
        boxes = finer if len(finer) >= len(boxes) else boxes
    return boxes


def mouth(frame: np.ndarray) -> np.ndarray:
    """As `haar`, but boxes (N, 4) around the mouths, so that few pixels show the lips in detail: for matching speech
    with lips. `affekt prepare --face affekt.data.media.face:mouth --size 64`."""
    x0, y0, x1, y1 = haar(frame, width=120).T
    side, x, y = 0.42 * (x1 - x0), (x0 + x1) / 2, y0 + 0.82 * (y1 - y0)
    return np.stack([x - side / 2, y - side / 2, x + side / 2, y + side / 2], axis=1)


def _detect(gray: np.ndarray, cascade: str, width: int, rim: float) -> np.ndarray:
    scale = min(1.0, width / gray.shape[1])
    if scale < 1:
        gray = cv2.resize(gray, None, fx=scale, fy=scale, interpolation=cv2.INTER_AREA)
    edge = round(rim * gray.shape[1])
    gray = np.pad(gray, edge, mode="edge")
    x, y, w, h = np.reshape(_cascade(cascade).detectMultiScale(gray, 1.15, 4, minSize=(SMALLEST, SMALLEST)), (-1, 4)).T
    return np.stack([x - edge, y - edge, x - edge + w, y - edge + h], axis=1).astype(np.float32) / np.float32(scale)


@cache
def _cascade(name: str) -> cv2.CascadeClassifier:
    path = Path(cv2.data.haarcascades) / f"haarcascade_frontalface_{name}.xml"
    cascade = cv2.CascadeClassifier(str(path))
    assert not cascade.empty(), f"{path} is missing; install opencv-python-headless below 5"
    return cascade


def center_boxes(count: int, height: int, width: int) -> np.ndarray:
    """(count, 4): the largest centred square of the frame."""
    side = min(height, width)
    x, y = (width - side) / 2, (height - side) / 2
    return np.tile(np.array([x, y, x + side, y + side], np.float32), (count, 1))


def face_tracks(frames: np.ndarray, detectors: Sequence[Detector], fps: float = 25) -> list[Track]:
    """The tracks of all faces in frames (T, H, W, 3), the one that covers most in sum over the clip first.

    Without a detector it is one, the centred square, with a rate of 0.
    """
    count, height, width, _ = frames.shape
    if not detectors:
        return [Track(center_boxes(count, height, width), 0.0, 0.0, 0, count)]
    looks = np.linspace(0, count - 1, max(math.ceil(count / fps * DETECTIONS_PER_SECOND), 1)).round().astype(int)
    looks = np.unique(looks)
    best: list[Linked] = []
    for detector in detectors:
        linked = _link(looks, [_boxes(detector(frames[look])) for look in looks])
        if linked and (not best or len(linked[0][0]) > len(best[0][0])):
            best = linked
        if best and len(best[0][0]) >= ENOUGH * len(looks):
            break
    half = math.ceil((count - 1) / max(len(looks) - 1, 1) / 2)
    tracks = []
    for times, boxes in best:
        squares = _inside(_squares(times, boxes, count, fps), height, width)
        first, stop = max(times[0] - half, 0), min(times[-1] + half + 1, count)
        tracks.append(Track(squares, len(times) / len(looks), _area(boxes) / len(times), int(first), int(stop)))
    return tracks


def _boxes(found: Any) -> np.ndarray:
    """What a detector returned, as float32 (N, 4); further columns such as a score are dropped."""
    boxes = np.asarray(found, np.float32)
    return boxes[:, :4] if boxes.size else np.zeros((0, 4), np.float32)


def _link(looks: np.ndarray, found: list[np.ndarray]) -> list[Linked]:
    """Link detections that overlap from look to look; the track with the most area in sum comes first."""
    tracks: list[tuple[list[int], list[np.ndarray]]] = []
    for look, boxes in zip(looks, found, strict=True):
        free = list(range(len(boxes)))
        for times, members in sorted(tracks, key=lambda track: -len(track[0])):
            overlaps = [_overlap(members[-1], boxes[i]) for i in free]
            if overlaps and max(overlaps) > SAME_FACE:
                best = free.pop(int(np.argmax(overlaps)))
                times.append(int(look))
                members.append(boxes[best])
        tracks += [([int(look)], [boxes[i]]) for i in free]
    linked = [(np.array(times), np.stack(members)) for times, members in tracks]
    return sorted(linked, key=lambda track: -_area(track[1]))


def _area(boxes: np.ndarray) -> float:
    """The sum over boxes (N, 4)."""
    return float(((boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])).sum())


def _overlap(a: np.ndarray, b: np.ndarray) -> float:
    width = min(a[2], b[2]) - max(a[0], b[0])
    height = min(a[3], b[3]) - max(a[1], b[1])
    if width <= 0 or height <= 0:
        return 0.0
    both = width * height
    return float(both / ((a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - both))


def _squares(times: np.ndarray, boxes: np.ndarray, count: int, fps: float) -> np.ndarray:
    """(count, 3) centre x, centre y, side: outliers removed, interpolated to every frame, smoothed over time."""
    x0, y0, x1, y1 = boxes.astype(np.float64).T
    face = np.maximum(x1 - x0, y1 - y0)
    known = np.stack([(x0 + x1) / 2, (y0 + y1) / 2 + LOWER * face, face * MARGIN], axis=1)
    if len(known) >= 3:  # a single wrong box between two good ones
        known[1:-1] = np.median(np.stack([known[:-2], known[1:-1], known[2:]]), axis=0)
    squares = np.stack([np.interp(np.arange(count), times, column) for column in known.T], axis=1)
    for columns, seconds in ((slice(0, 2), SMOOTH_CENTRE), (slice(2, 3), SMOOTH_SIZE)):
        squares[:, columns] = _smooth(squares[:, columns], seconds * fps)
    return squares


def _smooth(values: np.ndarray, sigma: float) -> np.ndarray:
    """Gaussian over the first axis of (T, C), the ends held."""
    reach = math.ceil(3 * sigma)
    kernel = np.exp(-0.5 * (np.arange(-reach, reach + 1) / sigma) ** 2)
    padded = np.pad(values, [[reach, reach], [0, 0]], mode="edge")
    return np.stack([np.convolve(column, kernel / kernel.sum(), mode="valid") for column in padded.T], axis=1)


def _inside(squares: np.ndarray, height: int, width: int) -> np.ndarray:
    """Corners (T, 4) of squares moved into the frame, and made smaller where they do not fit."""
    side = np.minimum(squares[:, 2], min(height, width))
    x = np.clip(squares[:, 0] - side / 2, 0, width - side)
    y = np.clip(squares[:, 1] - side / 2, 0, height - side)
    return np.stack([x, y, x + side, y + side], axis=1).astype(np.float32)


def crop(frames: np.ndarray, boxes: np.ndarray, size: int) -> np.ndarray:
    """(T, H, W, 3) and square boxes (T, 4) in pixels -> uint8 (T, size, size, 3), with sub-pixel placing."""
    crops = np.empty((len(frames), size, size, 3), np.uint8)
    for index, (frame, (x0, y0, x1, _)) in enumerate(zip(frames, boxes, strict=True)):
        # Shrinking takes the mean over `fold` samples per pixel and axis: no aliasing, and the place stays exact.
        fold = max(1, round((x1 - x0) / size))
        step = (x1 - x0) / (size * fold)
        matrix = np.array([[step, 0, x0 + step / 2 - 0.5], [0, step, y0 + step / 2 - 0.5]], np.float64)
        flags = cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP
        wide = cv2.warpAffine(frame, matrix, (size * fold,) * 2, flags=flags, borderMode=cv2.BORDER_REPLICATE)
        crops[index] = wide if fold == 1 else cv2.resize(wide, (size, size), interpolation=cv2.INTER_AREA)
    return crops
