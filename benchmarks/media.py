"""Difficult media on demand: films with any clocks, rates, sizes and formats, damaged files, traps. For tests and
`benchmarks.prepare`; nothing of it lies in the repository as a file."""

import ctypes
import heapq
import os
import random
import signal
import struct
import zlib
from collections.abc import Callable, Iterator, Sequence
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import soundfile

CODECS = {
    **dict.fromkeys(("mp4", "mov", "ts", "flv"), ("libx264", "aac")),
    "mkv": ("libx264", "flac"),
    "avi": ("mpeg4", "mp3"),
    "webm": ("libvpx", "libopus"),
}
MUTATIONS = ("bit", "bytes", "header", "zeros", "cut", "shuffle")
MUTATED = ("mp4", "mkv", "avi", "ts", "webm", "wav")


def gray(level: float, size: tuple[int, int] = (64, 48)) -> np.ndarray:
    """A picture (height, width, 3) of one level; `size` is (width, height)."""
    return np.full((size[1], size[0], 3), level, np.uint8)


def ticks(begin: float, end: float, fps: float = 25) -> list[float]:
    return [begin + k / fps for k in range(round((end - begin) * fps))]


def tone(seconds: float, rate: int = 16_000, hertz: float = 1000.0, level: float = 0.4) -> np.ndarray:
    return level * np.sin(2 * np.pi * hertz * np.arange(round(seconds * rate)) / rate)


def write_film(
    path: Path,
    picture: Callable[[float], np.ndarray] | None = None,
    times: Sequence[float] = (),
    sound: np.ndarray | None = None,
    sound_at: float = 0.0,
    rate: int = 16_000,
    turn: int = 0,
    aspect: Fraction | None = None,
    options: dict[str, str] | None = None,
    codec: str | None = None,
    pix_fmt: str = "yuv420p",
) -> Path:
    """`picture(t)` RGB, or RGBA for formats with alpha, at each of `times`, and samples `sound` (S,) or (C, S) from
    `sound_at` seconds on. Either may be absent, and times may be negative."""
    container = av.open(str(path), "w", options=options or {})
    video_codec, audio_codec = CODECS[path.suffix[1:]]
    video_codec = codec or video_codec
    if picture:
        first = picture(times[0])
        video = container.add_stream(video_codec, rate=25)
        video.height, video.width = first.shape[:2]
        clock = Fraction(1, 25 if video_codec == "mpeg4" else 90_000)
        video.pix_fmt, video.time_base, video.codec_context.time_base = pix_fmt, clock, clock
        if video_codec == "libx264":
            video.options = {"crf": "8", "preset": "ultrafast", "bf": "2", "g": "25"}
        if turn:
            video.set_display_rotation(turn)
        if aspect:
            video.codec_context.sample_aspect_ratio = aspect
    if sound is not None:
        sound = np.atleast_2d(np.asarray(sound, np.float32))
        layout = {1: "mono", 2: "stereo", 6: "5.1"}[len(sound)]
        audio = container.add_stream(audio_codec, rate=48_000 if audio_codec == "libopus" else rate, layout=layout)
    frames = []  # (seconds, stream, frame): both streams by time, as players and probes expect them
    if picture:
        frames = ((time, video, _picture(picture(time), time, clock)) for time in times)
    pieces = [] if sound is None else ((time, audio, piece) for time, piece in _pieces(sound, sound_at, rate, layout))
    for _, stream, frame in heapq.merge(frames, pieces, key=lambda item: item[0]):
        container.mux(stream.encode(frame))
    for stream in container.streams:
        container.mux(stream.encode(None))
    container.close()
    return path


def _picture(shown: np.ndarray, seconds: float, clock: Fraction) -> av.VideoFrame:
    frame = av.VideoFrame.from_ndarray(shown, format="rgba" if shown.shape[2] == 4 else "rgb24")
    frame.pts, frame.time_base = round(seconds / clock), clock
    return frame


def _pieces(sound: np.ndarray, begin: float, rate: int, layout: str) -> Iterator[tuple[float, av.AudioFrame]]:
    whole = np.clip(np.rint(sound * 32767), -32768, 32767).astype(np.int16)
    for at in range(0, whole.shape[1], 1024):
        piece = np.ascontiguousarray(whole[:, at : at + 1024].T).reshape(1, -1)
        frame = av.AudioFrame.from_ndarray(piece, format="s16", layout=layout)
        frame.sample_rate, frame.time_base = rate, Fraction(1, rate)
        frame.pts = round(begin * rate) + at
        yield begin + at / rate, frame


def write_flash_and_beep(path: Path, picture_at: float, sound_at: float, seconds: float = 2.5) -> Path:
    """A flash and a beep at 1.5 seconds, with streams that begin at these times; negative ones are before zero, which
    mp4 keeps as an edit list."""

    def flash(time_: float) -> np.ndarray:
        return gray(230 if 1.5 <= time_ < 1.6 else 20)

    times = sound_at + np.arange(round((seconds - sound_at) * 16_000)) / 16_000
    beep = np.where((times >= 1.5) & (times < 1.6), 0.6 * np.sin(2 * np.pi * 1000 * times), 0)
    return write_film(path, flash, ticks(picture_at, seconds), beep, sound_at)


def flash_to_beep(frames: np.ndarray, waveform: np.ndarray) -> float:
    """Seconds by which the beep comes after the flash, in frames at 25 per second and sound at 16 kHz."""
    flash = np.flatnonzero(frames.mean(axis=(1, 2, 3)) > 120)[0] / 25
    return np.flatnonzero(np.abs(waveform) > 0.2)[0] / 16_000 - flash


def mutate(raw: bytes, kind: str, rng: random.Random) -> bytes:
    """A damaged copy: a bit, 64 bytes, the first kilobyte's bytes, a run of zeros, a cut, or two swapped blocks."""
    raw = bytearray(raw)
    at = rng.randrange(len(raw))
    if kind == "bit":
        raw[at] ^= 1 << rng.randrange(8)
    elif kind == "bytes":
        raw[at : at + 64] = rng.randbytes(len(raw[at : at + 64]))
    elif kind == "header":
        for place in rng.sample(range(min(1024, len(raw))), 4):
            raw[place] = rng.randrange(256)
    elif kind == "zeros":
        raw[at : at + 2000] = bytes(len(raw[at : at + 2000]))
    elif kind == "cut":
        del raw[at:]
    else:
        block = max(len(raw) // 16, 1)
        a, b = sorted(rng.sample(range(len(raw) // block), 2))
        one, other = slice(a * block, (a + 1) * block), slice(b * block, (b + 1) * block)
        raw[one], raw[other] = raw[other], raw[one]
    return bytes(raw)


def write_mutated(folder: Path, count: int, seed: int) -> None:
    """`count` damaged files, kinds of container and of damage in turn."""
    rng = random.Random(seed)
    originals = {}
    for kind in MUTATED:
        path = folder / f"original.{kind}"
        if kind == "wav":
            soundfile.write(path, tone(1.0, 44_100), 44_100)
        else:
            rate = 44_100 if kind == "avi" else 16_000
            write_film(path, lambda t: gray(round(30 + 60 * t)), ticks(0, 1), tone(1.0, rate), rate=rate)
        originals[kind] = path.read_bytes()
        path.unlink()
    for number in range(count):
        kind = MUTATED[number % len(MUTATED)]
        damage = MUTATIONS[number // len(MUTATED) % len(MUTATIONS)]
        (folder / f"m{number:04d}_{damage}.{kind}").write_bytes(mutate(originals[kind], damage, rng))


def write_bombs(folder: Path) -> dict[str, Path]:
    """Small files that announce much: the cause each must be refused with, and the file."""
    bombs = {cause: folder / name for cause, name in [("bad_rate", "hertz.wav"), ("too_long", "hours.mkv")]}
    soundfile.write(bombs["bad_rate"], tone(0.1), 16_000)
    raw = bytearray(bombs["bad_rate"].read_bytes())
    raw[24:28] = struct.pack("<I", 1)  # 1 Hz
    bombs["bad_rate"].write_bytes(raw)
    write_film(bombs["too_long"], lambda t: gray(90), [0, 0.04, 36_000.0])
    bombs["too_many_pixels"] = write_vast_png(folder / "vast.png")
    bombs["too_many_streams"] = folder / "streams.mkv"
    with av.open(str(bombs["too_many_streams"]), "w") as container:
        streams = [container.add_stream("pcm_s16le", rate=16_000, layout="mono") for _ in range(300)]
        for stream in streams:
            frame = av.AudioFrame.from_ndarray(np.zeros((1, 160), np.int16), format="s16", layout="mono")
            frame.sample_rate, frame.pts, frame.time_base = 16_000, 0, Fraction(1, 16_000)
            container.mux(stream.encode(frame))
    return bombs


def write_vast_png(path: Path, side: int = 16_000) -> Path:
    """The beginning of a picture of `side` times `side` pixels."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    rows = zlib.compress(bytes(1 << 20))
    head = struct.pack(">IIBBBBB", side, side, 8, 0, 0, 0, 0)
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", rows) + chunk(b"IEND", b""))
    return path


def write_vast_film(path: Path, side: int = 16_000) -> Path:
    """An avi of motion JPEG whose header and pictures claim `side` times `side` pixels."""
    write_film(path, lambda t: gray(90), ticks(0, 0.4), codec="mjpeg", pix_fmt="yuvj420p")
    raw = path.read_bytes()
    small, vast = struct.pack("<II", 64, 48), struct.pack("<II", side, side)
    raw = raw.replace(small, vast).replace(struct.pack(">HH", 48, 64), struct.pack(">HH", side, side))
    path.write_bytes(raw)
    return path


def write_short_film(path: Path, told: int = 431, there: int = 300) -> Path:
    """An mp4 whose table lists `told` pictures while the file ends after `there` of them."""
    write_film(path, lambda t: gray(round(20 + 10 * t)), ticks(0, told / 25), options={"movflags": "faststart"})
    with av.open(str(path)) as container:
        ends = sorted(p.pos + p.size for p in container.demux(video=0) if p.size)
    os.truncate(path, ends[there - 1])
    return path


def write_traps(folder: Path, canary: Path, url: str) -> list[Path]:
    """Files that would make a careless reader open `canary`, a media file, or `url`."""
    names = {"hls": "#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\n{0}\n#EXT-X-ENDLIST\n"}
    names["concat"] = "ffconcat version 1.0\nfile '{0}'\n"
    names["dash"] = (
        '<?xml version="1.0"?><MPD xmlns="urn:mpeg:dash:schema:mpd:2011" type="static"><BaseURL>{0}</BaseURL></MPD>'
    )
    names["sdp"] = "v=0\no=- 0 0 IN IP4 127.0.0.1\ns=x\nc=IN IP4 127.0.0.1\nt=0 0\nm=video 5004 RTP/AVP 96\ni={0}\n"
    names["asx"] = '<asx version="3.0"><entry><ref href="{0}"/></entry></asx>'
    traps = []
    for name, text in names.items():
        for target, what in ((canary, "file"), (url, "url")):
            traps.append(folder / f"{name}_{what}.mp4")
            traps[-1].write_text(text.format(target))
    traps.append(folder / "frame%03d.png")  # as a pattern it would name the picture beside it
    traps[-1].write_bytes(b"no picture")
    (folder / "frame001.png").write_bytes(canary.read_bytes())
    traps.append(folder / "reference.mov")  # QuickTime's reference movie
    inner = b"".join([_atom(b"rdrf", b"\0\0\0\0url " + struct.pack(">I", len(url) + 1) + url.encode() + b"\0")])
    traps[-1].write_bytes(_atom(b"moov", _atom(b"rmra", _atom(b"rmda", inner))))
    return traps


def _atom(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content) + 8) + kind + content


class Watched:
    """Counts how often a file is opened, by any process: `with Watched(path) as opened: ...; opened()`."""

    IN_OPEN = 0x20

    def __init__(self, path: Path):
        self.path = path
        self._libc = ctypes.CDLL(None, use_errno=True)

    def __enter__(self) -> Callable[[], int]:
        self._descriptor = self._libc.inotify_init1(os.O_NONBLOCK | os.O_CLOEXEC)
        if self._libc.inotify_add_watch(self._descriptor, os.fsencode(self.path), self.IN_OPEN) < 0:
            raise OSError(ctypes.get_errno(), "inotify")
        return self._count

    def __exit__(self, *_: object) -> None:
        os.close(self._descriptor)

    def _count(self) -> int:
        try:
            return len(os.read(self._descriptor, 1 << 16)) // 16  # an event of a watched file has no name
        except BlockingIOError:
            return 0


def faulty(frame: np.ndarray) -> list[list[float]]:
    """A face detector that does what native code does on some files, by the colour of the picture."""
    red, green, blue = (int(channel) for channel in frame.reshape(-1, 3).mean(axis=0))
    if red > 200:
        os.kill(os.getpid(), {0: signal.SIGSEGV, 1: signal.SIGABRT, 2: signal.SIGKILL}[blue // 40])
    if green > 200:
        ctypes.PyDLL(None).sleep(1000)  # in native code and with the interpreter's lock, as real hangs are
    if blue > 200:
        os._exit(0)
    return [[4, 4, 40, 40]]
