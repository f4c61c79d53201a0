"""What needs no learning: statistics of log-mel bands and of pixels, and the majority class.

They see the same windows of the same clips as an encoder does, through its preprocessing of sound and the raw picture.
"""

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d

from affekt.data.decode import FRAME_LENGTH, FRAME_SHIFT, Window
from affekt.data.loader import Batch
from affekt.data.shards import ShardIndex
from affekt.data.transforms import log_mel
from affekt.finetune.features import FeatureTable, kept_views

MEL_BINS = 128
# Coarse grids of the picture: enough to tell brow, eyes and mouth of a face crop apart.
GRIDS = (4, 8)


def statistics(
    index: ShardIndex,
    positions: Sequence[int],
    window: Window,
    *,
    windows: int,
    streams: str = "both",
    cache: Path | None = None,
    batch_size: int = 16,
    workers: int = 0,
    rank: int = 0,
    world_size: int = 1,
    on_batch: Callable[[int], None] | None = None,
) -> FeatureTable:
    """Plain statistics of each clip as feature blocks, so that the probe treats them as it treats an encoder.

    `audio_statistics/level` mean and deviation over time per mel band (256), `/level_change` also those of the change
    from frame to frame (512); `video_statistics/grid4` and `/grid8` mean and deviation over time of each colour in each
    cell of the picture, and mean absolute difference of successive frames.
    """

    def compute(batch: Batch, available: str) -> dict[str, Tensor]:
        blocks = {}
        if available != "video":
            blocks |= mel_statistics(batch.audio, batch.audio_valid)
        if available != "audio":
            blocks |= pixel_statistics(batch.video)
        return blocks

    how = {"windows": windows, "streams": streams, "batch_size": batch_size, "workers": workers}
    return kept_views(
        compute,
        index,
        positions,
        window,
        made_by=f"statistics 1: {MEL_BINS} bands, grids {GRIDS}",
        policy={"windows": windows, "streams": streams, "window": window.model_dump()},
        cache=cache,
        rank=rank,
        world_size=world_size,
        how=how,
        on_batch=on_batch,
    )


def mel_statistics(waveform: Tensor, valid: Tensor) -> dict[str, Tensor]:
    """Blocks from sound `(B, S)` at 16 kHz of which the first `valid (B,)` samples are real."""
    mel = log_mel(waveform, MEL_BINS, valid)  # (B, T, mel)
    frames = ((valid - FRAME_LENGTH) // FRAME_SHIFT + 1).clamp(min=2, max=mel.shape[1])
    real = (torch.arange(mel.shape[1]) < frames[:, None]).unsqueeze(-1)
    level = _moments(mel, real)
    change = _moments(mel.diff(dim=1), real[:, 1:])
    return {
        "audio_statistics/level": level,
        "audio_statistics/level_change": torch.cat([level, change], 1),
    }


def pixel_statistics(video: Tensor) -> dict[str, Tensor]:
    """Blocks from frames `(B, T, H, W, 3)` uint8."""
    batch, time = video.shape[:2]
    frames = video.flatten(0, 1).permute(0, 3, 1, 2).float() / 255
    blocks = {}
    for cells in GRIDS:
        grid = adaptive_avg_pool2d(frames, cells).reshape(batch, time, -1)  # (B, T, 3 * cells * cells)
        parts = [grid.mean(1), grid.std(1, correction=0), grid.diff(dim=1).abs().sum(1) / max(time - 1, 1)]
        blocks[f"video_statistics/grid{cells}"] = torch.cat(parts, 1)
    return blocks


def majority(labels: np.ndarray, num_classes: int) -> int:
    """The most frequent class index, the first of them on a tie."""
    return int(np.bincount(labels, minlength=num_classes).argmax())


def _moments(x: Tensor, real: Tensor) -> Tensor:
    """Mean and deviation over the real steps of `x (B, T, D)`: (B, 2 D)."""
    count = real.sum(1)
    mean = (x * real).sum(1) / count
    variance = ((x - mean[:, None]).square() * real).sum(1) / count
    return torch.cat([mean, variance.sqrt()], 1)
