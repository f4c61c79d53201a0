"""How far sound and picture of a corpus are apart, found from the clips themselves.

A ridge regression predicts the level of the sound from the picture around the same time, once per lag; where the clips
are in step the prediction is best. It needs no model of a mouth: which parts of the picture go with the voice is
learned from one part of the clips and tried on the others. The same with the sound of another clip shows how much comes
from clips having a common course. What is found is when the picture goes with the sound, so a natural lead of the
lips over the voice is part of it; on clips in step that was below 10 ms for GRID and the synthetic corpus.
"""

from typing import Any

import numpy as np

from affekt.data.inspect.traces import PICTURE_ROW, RATE, SOUND_ROW, TraceFile

REACH = 15  # rows: lags of up to 0.6 s to either side
LEAST_ROWS = 2 * REACH + 20  # of a clip: two seconds
LEAST_CLIPS = 12
TREND = 13  # rows: slower than half a second is posture and phrasing, which lie in step at any lag
PENALTY = 0.1  # of the ridge, in mean variances of a feature
BLOCKS, DRAWS = 64, 200  # of clips, which the bootstrap draws
# When the offset counts as told: the correlation exceeds that with strangers' sound, and the interval is narrow.
LEAST_GAIN, WIDEST_MS = 0.08, 160.0
# When a single clip counts as out of step: at its own best lag, two rows or more from that of the corpus, the
# prediction correlates so well, and so much better than at the corpus's. Measured with 280 ms on clips of 3 s: found 16
# of 20 and none of 140 others (synthetic), 18 of 20 and 2 of 140 others (GRID).
APART_ROWS, APART_CORRELATION, APART_GAIN = 2, 0.5, 0.3


class Sums:
    """Sums of products over the clips of a block: all that a regression and its test need, however many clips."""

    def __init__(self) -> None:
        features, lags = 2 * PICTURE_ROW, 2 * REACH + 1
        self.xx, self.xy, self.yy = np.zeros((features, features)), np.zeros((features, lags)), np.zeros(lags)

    def add(self, x: np.ndarray, y: np.ndarray) -> None:
        self.xx += x.T @ x
        self.xy += x.T @ y
        self.yy += np.square(y).sum(0)


def av_offset(pictures: TraceFile, sounds: TraceFile, seed: int = 0) -> dict[str, Any]:
    """The offset of the corpus in milliseconds, positive where the sound comes late, with its 95 % interval from a
    bootstrap over clips; or why it cannot be told.

    `correlation` is that of the held-out prediction at the best lag, `strangers` the same with another clip's sound.
    `curve` holds [lag in ms, correlation], `apart` the clips out of step with the rest: (clip, offset in ms).
    """
    clips = [c for c in pictures.clips() if c in sounds and min(pictures.rows(c), sounds.rows(c)) >= LEAST_ROWS]
    result: dict[str, Any] = dict.fromkeys(("ms", "low", "high", "correlation", "strangers"))
    result |= {"told": False, "why": None, "clips": len(clips), "curve": [], "apart": []}
    if len(clips) < LEAST_CLIPS:
        return result | {"why": f"{len(clips)} clips have both streams for two seconds; {LEAST_CLIPS} are needed"}
    own, strange = _sums(clips, pictures, sounds)
    if not sum(block.yy.sum() for block in own) or not sum(np.trace(block.xx) for block in own):
        return result | {"why": "nothing moves, or nothing sounds, in the clips"}
    curve = _crossed(own)
    generator = np.random.default_rng(seed)
    peaks = []
    for _ in range(DRAWS):
        drawn = generator.integers(0, len(own), len(own))
        rest = np.setdiff1d(np.arange(len(own)), drawn)
        if len(rest):
            peaks.append(_peak(_curve([own[i] for i in drawn], [own[i] for i in rest])))
    low, high = np.quantile(peaks, [0.025, 0.975])
    best, strangers = float(curve.max()), float(_crossed(strange).max())
    result |= {"correlation": round(best, 3), "strangers": round(strangers, 3)}
    result["curve"] = [[lag * 1000 // RATE, round(float(r), 4)] for lag, r in enumerate(curve, -REACH)]
    if best - strangers < LEAST_GAIN:
        why = f"the picture predicts the sound hardly better ({best:.2f}) than that of another clip ({strangers:.2f})"
        return result | {"why": why}
    if high - low > WIDEST_MS:
        return result | {"why": f"95 % of the resampled estimates spread over {high - low:.0f} ms; more clips may help"}
    if abs(int(np.argmax(curve)) - REACH) == REACH:
        return result | {"why": f"it is {REACH * 1000 // RATE} ms or more, the largest lag looked at"}
    return result | {
        "told": True,
        "ms": round(_peak(curve), 1),
        "low": round(float(low), 1),
        "high": round(float(high), 1),
        "apart": _apart(clips, own, int(np.argmax(curve)), pictures, sounds),
    }


def _sums(clips: list[int], pictures: TraceFile, sounds: TraceFile) -> tuple[list[Sums], list[Sums]]:
    """Per block of clips the sums of each picture with its own sound, and with that of the clip before."""
    blocks = min(BLOCKS, len(clips))
    own, strange = [Sums() for _ in range(blocks)], [Sums() for _ in range(blocks)]
    before = sounds[clips[-1]]
    for number, clip in enumerate(clips):
        picture, sound = pictures[clip], sounds[clip]
        for sums, heard in ((own, sound), (strange, before)):
            rows = min(len(picture), len(heard))
            sums[number % blocks].add(features(picture[:rows]), lagged_levels(heard[:rows]))
        before = sound
    return own, strange


def features(picture: np.ndarray) -> np.ndarray:
    """(rows, 64) -> (rows - 2 REACH, 128): gray levels and how fast they change, without trend, of like size."""
    speed = np.zeros_like(picture)
    speed[1:-1] = np.abs(picture[2:] - picture[:-2]) / 2
    x = np.concatenate([_without_trend(picture), _without_trend(speed)], axis=1)[REACH:-REACH]
    x = x - x.mean(0)
    return x / (np.sqrt(np.square(x).mean()) + 1e-3)  # every clip weighs the same, whatever its light


def lagged_levels(sound: np.ndarray) -> np.ndarray:
    """(rows, 17) -> (rows - 2 REACH, lags): the level of the sound at every lag, without trend."""
    assert sound.shape[1] == SOUND_ROW
    level = _without_trend(sound[:, -1:])[:, 0]
    y = np.lib.stride_tricks.sliding_window_view(level, 2 * REACH + 1)
    return y - y.mean(0)


def _without_trend(x: np.ndarray) -> np.ndarray:
    half = TREND // 2
    sums = np.cumsum(np.pad(x.astype(np.float64), [[half + 1, half], [0, 0]], mode="edge"), axis=0)
    return x - (sums[TREND:] - sums[:-TREND]) / TREND


def _fit(train: list[Sums]) -> np.ndarray:
    """Weights (features, lags) of the ridge regression."""
    xx, xy = sum(block.xx for block in train), sum(block.xy for block in train)
    return np.linalg.solve(xx + PENALTY * np.trace(xx) / len(xx) * np.eye(len(xx)), xy)


def _apart(
    clips: list[int], own: list[Sums], best: int, pictures: TraceFile, sounds: TraceFile
) -> list[tuple[int, float]]:
    """Clips whose sound goes with the prediction at quite another lag, by weights that were not learned from them."""
    halves = _fit(own[::2])[:, best], _fit(own[1::2])[:, best]
    apart = []
    for number, clip in enumerate(clips):
        rows = min(pictures.rows(clip), sounds.rows(clip))
        y = lagged_levels(sounds[clip][:rows])
        predicted = features(pictures[clip][:rows]) @ halves[1 - number % len(own) % 2]
        power = np.square(predicted).sum() * np.square(y).sum(0)
        correlation = predicted @ y / np.sqrt(np.maximum(power, 1e-12))
        lag = int(np.argmax(correlation))
        gain = correlation[lag] - correlation[best]
        if abs(lag - best) >= APART_ROWS and correlation[lag] >= APART_CORRELATION and gain >= APART_GAIN:
            apart.append((clip, round(_peak(correlation), 1)))
    return apart


def _curve(train: list[Sums], test: list[Sums]) -> np.ndarray:
    """Correlation (lags,) of predicted and true level in `test`."""
    weights = _fit(train)
    together = sum((weights * block.xy).sum(0) for block in test)
    xx, yy = sum(block.xx for block in test), sum(block.yy for block in test)
    predicted = ((xx @ weights) * weights).sum(0)
    return together / np.sqrt(np.maximum(predicted * yy, 1e-12))


def _crossed(blocks: list[Sums]) -> np.ndarray:
    halves = blocks[::2], blocks[1::2]
    return (_curve(*halves) + _curve(*halves[::-1])) / 2


def _peak(curve: np.ndarray) -> float:
    """Lag of the maximum in milliseconds, between rows by a parabola."""
    best = int(np.argmax(curve))
    if 0 < best < len(curve) - 1:
        before, top, after = curve[best - 1 : best + 2]
        best += (before - after) / (2 * (before - 2 * top + after))
    return (best - REACH) * 1000 / RATE
