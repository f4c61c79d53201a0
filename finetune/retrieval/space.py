"""The space that clips are compared in: what the contrast of pre-training trained, made of the taps of each stream.

A vector is the taps' features, each of unit length, one behind the other: the inner product of two vectors is the mean
over taps of their cosine similarities.
"""

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.numpy
import torch
from safetensors import SafetensorError, safe_open

from affekt.data.batch import Batch
from affekt.data.errors import DataError
from affekt.data.files import check_version, committed
from affekt.data.shards import ShardIndex
from affekt.finetune.features import average_views
from affekt.pretrain.encoder import Encoder

FORMAT, VERSION = "affekt-retrieval-space", "1.0"
SMALLEST = 1e-12
PENALTIES = (0.01, 0.1, 1.0)  # of `aligned`, as parts of the mean variance

Features = dict[str, np.ndarray]  # `video_taps` and so on: float32 (clips, K, D), NaN where a clip lacks the stream


@dataclass
class Space:
    """`features` taps or heads (projection heads), `taps` places in the encoder's list of them.

    `means` (K, D) by stream are taken off first: with `contrast_center` the contrast was computed so. `maps` are linear
    maps of each stream's vectors into a common space (`aligned`).
    """

    features: str
    taps: tuple[int, ...]
    means: dict[str, np.ndarray] = field(default_factory=dict)
    maps: dict[str, np.ndarray] = field(default_factory=dict)
    penalty: float | None = None

    @property
    def name(self) -> str:
        parts = [self.features, "+".join(str(tap + 1) for tap in self.taps), "centred" if self.means else ""]
        parts.append(f"aligned, penalty {self.penalty:g}" if self.maps else "")
        return " ".join(filter(None, parts))

    def vectors(self, features: Features, stream: str) -> np.ndarray:
        """float32 (clips, width) of unit length, NaN for clips without the stream; `both` has video and audio one
        behind the other. Features that are all zero have no direction and stay zero."""
        if stream == "both":
            parts = [self.vectors(features, one) for one in ("video", "audio")]
            return (np.concatenate(parts, 1) / np.float32(np.sqrt(2))).astype(np.float32)
        x = features[f"{stream}_{self.features}"][:, list(self.taps)].astype(np.float64)
        if self.means:
            if stream not in self.means:
                raise DataError(f"a space without a mean of {stream}: the clips it was made on had none; make it again")
            x = x - self.means[stream]
        x = unit(x).reshape(len(x), -1) / np.sqrt(len(self.taps))
        if self.maps:
            x = unit((x - self.maps[f"{stream}_mean"]) @ self.maps[stream])
        return x.astype(np.float32)

    def save(self, path: Path) -> None:
        """One safetensors file."""
        about = {"format": FORMAT, "version": VERSION, "features": self.features, "taps": list(self.taps)}
        about["penalty"] = self.penalty
        arrays = {f"means/{s}": x for s, x in self.means.items()} | {f"maps/{s}": x for s, x in self.maps.items()}
        arrays = {name: np.ascontiguousarray(x, np.float64) for name, x in arrays.items()} or {"none": np.zeros(1)}
        with committed(path) as file:
            file.write(safetensors.numpy.save(arrays, {"affekt": json.dumps(about)}))

    @classmethod
    def load(cls, path: Path) -> "Space":
        """Raises DataError for a file that is missing, damaged or of another major version."""
        try:
            with safe_open(path, framework="numpy") as file:
                about = json.loads(file.metadata()["affekt"])
                check_version(about, FORMAT, VERSION, path)
                arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
            parts = {
                kind: {n.partition("/")[2]: x for n, x in arrays.items() if n.startswith(kind)}
                for kind in ("means", "maps")
            }
            return cls(about["features"], tuple(about["taps"]), **parts, penalty=about["penalty"])
        except (OSError, LookupError, TypeError, ValueError, SafetensorError) as error:
            raise DataError(f"{path}: no space of retrieval can be read: {error!r}; make it again") from None


def unit(x: np.ndarray) -> np.ndarray:
    return x / np.maximum(np.linalg.norm(x, axis=-1, keepdims=True), SMALLEST)


def clip_features(
    encoder: Encoder,
    index: ShardIndex,
    positions: Sequence[int],
    *,
    windows: int = 4,
    batch_size: int = 16,
    workers: int = 0,
    on_batch: Callable[[int], None] | None = None,
) -> Features:
    """`Encoder.contrast_features` of the clips at `positions`, averaged over `windows` evenly spaced views of each.

    Clips that cannot be decoded are NaN in every stream, as those that lack one are in that. Raises DataError naming a
    clip whose features are not finite.
    """
    device = next(encoder.parameters()).device
    encoder.eval()

    def compute(batch: Batch, streams: str) -> dict[str, torch.Tensor]:
        return {n: x for n, x in encoder.contrast_features(batch.to(device)).items() if streams in ("both", n[:5])}

    how = {"windows": windows, "streams": encoder.streams, "batch_size": batch_size, "workers": workers}
    table = average_views(compute, index, positions, encoder.window, **how, on_batch=on_batch)
    s, features = encoder.settings, {}
    widths = {"taps": s.embed_dim} | ({"heads": s.projector_dim} if encoder.has_projectors else {})
    for stream in ("video", "audio") if encoder.streams == "both" else (encoder.streams,):
        for kind, width in widths.items():
            features[f"{stream}_{kind}"] = np.full((len(positions), len(s.taps), width), np.nan, np.float32)
    for name, rows in table.blocks.items():
        has = table.has[name[:5]]
        bad = np.flatnonzero(~np.isfinite(rows).all((1, 2)))
        if len(bad):
            clip = table.ids[np.flatnonzero(has)[bad[0]]]
            raise DataError(f"{name}: {len(bad)} of {len(rows)} clips have NaN or infinite features, first {clip}")
        features[name][has] = rows
    return features


def default_space(encoder: Encoder, features: Features) -> Space:
    """All taps, behind the heads where there are some, centred on `features` where the contrast was: the space that
    pre-training compared in."""
    kind = "heads" if encoder.has_projectors else "taps"
    space = Space(kind, tuple(range(len(encoder.settings.taps))))
    return centred(space, features) if encoder.settings.contrast_center else space


def menu(encoder: Encoder, fit: Features | None) -> Iterator[Space]:
    """What development clips choose from: taps or heads, all of them or one, as they are or without their mean over
    the clips of `fit`, and all taps aligned on the pairs of `fit`."""
    count = len(encoder.settings.taps)
    every = tuple(range(count))
    for kind in ("heads", "taps") if encoder.has_projectors else ("taps",):
        for taps in dict.fromkeys([every, *((tap,) for tap in every)]):
            yield Space(kind, taps)
            if fit is not None:
                yield centred(Space(kind, taps), fit)
    if fit is not None and encoder.streams == "both" and pairs(fit).sum() > 1:
        for penalty in PENALTIES:
            yield aligned(centred(Space("taps", every), fit), fit, penalty)


def centred(space: Space, fit: Features) -> Space:
    """The space without the mean over the clips of `fit`, of each stream on its own."""
    means = {}
    for name, x in fit.items():
        stream, _, kind = name.partition("_")
        if kind == space.features and not np.isnan(x).all():
            means[stream] = np.nanmean(x[:, list(space.taps)].astype(np.float64), 0)
    return Space(space.features, space.taps, means)


def aligned(space: Space, fit: Features, penalty: float) -> Space:
    """`space` with a linear map of each stream into a common one: canonical correlation analysis on the clips of `fit`
    that have both streams, which uses no labels.

    Directions weigh by their correlation (Gong et al. 2014, "A multi-view embedding space", section 3.2). `penalty` is
    added to the variance of every direction, as a part of the mean one (Vinod 1976, "canonical ridge").
    """
    video, audio = (space.vectors(fit, stream).astype(np.float64) for stream in ("video", "audio"))
    paired = pairs(fit)
    video, audio = video[paired], audio[paired]
    maps: dict[str, Any] = {"video_mean": video.mean(0), "audio_mean": audio.mean(0)}
    video, audio = video - maps["video_mean"], audio - maps["audio_mean"]
    whiten = [_inverse_root(x.T @ x / len(x), penalty) for x in (video, audio)]
    left, correlation, right = np.linalg.svd(whiten[0] @ (video.T @ audio / len(video)) @ whiten[1], False)
    maps |= {"video": whiten[0] @ left * correlation, "audio": whiten[1] @ right.T * correlation}
    return Space(space.features, space.taps, space.means, maps, penalty)


def pairs(features: Features) -> np.ndarray:
    """bool (clips,): which have both streams."""
    return np.isfinite(features["video_taps"]).all((1, 2)) & np.isfinite(features["audio_taps"]).all((1, 2))


def _inverse_root(covariance: np.ndarray, penalty: float) -> np.ndarray:
    values, vectors = np.linalg.eigh(covariance)
    values = values.clip(0) + max(penalty * values.clip(0).mean(), SMALLEST)
    return vectors / np.sqrt(values) @ vectors.T
