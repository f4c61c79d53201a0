"""Who of several people speaks: a mouth that moves and opens when there is sound."""

import math
from collections.abc import Sequence
from itertools import pairwise

import numpy as np

from affekt.data.media.face import Track, crop

SIDE = 64  # pixels of the crops looked at
MOUTH = (slice(38, 54), slice(19, 45))  # rows and columns of the mouth in them
DARKEST = 100  # of its 416 pixels: the inside of an open mouth
LAGS = range(-1, 4)  # frames at 25 per second by which the sound may come after the lips, which lead a little
TREND = 13  # frames: slower changes of darkness are light and posture
# Only faces with at least this share of the largest one's area may speak, and each halving of the area has to be made
# up for by so much more agreement.
LEAST_AREA, PER_HALVING = 0.25, 0.1


def choose(tracks: Sequence[Track], agreements: Sequence[float]) -> int:
    """The number of the track to keep: the largest face, unless another one agrees more with the sound."""
    sizes = [track.area * track.rate for track in tracks]
    near = [i for i, size in enumerate(sizes) if size >= LEAST_AREA * max(sizes)]
    return max(near, key=lambda i: agreements[i] + PER_HALVING * math.log2(sizes[i] / max(sizes)))


def lip_agreement(frames: np.ndarray, track: Track, waveform: np.ndarray, fps: float, sample_rate: int) -> float:
    """-1 to 1: how motion and darkness of the mouth correlate with the level of the sound, the mean of the two, each
    with its best lag. 0 for what does not change.

    frames uint8 (T, H, W, 3), waveform float32 (S,) from the same moment on.
    """
    mouth = crop(frames, track.boxes, SIDE)[:, *MOUTH].mean(axis=3, dtype=np.float32).reshape(len(frames), -1)
    motion = np.abs(np.diff(mouth, axis=0, prepend=mouth[:1])).mean(axis=1)
    darkness = -np.partition(mouth, DARKEST, axis=1)[:, :DARKEST].mean(axis=1)
    hop = sample_rate / fps
    edges = np.minimum((np.arange(len(frames) + 1) * hop).round().astype(int), len(waveform))
    energy = np.array([np.square(waveform[a:b]).mean() if b > a else 0.0 for a, b in pairwise(edges)])
    level = np.log10(energy + 1e-6)
    pairs = ((motion, level), (_without_trend(darkness), _without_trend(level)))
    return sum(max(_correlation(seen, heard, lag) for lag in LAGS) for seen, heard in pairs) / len(pairs)


def _without_trend(values: np.ndarray) -> np.ndarray:
    padded = np.pad(values, TREND // 2, mode="edge")
    return values - np.convolve(padded, np.full(TREND, 1 / TREND), mode="valid")


def _correlation(seen: np.ndarray, heard: np.ndarray, lag: int) -> float:
    """Of seen[t] with heard[t + lag]."""
    count = len(seen) - abs(lag)
    if count < 2 * len(LAGS):
        return 0.0
    a, b = seen[max(-lag, 0) :][:count], heard[max(lag, 0) :][:count]
    a, b = a - a.mean(), b - b.mean()
    size = np.sqrt(np.square(a).sum() * np.square(b).sum())
    return float((a * b).sum() / size) if size > 1e-6 else 0.0
