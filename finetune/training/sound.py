"""What is varied of the sound of a training view, beside the gain and the turn of `data.augment`: noise on the
waveform; tempo, pitch and masks on the log-mel."""

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Annotated

import numpy as np
import torch
from pydantic import Field, model_validator
from torch import Tensor

from affekt.data.settings import Settings
from affekt.data.transforms import HIGH_HZ, LOW_HZ, MEL_MEAN, MEL_STD, Inputs
from affekt.finetune.training.draws import column, normals, uniforms

Share = Annotated[float, Field(ge=0, le=1)]
PADDING = -MEL_MEAN / (2 * MEL_STD)  # what stands after the end of a sound in a normalised log-mel
KNEE_HZ = 4800.0  # up to here a warped frequency axis is a straight line (VTLP; Jaitly and Hinton 2013)


class Sound(Settings):
    """Nothing is varied by default. Each part draws numbers of its own, so that one can be turned off alone."""

    noise: Share = Field(0.0, description="share of the views with noise, of a colour between white and pink")
    noise_snr_db: tuple[float, float] = Field((5.0, 30.0), description="lowest and highest signal-to-noise ratio")
    stretch: float = Field(0.0, ge=0, lt=1, description="tempo times 1 +- this; pictures keep theirs")
    mel_warp: float = Field(
        0.0, ge=0, lt=0.5, description="frequencies times 1 +- this, as a vocal tract's length does"
    )
    frequency_masks: int = Field(0, ge=0, description="SpecAugment: bands of the log-mel hidden")
    frequency_width: int = Field(24, ge=1, description="most mel bins in one of them")
    time_masks: int = Field(0, ge=0, description="SpecAugment: stretches of time hidden")
    time_width: int = Field(48, ge=1, description="most frames of 10 ms in one of them, and at most half of the sound")

    @model_validator(mode="after")
    def _check(self) -> "Sound":
        if self.noise_snr_db[0] > self.noise_snr_db[1]:
            raise ValueError(f"noise_snr_db {self.noise_snr_db}: the lowest ratio comes first")
        return self

    def waveform(self, audio: Tensor, valid: Tensor, keys: Sequence[int]) -> Tensor:
        """Sound (B, S) of which `valid` (B,) samples are real, with noise upon these in some rows."""
        if not self.noise:
            return audio
        u = uniforms(keys, 3, "noise")
        low, high = self.noise_snr_db
        audio = audio.clone()
        for row in np.flatnonzero(u[:, 0] < self.noise).tolist():
            noise = coloured(normals(keys[row], "noise wave", audio.shape[1], device=audio.device), float(u[row, 2]))
            audio[row] = with_noise(audio[row], noise, valid[row], low + (high - low) * float(u[row, 1]))
        return audio

    def log_mel(self, inputs: Inputs, keys: Sequence[int]) -> Inputs:
        """Inputs whose log-mel is stretched, warped and masked; `audio_frames` follow the tempo."""
        if inputs.audio is None:
            return inputs
        mel, frames, device = inputs.audio, inputs.audio_frames, inputs.audio.device
        if self.stretch:
            tempo = 1 + self.stretch * (2 * uniforms(keys, 1, "stretch")[:, 0] - 1)
            mel, frames = stretch_time(mel, frames, column(tempo, device))
        if self.mel_warp:
            factor = 1 + self.mel_warp * (2 * uniforms(keys, 1, "mel warp")[:, 0] - 1)
            mel = torch.where(_real(frames, mel), warp_mel(mel, column(factor, device)), mel)
        for name, count, width, dim in (
            ("frequency mask", self.frequency_masks, self.frequency_width, 3),
            ("time mask", self.time_masks, self.time_width, 2),
        ):
            if count:
                u = column(uniforms(keys, 2 * count, name).reshape(len(keys), count, 2), device)
                length = frames if dim == 2 else torch.full_like(frames, mel.shape[3])
                mel = mel.masked_fill(spans(u, width, length, mel.shape[dim], dim) & _real(frames, mel), 0.0)
        return replace(inputs, audio=mel, audio_frames=frames)


def coloured(white: Tensor, exponent: float) -> Tensor:
    """White noise (S,) with a power spectrum of 1 / f^exponent: 0 leaves it white, 1 makes it pink."""
    spectrum = torch.fft.rfft(white)
    scale = torch.arange(len(spectrum), device=white.device).clamp(min=1) ** (-exponent / 2)
    return torch.fft.irfft(spectrum * scale, len(white))


def with_noise(sound: Tensor, noise: Tensor, valid: Tensor, snr_db: float) -> Tensor:
    """Sound (S,) plus noise (S,) of which the mean power is `snr_db` below it, over the `valid` samples; zeros after.
    Silence gets none: no noise is below it."""
    real = torch.arange(len(sound), device=sound.device) < valid
    noise = noise * real
    power, unwanted = (x.double().square().sum() for x in (sound * real, noise))
    scale = (power / unwanted.clamp(min=1e-30) / 10 ** (snr_db / 10)).sqrt()
    return sound + noise * scale.float()


def stretch_time(mel: Tensor, frames: Tensor, tempo: Tensor) -> tuple[Tensor, Tensor]:
    """Log-mel (B, 1, F, M) at `tempo` (B,) times the speed, its pitch unchanged, and its frames of sound (B,).

    Linear between frames. What is slower is cut at the end of the window; what is quicker ends before it, in padding.
    """
    time, last = torch.arange(mel.shape[2], device=mel.device), (frames - 1).clamp(min=0)
    stretched = ((last / tempo).long() + 1).clamp(max=mel.shape[2])
    moved = read_between(mel, torch.minimum(time * tempo[:, None], last[:, None]), dim=2)
    stretched = torch.where(frames > 0, stretched, 0)
    return torch.where((time < stretched[:, None])[:, None, :, None], moved, PADDING), stretched


def warp_mel(mel: Tensor, factor: Tensor) -> Tensor:
    """Log-mel (B, 1, F, M) whose bins hold what stood at `factor` (B,) times their frequency; near 8 kHz the axis is
    pressed or drawn out so that its end stays (VTLP, Jaitly and Hinton 2013, equation 1). Linear between bins."""
    bins = mel.shape[3]
    low, high = (1127 * math.log1p(hertz / 700) for hertz in (LOW_HZ, HIGH_HZ))
    width = (high - low) / (bins + 1)
    centre = 700 * torch.expm1((low + width * torch.arange(1, bins + 1, device=mel.device)) / 1127)  # (M,) Hz
    factor = factor[:, None]
    edge = KNEE_HZ * factor.clamp(max=1)
    slope = (HIGH_HZ - edge) / (HIGH_HZ - edge / factor)
    warped = torch.where(centre <= edge / factor, centre * factor, HIGH_HZ - slope * (HIGH_HZ - centre))
    at = (1127 * torch.log1p(warped / 700) - low) / width - 1
    return read_between(mel, at.clamp(0, bins - 1), dim=3)


def read_between(mel: Tensor, at: Tensor, dim: int) -> Tensor:
    """Log-mel (B, 1, F, M) read at fractional places `at` (B, F or M) of `dim`, linear between its neighbours."""
    low = at.long().clamp(max=mel.shape[dim] - 1)
    share, high = at - low, (low + 1).clamp(max=mel.shape[dim] - 1)
    low, high, share = (x[:, None, :, None] if dim == 2 else x[:, None, None, :] for x in (low, high, share))
    first, second = (mel.gather(dim, place.expand_as(mel)) for place in (low, high))
    return torch.lerp(first, second, share.to(mel.dtype))


def spans(u: Tensor, width: int, length: Tensor, size: int, dim: int) -> Tensor:
    """Where spans lie on axis `dim` of a log-mel, of `size` places in all: bool (B, 1, size, 1) or (B, 1, 1, size).

    `u` (B, n, 2) in 0..1 draws the width of each of n spans, 0 to `width` and at most half of `length` (B,), and its
    place within the `length` first ones (SpecAugment, Park et al. 2019, section 2).
    """
    widest = torch.minimum(torch.full_like(length, width), length // 2)[:, None]
    wide = (u[..., 0] * (widest + 1)).long()  # (B, n)
    start = (u[..., 1] * (length[:, None] - wide + 1)).long()
    place = torch.arange(size, device=u.device)
    inside = ((place >= start[..., None]) & (place < (start + wide)[..., None])).any(1)
    return inside[:, None, :, None] if dim == 2 else inside[:, None, None, :]


def _real(frames: Tensor, mel: Tensor) -> Tensor:
    """(B, 1, F, 1) bool: which frames are sound; what is done to a sound leaves its padding as it is."""
    return (torch.arange(mel.shape[2], device=mel.device) < frames[:, None])[:, None, :, None]
