"""An impression of the clips behind a report: faces, spectrograms and sounds, as data URIs inside the page."""

from collections.abc import Callable
from html import escape

import matplotlib
import numpy as np
import torch

from affekt.data.decode import Window, decode_window
from affekt.data.page import card, data_uri, grid, picture_uri
from affekt.data.samples import Sample
from affekt.data.shards import SampleError, ShardIndex
from affekt.data.transforms import log_mel
from affekt.finetune.schema import Results

MAX_CLASSES_SHOWN = 12  # beyond this the clips of a corpus are a catalogue, not an impression


def gallery(results: Results, corpus: ShardIndex | None) -> str:
    """Per class up to four faces of different speakers, one sound and its spectrogram, from the fitting clips where the
    results tell which those are."""
    if corpus is None:
        return ""
    fitting = set(results.clips.get("parts", {}).get("fit", {}).get("speakers", ()))
    cards = []
    for name in results.classes[:MAX_CLASSES_SHOWN]:
        samples = [
            sample
            for sample in corpus.samples
            if str(sample.meta.get(results.label)) == name
            and (not fitting or str(sample.meta.get("speaker")) in fitting)
        ]
        chosen = spread(samples, 4)
        faces = "".join(shown(face, corpus, sample) for sample in chosen if sample.has_video)
        faces = f'<div class="faces">{faces}</div>' if faces else ""
        heard = next((shown(sound, corpus, sample) for sample in chosen if sample.has_audio), "")
        if faces or heard:
            cards.append(card(faces, heard, title=name))
    note = '<p class="soft">The middle frame of some clips; the sound is that of the first.</p>'
    return note + grid(cards, "two") if cards else ""


def shown(part: Callable[[ShardIndex, Sample], str], corpus: ShardIndex, sample: Sample) -> str:
    """Nothing for a damaged clip: what is wrong with clips is told where they are read for a purpose."""
    try:
        return part(corpus, sample)
    except SampleError:
        return ""


def spread(samples: list[Sample], count: int) -> list[Sample]:
    """Up to `count` samples, of as many speakers as there are, evenly picked in a fixed order."""
    first_of: dict[str, Sample] = {}
    for sample in samples:
        first_of.setdefault(str(sample.meta.get("speaker", sample.id)), sample)
    picked = list(first_of.values())
    others = [sample for sample in samples if sample not in picked]
    if len(picked) < count:
        return (picked + others)[:count]
    return [picked[i] for i in np.linspace(0, len(picked) - 1, count).astype(int)]


def face(corpus: ShardIndex, sample: Sample) -> str:
    middle = max(sample.duration / 2 - 0.02, 0.0)
    view = decode_window(corpus, sample, Window(num_frames=1, mel_frames=1), middle, "video")
    return f'<img alt="" title="{escape(sample.id)}" src="{picture_uri(view.video[0])}">'


def sound(corpus: ShardIndex, sample: Sample) -> str:
    frames = max(int(sample.samples - 400) // 160 + 1, 1)
    view = decode_window(corpus, sample, Window(num_frames=1, mel_frames=frames), 0.0, "audio")
    picture = picture_uri(spectrogram(view.audio[: view.audio_valid]))
    player = f'<audio controls preload="none" src="{data_uri(corpus.read(sample, "flac"), "audio/flac")}"></audio>'
    return f'<img class="sound" alt="spectrogram" title="{escape(sample.id)}" src="{picture}">{player}'


def spectrogram(waveform: np.ndarray, mel_bins: int = 96) -> np.ndarray:
    """Log-mel spectrogram of 16 kHz sound `(S,)` as a picture `(mel, time, 3)` uint8, low tones at the bottom."""
    mel = log_mel(torch.from_numpy(waveform)[None], mel_bins)[0].numpy()
    low, high = np.quantile(mel, [0.05, 0.995])
    shades = np.clip((mel - low) / max(high - low, 1e-6), 0, 1)
    return (matplotlib.colormaps["magma"](shades.T[::-1])[..., :3] * 255).astype(np.uint8)
