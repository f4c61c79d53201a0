"""A batch of clips as it leaves the loader: bytes and samples, flags of what is there, and a key per clip."""

from dataclasses import dataclass, field, fields, replace
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from affekt.data.decode import FRAME_LENGTH, FRAME_SHIFT, View, Window

Streams = Literal["both", "video", "audio"]
WHOLE_PICTURE = (0.0, 0.0, 1.0, 1.0)


@dataclass
class Batch:
    """B views of clips. A clip without a stream has zeros there and False in `has_*`: use the flag, never the zeros.

    video uint8 (B, T, H, W, 3) and audio float32 (B, S) at 16 kHz, None when the stream was not asked for;
    `audio_valid` int64 (B,) samples of sound before the padding; `crop` float32 (B, 4) x0, y0, x1, y1 in 0..1,
    mirrored when x0 > x1; `gain` float32 (B,) and `roll` int64 (B,) samples vary the sound on the device (None: not at
    all); `keys` int64 (B,) to draw masks from; `skipped` (id, cause) of clips that could not be read;
    `clip` int64 (B,): rows with the same number are views of one clip, -1 is no clip; `eval_loader` numbers its
    indices. In a training batch, `repeats` rows in turn are views of one decoded clip. `speaker` int64 (B,): a number
    of the speaker, -1 where none is known.
    """

    ids: list[str]
    video: Tensor | None
    audio: Tensor | None
    has_video: Tensor
    has_audio: Tensor
    audio_valid: Tensor
    crop: Tensor
    keys: Tensor
    epoch: int = 0
    skipped: list[tuple[str, str]] = field(default_factory=list)
    clip: Tensor | None = None
    repeats: int = 1
    gain: Tensor | None = None
    roll: Tensor | None = None
    speaker: Tensor | None = None

    def to(self, device: torch.device | str) -> "Batch":
        """The same batch on a device; from pinned memory without waiting for the copy."""
        return self._each(lambda tensor: tensor.to(device, non_blocking=True))

    def pin_memory(self) -> "Batch":
        return self._each(Tensor.pin_memory)

    def audio_frames(self, mel_frames: int) -> Tensor:
        """int64 (B,): how many log-mel frames of at most `mel_frames` are sound from end to end; 0 without sound."""
        frames = (self.audio_valid - FRAME_LENGTH).div(FRAME_SHIFT, rounding_mode="floor") + 1
        return frames.clamp(0, mel_frames)

    def facts(self) -> "Batch":
        """All but pictures and sound, in memory of its own: to keep when a loader wants its memory back."""
        return replace(self, video=None, audio=None)._each(Tensor.clone)

    def parts(self, count: int) -> list["Batch"]:
        """Its rows in `count` batches of the same size; views of one clip stay together. `skipped` is left behind."""
        rows = len(self.ids) // count
        assert rows * count == len(self.ids) and rows % self.repeats == 0, f"{len(self.ids)} rows in {count} parts"
        cuts = [slice(start, start + rows) for start in range(0, len(self.ids), rows)]
        return [replace(self._each(lambda x, cut=cut: x[cut]), ids=self.ids[cut], skipped=[]) for cut in cuts]

    def _each(self, function) -> "Batch":
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        return replace(self, **{name: function(x) for name, x in values.items() if isinstance(x, Tensor)})


class Row(NamedTuple):
    """One view on its way into a batch."""

    id: str
    view: View
    crop: tuple[float, float, float, float] = WHOLE_PICTURE
    key: int = 0
    gain: float = 1.0
    roll: int = 0
    speaker: int = -1


def empty_pictures(count: int, window: Window, size: int) -> np.ndarray:
    return np.empty((count, window.num_frames, size, size, 3), np.uint8)


def collate(rows: list[Row], window: Window, size: int, streams: str, pictures: np.ndarray | None = None) -> Batch:
    """Stack views; `size` is the side of the pictures in pixels. `pictures` is where they may have been decoded to."""
    count = len(rows)
    views = [row.view for row in rows]
    video = audio = None
    if streams != "audio":
        video = empty_pictures(count, window, size) if pictures is None else pictures[:count]
        for target, view in zip(video, views):
            if view.video is None or view.video.ctypes.data != target.ctypes.data:
                target[...] = 0 if view.video is None else view.video
    if streams != "video":
        audio = np.empty((count, window.audio_samples), np.float32)
        for target, view in zip(audio, views):
            target[...] = 0 if view.audio is None else view.audio
    return Batch(
        ids=[row.id for row in rows],
        video=None if video is None else torch.from_numpy(video),
        audio=None if audio is None else torch.from_numpy(audio),
        has_video=torch.tensor([view.video is not None for view in views], dtype=torch.bool),
        has_audio=torch.tensor([view.audio is not None for view in views], dtype=torch.bool),
        audio_valid=torch.tensor([view.audio_valid for view in views], dtype=torch.int64),
        crop=torch.tensor([row.crop for row in rows], dtype=torch.float32).view(-1, 4),
        speaker=torch.tensor([row.speaker for row in rows], dtype=torch.int64),
        keys=torch.tensor([row.key for row in rows], dtype=torch.int64),
        gain=torch.tensor([row.gain for row in rows]) if any(row.gain != 1 for row in rows) else None,
        roll=torch.tensor([row.roll for row in rows]) if any(row.roll for row in rows) else None,
    )
