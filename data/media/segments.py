"""Sources that are too long for one clip: how long they are, and the equal parts they are cut into."""

import dataclasses
import math
from pathlib import Path

import av

from affekt.data.manifest import Clip, frame_files
from affekt.data.media.container import Limits, MediaError, begin_of, clock_of, length_of, open_media, picture_stream

TOLD = ("mov", "matroska", "wav", "flac")  # containers whose header states the length; elsewhere it is an estimate


def measure(clip: Clip, limits: Limits, fps: int = 25) -> tuple[float, float]:
    """Seconds from which and to which all streams of `clip` last, within its own `start` and `end`.

    Read from headers, and packet by packet (without decoding) where those only estimate. A folder of frames lasts as
    long as its sound, or has `fps` of them a second. Raises MediaError.
    """
    begin, end = clip.start or 0.0, math.inf if clip.end is None else clip.end
    if clip.video is not None and clip.video.is_dir():
        if clip.audio is None:
            return begin, min(end, len(frame_files(clip.video)) / fps)
        clip = dataclasses.replace(clip, video=None)
    for path, wanted in ((clip.video, "picture" if clip.audio else "both"), (clip.audio, "sound")):
        if path is None:
            continue
        with open_media(path, limits) as container:
            picture = picture_stream(container) if wanted != "sound" else None
            sound = next(iter(container.streams.audio), None) if wanted != "picture" else None
            for stream_begin, stream_end in _spans(path, container, [s for s in (picture, sound) if s]):
                begin, end = max(begin, stream_begin), min(end, stream_end)
    return begin, end


def cut(clip: Clip, begin: float, end: float, longest: float, fps: int) -> list[Clip]:
    """The fewest parts of equal length, a frame more or less, that last at most `longest` seconds each.

    Equal parts leave no short rest. Their frames are those of the whole: all begin on its ticks. Their ids are the
    clip's with `@000` and so on; ids of a manifest hold no `@`, so they meet no other one. A clip whose own end lies
    beyond `end` asks for more than there is, and so does its last part.
    """
    frames = (end - begin) * fps
    if frames <= longest * fps + 1 or math.isinf(frames):
        return [clip]
    count = math.ceil(frames / max(math.floor(longest * fps), 1) - 1e-6)
    at = [round(begin + round(frames * part / count) / fps, 9) for part in range(count)] + [round(end, 9)]
    if clip.end is not None:
        at[-1] = round(min(clip.end, at[-2] + longest), 9)
    names = (f"{clip.id}@{part:03d}" for part in range(count))
    return [
        dataclasses.replace(clip, id=name, start=a, end=b) for name, a, b in zip(names, at[:-1], at[1:], strict=True)
    ]


def _spans(path: Path, container, streams: list) -> list[tuple[float, float]]:
    """(begin, end) in seconds of each stream on the container's clock."""
    whole = (container.duration or 0) / av.time_base
    told = container.format.name.startswith(TOLD) and whole > 0
    if container.format.name.startswith("mov"):  # a fragmented file's header speaks of the first fragment only
        told = told and all(stream.frames for stream in streams)
    begins = [begin_of(container, stream) for stream in streams]
    if told:
        lengths = [length_of(stream) for stream in streams]
        return [(begin, begin + length if length else whole) for begin, length in zip(begins, lengths, strict=True)]
    ends = dict.fromkeys((stream.index for stream in streams), -math.inf)
    try:
        for packet in container.demux(streams) if streams else ():
            if packet.pts is not None and packet.time_base:
                seconds = float((packet.pts + (packet.duration or 0)) * packet.time_base) - clock_of(container)
                ends[packet.stream.index] = max(ends[packet.stream.index], seconds)
    except av.FFmpegError as error:
        at = max(*ends.values(), 0.0)
        raise MediaError("damaged", f"{path}: cannot be read after {at:.2f} s ({error.strerror})") from None
    return [(begin, end) for begin, end in zip(begins, ends.values(), strict=True) if end > -math.inf]
