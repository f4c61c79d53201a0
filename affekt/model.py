"""An exported encoder together with the way from a media file to its embeddings."""

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import normalize

from affekt.data.batch import Batch, Row, Streams, collate
from affekt.data.decode import View, Window, window_starts
from affekt.data.errors import DataError, SettingsError
from affekt.data.media.clip import PreparedClip, PrepareSettings
from affekt.data.media.workers import prepare_clip_safely
from affekt.finetune.finetuned import is_finetuned
from affekt.pretrain.device import device_of
from affekt.pretrain.encoder import Encoder
from affekt.pretrain.export import load_encoder

if TYPE_CHECKING:
    from affekt.predictor import Predictor

WINDOWS_PER_BATCH = 16


class Model:
    """What `affekt.load` returns. `encoder` is the torch module underneath, on `device`."""

    def __init__(self, encoder: Encoder, device: torch.device | str = "cpu"):
        self.encoder = encoder.to(device).eval()
        self.device = torch.device(device)
        self.prepare_settings = PrepareSettings.parse(encoder.prepare, "preprocess.json")

    @property
    def streams(self) -> str:
        """The streams the encoder was trained on: both, video or audio."""
        return self.encoder.streams

    def embed(self, clip: str | Path | PreparedClip | Batch, windows: int = 4) -> dict[str, Tensor]:
        """L2-normalised float32 embeddings by stream.

        For a media file or prepared clip: `{"video": (D,), "audio": (D,), "both": (2 D,)}`, the mean over at most
        `windows` evenly spaced windows, normalised again. A stream that the file lacks has no entry. For a `Batch` of
        B views: the same keys with (B, D), NaN in rows that lack the stream. Those of a file are on the CPU, those of a
        batch on the model's device.

        A file is read, face-cropped and resampled as the training clips were, in a process of its own that is ended at
        a deadline. Raises MediaError where it cannot be read, or shows no face and `face_fallback` keeps nothing of
        it, DataError where it holds no stream that the encoder knows, SettingsError for less than one window.
        """
        if windows < 1:
            raise SettingsError(f"windows is {windows}; at least 1 is needed")
        if isinstance(clip, Batch):
            return self.encoder.embed(clip.to(self.device))
        name = "clip" if isinstance(clip, PreparedClip) else str(clip)
        if not isinstance(clip, PreparedClip):
            clip = prepare_clip_safely(clip, self.prepare_settings)
        known = self._means(clip, windows, self.encoder.embed, name)
        return {stream: normalize(x, dim=0).cpu() for stream, x in known.items()}

    def contrast_features(self, clip: PreparedClip, windows: int = 4, segments: int = 0) -> dict[str, Tensor]:
        """`Encoder.contrast_features` of a clip, (K, D) each on the CPU: the mean over windows, not normalised. A
        stream that the clip lacks has no entry. Raises DataError where it holds none that the encoder knows."""
        compute = partial(self.encoder.contrast_features, segments=segments)
        means = self._means(clip, windows, compute, "clip")
        return {name: x.cpu() for name, x in means.items()}

    def _means(
        self, clip: PreparedClip, windows: int, compute: Callable[[Batch], dict[str, Tensor]], name: str
    ) -> dict[str, Tensor]:
        """What `compute` gives of each window, by names that begin with the stream, averaged."""
        per_window: dict[str, list[Tensor]] = {}
        for batch in batches_of(clip, self.encoder.window, windows, self.prepare_settings.size, self.streams):
            for stream, x in compute(batch.to(self.device)).items():
                per_window.setdefault(stream, []).append(x)
        means = {stream: torch.cat(parts).mean(0) for stream, parts in per_window.items()}
        present = {"video": clip.frames is not None, "audio": clip.waveform is not None}
        present["both"] = all(present.values())
        known = {stream: x for stream, x in means.items() if present[stream.partition("_")[0]]}
        if not known:
            raise DataError(f"{name}: holds no stream of this encoder, which knows {self.streams}")
        return known


def batches_of(clip: PreparedClip, window: Window, windows: int, size: int, streams: Streams) -> Iterator[Batch]:
    """At most `windows` evenly spaced windows of a clip, in batches; pictures have sides of `size` pixels."""
    rows = [
        Row(id="clip", view=cut_window(clip, window, start))
        for start in window_starts(clip.record["duration"], window, windows)
    ]
    for at in range(0, len(rows), WINDOWS_PER_BATCH):
        yield collate(rows[at : at + WINDOWS_PER_BATCH], window, size, streams)


def cut_window(clip: PreparedClip, window: Window, start: float) -> View:
    """The window from `start` seconds, as `decode_window` cuts it from a shard."""
    first = round(start * window.fps)
    video = audio = None
    valid = 0
    if clip.frames is not None:
        frames = np.minimum(first + np.arange(window.num_frames) * window.frame_stride, len(clip.frames) - 1)
        video = clip.frames[frames]
    if clip.waveform is not None:
        at = round(first / window.fps * window.sample_rate)
        sound = clip.waveform[at : at + window.audio_samples]
        valid = len(sound)
        audio = np.pad(sound, (0, window.audio_samples - valid))
    return View(video, audio, valid)


def load(folder: str | Path, device: torch.device | str = "cpu") -> "Model | Predictor":
    """Load a folder written by `affekt export`, or a `.pth` file of the authors of HiCMAE; of one by `affekt finetune`,
    OUT/seed-N/model, what it returns has `predict` in place of `embed`. Raises CheckpointError with the reason when it
    is refused."""
    device = device_of(device)
    if is_finetuned(folder):
        from affekt.predictor import Predictor

        return Predictor(folder, device)
    return Model(load_encoder(folder), device)
