"""From the bytes of a clip to one window of it: only the frames that are needed, and the sound under them."""

import io
from typing import Any, NamedTuple

import numpy as np
import simplejpeg
import soundfile
from pydantic import Field

from affekt.data.samples import Sample
from affekt.data.settings import Settings
from affekt.data.shards import SampleError, ShardIndex

# Of a log-mel frame at 16 kHz, in samples: 25 ms long, every 10 ms (Kaldi's defaults).
FRAME_LENGTH, FRAME_SHIFT = 400, 160
SPEECH_KEPT = 0.95


class Window(Settings):
    """What one view of a clip holds: `num_frames` pictures, `frame_stride` apart, and `mel_frames` frames of sound."""

    num_frames: int = Field(16, ge=1)
    frame_stride: int = Field(4, ge=1)
    mel_frames: int = Field(256, ge=1)
    fps: int = Field(25, ge=1)
    sample_rate: int = Field(16000, ge=1)

    @property
    def audio_samples(self) -> int:
        """Samples of sound that give exactly `mel_frames`: 41,200 for 256."""
        return FRAME_LENGTH + (self.mel_frames - 1) * FRAME_SHIFT

    @property
    def picture_seconds(self) -> float:
        return ((self.num_frames - 1) * self.frame_stride + 1) / self.fps

    @property
    def sound_seconds(self) -> float:
        return self.audio_samples / self.sample_rate

    @property
    def duration(self) -> float:
        """Seconds of a clip that hold every picture and sample of the window."""
        return max(self.picture_seconds, self.sound_seconds)


class View(NamedTuple):
    """A decoded window: video uint8 (T, H, W, 3) and audio float32 (S,), None where absent or not asked for.

    The first `audio_valid` samples are sound, the rest zeros after its end.
    """

    video: np.ndarray | None
    audio: np.ndarray | None
    audio_valid: int


def random_start(duration: float, window: Window, u: float, sound: np.ndarray | None = None) -> float:
    """The start in seconds, on a frame, that `u` in [0, 1) chooses among `possible_starts`."""
    starts = possible_starts(duration, window, sound)
    return int(starts[int(u * len(starts))]) / window.fps


def window_starts(duration: float, window: Window, n: int, sound: np.ndarray | None = None) -> list[float]:
    """At most `n` different starts in seconds, evenly spaced among `possible_starts`; one alone lies in the middle."""
    starts = possible_starts(duration, window, sound)
    last = len(starts) - 1
    places = [last // 2] if n == 1 else sorted({round(i * last / (n - 1)) for i in range(n)})
    return [int(starts[place]) / window.fps for place in places]


def possible_starts(duration: float, window: Window, sound: np.ndarray | None = None) -> np.ndarray:
    """The frames, int64 (K,), at which a window may start that lies in the clip; 0 in a clip shorter than it.

    With the `sound` (S,) of the whole clip, only those where the window holds SPEECH_KEPT of the most sound that any
    of them does, by the sum of its amplitudes: windows around the speech, not of the silence before and after.
    """
    starts = np.arange(max(0, int((duration - window.duration) * window.fps + 1e-6)) + 1)
    if sound is None:
        return starts
    total = np.concatenate(([0.0], np.abs(sound, dtype=np.float64).cumsum()))
    begin = np.round(starts / window.fps * window.sample_rate).astype(np.int64).clip(max=len(sound))
    held = total[(begin + window.audio_samples).clip(max=len(sound))] - total[begin]
    return starts[held >= SPEECH_KEPT * held.max()]


def decode_window(
    index: ShardIndex,
    sample: Sample,
    window: Window,
    start: float,
    streams: str = "both",
    into: np.ndarray | None = None,
) -> View:
    """One window of a clip from `start` seconds; the sound begins at the time stamp of the first picture.

    `into` uint8 (T, size, size, 3) takes the pictures, which saves a copy. A clip that ends inside the window has its
    last picture repeated and its sound padded with zeros. Raises SampleError (cause `checksum`, `read` or `decode`)
    when the clip is damaged.
    """
    first = round(start * window.fps)
    video, audio, valid = None, None, 0
    if sample.has_video and streams != "audio":
        frames = np.minimum(first + np.arange(window.num_frames) * window.frame_stride, sample.frames - 1)
        video = decode_frames(index, sample, frames, into)
    if sample.has_audio and streams != "video":
        audio = np.zeros(window.audio_samples, np.float32)
        sound = decode_sound(index, sample, round(first / window.fps * window.sample_rate), window.audio_samples)
        valid = len(sound)
        audio[:valid] = sound
    return View(video, audio, valid)


def decode_frames(index: ShardIndex, sample: Sample, frames: np.ndarray, into: np.ndarray | None = None) -> np.ndarray:
    """The pictures with these ascending numbers, of which the last may be repeated: uint8 (T, size, size, 3), RGB."""
    size = index.header["size"]
    member = "mjpeg" if "mjpeg" in sample.members else "mp4"
    content = index.read(sample, member)
    pictures = np.empty((len(frames), size, size, 3), np.uint8) if into is None else into
    last = np.flatnonzero(frames == frames[-1])[0] + 1  # the last picture may stand again and again
    try:
        (_from_mjpeg if member == "mjpeg" else _from_mp4)(content, sample, frames[:last], size, pictures)
    except SampleError:
        raise
    except Exception as error:  # decoders raise classes of their own; whatever they say, the clip is at fault
        raise _undecodable(index, sample, member, error) from error
    pictures[last:] = pictures[last - 1]
    return pictures


def decode_sound(index: ShardIndex, sample: Sample, start: int, count: int) -> np.ndarray:
    """Up to `count` samples of sound from sample `start` on: float32 (n,); fewer at the end of the clip."""
    content = index.read(sample, "flac")
    expected = max(0, min(count, sample.samples - start))
    try:
        with soundfile.SoundFile(io.BytesIO(content)) as file:
            file.seek(min(start, sample.samples))
            sound = file.read(expected, dtype="float32")
    except (RuntimeError, ValueError) as error:  # soundfile.LibsndfileError is a RuntimeError
        raise _undecodable(index, sample, "flac", error) from error
    if sound.shape != (expected,):
        raise _undecodable(index, sample, "flac", f"{sound.shape} samples at {start}, expected ({expected},)")
    return sound


def whole_sound(index: ShardIndex, sample: Sample) -> np.ndarray | None:
    """All the sound of a clip, float32 (S,); None where it has none. Raises SampleError."""
    return decode_sound(index, sample, 0, sample.samples) if sample.has_audio else None


def _from_mjpeg(content: bytes, sample: Sample, frames: np.ndarray, size: int, pictures: np.ndarray) -> None:
    ends = np.cumsum(sample.frame_sizes).tolist()
    view = memoryview(content)
    for picture, frame in zip(pictures, frames.tolist()):
        jpeg = view[ends[frame] - sample.frame_sizes[frame] : ends[frame]]
        height, width, *_ = simplejpeg.decode_jpeg_header(jpeg)
        if (height, width) != (size, size):
            raise ValueError(f"frame {frame} is {width}x{height}, the index says {size}x{size}")
        simplejpeg.decode_jpeg(jpeg, "RGB", buffer=picture)


def _from_mp4(content: bytes, sample: Sample, frames: np.ndarray, size: int, pictures: np.ndarray) -> None:
    import decord  # only here: the usual shards hold JPEG pictures, and loading it takes a moment

    reader = decord.VideoReader(io.BytesIO(content), num_threads=1)
    if len(reader) < sample.frames:  # more where only the beginning of a clip is looked at
        raise ValueError(f"{len(reader)} frames, the index says {sample.frames}")
    for picture, frame in zip(pictures, frames.tolist()):
        # One by one, because `get_batch` fails at widths such as 96: decord pads rows to 64 pixels and, where that
        # comes out even, takes the padding for more channels.
        rows = reader[frame].asnumpy()
        if rows.shape[:2] != (size, size):
            raise ValueError(f"frame {frame} is {rows.shape[1]}x{rows.shape[0]}, the index says {size}x{size}")
        picture[...] = rows.reshape(size, -1)[:, : 3 * size].reshape(size, size, 3)


def _undecodable(index: ShardIndex, sample: Sample, member: str, error: Any) -> SampleError:
    where = index.root / index.shard_name(sample)
    return SampleError(f"{where}: clip {sample.id}, member {member}: cannot be decoded: {error}", "decode")
