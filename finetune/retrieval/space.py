"""The space that clips are compared in: what the contrast of pre-training trained, made of the taps of each stream.

A vector is the taps' features, each of unit length, one behind the other: the inner product of two vectors is the mean
over taps of their cosine similarities.
"""

import itertools
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import safetensors.numpy
from safetensors import SafetensorError, safe_open

from affekt.data.errors import DataError
from affekt.data.files import check_version, committed
from affekt.pretrain.encoder import Encoder

FORMAT, VERSION = "affekt-retrieval-space", "1.1"
SMALLEST = 1e-12
PENALTIES = (0.01, 0.03, 0.1, 0.3, 1.0)  # of `aligned`, as parts of the mean variance

Features = dict[str, np.ndarray]  # `video_taps` and so on: float32 (clips, K, D), NaN where a clip lacks the stream


@dataclass
class Space:
    """`features` are taps, heads (projection heads) or steps (taps over `segments` parts of the window), `taps` places
    in the encoder's list of them.

    `means` (K, D) by stream are taken off first: with `contrast_center` the contrast was computed so. `maps` are linear
    maps of each stream's vectors into a common space (`aligned`). `weights` is the hash of the encoder that it was
    chosen for, "" where that is not told (files of 1.0).
    """

    features: str
    taps: tuple[int, ...]
    means: dict[str, np.ndarray] = field(default_factory=dict)
    maps: dict[str, np.ndarray] = field(default_factory=dict)
    penalty: float | None = None
    segments: int = 0
    weights: str = ""

    def part(self, features: Features, stream: str) -> np.ndarray:
        """float64 (clips, taps or taps x segments, D): what the vectors are made of."""
        runs = max(self.segments, 1)
        places = [tap * runs + run for tap in self.taps for run in range(runs)]
        return features[f"{stream}_{self.features}"][:, places].astype(np.float64)

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
        x = self.part(features, stream)
        if self.means:
            if stream not in self.means:
                raise DataError(f"a space without a mean of {stream}: the clips it was made on had none; make it again")
            x = x - self.means[stream]
        x = unit(x).reshape(len(x), -1) / np.sqrt(x.shape[1])
        if self.maps:
            x = unit((x - self.maps[f"{stream}_mean"]) @ self.maps[stream])
        return x.astype(np.float32)

    def save(self, path: Path) -> None:
        """One safetensors file."""
        about = {"format": FORMAT, "version": VERSION, "features": self.features, "taps": list(self.taps)}
        about |= {"penalty": self.penalty, "segments": self.segments, "weights": self.weights}
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
            told = {"penalty": about["penalty"], "segments": about["segments"], "weights": about.get("weights", "")}
            return cls(about["features"], tuple(about["taps"]), **parts, **told)
        except (OSError, LookupError, TypeError, ValueError, SafetensorError) as error:
            raise DataError(f"{path}: no space of retrieval can be read: {error!r}; make it again") from None


def unit(x: np.ndarray) -> np.ndarray:
    return x / np.maximum(np.linalg.norm(x, axis=-1, keepdims=True), SMALLEST)


def default_space(encoder: Encoder, features: Features) -> Space:
    """All taps, behind the heads where there are some, centred on `features` where the contrast was: the space that
    pre-training compared in."""
    kind = "heads" if encoder.has_projectors else "taps"
    space = Space(kind, tuple(range(len(encoder.settings.taps))))
    return centred(space, features) if encoder.settings.contrast_center else space


def menu(encoder: Encoder, fit: Features | None, segments: int) -> Iterator[Space]:
    """What development clips choose from: taps, heads or steps, all taps or one, as they are or without their mean over
    the clips of `fit`, and all taps (steps of all or of one) aligned on the pairs of `fit`."""
    every = tuple(range(len(encoder.settings.taps)))
    some = list(dict.fromkeys([every, *((tap,) for tap in every)]))
    kinds = [*(["heads"] if encoder.has_projectors else []), "taps", "steps"]
    to_align = [("taps", every), *(("steps", taps) for taps in some)] if encoder.streams == "both" else []
    for kind, taps in itertools.product(kinds, some):
        space = Space(kind, taps, segments=segments if kind == "steps" else 0)
        yield space
        if fit is not None:
            yield centred(space, fit)
            yield from aligned(centred(space, fit), fit) if (kind, taps) in to_align else ()


def centred(space: Space, fit: Features) -> Space:
    """The space without the mean over the clips of `fit`, of each stream on its own."""
    means = {}
    for stream in ("video", "audio"):
        name = f"{stream}_{space.features}"
        if name in fit and not np.isnan(fit[name]).all():
            means[stream] = np.nanmean(space.part(fit, stream), 0)
    return replace(space, means=means)


def aligned(space: Space, fit: Features, penalties: Sequence[float] = PENALTIES) -> list[Space]:
    """`space` with a linear map of each stream into a common one: canonical correlation analysis on the clips of `fit`
    that have both streams, which uses no labels. One for each of `penalties`, none for less than two clips.

    Directions weigh by their correlation (Gong et al. 2014, "A multi-view embedding space", section 3.2). A penalty is
    added to the variance of every direction, as a part of the mean one (Vinod 1976, "canonical ridge").
    """
    both = pairs(fit)
    if both.sum() < 2:
        return []
    video, audio = (space.vectors(fit, stream)[both].astype(np.float64) for stream in ("video", "audio"))
    means = {"video_mean": video.mean(0), "audio_mean": audio.mean(0)}
    # Directions that the clips do not span have no covariance with anything: they may be left out.
    views = [np.linalg.svd(x - x.mean(0), full_matrices=False) for x in (video, audio)]
    spaces = []
    for penalty in penalties:
        scales = [np.sqrt(np.maximum(s**2 + penalty * (s**2).mean(), SMALLEST)) for _, s, _ in views]
        whitened = [u * (s / scale) for (u, s, _), scale in zip(views, scales)]
        left, correlation, right = np.linalg.svd(whitened[0].T @ whitened[1], full_matrices=False)
        maps = [(w.T / scale) @ turn * correlation for (_, _, w), scale, turn in zip(views, scales, (left, right.T))]
        spaces.append(replace(space, maps=means | dict(zip(("video", "audio"), maps)), penalty=penalty))
    return spaces


def pairs(features: Features) -> np.ndarray:
    """bool (clips,): which have both streams."""
    known = [[np.isfinite(x).all((1, 2)) for name, x in features.items() if name.startswith(s)] for s in ("vi", "au")]
    return known[0][0] & known[1][0]
