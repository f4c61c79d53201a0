"""The contact sheet: some clips as pictures, waveform and log-mel spectrogram, as HTML."""

from html import escape

import cv2
import numpy as np
import simplejpeg
import torch

from affekt.data.decode import decode_frames, decode_sound
from affekt.data.order import raw
from affekt.data.page import card, data_uri, grid
from affekt.data.samples import Sample
from affekt.data.shards import SampleError, ShardIndex
from affekt.data.transforms import log_mel

PICTURES = 5  # of a clip, evenly spaced
MEL_BINS, STRIP_WIDTH = 64, 480
WAVE_POINTS = 240


def contact_sheet(index: ShardIndex, label: str, split: str, count: int, seed: int) -> str:
    """Cards of `count` clips drawn by `seed`, in the order of the index."""
    drawn = np.sort(np.argsort(raw(len(index.samples), seed, "contact sheet"), kind="stable")[:count])
    return grid([_clip(index, index.samples[clip], label, split) for clip in drawn.tolist()], "sheet")


def _clip(index: ShardIndex, sample: Sample, label: str, split: str) -> str:
    parts = []
    try:
        if sample.has_video:
            parts.append(_pictures(index, sample))
        if sample.has_audio:
            parts.append(_sound(index, sample))
    except SampleError as error:
        parts.append(f"<p><strong>{escape(error.cause)}</strong>: {escape(str(error))}</p>")
    said = [sample.meta.get(name) for name in (label, "speaker", split)]
    facts = " · ".join([f"{sample.duration:.2f} s", *(escape(str(value)) for value in said if value), *sample.flags])
    return card(*parts, f'<p class="facts"><b title="{escape(sample.id)}">{escape(sample.id)}</b>{facts}</p>')


def _pictures(index: ShardIndex, sample: Sample) -> str:
    wanted = np.linspace(0, sample.frames - 1, min(PICTURES, sample.frames)).round().astype(int)
    row = np.concatenate(list(decode_frames(index, sample, wanted)), axis=1)
    return f'<img class="row" alt="pictures" src="{_jpeg(row)}">'


def _sound(index: ShardIndex, sample: Sample) -> str:
    sound = decode_sound(index, sample, 0, sample.samples)
    bounds = np.linspace(0, len(sound), min(WAVE_POINTS, len(sound)), endpoint=False).astype(int)
    high, low = np.maximum.reduceat(sound, bounds), np.minimum.reduceat(sound, bounds)
    x = np.linspace(0, 100, len(bounds))
    points = [f"{a:.2f},{20 - 19 * v:.2f}" for a, v in [*zip(x, high), *zip(x[::-1], low[::-1])]]
    shape = f'<polygon points="{" ".join(points)}"/>'
    wave = f'<svg class="wave" viewBox="0 0 100 40" preserveAspectRatio="none">{shape}</svg>'
    rate = index.header["sample_rate"]
    mel = log_mel(torch.from_numpy(sound)[None], MEL_BINS)[0].numpy() if rate == 16_000 else np.zeros((0, 0))
    if not mel.size:  # too short for one window, or of a rate that the models' log-mel is not made for
        return wave
    low_shade, high_shade = np.quantile(mel, [0.05, 0.995])
    shades = (np.clip((mel.T[::-1] - low_shade) / max(high_shade - low_shade, 1e-6), 0, 1) * 255).astype(np.uint8)
    shades = cv2.resize(shades, (STRIP_WIDTH, MEL_BINS), interpolation=cv2.INTER_AREA)
    strip = cv2.cvtColor(cv2.applyColorMap(shades, cv2.COLORMAP_MAGMA), cv2.COLOR_BGR2RGB)
    return f'{wave}<img class="mel" alt="log-mel spectrogram" src="{_jpeg(strip)}">'


def _jpeg(picture: np.ndarray) -> str:
    return data_uri(simplejpeg.encode_jpeg(np.ascontiguousarray(picture), quality=85), "image/jpeg")
