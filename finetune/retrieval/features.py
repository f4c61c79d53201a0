"""Features of clips to compare across streams: those of an encoder, and plain ones that need no learning."""

import math
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d

from affekt.data.batch import Batch
from affekt.data.errors import DataError
from affekt.data.shards import ShardIndex
from affekt.data.transforms import log_mel
from affekt.finetune.features import average_views
from affekt.finetune.retrieval.space import Features
from affekt.pretrain.encoder import Encoder, mean_by_time

MOST_SEGMENTS = 8  # of a window
PLAIN_BANDS, PLAIN_CELLS = 64, 16  # of the log-mel, and on a side of the picture


def time_segments(encoder: Encoder) -> int:
    """Equal parts of a window that hold whole tokens of both streams, at most 8."""
    return math.gcd(MOST_SEGMENTS, encoder.grid_video[0], encoder.grid_audio[0])


def clip_features(
    encoder: Encoder,
    index: ShardIndex,
    positions: Sequence[int],
    *,
    windows: int = 4,
    segments: int = 0,
    batch_size: int = 16,
    workers: int = 0,
    on_batch: Callable[[int], None] | None = None,
) -> Features:
    """`Encoder.contrast_features` of the clips at `positions`, averaged over `windows` evenly spaced views of each.

    Clips that cannot be decoded are NaN in every stream, as those that lack one are in that. Raises DataError naming a
    clip whose features are not finite.
    """
    s, device = encoder.settings, next(encoder.parameters()).device
    shapes = {"taps": (len(s.taps), s.embed_dim * s.contrast_segments)}
    shapes |= {"heads": (len(s.taps), s.projector_dim * s.contrast_segments)} if encoder.has_projectors else {}
    shapes |= {"steps": (len(s.taps) * segments, s.embed_dim)} if segments else {}
    streams = ("video", "audio") if encoder.streams == "both" else (encoder.streams,)
    shapes = {f"{stream}_{kind}": shape for stream in streams for kind, shape in shapes.items()}
    encoder.eval()

    def compute(batch: Batch) -> dict[str, Tensor]:
        return encoder.contrast_features(batch.to(device), segments)

    how = {"windows": windows, "batch_size": batch_size, "workers": workers, "on_batch": on_batch}
    return _averaged(compute, shapes, encoder, index, positions, **how)


def unread_clips(features: Features, index: ShardIndex, positions: Sequence[int], streams: str) -> list[str]:
    """Ids of the clips at `positions` that hold a stream of an encoder of `streams`, and could not be read."""
    known = np.array([np.isfinite(x).all((1, 2)) for x in features.values()]).any(0)
    samples = index.samples
    has = {"audio": samples.has_audio, "video": samples.has_video, "both": samples.has_audio | samples.has_video}
    return [samples.row(p)["id"] for p, k in zip(positions, known) if has[streams][p] and not k]


def plain_features(
    encoder: Encoder,
    index: ShardIndex,
    positions: Sequence[int],
    *,
    windows: int = 4,
    segments: int,
    batch_size: int = 16,
    workers: int = 0,
    on_batch: Callable[[int], None] | None = None,
) -> Features:
    """What is seen and heard in the parts of the windows of `encoder`, without it: `audio_steps` (clips, segments, 64)
    means of log-mel bands, `video_steps` (clips, segments, 512) of the grey levels of 16 x 16 cells and of how much
    each changes between frames. Only aligned are they comparable."""

    def compute(batch: Batch) -> dict[str, Tensor]:
        found = {}
        if batch.audio is not None:
            mel = log_mel(batch.audio, PLAIN_BANDS, batch.audio_valid)
            frames = batch.audio_frames(mel.shape[1]).clamp(min=1)
            found["audio_steps"] = mean_by_time(mel, torch.arange(mel.shape[1]) < frames[:, None], segments)
        if batch.video is not None:
            grey = adaptive_avg_pool2d(batch.video.float().mean(-1) / 255, PLAIN_CELLS).flatten(2)  # (B, T, cells)
            change = grey.diff(dim=1, prepend=grey[:, :1]).abs()
            found["video_steps"] = mean_by_time(torch.cat((grey, change), 2), None, segments)
        return found

    shapes = {"video_steps": (segments, 2 * PLAIN_CELLS**2), "audio_steps": (segments, PLAIN_BANDS)}
    how = {"windows": windows, "batch_size": batch_size, "workers": workers, "on_batch": on_batch}
    return _averaged(compute, shapes, encoder, index, positions, **how)


def _averaged(
    compute: Callable[[Batch], dict[str, Tensor]],
    shapes: dict[str, tuple[int, int]],
    encoder: Encoder,
    index: ShardIndex,
    positions: Sequence[int],
    **how,
) -> Features:
    """Means over views by clip, NaN where a clip has none."""

    def of_streams(batch: Batch, streams: str) -> dict[str, Tensor]:
        return {name: x for name, x in compute(batch).items() if streams in ("both", name.partition("_")[0])}

    table = average_views(of_streams, index, positions, encoder.window, streams=encoder.streams, **how)
    features = {name: np.full((len(positions), *shape), np.nan, np.float32) for name, shape in shapes.items()}
    for name, rows in table.blocks.items():
        has = table.has[name.partition("_")[0]]
        bad = np.flatnonzero(~np.isfinite(rows).all((1, 2)))
        if len(bad):
            clip = table.ids[np.flatnonzero(has)[bad[0]]]
            raise DataError(f"{name}: {len(bad)} of {len(rows)} clips have NaN or infinite features, first {clip}")
        features[name][has] = rows
    return features
