"""Who of several people speaks: mouths that move when there is sound."""

from collections.abc import Sequence
from itertools import pairwise

import numpy as np

from affekt.data.media.face import Track, crop

SIDE = 48  # pixels of the crops looked at
MOUTH = (slice(28, 40), slice(14, 34))  # rows and columns of the mouth in them, wherever a face's box is trusted
UPPER = (slice(6, 24), slice(10, 38))  # brows, eyes and nose: what moves there moves with the head
LAGS = range(-2, 5)  # frames at 25 per second by which the sound may come after the lips, which lead a little
SMOOTH = 5  # frames, moving average
# A face counts beside the largest when its sides are half as long or longer. The sound decides between those, unless
# the agreement of the largest is within this of the best.
LEAST_AREA, MARGIN = 0.25, 0.05


def choose(tracks: Sequence[Track], agreements: Sequence[float]) -> int:
    """The number of the track to keep: the largest face, unless another one of its size class agrees more with the
    sound."""
    largest = max(range(len(tracks)), key=lambda i: tracks[i].area * tracks[i].rate)
    near = [i for i, track in enumerate(tracks) if track.area >= LEAST_AREA * tracks[largest].area]
    best = max(near, key=lambda i: agreements[i])
    return best if agreements[best] > agreements[largest] + MARGIN else largest


def lip_agreement(frames: np.ndarray, track: Track, waveform: np.ndarray, fps: float, sample_rate: int) -> float:
    """Correlation of the motion of the mouth with the level of the sound, the largest over small lags; -1 to 1.

    frames uint8 (T, H, W, 3), waveform float32 (S,). 0 where one of them does not change.
    """
    faces = crop(frames, track.boxes, SIDE).mean(axis=3)  # (T, 48, 48)
    change = np.abs(np.diff(faces, axis=0, prepend=faces[:1]))
    motion = change[:, *MOUTH].mean(axis=(1, 2)) - change[:, *UPPER].mean(axis=(1, 2))
    hop = sample_rate / fps
    edges = np.minimum((np.arange(len(frames) + 1) * hop).round().astype(int), len(waveform))
    energy = np.array([np.square(waveform[a:b]).mean() if b > a else 0.0 for a, b in pairwise(edges)])
    level = np.log10(energy + 1e-6)
    motion, level = _smooth(motion), _smooth(level)
    return max(_correlation(motion, np.roll(level, -lag), abs(lag)) for lag in LAGS)


def _smooth(values: np.ndarray) -> np.ndarray:
    padded = np.pad(values, SMOOTH // 2, mode="edge")
    return np.convolve(padded, np.full(SMOOTH, 1 / SMOOTH), mode="valid")


def _correlation(a: np.ndarray, b: np.ndarray, edge: int) -> float:
    a, b = a[edge : len(a) - edge], b[edge : len(b) - edge]
    if len(a) < 3:
        return 0.0
    a, b = a - a.mean(), b - b.mean()
    size = np.sqrt(np.square(a).sum() * np.square(b).sum())
    return float((a * b).sum() / size) if size > 1e-9 else 0.0
