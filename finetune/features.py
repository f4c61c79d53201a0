"""Frozen features: every layer of an encoder, pooled by a fixed menu, computed once and kept on disk."""

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file
from torch import Tensor

from affekt.data.decode import Window
from affekt.data.errors import DataError
from affekt.data.loader import Batch, eval_loader
from affekt.data.shards import ShardIndex
from affekt.pretrain.encoder import Encoder

POOLINGS = ("mean", "mean_std", "rows_mean_std")
# Bands of rows for `rows_mean_std`: eight of the spectrum, four of the face (brow, eyes, nose, mouth in a face crop).
BANDS = {"audio": 8, "video": 4}
FORMAT = "affekt-features 1"


@dataclass
class FeatureTable:
    """Feature blocks of some clips. A clip without a stream has no row in the blocks that need it.

    `blocks[name]` is float32 `(clips that have stream[name], D)` in clip order; `has[stream]` bool `(clips,)` for the
    streams audio, video and both; `unread` maps the ids of clips that could not be decoded to the cause.
    """

    ids: list[str]
    has: dict[str, np.ndarray]
    blocks: dict[str, np.ndarray] = field(default_factory=dict)
    unread: dict[str, str] = field(default_factory=dict)

    def take(self, name: str, clips: np.ndarray) -> np.ndarray:
        """Rows `(len(clips), D)` of a block; asking for a clip that has none is a fault of the caller."""
        has = self.has[stream_of(name)]
        assert has[clips].all(), f"{name}: no features for {self.ids[clips[~has[clips]][0]]}"
        return self.blocks[name][(np.cumsum(has) - 1)[clips]]

    def require_finite(self) -> None:
        """Raises DataError naming block and clip where a value is not finite: no score may rest on it."""
        for name, rows in self.blocks.items():
            bad = np.flatnonzero(~np.isfinite(rows).all(1))
            if len(bad):
                clip = self.ids[np.flatnonzero(self.has[stream_of(name)])[bad[0]]]
                raise DataError(f"{name}: {len(bad)} of {len(rows)} clips have NaN or infinite features, first {clip}")


def stream_of(block: str) -> str:
    """`audio_3/mean` -> audio, `fusion_video/mean` -> both: the stream a clip must have for this block."""
    prefix = block.split("_")[0]
    return "both" if prefix == "fusion" else prefix


def pool(tokens: Tensor, grid: tuple[int, int, int], bands: int, valid: Tensor | None = None) -> dict[str, Tensor]:
    """Pool tokens `(B, N, D)` that lie on a grid (time, rows, columns) by every pooling of the menu.

    `mean` (B, D); `mean_std` (B, 2 D) over all tokens; `rows_mean_std` (B, bands * 2 * D): columns averaged, rows
    joined to at most `bands` bands, then mean and deviation over time. `valid` (B, time) bool leaves padding out.
    """
    x = tokens.float().unflatten(1, grid)  # (B, T, R, C, D)
    valid = x.new_ones(x.shape[:2]) if valid is None else valid.to(x)
    share = (valid / valid.sum(1, keepdim=True))[:, :, None, None]  # (B, T, 1, 1), sums to 1 over time
    rows = torch.stack([band.mean((2, 3)) for band in x.tensor_split(min(bands, grid[1]), dim=2)], dim=2)
    rows_mean = (rows * share).sum(1)
    rows_std = ((rows - rows_mean[:, None]).square() * share).sum(1).sqrt()
    x = x.flatten(2, 3)
    mean = (x.mean(2) * share[..., 0]).sum(1)
    std = ((x - mean[:, None, None]).square().mean(2) * share[..., 0]).sum(1).sqrt()
    return {
        "mean": mean,
        "mean_std": torch.cat([mean, std], 1),
        "rows_mean_std": torch.cat([rows_mean, rows_std], 2).flatten(1),
    }


def extract(
    encoder: Encoder,
    index: ShardIndex,
    positions: Sequence[int],
    *,
    windows: int,
    cache: Path | None = None,
    batch_size: int = 16,
    workers: int = 0,
    on_batch: Callable[[int], None] | None = None,
) -> FeatureTable:
    """Features `<layer>/<pooling>` of the clips at `positions`, averaged over evenly spaced `windows` of each clip.

    Tokens are pooled as they come. With `cache` (a folder) the table is read back when weights, shards, clips and
    windows are the same; `on_batch(n)` hears of n more clips done.
    """
    ids = [index.samples[p].id for p in positions]
    identity = {
        "format": FORMAT,
        "weights": weights_hash(encoder),
        "shards": index.fingerprint,
        "clips": hashlib.sha256("\n".join(ids).encode()).hexdigest(),
        "windows": str(windows),
    }
    path = cache and cache / f"features-{hashlib.sha256(json.dumps(identity).encode()).hexdigest()[:16]}.safetensors"
    table = path and _read(path, identity, ids)
    if table is None:
        encoder.eval()
        table = average_views(
            lambda batch, streams: pooled_layers(encoder, batch, streams),
            index,
            positions,
            encoder.window,
            windows=windows,
            streams=encoder.streams,
            batch_size=batch_size,
            workers=workers,
            on_batch=on_batch,
        )
        if path:
            _write(path, identity, table)
    elif on_batch:
        on_batch(len(ids) * windows)
    table.require_finite()
    return table


@torch.inference_mode()
def average_views(
    compute: Callable[[Batch, str], dict[str, Tensor]],
    index: ShardIndex,
    positions: Sequence[int],
    window: Window,
    *,
    windows: int,
    streams: str = "both",
    batch_size: int = 16,
    workers: int = 0,
    on_batch: Callable[[int], None] | None = None,
) -> FeatureTable:
    """Run `compute(batch, streams)` over evenly spaced windows of the clips and average what it gives per clip.

    Clips are batched with others that have the same streams, so that `compute` never meets one that is missing.
    """
    sums: dict[str, dict[int, np.ndarray]] = {}
    views = np.zeros(len(positions), int)
    unread: dict[str, str] = {}
    for available, clips in by_streams(index, positions, streams):
        loader = eval_loader(
            index,
            window,
            indices=[positions[c] for c in clips],
            windows_per_clip=windows,
            batch_size=batch_size,
            workers=workers,
            streams=available,
        )
        for batch in loader:
            unread.update(batch.skipped)
            if not batch.ids:
                continue
            rows = [clips[i] for i in batch.clip.tolist()]
            for name, values in compute(batch, available).items():
                block = sums.setdefault(name, {})
                for clip, value in zip(rows, values.float().cpu().numpy()):
                    block[clip] = block[clip] + value if clip in block else value
            np.add.at(views, rows, 1)
            if on_batch:
                on_batch(len(rows))
    has = {stream: np.zeros(len(views), bool) for stream in ("audio", "video", "both")}
    for name, block in sums.items():
        has[stream_of(name)][list(block)] = True
    has["both"] = has["audio"] & has["video"]
    blocks = {name: np.stack([block[c] / views[c] for c in sorted(block)]) for name, block in sums.items()}
    return FeatureTable([index.samples[p].id for p in positions], has, blocks, unread)


def pooled_layers(encoder: Encoder, batch: Batch, streams: str) -> dict[str, Tensor]:
    """Every layer of a batch under every pooling, `{"audio_1/mean": (B, D), ...}`; all its clips have `streams`."""
    inputs = encoder.preprocess(batch.to(next(encoder.parameters()).device))
    pooled = {}
    for layer, tokens in encoder.layers(inputs, streams).items():
        if "audio" in layer:
            time, mel = encoder.grid_audio
            frames_per_step = encoder.window.mel_frames // time
            starts = torch.arange(time, device=tokens.device) * frames_per_step
            valid = starts < inputs.audio_frames[:, None].clamp(min=1)  # a step counts when it holds any real sound
            values = pool(tokens, (time, mel, 1), BANDS["audio"], valid)
        else:
            values = pool(tokens, encoder.grid_video, BANDS["video"])
        pooled |= {f"{layer}/{pooling}": value for pooling, value in values.items()}
    return pooled


def by_streams(index: ShardIndex, positions: Sequence[int], streams: str) -> Iterator[tuple[str, list[int]]]:
    """Group clips by what can be computed for them: (streams to load, places in `positions`), empty groups left out.

    `streams` is what the encoder takes; one made for a single stream sees just that of every clip.
    """
    groups: dict[str, list[int]] = {"both": [], "audio": [], "video": []}
    for place, position in enumerate(positions):
        sample = index.samples[position]
        audio, video = sample.has_audio and streams != "video", sample.has_video and streams != "audio"
        if audio or video:
            groups["both" if audio and video else "audio" if audio else "video"].append(place)
    return ((name, places) for name, places in groups.items() if places)


def weights_hash(encoder: Encoder) -> str:
    """sha256 over the names, types, shapes and values of the weights, and over the preprocessing before them."""
    before = [encoder.window.model_dump(), encoder.preprocess.to_dict(), encoder.streams]
    digest = hashlib.sha256(json.dumps(before).encode())
    for name, tensor in sorted(encoder.state_dict().items()):
        tensor = tensor.detach().cpu().contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def _write(path: Path, identity: dict[str, str], table: FeatureTable) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    arrays = {f"has/{stream}": has for stream, has in table.has.items()} | table.blocks
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        save_file(arrays, temporary, metadata=identity | {"unread": json.dumps(table.unread)})
        os.replace(temporary, path)
    except (OSError, SafetensorError) as error:
        raise DataError(f"{path}: features cannot be written: {error}; make room and run the command again") from None
    finally:
        temporary.unlink(missing_ok=True)


def _read(path: Path, identity: dict[str, str], ids: list[str]) -> FeatureTable | None:
    try:
        with safe_open(path, framework="numpy") as file:
            stored = file.metadata()
            if {key: stored.get(key) for key in identity} != identity:
                return None
            arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
    except (OSError, SafetensorError):  # absent, or cut short: it is computed again and replaced
        return None
    has = {name.removeprefix("has/"): arrays.pop(name) for name in list(arrays) if name.startswith("has/")}
    return FeatureTable(ids, has, arrays, json.loads(stored["unread"]))
