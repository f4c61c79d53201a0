"""Frozen features: every layer of an encoder, pooled by a fixed menu, computed once and kept on disk."""

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from affekt.data.decode import Window
from affekt.data.errors import DataError, SettingsError
from affekt.data.loader import Batch, eval_loader
from affekt.data.shards import ShardIndex
from affekt.finetune import feature_store as store
from affekt.finetune.pooling import BANDS, POOLINGS, check_poolings, pool
from affekt.pretrain.encoder import Encoder

TOKENS, REAL = "tokens", "real"  # kept as they are, of each view, and which of them are no padding


@dataclass
class FeatureTable:
    """Feature blocks of some clips. A clip without a stream has no row in the blocks that need it.

    `blocks[name]` is float32 `(clips that have stream[name], D)` in clip order; `has[stream]` bool `(clips,)` for the
    streams audio, video and both; `unread` maps the ids of clips that could not be decoded to the cause. Tokens are
    blocks too: `audio_4/tokens` float16 `(clips, windows * N, D)` beside `audio_4/real` bool `(clips, windows * N)`.
    """

    ids: list[str]
    has: dict[str, np.ndarray]
    blocks: Mapping[str, np.ndarray] = field(default_factory=dict)
    unread: dict[str, str] = field(default_factory=dict)

    def take(self, name: str, clips: np.ndarray) -> np.ndarray:
        """Rows `(len(clips), D)` of a block; asking for a clip that has none is a fault of the caller."""
        has = self.has[stream_of(name)]
        assert has[clips].all(), f"{name}: no features for {self.ids[clips[~has[clips]][0]]}"
        rows = (np.cumsum(has) - 1)[clips]
        return self.blocks.rows(name, rows) if isinstance(self.blocks, store.Joined) else self.blocks[name][rows]

    def require_finite(self) -> None:
        """Raises DataError naming block and clip where a value is not finite: no score may rest on it."""
        for name, rows in self.blocks.items():
            bad = np.flatnonzero(~np.isfinite(rows).reshape(len(rows), -1).all(1))
            if len(bad):
                clip = self.ids[np.flatnonzero(self.has[stream_of(name)])[bad[0]]]
                raise DataError(f"{name}: {len(bad)} of {len(rows)} clips have NaN or infinite features, first {clip}")


def stream_of(block: str) -> str:
    """`audio_3/mean` -> audio, `fusion_video/mean` -> both: the stream a clip must have for this block."""
    prefix = block.split("_")[0]
    return "both" if prefix == "fusion" else prefix


def extract(
    encoder: Encoder,
    index: ShardIndex,
    positions: Sequence[int],
    *,
    windows: int,
    cache: Path | None = None,
    poolings: Sequence[str] = POOLINGS,
    tokens: Sequence[str] = (),
    token_limit: float = 8.0,
    batch_size: int = 16,
    workers: int = 0,
    rank: int = 0,
    world_size: int = 1,
    on_batch: Callable[[int], None] | None = None,
) -> FeatureTable:
    """Features `<layer>/<pooling>` of the clips at `positions`, averaged over evenly spaced `windows` of each clip.

    The tokens of layers named in `tokens` are kept too, as `<layer>/tokens` and `<layer>/real`; SettingsError when they
    would take more than `token_limit` GiB. With `cache` (a folder) what was computed for the same weights, shards,
    clips and policy is read back, and `world_size` processes share the work; `on_batch(n)` hears of n more views done.
    """
    check_poolings(poolings)
    check_tokens(encoder, index, positions, windows, tokens, token_limit)
    policy = {"windows": windows, "batch_size": batch_size, "poolings": list(poolings), "tokens": list(tokens)}
    encoder.eval()
    return kept_views(
        partial(read_layers, encoder, poolings=poolings, tokens=tokens),
        index,
        positions,
        encoder.window,
        made_by=weights_hash(encoder),
        policy=policy,
        cache=cache,
        rank=rank,
        world_size=world_size,
        how={"windows": windows, "streams": encoder.streams, "batch_size": batch_size, "workers": workers},
        on_batch=on_batch,
    )


def kept_views(
    compute: Callable[[Batch, str], dict[str, Tensor]],
    index: ShardIndex,
    positions: Sequence[int],
    window: Window,
    *,
    made_by: str,
    policy: dict,
    cache: Path | None,
    rank: int,
    world_size: int,
    how: dict,
    on_batch: Callable[[int], None] | None,
) -> FeatureTable:
    """`average_views` in parts, kept in `cache` under a hash of what made them, shards, clips and policy."""
    ids = [index.samples.row(p)["id"] for p in positions]

    def part(places: range) -> tuple[dict[str, np.ndarray], dict[str, str]]:
        clips = [int(positions[place]) for place in places]
        table = average_views(compute, index, clips, window, **how, on_batch=on_batch)
        table.require_finite()
        return {f"has/{stream}": has for stream, has in table.has.items()} | table.blocks, table.unread

    if cache is None:
        parts = [part(range(first, min(first + store.PART, len(ids)))) for first in range(0, len(ids), store.PART)]
    else:
        identity = {
            "format": store.FORMAT,
            "made_by": made_by,
            "shards": index.fingerprint,
            "clips": hashlib.sha256("\n".join(ids).encode()).hexdigest(),
            "policy": json.dumps(policy | {"part": store.PART}),
        }
        ready = on_batch and (lambda places: on_batch(len(places) * how["windows"]))
        ranks = {"rank": rank, "world_size": world_size}
        folder = store.folder_of(cache, identity)
        parts = store.compute_parts(folder, identity, len(ids), part, **ranks, on_part=ready)
    joined = store.Joined([arrays for arrays, _ in parts])
    has = {name.removeprefix("has/"): joined.parts.pop(name) for name in list(joined) if name.startswith("has/")}
    unread = {clip: cause for _, causes in parts for clip, cause in causes.items()}
    if ids and len(unread) == len(ids):
        raise DataError(f"not one of {len(ids)} clips could be read; the first, {ids[0]}: {unread[ids[0]]}")
    return FeatureTable(ids, {stream: np.concatenate(arrays) for stream, arrays in has.items()}, joined, unread)


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

    Clips are batched with others that have the same streams, so that `compute` never meets one that is missing. Tokens
    are not averaged but put one view after the other; a clip of fewer views has zeros that are not real.
    """
    sums: dict[str, dict[int, np.ndarray]] = {}
    kept: dict[str, dict[int, list[np.ndarray]]] = {}
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
            or_none=True,
        )
        for batch in loader:
            unread.update(batch.skipped)
            if not batch.ids:
                continue
            rows = [clips[i] for i in batch.clip.tolist()]
            for name, values in compute(batch, available).items():
                if name.endswith((f"/{TOKENS}", f"/{REAL}")):
                    for clip, value in zip(rows, values.cpu().numpy()):
                        kept.setdefault(name, {}).setdefault(clip, []).append(value)
                    continue
                block = sums.setdefault(name, {})
                for clip, value in zip(rows, values.float().cpu().numpy()):
                    block[clip] = block[clip] + value if clip in block else value
            np.add.at(views, rows, 1)
            if on_batch:
                on_batch(len(rows))
    has = {stream: np.zeros(len(views), bool) for stream in ("audio", "video", "both")}
    for name, block in (sums | kept).items():
        has[stream_of(name)][list(block)] = True
    has["both"] = has["audio"] & has["video"]
    blocks = {name: np.stack([block[c] / np.float32(views[c]) for c in sorted(block)]) for name, block in sums.items()}
    for name, block in kept.items():
        first = next(iter(block.values()))[0]
        blocks[name] = np.zeros((len(block), windows * len(first), *first.shape[1:]), first.dtype)
        for row, clip in enumerate(sorted(block)):
            blocks[name][row, : len(block[clip]) * len(first)] = np.concatenate(block[clip])
    return FeatureTable([index.samples[p].id for p in positions], has, blocks, unread)


def read_layers(
    encoder: Encoder, batch: Batch, streams: str, *, poolings: Sequence[str] = POOLINGS, tokens: Sequence[str] = ()
) -> dict[str, Tensor]:
    """Every layer of a batch under every pooling, `{"audio_1/mean": (B, D), ...}`, and the tokens of the layers named
    in `tokens`, `{"audio_1/tokens": (B, N, D), "audio_1/real": (B, N)}`; all clips of the batch have `streams`."""
    inputs = encoder.preprocess(batch.to(next(encoder.parameters()).device))
    found = {}
    for layer, x in encoder.layers(inputs, streams).items():
        if "audio" in layer:
            time, mel = encoder.grid_audio
            frames_per_step = encoder.window.mel_frames // time
            starts = torch.arange(time, device=x.device) * frames_per_step
            valid = starts < inputs.audio_frames[:, None].clamp(min=1)  # a step counts when it holds any real sound
            grid, bands = (time, mel, 1), BANDS["audio"]
        else:
            valid, grid, bands = None, encoder.grid_video, BANDS["video"]
        pooled = pool(x, grid, bands, valid, poolings)
        found |= {f"{layer}/{pooling}": value for pooling, value in pooled.items()}
        if layer in tokens:
            real = torch.ones(x.shape[:2], dtype=torch.bool, device=x.device)
            if valid is not None:
                real = valid.repeat_interleave(grid[1] * grid[2], 1)
            found |= {f"{layer}/{TOKENS}": x.half(), f"{layer}/{REAL}": real}
    return found


def check_tokens(
    encoder: Encoder, index: ShardIndex, positions: Sequence[int], windows: int, tokens: Sequence[str], limit: float
) -> float:
    """How many GiB the tokens of these layers take. SettingsError when that is over the limit."""
    size = 0
    for layer in tokens:
        counts = [index.samples.has_audio[p] for p in positions], [index.samples.has_video[p] for p in positions]
        stream = layer.split("_")[0]
        clips = np.logical_and(*counts) if stream == "fusion" else counts[stream == "video"]
        grid = encoder.grid_audio if "audio" in layer else encoder.grid_video
        size += int(np.sum(clips)) * windows * int(np.prod(grid)) * encoder.settings.embed_dim * 2
    if size > limit * 2**30:
        raise SettingsError(
            f"the tokens of {', '.join(tokens)} for {len(positions)} clips take {size / 2**30:.2f} GiB, more than the"
            f" limit of {limit:g}; keep those of fewer layers, use fewer windows, or raise the limit"
        )
    return size / 2**30


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
