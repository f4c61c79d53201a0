"""One clip's picture and sound on one clock, at constant rates.

Seconds come from the container's time stamps, never from a frame's number: streams that start apart, variable frame
rates and dropped frames then stay in step. Anything that cannot be used raises MediaError with a cause code.
"""

import dataclasses
import math
from pathlib import Path
from typing import Any

import av
import numpy as np

from affekt.data.media.container import (
    SEEK_AFTER,
    Limits,
    MediaError,
    begin_of,
    check_rate,
    decode_stream,
    is_still,
    length_of,
    open_media,
    picture_stream,
)
from affekt.data.media.frames import FrameFolder
from affekt.data.media.picture import FramePicker, Region

EARLY = 0.1  # seconds; ends are rounded in manifests, and streams end within a packet or two of each other
GAP = 0.05  # seconds between where a sound frame stands and where it should; below it is rounding of time stamps


@dataclasses.dataclass
class Media:
    """One clip: `frames` uint8 (T, H, W, 3) RGB, `waveform` float32 (S,) in [-1, 1]; None for a stream that is absent.

    With both, frame k and sample k * sample_rate / fps belong to the same moment and both cover the same interval.
    """

    frames: np.ndarray | None
    waveform: np.ndarray | None
    flags: list[str]
    info: dict[str, Any]
    begin: float = 0.0  # seconds of the file, on its container's clock
    scale: float = 1.0  # pixels of the frames per pixel of the source

    def part(self, first: int, stop: int, fps: float, sample_rate: int) -> "Media":
        """The frames from `first` to before `stop`, and the sound under them."""
        begin, end = (round(frame / fps * sample_rate) for frame in (first, stop))
        sound = None if self.waveform is None else self.waveform[begin:end]
        return Media(self.frames[first:stop], sound, self.flags, self.info, self.begin + first / fps, self.scale)


@dataclasses.dataclass
class _Sound:
    waveform: np.ndarray  # float32 (S,)
    begin: float  # seconds on the container's clock
    end: float
    flags: list[str]


def read_media(
    video: str | Path | None,
    audio: str | Path | None = None,
    start: float | None = None,
    end: float | None = None,
    *,
    fps: float = 25,
    sample_rate: int = 16_000,
    limits: Limits | None = None,
) -> Media:
    """Read `video`, a file or a folder of frames, and its own sound, or that of `audio`, from `start` to `end` seconds.

    Frames are those nearest in time to a constant `fps`, scaled down to `limits.pixels`; sound is mono at
    `sample_rate`. Where both streams exist only their common interval is kept. Flags: cut (longer than the limit),
    ends_early (0.1 s or more before `end`), silent, clipped, antiphase, sound_gap, picture_gap, blank, no_sound,
    no_picture. `info` holds what was found: source_duration, source_fps, source_rate and `offset`, the seconds by which
    the sound begins after the picture. Raises MediaError.
    """
    if video is None and audio is None:
        raise MediaError("no_stream", "neither a picture nor a sound file was given")
    limits, name = limits or Limits(), str(video or audio)
    begin, stop = start or 0.0, math.inf if end is None else end
    info: dict[str, Any] = {}
    sound = None
    if audio is not None or not (is_still(video) or Path(video).is_dir()):
        # The limit counts from where both streams have begun, and the picture may begin late.
        late = _picture_begin(video, limits) if video is not None else 0.0
        reach = min(stop, max(begin, late) + limits.max_duration)
        sound = _read_sound(audio or video, begin, reach, sample_rate, limits, info)
    picture = _read_picture(video, begin, stop, sound, fps, limits, info) if video is not None else None
    if picture is None and sound is None:
        raise MediaError("no_stream", f"{name}: neither picture nor sound in this file")

    frames = waveform = None
    flags = ["no_picture"] if picture is None else list(picture.flags)
    if picture is not None:
        frames, begin = picture.frames, picture.begin
        seconds = len(frames) / fps
    else:
        begin = max(begin, sound.begin)
        seconds = min(stop - begin, limits.max_duration)
    if sound is None:
        flags.append("no_sound")
    else:
        first = round((begin - sound.begin) * sample_rate)
        waveform = sound.waveform[first:][: max(round(seconds * sample_rate), 0)]
        if len(waveform) == 0:
            raise MediaError("empty", f"{name}: no sound after {begin:.2f} s")
        flags += sound.flags + sound_flags(waveform)
    if min(stop, info["source_duration"]) - begin > limits.max_duration + 1 / fps:
        flags.append("cut")
    lasts = len(waveform) / sample_rate if frames is None else len(frames) / fps
    if end is not None and min(end, begin + limits.max_duration) - (begin + lasts) > EARLY:
        flags.append("ends_early")
    return Media(frames, waveform, sorted(flags), info, begin, picture.scale if picture else 1.0)


def sound_flags(waveform: np.ndarray) -> list[str]:
    """`silent` (within 60 dB below full scale of its mean everywhere: a constant is not heard) or `clipped` (over 0.1 %
    of samples at full scale)."""
    if np.abs(waveform - waveform.mean()).max() < 1e-3:
        return ["silent"]
    return ["clipped"] if np.mean(np.abs(waveform) >= 0.999) > 1e-3 else []


def to_mono(sound: np.ndarray) -> tuple[np.ndarray, list[str]]:
    """Mean of the channels (C, S) -> (S,); of channels that cancel each other the louder one, flagged `antiphase`."""
    mean = sound.mean(axis=0)
    powers = np.mean(np.square(sound, dtype=np.float64), axis=1)
    if len(sound) > 1 and powers.min() > 0.1 * powers.max() and np.mean(mean**2) < 0.01 * powers.max():
        return np.ascontiguousarray(sound[powers.argmax()]), ["antiphase"]
    return mean, []


def _picture_begin(path: str | Path, limits: Limits) -> float:
    """Seconds by which the picture begins after its container does, as far as the header tells."""
    if Path(path).is_dir():
        return 0.0
    with open_media(path, limits) as container:
        stream = picture_stream(container)
        return 0.0 if stream is None else begin_of(container, stream)


def _read_picture(path, begin, stop, sound: _Sound | None, fps, limits: Limits, info) -> FramePicker | None:
    """The frames shared with `sound`; None where the file has no picture."""
    if Path(path).is_dir():
        folder = FrameFolder(path, info.get("source_duration"), fps, limits)
        info |= {"source_duration": round(folder.seconds, 3), "source_fps": round(folder.rate, 3)}
        return _pick(folder, 1.0, folder.seconds, path, begin, stop, sound, fps, limits, info)
    with open_media(path, limits) as container:
        info["source_duration"] = round((container.duration or 0) / av.time_base, 3)
        stream = picture_stream(container)
        if stream is None:
            return None
        info["source_fps"] = round(float(stream.average_rate or 0), 3)
        aspect = float(stream.sample_aspect_ratio or 1)
        announced = 1 / fps if is_still(path) else length_of(stream) or info["source_duration"] or math.inf
        frames = decode_stream(container, stream, path, begin)
        return _pick(frames, aspect, announced, path, begin, stop, sound, fps, limits, info)


def _pick(frames, aspect, announced, path, begin, stop, sound: _Sound | None, fps, limits: Limits, info) -> FramePicker:
    first = max(begin, sound.begin) if sound else begin
    last = min(stop, sound.end) if sound else stop
    picker = FramePicker(first, last, fps, limits, aspect, announced)
    picker.take(frames)
    if not picker.count:
        where = f"sound, {picker.begin:.2f} to {picker.stop:.2f} s" if sound else f"picture after {picker.begin:.2f} s"
        raise MediaError("no_overlap" if sound else "empty", f"{path}: no frame within the {where}")
    if sound and begin <= SEEK_AFTER:  # after a seek both begin wherever they could be entered
        info["offset"] = round(sound.begin - picker.first, 4)
    return picker


def read_region(
    path: str | Path,
    begin: float,
    count: int,
    region: Region,
    *,
    fps: float,
    limits: Limits,
    pixels: float,
    sound_seconds: float | None = None,
) -> tuple[np.ndarray, Region]:
    """The same `count` frames as `read_media` gave from `begin` on, of a `region` of the picture alone, at up to
    `pixels`: uint8 (count, h, w, 3), and the region that they show. A folder of frames was spread over `sound_seconds`.
    Raises MediaError."""
    when = begin, begin + count / fps, fps
    if Path(path).is_dir():
        picker = FramePicker(*when, limits, 1.0, count / fps, pixels, region)
        picker.take(FrameFolder(path, sound_seconds, fps, limits))
    else:
        with open_media(path, limits) as container:
            stream = picture_stream(container)
            picker = FramePicker(*when, limits, float(stream.sample_aspect_ratio or 1), count / fps, pixels, region)
            picker.take(decode_stream(container, stream, path, begin))
    if picker.count != count:
        raise MediaError("damaged", f"{path}: {count} frames at first, {picker.count} when read again")
    return picker.frames, picker.region


def _read_sound(path, begin: float, stop: float, sample_rate: int, limits: Limits, info) -> _Sound | None:
    """All sound up to `stop`, resampled, in its place by time stamps. None where the file has no sound."""
    runs: list[tuple[float, list[np.ndarray]]] = []  # (seconds, arrays (channels, samples)), one per gapless run
    with open_media(path, limits) as container:
        info["source_duration"] = round((container.duration or 0) / av.time_base, 3)
        if not container.streams.audio:
            return None
        stream = container.streams.audio[0]
        info["source_rate"] = stream.codec_context.sample_rate
        resampler, expected = None, -math.inf
        for time, frame in decode_stream(container, stream, path, begin):
            if time > stop:
                break
            if abs(time - expected) > GAP:
                _flush(resampler, runs)
                check_rate(frame.sample_rate, path)
                layout = "mono" if len(frame.layout.channels) == 1 else "stereo"
                resampler = av.AudioResampler(format="fltp", layout=layout, rate=sample_rate)
                runs.append((time, []))
                expected = time
            expected += frame.samples / frame.sample_rate
            frame.pts = None  # without a gap only counts matter, and rounded time stamps would make the filter stretch
            runs[-1][1].extend(out.to_ndarray() for out in resampler.resample(frame))
        _flush(resampler, runs)
    sound = _place([(time, np.concatenate(arrays, axis=1)) for time, arrays in runs if arrays], sample_rate, path)
    if sound is not None and sound.end <= begin:
        raise MediaError("empty", f"{path}: the sound ends at {sound.end:.2f} s, before {begin:.2f} s")
    return sound


def _flush(resampler, runs) -> None:
    if resampler is not None:
        runs[-1][1].extend(out.to_ndarray() for out in resampler.resample(None))


def _place(runs: list[tuple[float, np.ndarray]], sample_rate: int, path) -> _Sound | None:
    if not runs:
        return None  # a stream that is announced but holds nothing
    begin = min(time for time, _ in runs)
    places = [round((time - begin) * sample_rate) for time, _ in runs]
    size = max(place + run.shape[1] for place, (_, run) in zip(places, runs, strict=True))
    sound = np.zeros((max(run.shape[0] for _, run in runs), size), np.float32)
    for place, (_, run) in zip(places, runs, strict=True):
        sound[:, place : place + run.shape[1]] = run
    if not np.isfinite(sound).all():
        raise MediaError("non_finite", f"{path}: the sound holds values that are not numbers")
    waveform, flags = to_mono(sound)
    flags += ["sound_gap"] * (len(runs) > 1)
    return _Sound(np.clip(waveform, -1.0, 1.0), begin, begin + size / sample_rate, flags)
