"""One finished clip as a file: picture and sound encoded the same way every time."""

import os
from fractions import Fraction
from pathlib import Path

import av
import cv2
import numpy as np
import soundfile

from affekt.data.synth.voice import SAMPLE_RATE

# x264 repeats itself only when told to: several threads decide differently from run to run, and its macroblock tree was
# seen to read memory it had not set (the same frames gave up to 8 files in 8 runs); both are off.
_X264 = {"preset": "superfast", "crf": "21", "x264-params": "threads=1:lookahead-threads=1:mbtree=0:cpu-independent=1"}


def write_clip(path: Path, film: np.ndarray | None, sound: np.ndarray | None, fps: int) -> None:
    """Write `film` uint8 RGB (T, H, W, 3) and `sound` float32 (S,) at 16 kHz; either may be absent.

    With a picture the file is mp4 (H.264, AAC), without one FLAC. It appears under its name only when complete, and the
    same input gives the same bytes.
    """
    part = path.with_name(f".{path.stem}.part{path.suffix}")
    try:
        if film is None:
            soundfile.write(part, sound, SAMPLE_RATE, subtype="PCM_16", format="FLAC")
        else:
            _write_mp4(part, film, sound, fps)
        os.replace(part, path)
    except (av.FFmpegError, soundfile.SoundFileError) as error:
        raise OSError(str(error)) from error
    finally:
        part.unlink(missing_ok=True)


def _write_mp4(path: Path, film: np.ndarray, sound: np.ndarray | None, fps: int) -> None:
    with av.open(str(path), "w", format="mp4", options={"fflags": "+bitexact"}) as container:
        picture = container.add_stream("libx264", rate=fps, options=_X264)
        picture.height, picture.width = film.shape[1:3]
        picture.pix_fmt = "yuv420p"
        picture.time_base = Fraction(1, fps)
        picture.thread_count = 1
        picture.codec_context.flags |= av.codec.context.Flags.bitexact
        if sound is not None:
            voice = container.add_stream("aac", rate=SAMPLE_RATE, layout="mono")
            voice.bit_rate = 64000
            voice.codec_context.flags |= av.codec.context.Flags.bitexact
        for number, pixels in enumerate(film):
            frame = av.VideoFrame.from_ndarray(cv2.cvtColor(pixels, cv2.COLOR_RGB2YUV_I420), format="yuv420p")
            frame.pts, frame.time_base = number, Fraction(1, fps)
            container.mux(picture.encode(frame))
        container.mux(picture.encode(None))
        if sound is not None:
            frame = av.AudioFrame.from_ndarray(sound[None], format="fltp", layout="mono")
            frame.sample_rate, frame.pts, frame.time_base = SAMPLE_RATE, 0, Fraction(1, SAMPLE_RATE)
            container.mux(voice.encode(frame))
            container.mux(voice.encode(None))
