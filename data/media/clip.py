"""One clip from its files to what a shard holds: read, track the face, crop, encode."""

import dataclasses
import hashlib
import io
import math
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any, Literal

import av
import numpy as np
import simplejpeg
import soundfile
from pydantic import Field, field_validator, model_validator

from affekt.data.manifest import Clip, clip_of_file, frame_files
from affekt.data.media.container import Limits, MediaError, is_still
from affekt.data.media.face import Track, center_boxes, crop, face_tracks, find_detectors
from affekt.data.media.lips import choose, lip_agreement
from affekt.data.media.streams import Media, read_media, read_region
from affekt.data.settings import Settings

FINE = 2  # pixels of the source for a pixel of the crop, each way; more cannot be seen


class PrepareSettings(Settings):
    """What decides the content of the shards, and the limits of the processes that make them."""

    size: int = Field(160, ge=16, le=1024, description="side of the square face crop in pixels")
    fps: int = Field(25, ge=1, le=120, description="pictures per second")
    sample_rate: int = Field(16_000, ge=8_000, le=48_000, description="of the sound, Hz")
    picture: Literal["mjpeg", "mp4"] = Field(
        "mjpeg", description="mp4 is a seventh of the bytes, 14 times slower to read"
    )
    quality: int = Field(90, ge=1, le=100, description="of JPEG; mp4 uses x264's rate factor of about the same look")
    face: str = Field(
        "haar", description="haar, center, or package.module:callable that maps RGB (H, W, 3) to boxes (N, 4)"
    )
    face_fallback: Literal["sound", "quarantine", "center"] = Field(
        "sound",
        description="for a picture without a face: keep the sound alone (without sound the clip is quarantined), "
        "quarantine the clip, or keep the centre of the picture; what is kept has the flag no_face",
    )
    min_face_rate: float = Field(0.25, ge=0, le=1, description="share of looks in which a face must be found")
    people: Literal["main", "all"] = Field(
        "main", description="of several faces: the one that speaks or is largest, or each as a clip of its own"
    )
    min_duration: float = Field(0.1, ge=0, description="seconds of a clip; still images are exempt")
    max_duration: float = Field(60.0, gt=0, description="seconds of a clip")
    long_clips: Literal["segment", "cut"] = Field(
        "segment", description="longer ones: cut into equal parts, or off after max_duration (flag cut)"
    )
    max_source_duration: float = Field(6 * 3600.0, gt=0, description="seconds; longer files are refused")
    max_pixels: int = Field(4096 * 2304, gt=0, description="of one frame; files with larger ones are refused")
    frame_mib: int = Field(768, ge=16, description="frames of one clip in memory; larger ones are read scaled down")
    clips_per_shard: int = Field(128, ge=1, description="clips of the source whose results make one shard")
    timeout_s: float = Field(180.0, gt=0, description="per clip, then its process is killed")
    memory_mib: int = Field(6144, ge=512, description="address space of one process")
    recycle: int = Field(200, ge=1, description="clips after which a process is replaced, against slow leaks")

    @property
    def limits(self) -> Limits:
        return Limits(self.max_duration, self.max_source_duration, self.max_pixels, self.frame_mib * 2**20)

    @field_validator("face")
    @classmethod
    def _known_face(cls, name: str) -> str:
        if name not in ("haar", "center") and ":" not in name:
            raise ValueError("use `haar`, `center` or `package.module:callable`")
        return name

    @model_validator(mode="after")
    def _lengths(self) -> "PrepareSettings":
        if self.max_duration < self.min_duration:
            raise ValueError(f"max_duration {self.max_duration} is below min_duration {self.min_duration}")
        return self


@dataclasses.dataclass
class PreparedClip:
    """`frames` uint8 (T, size, size, 3) RGB, `waveform` float32 (S,); None where absent. `record` as in the index."""

    frames: np.ndarray | None
    waveform: np.ndarray | None
    record: dict[str, Any]


def prepare_clip(clip: Clip | str | Path, settings: PrepareSettings | None = None) -> PreparedClip:
    """Read, track and crop one clip or media file in this process, for its main person; at most the first
    `max_duration` seconds. Raises MediaError with a cause."""
    settings = (settings or PrepareSettings()).model_copy(update={"people": "main"})
    return prepare_people(clip if isinstance(clip, Clip) else clip_of_file(clip), settings)[0]


def prepare_people(clip: Clip, settings: PrepareSettings) -> list[PreparedClip]:
    """As `prepare_clip`; with `people=all` and several people one for each, over the time that the person is seen.

    The one that `people=main` would take comes first. Ids get `@p0` and so on; those after it the flag `other_person`,
    because the sound is more likely not theirs.
    """
    media = read_media(
        *(clip.video, clip.audio, clip.start, clip.end),
        fps=settings.fps,
        sample_rate=settings.sample_rate,
        limits=settings.limits,
    )
    if media.frames is None:
        return [_prepared(clip, settings, media)]
    tracks = _tracks(media, clip, settings)
    if tracks is None and settings.face_fallback == "center":
        boxes = center_boxes(*media.frames.shape[:3])
        return [_prepared(clip, settings, media, _crop(clip, media, boxes, settings), ["no_face"], 0.0)]
    if tracks is None:
        return [_prepared(clip, settings, media, None, ["no_face"], 0.0)]
    several = ["several_people"] * (len(tracks) > 1)
    if settings.people == "all":  # who is seen too briefly for a clip is none
        tracks = [t for t in tracks if t.stop - t.first >= settings.min_duration * settings.fps] or tracks[:1]
    if settings.people == "main" or len(tracks) == 1:
        pictures = _crop(clip, media, tracks[0].boxes, settings)
        return [_prepared(clip, settings, media, pictures, several, _rate(tracks[0], settings))]
    people = []
    for number, track in enumerate(tracks):
        seen = media.part(track.first, track.stop, settings.fps, settings.sample_rate)
        person = dataclasses.replace(clip, id=f"{clip.id}@p{number}")
        flags = [*several, *["other_person"] * (number > 0)]
        pictures = _crop(clip, seen, track.boxes[track.first : track.stop], settings)
        people.append(_prepared(person, settings, seen, pictures, flags, _rate(track, settings)))
    return people


def _rate(track: Track, settings: PrepareSettings) -> float | None:
    return None if settings.face == "center" else round(track.rate, 4)


def _tracks(media: Media, clip: Clip, settings: PrepareSettings) -> list[Track] | None:
    """Faces seen often enough, the main person's first. None where the picture is to be given up for the sound, or
    replaced by its centre."""
    found = face_tracks(media.frames, _detectors(settings.face), settings.fps)
    tracks = [track for track in found if track.rate >= settings.min_face_rate or settings.face == "center"]
    if len(tracks) > 1 and media.waveform is not None and "silent" not in media.flags:
        rates = settings.fps, settings.sample_rate
        main = choose(tracks, [lip_agreement(media.frames, track, media.waveform, *rates) for track in tracks])
        tracks.insert(0, tracks.pop(main))
    if tracks:
        return tracks
    heard = media.waveform is not None and "silent" not in media.flags
    if settings.face_fallback == "center" or (settings.face_fallback == "sound" and heard):
        return None
    rate = found[0].rate if found else 0.0
    hint = (
        "set face_fallback=sound to keep its sound, or face_fallback=center to take the centre of the picture instead"
    )
    raise MediaError("no_face", f"{clip.video}: a face in {rate:.0%} of the frames looked at; {hint}")


def _crop(clip: Clip, media: Media, boxes: np.ndarray, settings: PrepareSettings) -> np.ndarray:
    """(T, size, size, 3) of the boxes (T, 4). Where the frames were scaled down too far for it, what the boxes go over
    is read again in a higher resolution."""
    side = float(np.median(boxes[:, 2] - boxes[:, 0]))
    if media.scale == 1 or side >= settings.size:
        return crop(media.frames, boxes, settings.size)
    height, width = media.frames.shape[1:3]
    sides = np.array([width, height, width, height])
    region = (*(boxes[:, :2].min(axis=0) / sides[:2]), *(boxes[:, 2:].max(axis=0) / sides[2:]))
    larger = min(FINE * settings.size / side, 1 / media.scale)  # than in the frames at hand
    pixels = (region[2] - region[0]) * (region[3] - region[1]) * width * height * larger**2
    frames, shown = read_region(
        *(clip.video, media.begin, len(boxes), region),
        fps=settings.fps,
        limits=settings.limits,
        pixels=pixels,
        sound_seconds=media.info["source_duration"] if clip.audio else None,
    )
    factors = np.array([frames.shape[2] / (shown[2] - shown[0]), frames.shape[1] / (shown[3] - shown[1])])
    boxes = ((boxes / sides).reshape(-1, 2, 2) - shown[:2]) * factors
    return crop(frames, boxes.reshape(-1, 4), settings.size)


def _prepared(
    clip: Clip,
    settings: PrepareSettings,
    media: Media,
    frames: np.ndarray | None = None,
    flags: Sequence[str] = (),
    face_rate: float | None = None,
) -> PreparedClip:
    """`media` with `frames` in place of the whole pictures, and its record."""
    counts = {"frames": 0 if frames is None else len(frames)}
    counts["samples"] = 0 if media.waveform is None else len(media.waveform)
    duration = counts["frames"] / settings.fps if counts["frames"] else counts["samples"] / settings.sample_rate
    if duration < settings.min_duration and not is_still(clip.video):
        raise MediaError("too_short", f"{clip.video or clip.audio}: {duration:.3f} s, below {settings.min_duration} s")
    record = {"id": clip.id, **counts, "duration": round(duration, 6), "flags": sorted([*media.flags, *flags])}
    record |= {"source_sha256": _fingerprint(clip), "frame_sizes": [], "meta": clip.meta}
    record |= {"start": round(media.begin, 6), "end": round(media.begin + duration, 6)}
    return PreparedClip(frames, media.waveform, record | {"face_rate": face_rate, "source": media.info})


_detectors = cache(find_detectors)


def _fingerprint(clip: Clip) -> str:
    """sha256 of the file's bytes; of the digests where picture and sound come from two files, or from frames."""
    digests = [_sha256(str(path), path.stat().st_mtime_ns) for path in (clip.video, clip.audio) if path is not None]
    return digests[0].hex() if len(digests) == 1 else hashlib.sha256(b"".join(digests)).hexdigest()


@cache
def _sha256(path: str, _changed: int) -> bytes:
    if Path(path).is_dir():
        return hashlib.sha256(b"".join(_sha256(str(frame), 0) for frame in frame_files(path))).digest()
    with open(path, "rb") as file:  # many clips may be cut from one long file
        return hashlib.file_digest(file, "sha256").digest()


def encode_clip(clip: PreparedClip, settings: PrepareSettings) -> tuple[dict[str, Any], dict[str, bytes]]:
    """(record, members) for a shard: `mjpeg` or `mp4`, `flac` of 16 bits; no member for an absent stream."""
    record, members = dict(clip.record), {}
    if clip.frames is not None and settings.picture == "mjpeg":
        jpegs = [encode_jpeg(frame, settings.quality) for frame in clip.frames]
        record["frame_sizes"] = [len(jpeg) for jpeg in jpegs]
        members["mjpeg"] = b"".join(jpegs)
    elif clip.frames is not None:
        members["mp4"] = encode_mp4(clip.frames, settings.fps, settings.quality)
    if clip.waveform is not None:
        members["flac"] = encode_flac(clip.waveform, settings.sample_rate)
    return record, members


def encode_jpeg(frame: np.ndarray, quality: int) -> bytes:
    return simplejpeg.encode_jpeg(frame, quality=quality, colorspace="RGB", colorsubsampling="420")


def encode_flac(waveform: np.ndarray, sample_rate: int) -> bytes:
    """float32 (S,) in [-1, 1] as 16 bit FLAC."""
    values = np.rint(np.clip(waveform, -1, 1) * np.float32(32767)).astype(np.int16)
    file = io.BytesIO()
    soundfile.write(file, values, sample_rate, format="FLAC", subtype="PCM_16")
    return file.getvalue()


def encode_mp4(frames: np.ndarray, fps: int, quality: int) -> bytes:
    """(T, H, W, 3) uint8 as H.264 in mp4, every twelfth frame whole so that a window can be reached cheaply."""
    file = io.BytesIO()
    with av.open(file, "w", format="mp4", options={"fflags": "+bitexact"}) as container:
        stream = container.add_stream("libx264", rate=fps)
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = "yuv420p"
        factor = math.floor((100 - quality) / 2 + 13)  # 90 -> 18, which is visually close to JPEG at 90
        stream.options = {"crf": str(min(factor, 51)), "g": "12", "bf": "0", "threads": "1", "preset": "medium"}
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode(None))
    return file.getvalue()
