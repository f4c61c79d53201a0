"""Look at clips: which are damaged, silent or clipped, and the traces that comparisons need. Run in workers."""

import dataclasses
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from threadpoolctl import threadpool_limits

from affekt.data.decode import decode_frames, decode_sound
from affekt.data.files import hash_file
from affekt.data.inspect.traces import RATE, picture_hash, picture_trace, sound_trace
from affekt.data.samples import Sample
from affekt.data.shards import SampleError, ShardIndex

SILENT_DB = -60.0  # of full scale, in the loudest tenth of a second; quiet takes of RAVDESS reach -55
FULL_SCALE, CLIPPED_RUN, CLIPPED_SHARE = 0.99, 3, 1e-3
SHORT = RATE  # frames below which a picture is compared by its hash: there is too little motion in it
LOWEST_DB = -120.0


@dataclasses.dataclass(slots=True)
class Look:
    """What one clip is like; None where it has no such stream. Levels in dB of full scale."""

    clip: int
    damage: list[tuple[str, str]] = dataclasses.field(default_factory=list)  # cause, message
    peak_db: float | None = None
    loudest_db: float | None = None  # RMS of the loudest tenth of a second
    clipped_share: float | None = None
    picture: np.ndarray | None = None  # traces; the picture's is its hash where it is short
    sound: np.ndarray | None = None

    @property
    def silent(self) -> bool:
        return self.loudest_db is not None and self.loudest_db < SILENT_DB

    @property
    def clipped(self) -> bool:
        return self.clipped_share is not None and self.clipped_share > CLIPPED_SHARE


def start() -> None:
    """What a worker process does first: parallel over clips, not within one."""
    cv2.setNumThreads(1)
    threadpool_limits(1)


def look_at(folder: Path, fingerprint: str, clips: Sequence[int], verify: bool) -> list[Look]:
    """Read and decode clips; with `verify` every member, those that nothing decodes too."""
    index = _opened(folder, fingerprint)
    return [_look(index, index.samples[clip], clip, verify) for clip in clips]


def check_shard(path: Path, shard: dict[str, Any]) -> str | None:
    """What is wrong with a shard's file as a whole, headers and padding included."""
    try:
        digest = hash_file(path)
    except OSError as error:
        return f"{path}: {error.strerror}"
    return None if digest == shard["sha256"] else f"{path}: checksum differs from the index"


def measure_sound(sound: np.ndarray, sample_rate: int) -> dict[str, float]:
    """Level figures of sound float32 (S,), S > 0, in -1..1."""
    tenth = max(min(sample_rate // 10, len(sound)), 1)
    parts = np.add.reduceat(np.square(sound, dtype=np.float64), np.arange(0, len(sound) - tenth + 1, tenth))
    full = np.abs(sound) >= FULL_SCALE
    edges = np.flatnonzero(np.diff(np.concatenate([[False], full, [False]])))  # starts and ends of runs, in turn
    runs = edges[1::2] - edges[::2]
    return {
        "peak_db": _decibel(float(np.abs(sound).max())),
        "loudest_db": _decibel(float(np.sqrt(parts.max() / tenth))),
        "clipped_share": float(runs[runs >= CLIPPED_RUN].sum() / len(sound)),
    }


def _look(index: ShardIndex, sample: Sample, clip: int, verify: bool) -> Look:
    look = Look(clip)
    if sample.has_video:
        try:
            frames = decode_frames(index, sample, np.arange(sample.frames))
        except SampleError as error:
            look.damage.append((error.cause, str(error)))
        else:
            short = sample.frames * RATE < SHORT * index.header["fps"]
            look.picture = (
                picture_hash(frames[len(frames) // 2]) if short else picture_trace(frames, index.header["fps"])
            ).astype(np.float16)
    if sample.has_audio:
        try:
            sound = decode_sound(index, sample, 0, sample.samples)
        except SampleError as error:
            look.damage.append((error.cause, str(error)))
        else:
            for name, value in measure_sound(sound, index.header["sample_rate"]).items():
                setattr(look, name, value)
            look.sound = sound_trace(sound, index.header["sample_rate"]).astype(np.float16)
    if verify:
        for member in sorted(set(sample.members) - {"mjpeg", "mp4", "flac"}):
            try:
                index.read(sample, member)
            except SampleError as error:
                look.damage.append((error.cause, str(error)))
    return look


def _decibel(amplitude: float) -> float:
    return round(max(20 * float(np.log10(max(amplitude, 1e-9))), LOWEST_DB), 2)


@lru_cache(maxsize=1)
def _opened(folder: Path, fingerprint: str) -> ShardIndex:
    index = ShardIndex.open(folder)
    if index.fingerprint != fingerprint:
        raise RuntimeError(f"{folder}: the index changed while it was inspected; run the command again")
    return index
