"""Every way to spoil a batch, by name, with the levels that are usual."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import torch

from affekt.data.batch import Batch, Streams
from affekt.finetune.stress import picture, sound
from affekt.finetune.stress.scene import Scene, generator

Alter = Callable[[Batch], Batch]
OfView = Callable[[np.ndarray, float, np.random.Generator], np.ndarray]


@dataclass(frozen=True)
class Alteration:
    """`make(scene, level)` spoils batches. `stream` is what it touches: a model without it is not asked.

    `clean` is the level that changes nothing, None where there is none; levels lie `within` two bounds.
    """

    name: str
    title: str
    unit: str
    levels: tuple[float, ...]
    stream: Streams
    make: Callable[[Scene, float], Alter]
    clean: float | None = None
    note: str = ""
    within: tuple[float, float] = (0.0, 1.0)


def of_sound(batch: Batch, name: str, function: Callable[[str, np.ndarray, np.random.Generator], np.ndarray]) -> Batch:
    """`function(clip, sound, rng)` of the real samples of every row that has any."""
    if batch.audio is None:
        return batch
    audio = batch.audio.clone()
    for row, valid in enumerate(batch.audio_valid.tolist()):
        if batch.has_audio[row] and valid:
            clip = batch.ids[row]
            heard = function(clip, batch.audio[row, :valid].numpy(), generator(clip, name))
            audio[row, :valid] = torch.from_numpy(np.ascontiguousarray(heard, np.float32))
    return replace(batch, audio=audio)


def of_pictures(batch: Batch, name: str, function: Callable[[np.ndarray, np.random.Generator], np.ndarray]) -> Batch:
    """`function(video, rng)` of every row that has pictures."""
    if batch.video is None:
        return batch
    video = batch.video.clone()
    for row in torch.nonzero(batch.has_video).flatten().tolist():
        seen = function(batch.video[row].numpy(), generator(batch.ids[row], name))
        video[row] = torch.from_numpy(np.ascontiguousarray(seen))
    return replace(batch, video=video)


def shift_sound(batch: Batch, milliseconds: float) -> Batch:
    """Sound that comes later than the pictures (earlier where negative); what is moved out of the window is lost, and
    silence comes in. The end of a clip moves with it."""
    if batch.audio is None or not milliseconds:
        return batch
    by = round(milliseconds / 1000 * sound.RATE)
    length = batch.audio.shape[1]
    audio = torch.zeros_like(batch.audio)
    if abs(by) < length:
        into, out_of = (slice(by, None), slice(length - by)) if by > 0 else (slice(length + by), slice(-by, None))
        audio[:, into] = batch.audio[:, out_of]
    valid = torch.where(batch.has_audio, (batch.audio_valid + by).clamp(min=0, max=length), batch.audio_valid)
    return replace(batch, audio=audio, audio_valid=valid)


def swap_sound(scene: Scene, partners: dict[str, str]) -> Alter:
    """Every clip with the sound of its partner: voice and face of one person who says two different things."""

    def alter(batch: Batch) -> Batch:
        if batch.audio is None:
            return batch
        audio, valid = batch.audio.clone(), batch.audio_valid.clone()
        for row, clip in enumerate(batch.ids):
            if batch.has_audio[row] and clip in partners:
                other = scene.sound(partners[clip])[: audio.shape[1]]
                audio[row], valid[row] = 0, len(other)
                audio[row, : len(other)] = torch.from_numpy(other.copy())
        return replace(batch, audio=audio, audio_valid=valid)

    return alter


def _sound(name: str, function: OfView) -> Callable[[Scene, float], Alter]:
    return lambda scene, level: partial(of_sound, name=name, function=lambda _, x, rng: function(x, level, rng))


def _pictures(name: str, function: OfView) -> Callable[[Scene, float], Alter]:
    return lambda scene, level: partial(of_pictures, name=name, function=lambda x, rng: function(x, level, rng))


def _babble(scene: Scene, level: float) -> Alter:
    def heard(clip: str, x: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        return sound.with_noise(x, scene.babble(clip, len(x), rng), level)

    return partial(of_sound, name="babble", function=heard)


def _of_sound(name, title, unit, levels, function, within, clean=None, note="") -> Alteration:
    return Alteration(name, title, unit, levels, "audio", _sound(name, function), clean, note, within)


def _of_pictures(name, title, unit, levels, function, within=(0.0, 1.0), clean=0) -> Alteration:
    return Alteration(name, title, unit, levels, "video", _pictures(name, function), clean, within=within)


DECIBELS = (-100.0, 100.0)
SNR = (30.0, 20.0, 10.0, 5.0, 0.0, -5.0)
SMALL = "Small changes should leave 95 % of the answers as they are."
ALTERATIONS = {
    one.name: one
    for one in (
        _of_sound("tone", "A tone", "dB SNR", (50.0, 45.0, 40.0), sound.tone, DECIBELS, note=SMALL),
        _of_sound("white_noise", "White noise", "dB SNR", SNR, sound.white, DECIBELS),
        _of_sound("pink_noise", "Pink noise", "dB SNR", SNR, sound.pink, DECIBELS),
        Alteration("babble", "Babble of other voices", "dB SNR", SNR, "audio", _babble, within=DECIBELS),
        _of_sound(
            "phone", "Telephone", "", (0.0, 1.0), sound.phone, (0, 1), 0, "1: 300 to 3,400 Hz with 8 bits of mu-law."
        ),
        _of_sound("low_pass", "Low pass", "Hz", (8e3, 4e3, 2e3, 1e3, 500.0), sound.low_pass, (20, 8000), 8000),
        _of_sound("high_pass", "High pass", "Hz", (0.0, 150.0, 300.0, 600.0, 1200.0), sound.high_pass, (0, 7900), 0),
        _of_sound("gain", "Gain of the sound", "dB", (-20.0, -10.0, -2.0, 0.0, 2.0, 10.0), sound.gain, DECIBELS, 0),
        _of_sound("clipping", "Clipped samples", "share", (0.0, 0.003, 0.01, 0.05, 0.2), sound.clipping, (0, 1), 0),
        Alteration(
            "desync", "Sound later than the pictures", "ms",
            (-800.0, -400.0, -200.0, -80.0, 0.0, 80.0, 200.0, 400.0, 800.0),
            "both", lambda scene, level: partial(shift_sound, milliseconds=level), 0, within=(-60_000, 60_000),
        ),
        _of_pictures("cover_lower", "Lower face covered", "share", (0.0, 0.25, 0.5), picture.cover_lower),
        _of_pictures("cover_upper", "Upper face covered", "share", (0.0, 0.25, 0.5), picture.cover_upper),
        _of_pictures("cover_box", "A square covered", "share", (0.0, 0.1, 0.25, 0.5), picture.cover_box),
        _of_pictures(
            "brightness", "Brightness", "times", (0.25, 0.5, 0.98, 1.0, 1.02, 2.0), picture.brightness, (0, 100), 1
        ),
        _of_pictures("jpeg", "JPEG quality", "", (100.0, 95.0, 75.0, 50.0, 25.0, 10.0), picture.jpeg, (1, 100), 100),
        _of_pictures("blur", "Blur", "% of the side", (0.0, 0.5, 1.0, 2.0, 4.0), picture.blur, (0, 50)),
        _of_pictures("freeze", "Pictures lost and frozen", "share", (0.0, 0.25, 0.5, 0.75, 0.9), picture.freeze),
    )
}  # fmt: skip
