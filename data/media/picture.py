"""From decoded frames at their own times to upright RGB frames at a constant rate."""

import math
from collections.abc import Iterable
from fractions import Fraction
from typing import Any

import av
import numpy as np

from affekt.data.media.container import Limits, MediaError

SLACK = 1e-6  # of a frame: rounding of seconds must not cost one
Region = tuple[float, float, float, float]  # x0, y0, x1, y1 in widths and heights of a picture
WHOLE: Region = (0.0, 0.0, 1.0, 1.0)


class FramePicker:
    """Takes frames in order of time and keeps, for every tick of the constant rate, the one nearest to it.

    Ticks begin at `begin` or the first frame, whichever is later, and each lasts 1 / fps before `stop` and before the
    last frame's own end. `frames` is uint8 (T, H, W, 3). Of the upright pictures only `region` is converted and kept,
    a pixel more or less: `region` says exactly what, `scale` its pixels per pixel of the source.
    """

    def __init__(
        self,
        begin: float,
        stop: float,
        fps: float,
        limits: Limits,
        aspect: float,
        announced: float,
        pixels: float | None = None,
        region: Region = WHOLE,
    ):
        """`aspect` is the width of a pixel in heights, `announced` the seconds that the header promises. Pictures with
        more than `pixels` of the region, by default as the limits say, are scaled down."""
        self.begin, self.stop, self.fps, self.limits = begin, stop, fps, limits
        self.first = math.nan  # seconds of the first frame
        self.count = 0  # ticks that have their frame
        self.widest = 0.0  # seconds between two neighbours
        self.region, self.scale = region, 1.0
        self._aspect, self._pixels = aspect if 0.1 < aspect < 10 else 1.0, pixels or limits.pixels
        self._cutter = _Cutter(WHOLE)
        self._announced = announced
        self._before: tuple[float, object] | None = None  # the newest frame, not yet known to be the nearest of a tick
        self._array: np.ndarray | None = None  # the same, converted, when a tick has used it
        self._shown = 0.0  # seconds between the two newest frames
        self._room = np.empty((0, 2, 2, 3), np.uint8)  # one array, not a list to stack: most of the memory is here
        self._size: tuple[int, int] | None = None
        self._matrix: tuple[int, int, int, int] | None = None

    def take(self, frames: Iterable[tuple[float, Any]]) -> None:
        """All of `frames` that matter."""
        for time, frame in frames:
            if not self.add(time, frame):
                break
        self.finish()

    def add(self, time: float, frame) -> bool:
        """Take the next frame; False when no later one can matter."""
        if self._before is None:
            self.first = time
            self.begin = max(self.begin, time)
            self.stop = min(self.stop, self.begin + self.limits.max_duration)
            self._matrix = display_matrix(frame)  # once: asking keeps a frame in memory until the next collection
            self._cutter = _Cutter(turned(self.region, self._matrix, back=True))
            self.region = turned(self._cutter.fit(frame), self._matrix)
            self._size = self._target_size(frame)
        elif time > self._before[0]:
            self._shown = time - self._before[0]
            self.widest = max(self.widest, self._shown)
            self._fill((self._before[0] + time) / 2)
        else:
            return True  # a time stamp that steps back has no place
        self._before, self._array = (time, frame), None
        return self.count < self._ticks(self.stop)

    def finish(self) -> None:
        """The last frame lasts as long as the one before it."""
        if self._before is None:
            return
        end = min(self._before[0] + (self._shown or 1 / self.fps), self.stop)
        self.count = min(self.count, self._ticks(end))
        self._fill(math.inf, self._ticks(end))

    @property
    def frames(self) -> np.ndarray:
        return self._room[: self.count]

    @property
    def flags(self) -> list[str]:
        blank = all(frame.std() < 2 for frame in self.frames[:: max(self.count // 8, 1)])
        return ["picture_gap"] * (self.widest > 0.5) + ["blank"] * blank

    def _ticks(self, end: float) -> int:
        return max(math.floor((end - self.begin) * self.fps + SLACK), 0)

    def _fill(self, until: float, count: int | None = None) -> None:
        """Give the newest frame to every open tick up to `until` seconds."""
        count = self._ticks(self.stop) if count is None else count
        while self.count < count and self.begin + self.count / self.fps <= until:
            if self._array is None:
                self._array = self._convert(self._before[1])
            if self.count == len(self._room):
                self._grow()
            self._room[self.count] = self._array
            self.count += 1

    def _grow(self) -> None:
        """Room for what is announced, or for twice as much as there is; memory is only taken where it is filled."""
        expected = self._ticks(min(self.stop, self.begin + self._announced)) + 2
        room = np.empty((max(expected, 2 * self.count), *self._array.shape), np.uint8)
        if self.count:
            room[: self.count] = self.frames
        self._room = room

    def _target_size(self, frame) -> tuple[int, int]:
        """(width, height) with square pixels, scaled down so that all frames of the clip fit the limit."""
        width, height = frame.width * self._aspect, float(frame.height)
        if width * height > self.limits.max_pixels:
            raise MediaError("too_many_pixels", f"frames of {width:.0f} x {height:.0f} pixels")
        x0, y0, x1, y1 = self._cutter.fit(frame)
        width, height = width * (x1 - x0), height * (y1 - y0)
        seconds = min(self.stop - self.begin, self._announced)
        room = self.limits.frame_bytes / max(seconds * self.fps, 1) / 3
        fold = math.ceil(math.sqrt(width * height / self._pixels) - SLACK)  # whole: a third of the time of any other
        self.scale = min(1 / max(fold, 1), math.sqrt(room / (width * height)))
        return max(round(width * self.scale), 2), max(round(height * self.scale), 2)

    def _convert(self, frame) -> np.ndarray:
        width, height = self._size
        how = {"interpolation": "AREA"} if self.scale < 1 else {}
        picture = self._cutter.cut(frame).to_ndarray(format="rgb24", width=width, height=height, **how)
        return upright(picture, self._matrix)


class _Cutter:
    """Cuts a region out of decoded frames before they are converted, which costs nothing."""

    def __init__(self, region: Region):
        self.region = region
        self._graph: av.filter.Graph | None = None
        self._kind: tuple | None = None

    def fit(self, frame) -> Region:
        """The region on even pixels, which every layout of colours can be cut at."""
        x0, y0, x1, y1 = self._corners(frame)
        return x0 / frame.width, y0 / frame.height, x1 / frame.width, y1 / frame.height

    def cut(self, frame):
        x0, y0, x1, y1 = self._corners(frame)
        if (x0, y0, x1, y1) == (0, 0, frame.width, frame.height):
            return frame
        kind = frame.width, frame.height, frame.format.name
        if kind != self._kind:  # the first one, or a stream that changes its size
            self._graph, self._kind = av.filter.Graph(), kind
            source = self._graph.add_buffer(
                width=frame.width, height=frame.height, format=frame.format, time_base=Fraction(1, 90_000)
            )
            nodes = [source, self._graph.add("crop", f"{x1 - x0}:{y1 - y0}:{x0}:{y0}"), self._graph.add("buffersink")]
            self._graph.link_nodes(*nodes).configure()
        self._graph.push(frame)
        return self._graph.pull()

    def _corners(self, frame) -> tuple[int, int, int, int]:
        x0, y0, x1, y1 = self.region
        x0, y0 = (2 * math.floor(share * side / 2) for share, side in ((x0, frame.width), (y0, frame.height)))
        x1, y1 = (2 * math.ceil(share * side / 2) for share, side in ((x1, frame.width), (y1, frame.height)))
        return x0, y0, min(x1, frame.width), min(y1, frame.height)


def turned(region: Region, matrix: tuple[int, int, int, int] | None, back: bool = False) -> Region:
    """Where a region of a stored picture lies in the one made `upright`, or the way `back`."""
    corners = np.array(region).reshape(2, 2)
    if matrix is not None:
        a, b, c, d = matrix
        swap = abs(b) > abs(a)
        flips = np.array([c < 0, b < 0]) if swap else np.array([a < 0, d < 0])
        if back:
            corners = np.where(flips, 1 - corners, corners)
        corners = corners[:, ::-1] if swap else corners
        if not back:
            corners = np.where(flips, 1 - corners, corners)
    return tuple(float(x) for x in (*corners.min(axis=0), *corners.max(axis=0)))


def display_matrix(frame) -> tuple[int, int, int, int] | None:
    """(a, b, c, d) of the container's rotation: pixel (x, y) is shown at (a x + c y, b x + d y). None if not told."""
    data = frame.side_data.get("DISPLAYMATRIX")
    if data is None:
        return None
    a, b, _, c, d = np.frombuffer(bytes(data), np.int32)[:5]
    return int(a), int(b), int(c), int(d)


def upright(picture: np.ndarray, matrix: tuple[int, int, int, int] | None) -> np.ndarray:
    """Turn (H, W, 3) by the nearest quarter turn, with its mirroring."""
    if matrix is None:
        return picture
    a, b, c, d = matrix
    if abs(b) > abs(a):  # x goes to y: a quarter turn
        picture, a, d = picture.transpose(1, 0, 2), c, b
    if a < 0:
        picture = picture[:, ::-1]
    if d < 0:
        picture = picture[::-1]
    return np.ascontiguousarray(picture)
