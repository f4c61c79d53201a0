"""Clips as they are shown in a page: small faces, strips of pictures, spectrograms and sounds, as data URIs."""

from html import escape

import cv2
import numpy as np

from affekt.data.decode import decode_frames, decode_sound
from affekt.data.page import data_uri, picture_uri
from affekt.data.samples import Sample
from affekt.data.shards import SampleError, ShardIndex
from affekt.finetune.report.gallery import spectrogram

THUMB = 72  # pixels of a thumbnail's side; about 2 KB
FRAMES, FRAME = 4, 112  # of a strip
WIDE, HIGH = 448, 80  # of its spectrogram
LONGEST_SOUND = 8.0  # seconds; longer ones would make the page heavy
RATE = 16_000  # the only one that the log-mel is made for


def find_samples(index: ShardIndex | None, ids: set[str]) -> dict[str, Sample]:
    """The clips with these ids; those that the shards lack are left out."""
    if index is None or not ids:
        return {}
    return {row["id"]: index.samples[i] for i, row in enumerate(index.samples.rows()) if row["id"] in ids}


def thumbnail(index: ShardIndex, sample: Sample) -> str | None:
    """The middle picture, or the spectrogram of a clip without one; None for one that is damaged."""
    try:
        if sample.has_video:
            picture = decode_frames(index, sample, np.array([sample.frames // 2]))[0]
        else:
            picture = _spectrogram(index, sample)
    except SampleError:
        return None
    return None if picture is None else picture_uri(_resized(picture, THUMB, THUMB), quality=72)


def film(index: ShardIndex, sample: Sample) -> str:
    """Some pictures of a clip side by side, its spectrogram, and its sound to listen to, as far as it has them."""
    parts = []
    try:
        if sample.has_video:
            wanted = np.linspace(0, sample.frames - 1, min(FRAMES, sample.frames)).round().astype(int)
            frames = [_resized(frame, FRAME, FRAME) for frame in decode_frames(index, sample, wanted)]
            frames = np.concatenate(frames, axis=1)
            parts.append(f'<img class="strip" alt="pictures of the clip" src="{picture_uri(frames, 80)}">')
        picture = _spectrogram(index, sample) if sample.has_audio else None
        if picture is not None:
            shown = picture_uri(_resized(picture, WIDE, HIGH), 80)
            parts.append(f'<img class="strip sound" alt="log-mel spectrogram" src="{shown}">')
        if sample.has_audio and sample.duration <= LONGEST_SOUND:
            source = data_uri(index.read(sample, "flac"), "audio/flac")
            parts.append(f'<audio controls preload="none" aria-label="the clip\'s sound" src="{source}"></audio>')
    except SampleError as error:
        parts.append(f'<p class="soft">{escape(error.cause)}: the clip cannot be shown</p>')
    return "".join(parts)


def _spectrogram(index: ShardIndex, sample: Sample) -> np.ndarray | None:
    if index.header["sample_rate"] != RATE:
        return None
    sound = decode_sound(index, sample, 0, min(sample.samples, int(LONGEST_SOUND * RATE)))
    return spectrogram(sound, 64) if len(sound) >= 800 else None


def _resized(picture: np.ndarray, width: int, height: int) -> np.ndarray:
    return cv2.resize(picture, (width, height), interpolation=cv2.INTER_AREA)
