"""Opening foreign media files: local files only, known containers only, sizes checked before anything is decoded.

What comes out are decoded frames with their time in seconds on the container's clock. FFmpeg's decoders are exposed to
hostile bytes here, so `affekt.data.media.workers` runs this in processes that can be killed.
"""

import dataclasses
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import av
import av.logging

from affekt.data.errors import DataError
from affekt.data.manifest import IMAGE_SUFFIXES

# Containers that hold their own bytes. Playlists (hls, dash, concat, sdp, image sequences) would open further names.
FORMATS = (
    *("mov,mp4,m4a,3gp,3g2,mj2", "matroska,webm", "avi", "asf", "flv", "mpeg", "mpegts", "ogg", "gif"),
    *("wav", "w64", "flac", "mp3", "aac", "aiff", "amr", "au", "caf"),
)
STILLS = ("jpeg_pipe", "png_pipe", "bmp_pipe", "webp_pipe", "tiff_pipe")
# Where time stamps are as good after a seek as in a straight reading; in bare mp3, aac and amr they are estimates then.
SEEKABLE = ("mov", "matroska", "wav", "flac", "avi", "mpegts", "flv", "asf")
RATES = (4_000, 384_000)  # a header of 1 Hz would turn seconds into gigabytes
MAX_STREAMS = 32
SEEK_AFTER = 5.0  # seconds; before, reading from the beginning is as quick
PREROLL = 1.0  # seconds decoded before a cut, so that predictive codecs have settled

av.logging.set_level(None)  # FFmpeg's own lines name no clip; what matters comes back as MediaError


class MediaError(DataError):
    """A clip that cannot be used; `cause` is a short code to count by."""

    def __init__(self, cause: str, message: str):
        super().__init__(message)
        self.cause = cause


@dataclasses.dataclass(frozen=True)
class Limits:
    """What is read at all. Seconds, pixels of one frame, bytes of all frames of a clip together."""

    max_duration: float = 60.0  # longer clips are cut here and flagged
    max_source_duration: float = 6 * 3600.0  # longer files are refused before decoding
    max_pixels: int = 4096 * 2304
    frame_bytes: int = 768 * 2**20  # frames are scaled down as they are read so that a clip stays below this
    pixels: int = 854 * 480  # and to this size or a little below, which is enough to find faces in


def is_still(path: str | Path | None) -> bool:
    return path is not None and Path(path).suffix.lower() in IMAGE_SUFFIXES


def open_media(path: str | Path, limits: Limits):
    """Open a local regular file with the demuxers listed above. Raises MediaError."""
    path = Path(path)
    if not path.is_file():
        raise MediaError("missing", f"{path}: the file is not there")
    if path.stat().st_size == 0:
        raise MediaError("empty", f"{path}: the file has 0 bytes")
    still = is_still(path)
    options = {"protocol_whitelist": "file", "format_whitelist": ",".join(STILLS if still else FORMATS)}
    vast = {"max_pixels": str(limits.max_pixels)}  # FFmpeg decodes the first pictures as it opens a file
    # A still is handed over as a nameless stream: by name FFmpeg would take `img%03d.png` for a sequence of files.
    source = _Nameless(path.open("rb")) if still else f"file:{path.resolve()}"
    try:
        container = av.open(source, options=vast, container_options=options, metadata_errors="replace")
    except (av.FFmpegError, ValueError, UnicodeError, IndexError) as error:
        raise MediaError("unreadable", f"{path}: not a media file of a known container ({_short(error)})") from None
    try:
        _check(container, path, limits)
    except MediaError:
        container.close()
        raise
    for stream in container.streams.video:
        if stream.codec_context is not None:
            stream.codec_context.options = vast
    return container


class _Nameless:
    """A file without a `name`, so that the demuxer is chosen by content only."""

    def __init__(self, file):
        self.read, self.seek, self.tell, self.close = file.read, file.seek, file.tell, file.close


def _check(container, path: Path, limits: Limits) -> None:
    if len(container.streams) > MAX_STREAMS:
        raise MediaError("too_many_streams", f"{path}: {len(container.streams)} streams, the limit is {MAX_STREAMS}")
    seconds = (container.duration or 0) / av.time_base
    if seconds > limits.max_source_duration:
        raise MediaError("too_long", f"{path}: {seconds:.0f} s, the limit is {limits.max_source_duration:.0f} s")
    for stream in container.streams.video:
        context = stream.codec_context
        if context is not None and context.width * context.height > limits.max_pixels:
            size = f"{context.width} x {context.height}"
            raise MediaError("too_many_pixels", f"{path}: frames of {size}, the limit is {limits.max_pixels} pixels")
        if context is not None and is_still(path) and not context.width:
            raise MediaError("too_many_pixels", f"{path}: no picture, or one of more than {limits.max_pixels} pixels")
    for stream in container.streams.audio:
        context = stream.codec_context
        if context is not None and context.sample_rate:  # 0 where the header does not tell; its frames will
            check_rate(context.sample_rate, path)


def check_rate(rate: int, path: str | Path) -> None:
    if not RATES[0] <= rate <= RATES[1]:
        raise MediaError("bad_rate", f"{path}: sound of {rate} Hz, known are {RATES[0]} to {RATES[1]} Hz")


def picture_stream(container):
    """The first stream with moving pictures; a cover picture inside a music file is none."""
    covers = av.stream.Disposition.attached_pic
    return next((s for s in container.streams.video if not s.disposition & covers), None)


def length_of(stream) -> float | None:
    """Seconds that the header announces for a stream."""
    return float(stream.duration * stream.time_base) if stream.duration and stream.time_base else None


def begin_of(container, stream) -> float:
    """Seconds by which a stream begins after its container, as far as the header tells."""
    if stream.start_time is None:
        return 0.0
    return max(float(stream.start_time * stream.time_base) - clock_of(container), 0.0)


def clock_of(container) -> float:
    """Where the container's own clock stands at its beginning, in seconds."""
    return 0.0 if container.start_time is None else container.start_time / av.time_base


def decode_stream(container, stream, path: str | Path, start: float = 0.0) -> Iterator[tuple[float, Any]]:
    """(seconds, frame) of one stream from `start` or before; seconds count from the beginning of the container.

    Raises MediaError where packets or frames are damaged, or end long before what the header announces.
    """
    if stream.codec_context is None:
        raise MediaError("no_decoder", f"{path}: the {stream.type} is in a format that is not known here")
    stream.codec_context.thread_count = 1  # parallel over clips, not within one
    if start > SEEK_AFTER and container.format.name.startswith(SEEKABLE):
        container.seek(int((start - PREROLL + clock_of(container)) * av.time_base), backward=True)
        frames = _decode(container, stream, path)
        try:
            first = next(frames, None)
        except MediaError:
            first = None
        if first is not None and first[0] <= start:
            yield first
            yield from frames
            return
        container.seek(0, backward=True)  # it came out too late, so read all that comes before
    yield from _decode(container, stream, path)


def _decode(container, stream, path: str | Path) -> Iterator[tuple[float, Any]]:
    clock = clock_of(container)
    last, lasts = -math.inf, 0.0
    try:
        for packet in container.demux(stream):
            if packet.is_corrupt:
                raise MediaError("truncated", f"{path}: the file ends in the middle of a {stream.type} packet")
            for frame in packet.decode():
                if frame.is_corrupt and last == -math.inf:
                    continue  # a file cut before its first whole picture
                if frame.is_corrupt:
                    raise MediaError("damaged", f"{path}: broken {stream.type} frame after {last:.2f} s")
                if frame.time is None:
                    raise MediaError("no_time_stamps", f"{path}: {stream.type} frames without time stamps")
                lasts = frame.time - clock - last if last > -math.inf else 0.0
                last = frame.time - clock
                yield last, frame
    except (av.FFmpegError, ValueError, UnicodeError, IndexError) as error:
        at = f" after {last:.2f} s" if last > -math.inf else ""
        raise MediaError("damaged", f"{path}: the {stream.type} does not decode{at} ({_short(error)})") from None
    announced = length_of(stream)
    if announced and last > -math.inf:
        missing = begin_of(container, stream) + announced - last - lasts
        if missing > max(0.5, 0.1 * announced):
            message = f"{path}: {announced:.2f} s of {stream.type} announced, the last {missing:.2f} s are not there"
            raise MediaError("truncated", message)


def _short(error: Exception) -> str:
    return getattr(error, "strerror", None) or str(error) or type(error).__name__
