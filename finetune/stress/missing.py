"""Parts of the input that never arrive: the six generators of CIDer, at the level of pictures and of 40 ms of sound.

CIDer (Zhong et al. 2025) hides feature vectors; here it is what those are made from. A rate hides exactly that share of
what its generator counts, rounded up or down so that the mean over clips is exact, and what is hidden at one rate is
hidden at every higher one (but for the block of STMFM, which moves). What is hidden depends on the clip alone.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Literal, get_args

import numpy as np
import torch

from affekt.data.batch import Batch
from affekt.finetune.stress.scene import Scene, generator

Generator = Literal["RMFM", "RMFM_same", "RMM", "TMFM", "STMFM", "SMM"]
Fill = Literal["zero", "repeat", "drop"]
GENERATORS: tuple[Generator, ...] = get_args(Generator)
STEP = 640  # samples of sound that are hidden together: as long as one picture at 25 fps
TITLES: dict[Generator, str] = {
    "RMFM": "Missing moments, drawn over both streams",
    "RMFM_same": "Missing moments, the same share of each stream",
    "RMM": "Missing streams, drawn independently",
    "TMFM": "Missing moments, the same in both streams",
    "STMFM": "A missing stretch, the same in both streams",
    "SMM": "Whole streams missing",
}
SUBSETS = (0.0, 1.0, 2.0)  # levels of SMM: both streams, the pictures alone, the sound alone
FILLS: dict[Fill, str] = {
    "zero": "hidden pictures are black, hidden sound is silence",
    "repeat": "the last moment that was not hidden stays",
    "drop": "what is left moves together; a stream of which nothing is left counts as absent",
}


def missing(scene: Scene, name: Generator, rate: float, fill: Fill) -> Callable[[Batch], Batch]:
    """An alteration of batches: `rate` of 0 to 1, for SMM one of `SUBSETS`.

    RMFM counts the pictures and the moments of sound of a view together, RMFM_same each stream's own, TMFM and STMFM
    moments in time, of which there is one per picture, RMM for either stream the clips of the scene.
    """
    without = {stream: scene.first(rate, f"RMM {stream}") for stream in ("video", "audio")} if name == "RMM" else {}
    window = scene.window
    seconds = window.frame_stride / window.fps  # from one picture to the next

    def hide(clip: str, steps: int) -> tuple[np.ndarray, np.ndarray]:
        """bool (T,) of pictures and (A,) of moments of sound: what is hidden."""
        pictures, rng = window.num_frames, generator(clip, name)
        if name == "SMM":
            return np.full(pictures, rate == 2), np.full(steps, rate == 1)
        if name == "RMM":
            return np.full(pictures, clip in without["video"]), np.full(steps, clip in without["audio"])
        if name == "RMFM":
            both = first(rng.permutation(pictures + steps), rate, rng.random())
            return both[:pictures], both[pictures:]
        if name == "RMFM_same":
            return tuple(first(rng.permutation(n), rate, rng.random()) for n in (pictures, steps))
        if name == "TMFM":
            moments = first(rng.permutation(pictures), rate, rng.random())
        else:
            length = rounded(rate * pictures, rng.random())
            start = int(rng.random() * (pictures - length + 1))
            moments = (np.arange(pictures) >= start) & (np.arange(pictures) < start + length)
        at = (np.arange(steps) + 0.5) * STEP / window.sample_rate / seconds
        return moments, moments[at.astype(int).clip(max=pictures - 1)]

    def alter(batch: Batch) -> Batch:
        changed = replace(
            batch,
            video=None if batch.video is None else batch.video.clone(),
            audio=None if batch.audio is None else batch.audio.clone(),
            **{name: getattr(batch, name).clone() for name in ("has_video", "has_audio", "audio_valid")},
        )
        for row, clip in enumerate(batch.ids):
            pictures, moments = hide(clip, -(-int(batch.audio_valid[row]) // STEP))
            if batch.video is not None and batch.has_video[row]:
                _hide_pictures(changed, row, pictures, fill)
            if batch.audio is not None and batch.has_audio[row]:
                _hide_sound(changed, row, moments, fill)
        return changed

    return alter


def first(order: np.ndarray, rate: float, u: float) -> np.ndarray:
    """bool (n,): the places of an order (n,) that come first, that share of all."""
    return order < rounded(rate * len(order), u)


def rounded(number: float, u: float) -> int:
    """Up or down, by u in [0, 1), so that the mean over many u is the number; one that is whole stays."""
    whole = round(number)
    return whole if abs(number - whole) < 1e-9 else int(number + u)


def _hide_pictures(batch: Batch, row: int, hidden: np.ndarray, fill: Fill) -> None:
    kept = np.flatnonzero(~hidden)
    video = batch.video[row]
    if not len(kept):
        video.zero_()
        batch.has_video[row] = fill != "drop"
    elif fill == "zero":
        video[torch.from_numpy(hidden)] = 0
    else:
        batch.video[row] = video[torch.from_numpy(_sources(hidden, fill))]


def _hide_sound(batch: Batch, row: int, hidden: np.ndarray, fill: Fill) -> None:
    valid, sound = int(batch.audio_valid[row]), batch.audio[row]
    if hidden.all():
        # How long the sound was is a part of it: silence fills the window, so that nothing tells clips apart.
        sound.zero_()
        batch.audio_valid[row] = 0 if fill == "drop" else len(sound)
        batch.has_audio[row] = fill != "drop"
        return
    real = sound[:valid].clone()
    if fill == "zero":
        sound[:valid] = real.masked_fill(torch.from_numpy(hidden).repeat_interleave(STEP)[:valid], 0)
    elif fill == "repeat":
        padded = torch.nn.functional.pad(real, (0, len(hidden) * STEP - valid)).view(-1, STEP)
        sound[:valid] = padded[torch.from_numpy(_sources(hidden, fill))].flatten()[:valid]
    else:
        left = real[~torch.from_numpy(hidden).repeat_interleave(STEP)[:valid]]
        sound.zero_()
        sound[: len(left)] = left
        batch.audio_valid[row] = len(left)


def _sources(hidden: np.ndarray, fill: Fill) -> np.ndarray:
    """Which moment (n,) stands at each place: the last one kept before it (the first one, where there is none), or
    those kept in turn and the last of them up to the end."""
    kept = np.flatnonzero(~hidden)
    if fill == "drop":
        return kept[np.arange(len(hidden)).clip(max=len(kept) - 1)]
    before = np.maximum.accumulate(np.where(hidden, -1, np.arange(len(hidden))))
    return np.where(before < 0, kept[0], before)
