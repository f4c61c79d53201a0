"""The trace of a stream: 25 rows per second that say how it goes on, and stay nearly the same when it is encoded again.

A row of a picture is its gray level on an 8 x 8 grid, a row of sound its energy in 16 bands and its level. Copies are
found by the changes of these rows (as fingerprints of sound are made of signs of changes: Haitsma and Kalker, A Highly
Robust Audio Fingerprinting System, ISMIR 2002, section 4.2), and the lag between the streams by their agreement.
"""

import os
import tempfile
from functools import cache

import cv2
import numpy as np

RATE = 25  # rows per second
GRID = 8
BANDS, LOW_HZ, HIGH_HZ = 16, 200.0, 4000.0  # what telephone and lossy codecs keep
WINDOW_S = 0.128  # of a spectrum: three rows long, so that a copy cut half a row later still has the same rows
FLOOR = 1e-5  # energy below -50 dB of the loudest is hiss, which no codec keeps
LEVEL_FLOOR = 1e-2  # the same for the level, an amplitude: -40 dB
PICTURE_ROW, SOUND_ROW = GRID * GRID, BANDS + 1
CHANGE = 3  # rows between which a picture's change is taken
LARGEST = 1.5  # times the clip's median: what a row of changes may weigh, so that a flash or a cut is not the clip
HASH_BITS = 63


def picture_trace(frames: np.ndarray, fps: float) -> np.ndarray:
    """Frames uint8 (T, H, W, 3) at `fps` -> gray levels float32 (rows, 64) at 25 rows per second."""
    rows = max(round(len(frames) * RATE / fps), 1)
    shown = np.minimum((np.arange(rows) * fps / RATE).astype(int), len(frames) - 1)
    small = [cv2.resize(frame, (GRID, GRID), interpolation=cv2.INTER_AREA) for frame in _gray(frames)]
    return np.stack(small).reshape(len(frames), -1)[shown]


def sound_trace(sound: np.ndarray, sample_rate: int) -> np.ndarray:
    """Sound float32 (S,) -> float32 (rows, 17): log energy of 16 bands, then the log level at the row's time."""
    hop, window = sample_rate // RATE, round(WINDOW_S * sample_rate)
    rows = max(round(len(sound) / hop), 1)
    shape, bank = _spectral_constants(sample_rate)
    padded = np.pad(sound, (window // 2, window + hop))
    cut = np.lib.stride_tricks.sliding_window_view(padded, window)[: rows * hop : hop]
    energy = np.square(np.abs(np.fft.rfft(cut * shape))) @ bank
    padded = np.pad(sound, (hop // 2, 2 * hop))
    level = np.sqrt(np.square(padded[: rows * hop]).reshape(rows, hop).mean(1))
    energy, level = np.maximum(energy, 1e-8), np.maximum(level, 1e-6)  # digital silence
    logs = np.log(energy + FLOOR * energy.max()), np.log(level + LEVEL_FLOOR * level.max())
    return np.column_stack(logs).astype(np.float32)


def picture_changes(trace: np.ndarray) -> np.ndarray:
    """(rows, 64) -> (rows, 64): what moves. The change common to the whole picture, its light, is taken off."""
    changes = np.zeros_like(trace)
    if len(trace) > CHANGE:
        changes[1 : len(trace) - CHANGE + 1] = trace[CHANGE:] - trace[:-CHANGE]
    changes -= changes.mean(1, keepdims=True)
    size = np.sqrt(np.square(changes).mean(1, keepdims=True))
    return changes * np.minimum(1, LARGEST * np.median(size) / np.maximum(size, 1e-6))


def sound_changes(trace: np.ndarray) -> np.ndarray:
    """(rows, 17) -> (rows, 16): what swells and fades; a gain or an equaliser adds a constant, which is gone."""
    changes = np.zeros((len(trace), BANDS), np.float32)
    changes[1:-1] = trace[2:, :BANDS] - trace[:-2, :BANDS]
    return changes


def picture_hash(frame: np.ndarray) -> np.ndarray:
    """Perceptual hash of (H, W, 3) uint8 as float32 (63,) of -1 and 1: signs of the lowest frequencies around their
    median (Zauner, Implementation and Benchmarking of Perceptual Image Hash Functions, 2010, section 3.2.1)."""
    small = cv2.resize(_gray(frame[None])[0], (32, 32), interpolation=cv2.INTER_AREA)
    low = cv2.dct(small)[:8, :8].ravel()[1:]  # without the mean
    return np.where(low > np.median(low), 1, -1).astype(np.float32)


class TraceFile:
    """Traces of many clips in a temporary file, so that memory holds only where each lies: a corpus of any size.

    About 4 KB per second of a clip on the disk (folder: TMPDIR); the file has no name and ends with the process.
    """

    def __init__(self, columns: int):
        self.columns = columns
        self._file = tempfile.TemporaryFile()  # noqa: SIM115 lives as long as this object
        self._places: dict[int, tuple[int, int]] = {}  # clip -> offset in bytes, rows
        self._end = 0

    def add(self, clip: int, trace: np.ndarray) -> None:
        content = trace.astype(np.float16).tobytes()
        self._file.write(content)
        self._places[clip] = (self._end, len(trace))
        self._end += len(content)

    def clips(self) -> list[int]:
        return sorted(self._places)

    def rows(self, clip: int) -> int:
        return self._places[clip][1]

    def __contains__(self, clip: int) -> bool:
        return clip in self._places

    def __getitem__(self, clip: int) -> np.ndarray:
        self._file.flush()
        offset, rows = self._places[clip]
        content = os.pread(self._file.fileno(), rows * self.columns * 2, offset)
        return np.frombuffer(content, np.float16).reshape(rows, self.columns).astype(np.float32)


def _gray(frames: np.ndarray) -> np.ndarray:
    return np.stack([cv2.cvtColor(frame, cv2.COLOR_RGB2GRAY) for frame in frames]).astype(np.float32)


@cache
def _spectral_constants(sample_rate: int) -> tuple[np.ndarray, np.ndarray]:
    window = round(WINDOW_S * sample_rate)
    hertz = np.fft.rfftfreq(window, 1 / sample_rate)
    edges = np.geomspace(LOW_HZ, HIGH_HZ, BANDS + 1)
    bank = (hertz[:, None] >= edges[:-1]) & (hertz[:, None] < edges[1:])
    return np.hanning(window).astype(np.float32), bank.astype(np.float32)
