"""Baselines without a network: fixed descriptors of the sound or the picture, and a linear support vector machine.

`mel` are means and deviations of log-mel bands over the whole clip, `pixels` those of a coarse grid of the picture,
`hog` its histograms of oriented gradients (Dalal & Triggs, CVPR 2005, by OpenCV, 4,356 numbers), averaged over frames.
`egemaps` (Eyben et al. 2016, 88 numbers) and `compare` (ComParE 2016, Schuller et al., 6,373) come from openSMILE,
which is no dependency of affekt: `pip install opensmile`.
"""

import hashlib
import json
import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Literal

import cv2
import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import Ridge
from sklearn.svm import LinearSVC
from torch import Tensor

from affekt.data.decode import FRAME_LENGTH, Window, decode_sound
from affekt.data.errors import DataError, SettingsError
from affekt.data.shards import ShardIndex
from affekt.finetune.features import average_views
from affekt.finetune.probes.baselines import mel_statistics, pixel_statistics
from affekt.finetune.probes.linear import rotate, standardise

Descriptors = Literal["mel", "pixels", "hog", "egemaps", "compare"]
STREAM = {"mel": "audio", "pixels": "video", "hog": "video", "egemaps": "audio", "compare": "audio"}
TITLES = {
    "mel": "Mel statistics + linear SVM",
    "pixels": "Pixel statistics + linear SVM",
    "hog": "Oriented gradients + linear SVM",
    "egemaps": "eGeMAPS + linear SVM",
    "compare": "ComParE 2016 + linear SVM",
}
FEATURE_SETS = {"egemaps": "eGeMAPSv02", "compare": "ComParE_2016"}
# Of the SVM, on features whose squared length is about 1: from hardly fitted to separated.
COSTS = (0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0)
SHORTEST = 16000 // 2  # samples of sound that openSMILE's functionals need; shorter clips are padded with silence
SAVE_EVERY = 200  # clips, so that a killed run goes on near where it was


def descriptors(
    kind: Descriptors,
    index: ShardIndex,
    positions: Sequence[int],
    cache: Path,
    progress: Callable[[int, int], None] | None = None,
) -> np.ndarray:
    """Features float32 (N, D) of clips that have the stream, kept in `cache` by the checksum of what they come from.

    Raises SettingsError for a clip without the stream and where openSMILE is needed and not installed, DataError for a
    clip that cannot be decoded or has features that are not finite.
    """
    path = cache / f"{kind}-{hashlib.sha256(needs(kind).encode()).hexdigest()[:8]}.safetensors"
    extractor = _extractor(kind)
    known = _read(path)
    keys = [_key(index, p, STREAM[kind]) for p in positions]
    missing = [i for i, key in enumerate(keys) if key not in known]
    for count, i in enumerate(missing, 1):
        known[keys[i]] = extractor(index, positions[i])
        if count % SAVE_EVERY == 0 or count == len(missing):
            _write(path, known)
        if progress:
            progress(len(keys) - len(missing) + count, len(keys))
    features = np.stack([known[key] for key in keys])
    bad = np.flatnonzero(~np.isfinite(features).all(1))
    if len(bad):
        clip = index.samples[positions[bad[0]]].id
        raise DataError(f"{index.root}: {kind} descriptors of {len(bad)} clips are NaN or infinite, first {clip}")
    return features


class LinearModel:
    """A linear SVM (classes count equally) or, for ratings, a ridge regression, with its penalty chosen on other clips.

    `costs` is walked from strong to weak penalty and the first best is kept. Features are standardised by the rows that
    are fitted and turned into their span, which changes no linear fit and costs by the number of clips.
    """

    def __init__(self, costs: Sequence[float] = COSTS):
        self.costs = tuple(sorted(costs))

    def choose(
        self, train: np.ndarray, truth: np.ndarray, dev: np.ndarray, score: Callable[[np.ndarray], float]
    ) -> tuple[float, float]:
        """(the cost, its score): fitted on `train`, what is said of `dev` scored by `score`."""
        scores = [score(said) for said in self.path(train, truth, dev, self.costs)]
        best = int(np.argmax(scores))
        return self.costs[best], scores[best]

    def path(
        self, train: np.ndarray, truth: np.ndarray, other: np.ndarray, costs: Sequence[float], classes: int = 0
    ) -> Iterator[np.ndarray]:
        """For each cost what is said of `other` (M, D): decision values (M, K) for class indices `truth` (N,), values
        (M, D') for ratings (N, D'). There are `classes`, or as many as `truth` shows."""
        rows, others = rotate(*standardise([train], [other]))
        rows, others = (x if x.shape[1] else np.zeros((len(x), 1)) for x in (rows, others))
        for cost in costs:
            if truth.ndim == 2:
                yield Ridge(alpha=1 / cost).fit(rows, truth).predict(others).reshape(len(others), -1)
            else:
                yield decision_values(rows, truth, others, cost, max(classes, int(truth.max()) + 1))


def decision_values(rows: np.ndarray, truth: np.ndarray, others: np.ndarray, cost: float, classes: int) -> np.ndarray:
    """(M, K) one-against-the-rest values of a linear SVM; a class that no row has gets less than any other's."""
    present = np.unique(truth)
    values = np.zeros((len(others), classes))
    if len(present) > 1:
        model = LinearSVC(C=cost, class_weight="balanced", dual=True, random_state=0, max_iter=5000)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)  # of a weak penalty on separable rows
            found = model.fit(rows, truth).decision_function(others)
        values[:, present] = np.stack([-found, found], 1) if found.ndim == 1 else found
    values[:, np.setdiff1d(np.arange(classes), present)] = values.min() - 1
    return values


def _extractor(kind: Descriptors) -> Callable[[ShardIndex, int], np.ndarray]:
    if kind == "mel":
        return lambda index, p: _mel(whole_sound(index, p))
    if STREAM[kind] == "video":
        return partial(_pictures, kind)
    import opensmile

    smile = opensmile.Smile(opensmile.FeatureSet[FEATURE_SETS[kind]], opensmile.FeatureLevel.Functionals)

    def functionals(index: ShardIndex, position: int) -> np.ndarray:
        sound = whole_sound(index, position)
        sound = np.pad(sound, (0, max(0, SHORTEST - len(sound))))
        return smile.process_signal(sound, 16000).to_numpy(np.float32)[0]

    return functionals


def whole_sound(index: ShardIndex, position: int) -> np.ndarray:
    """float32 (S,) at 16 kHz. Raises SettingsError for a clip without sound."""
    sample = index.samples[position]
    if not sample.has_audio:
        raise SettingsError(f"{index.root}: clip {sample.id} has no sound")
    return decode_sound(index, sample, 0, sample.samples)


def _mel(sound: np.ndarray) -> np.ndarray:
    sound = np.pad(sound, (0, max(0, 2 * FRAME_LENGTH - len(sound))))
    blocks = mel_statistics(torch.from_numpy(sound)[None], torch.tensor([len(sound)]))
    return blocks["audio_statistics/level_change"][0].numpy()


def _pictures(kind: Descriptors, index: ShardIndex, position: int) -> np.ndarray:
    """Of three views of the clip, sixteen frames each."""
    compute = pixel_statistics if kind == "pixels" else hog_statistics
    view = {"windows": 3, "streams": "video"}
    table = average_views(lambda batch, _: compute(batch.video), index, [position], Window(frame_stride=2), **view)
    for clip, cause in table.unread.items():
        raise DataError(f"{index.root}: no {kind} descriptors of {clip}: {cause}")
    block = "video_statistics/grid8" if kind == "pixels" else "video_statistics/hog"
    if not len(table.blocks.get(block, ())):
        raise SettingsError(f"{index.root}: clip {index.samples[position].id} has no picture")
    return table.blocks[block][0]


def hog_statistics(video: Tensor) -> dict[str, Tensor]:
    """A block from frames (B, T, H, W, 3) uint8: histograms of each frame, resized to 96 x 96, averaged over them."""
    describe = cv2.HOGDescriptor((96, 96), (16, 16), (8, 8), (8, 8), 9)

    def of_frame(frame: np.ndarray) -> np.ndarray:
        grey = cv2.cvtColor(cv2.resize(frame, (96, 96), interpolation=cv2.INTER_AREA), cv2.COLOR_RGB2GRAY)
        return describe.compute(grey)

    clips = [np.mean([of_frame(frame) for frame in clip], axis=0) for clip in video.numpy()]
    return {"video_statistics/hog": torch.from_numpy(np.stack(clips))}


def _key(index: ShardIndex, position: int, stream: str) -> str:
    members = index.samples[position].members
    return next(
        (members[name][2] for name in (("flac",) if stream == "audio" else ("mjpeg", "mp4")) if name in members), ""
    )


def needs(kind: str) -> str:
    """What the descriptors are computed by, with its version. Raises SettingsError for unknown ones, and where
    openSMILE is needed and not installed."""
    if kind not in TITLES:
        raise SettingsError(f"descriptors `{kind}`: known are {', '.join(TITLES)}")
    if kind not in FEATURE_SETS:
        return f"{kind} 1"
    try:
        return f"{kind} {version('opensmile')}"
    except PackageNotFoundError:
        raise SettingsError(f"{kind}: needs openSMILE, which is not installed: pip install opensmile") from None


def _read(path: Path) -> dict[str, np.ndarray]:
    if not path.exists():
        return {}
    try:
        with safe_open(path, framework="numpy") as file:
            keys = json.loads(file.metadata()["clips"])
            return dict(zip(keys, file.get_tensor("features"), strict=True))
    except (OSError, SafetensorError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path}: no descriptors can be read: {error}; remove the file") from None


def _write(path: Path, known: dict[str, np.ndarray]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        save_file({"features": np.stack(list(known.values()))}, temporary, {"clips": json.dumps(list(known))})
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
