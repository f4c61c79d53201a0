"""One clip from its files to what a shard holds: read, track the face, crop, encode."""

import dataclasses
import hashlib
import io
import math
from functools import cache
from pathlib import Path
from typing import Any, Literal

import av
import numpy as np
import simplejpeg
import soundfile
from pydantic import Field, field_validator

from affekt.data.manifest import Clip, clip_of_file, frame_files
from affekt.data.media.container import Limits, MediaError, is_still
from affekt.data.media.face import center_boxes, crop, face_track, find_detectors
from affekt.data.media.streams import read_media
from affekt.data.settings import Settings


class PrepareSettings(Settings):
    """What decides the content of the shards, and the limits of the processes that make them."""

    size: int = Field(160, ge=16, le=1024)  # pixels, square
    fps: int = Field(25, ge=1, le=120)
    sample_rate: int = Field(16_000, ge=8_000, le=48_000)
    picture: Literal["mjpeg", "mp4"] = "mjpeg"  # mp4 is a third of the bytes and ten times slower to read
    quality: int = Field(90, ge=1, le=100)  # of JPEG; mp4 uses x264's constant rate factor of about the same look
    face: str = "haar"  # or "center", or "package.module:callable" that maps RGB (H, W, 3) to boxes (N, 4)
    face_fallback: Literal["quarantine", "center"] = "quarantine"  # for a picture without a face
    min_face_rate: float = Field(0.25, ge=0, le=1)  # share of looked-at frames below which there is no face
    min_duration: float = Field(0.1, ge=0)  # seconds; still images are exempt
    max_duration: float = Field(60.0, gt=0)  # seconds; longer clips are cut and flagged
    max_source_duration: float = Field(6 * 3600.0, gt=0)  # seconds; longer files are refused
    max_pixels: int = Field(4096 * 2304, gt=0)
    frame_mib: int = Field(768, ge=16)  # frames of one clip in memory; larger ones are read scaled down
    clips_per_shard: int = Field(128, ge=1)
    timeout_s: float = Field(180.0, gt=0)  # per clip, then its process is killed
    memory_mib: int = Field(6144, ge=512)  # address space of one process
    recycle: int = Field(200, ge=1)  # clips after which a process is replaced, against slow leaks

    @field_validator("face")
    @classmethod
    def _known_face(cls, name: str) -> str:
        if name not in ("haar", "center") and ":" not in name:
            raise ValueError("use `haar`, `center` or `package.module:callable`")
        return name


@dataclasses.dataclass
class PreparedClip:
    """`frames` uint8 (T, size, size, 3) RGB, `waveform` float32 (S,); None where absent. `record` as in the index."""

    frames: np.ndarray | None
    waveform: np.ndarray | None
    record: dict[str, Any]


def prepare_clip(clip: Clip | str | Path, settings: PrepareSettings | None = None) -> PreparedClip:
    """Read, track and crop one clip or media file in this process. Raises MediaError with a cause."""
    settings = settings or PrepareSettings()
    clip = clip if isinstance(clip, Clip) else clip_of_file(clip)
    limits = Limits(
        settings.max_duration, settings.max_source_duration, settings.max_pixels, settings.frame_mib * 2**20
    )
    media = read_media(
        clip.video, clip.audio, clip.start, clip.end, fps=settings.fps, sample_rate=settings.sample_rate, limits=limits
    )
    frames, flags, face_rate = media.frames, list(media.flags), None
    if frames is not None:
        frames, face_rate, found = _crop_face(frames, clip, settings)
        flags += [] if found else ["no_face"]
    counts = {"frames": 0 if frames is None else len(frames)}
    counts["samples"] = 0 if media.waveform is None else len(media.waveform)
    duration = counts["frames"] / settings.fps if counts["frames"] else counts["samples"] / settings.sample_rate
    if duration < settings.min_duration and not is_still(clip.video):
        raise MediaError("too_short", f"{clip.video or clip.audio}: {duration:.3f} s, below {settings.min_duration} s")
    record = {"id": clip.id, **counts, "duration": round(duration, 6), "flags": sorted(flags)}
    record |= {"source_sha256": _fingerprint(clip), "frame_sizes": [], "meta": clip.meta}
    record |= {"face_rate": face_rate, "start": clip.start, "end": clip.end, "source": media.info}
    return PreparedClip(frames, media.waveform, record)


def _crop_face(frames: np.ndarray, clip: Clip, settings: PrepareSettings) -> tuple[np.ndarray, float | None, bool]:
    detectors = _detectors(settings.face)
    track = face_track(frames, detectors, settings.fps)
    if not detectors:
        return crop(frames, track.boxes, settings.size), None, True
    rate = 0.0 if track is None else round(track.rate, 4)
    if track is not None and rate >= settings.min_face_rate:
        return crop(frames, track.boxes, settings.size), rate, True
    if settings.face_fallback == "quarantine":
        hint = "set face_fallback=center to take the centre of the picture instead"
        raise MediaError("no_face", f"{clip.video}: a face in {rate:.0%} of the frames looked at; {hint}")
    return crop(frames, center_boxes(*frames.shape[:3]), settings.size), rate, False


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
