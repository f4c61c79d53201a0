"""Mixup and CutMix of clips with picture and sound: one partner, one share, the same for both streams and the labels.

The published code of HiCMAE mixes pictures and labels and leaves the sound of one clip beside the label of two. Mixup
is done on what the encoders see, normalised pictures and normalised log-mel, where the share of the input is the share
of the label; in a sum of waveforms the louder voice would cover the other, whatever the label says.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from pydantic import Field, model_validator
from scipy.special import betaincinv
from torch import Tensor

from affekt.data.errors import SettingsError
from affekt.data.settings import Settings
from affekt.data.transforms import Inputs
from affekt.finetune.training.draws import column, uniforms


class Mixing(Settings):
    """How clips are mixed in pairs; off by default. Published (HiCMAE): mixup 0.8, cutmix 1.0, of the pictures only."""

    mixup: float = Field(0.0, ge=0, description="alpha of the Beta(alpha, alpha) that draws the share; 0: none")
    cutmix: float = Field(0.0, ge=0, description="likewise for a box of the picture and as much of the time; 0: none")
    share: float = Field(1.0, ge=0, le=1, description="of the pairs that are mixed; published: 1")
    switch: float = Field(0.5, ge=0, le=1, description="share of CutMix where both are on; published: 0.5")

    @model_validator(mode="after")
    def _check(self) -> "Mixing":
        if self.share < 1 and not (self.mixup or self.cutmix):
            raise ValueError("share: neither mixup nor cutmix is on, so there is nothing to mix")
        return self


@dataclass(frozen=True)
class Mixed:
    """Who each row of a batch was mixed with: `partner` int64 (B,), and the `share` float32 (B,) that is its own."""

    partner: Tensor
    share: Tensor

    def targets(self, own: Tensor) -> Tensor:
        """Shares, votes or ratings (B, ...) mixed as the clips were: NaN where one of a mixed pair is NaN."""
        share = self.share.view(-1, *(1,) * (own.ndim - 1)).to(own)
        return torch.where(share < 1, share * own + (1 - share) * own[self.partner], own)


def mix(
    inputs: Inputs, keys: Sequence[int], settings: Mixing, repeats: int = 1, groups: Tensor | None = None
) -> tuple[Inputs, Mixed]:
    """Neighbours in a batch are mixed with each other, each keeping the same share of itself.

    Pairs are rows `i` and `i + repeats` (views of one clip stand next to each other), so whole pairs go to each rank
    and part; what a pair draws comes from the key of its first row. A pair stays as it is where one lacks a stream that
    the other has, or is of another group (`groups` (B,): which classes and ratings a clip's corpus knows). The sound
    of a shorter partner is repeated, so that a row keeps its length and every frame the share of its label.

    Raises SettingsError for a batch that does not divide into pairs.
    """
    rows, device = len(inputs.has_video), inputs.has_video.device
    if rows % (2 * repeats):
        raise SettingsError(f"{rows} clips of a rank's part of a batch cannot be mixed in pairs; make it even")
    partner = torch.arange(rows, device=device).view(-1, 2, repeats).flip(1).flatten()
    first = np.arange(rows).reshape(-1, 2, repeats)[:, :1].repeat(2, 1).flatten()
    u = uniforms([keys[i] for i in first], 6, "mix")
    cut = u[:, 1] < settings.switch if settings.mixup and settings.cutmix else np.full(rows, settings.cutmix > 0)
    alpha = np.where(cut, settings.cutmix, settings.mixup)
    given = np.where(u[:, 0] < settings.share, betaincinv(alpha, alpha, u[:, 2]), 0.0)  # of the partner; Beta(a, a)
    alike = (inputs.has_video == inputs.has_video[partner]) & (inputs.has_audio == inputs.has_audio[partner])
    if groups is not None:
        alike &= groups == groups[partner]
    given, cut, u = column(given, device) * alike, column(cut, device, torch.bool), column(u[:, 3:], device)
    video, audio, parts = inputs.video, inputs.audio, []
    area = given
    if video is not None:
        weight, area = _of_picture(given, cut, u, *video.shape[3:])
        video = torch.lerp(video, video[partner], weight[:, None, None])
        parts.append((inputs.has_video, weight.mean((1, 2))))
    if audio is not None:
        weight = _of_sound(torch.where(inputs.has_video, area, given), cut, u, inputs.audio_frames, audio.shape[2])
        audio = torch.lerp(audio, _repeated(audio[partner], inputs.audio_frames[partner]), weight[:, None, :, None])
        parts.append((inputs.has_audio, weight.sum(1) / inputs.audio_frames.clamp(min=1)))
    streams = sum(has.float() for has, _ in parts)
    other = sum(has * part for has, part in parts) / streams.clamp(min=1)
    return replace(inputs, video=video, audio=audio), Mixed(partner, 1 - other)


def _of_picture(given: Tensor, cut: Tensor, u: Tensor, height: int, width: int) -> tuple[Tensor, Tensor]:
    """How much of the partner stands at each pixel, (B, H, W), and in all, (B,): a box of all frames, or a share."""
    sides = []
    for size, place in ((height, u[:, 0]), (width, u[:, 1])):
        side = (size * given.sqrt()).round()
        start = (place * (size - side + 1)).floor()
        at = torch.arange(size, device=given.device)
        sides.append((at >= start[:, None]) & (at < (start + side)[:, None]))
    box = (sides[0][:, :, None] & sides[1][:, None, :]).float()
    weight = torch.where(cut[:, None, None], box, given[:, None, None])
    return weight, weight.mean((1, 2))


def _of_sound(given: Tensor, cut: Tensor, u: Tensor, frames: Tensor, length: int) -> Tensor:
    """How much of the partner stands at each frame, (B, F): a stretch of the sound, or a share of it all."""
    at = torch.arange(length, device=given.device)
    long = (given * frames).round()
    start = (u[:, 2] * (frames - long + 1)).floor()
    block = (at >= start[:, None]) & (at < (start + long)[:, None])
    return torch.where(cut[:, None], block.float(), given[:, None]) * (at < frames[:, None])


def _repeated(audio: Tensor, frames: Tensor) -> Tensor:
    """Log-mel (B, 1, F, M) of which the `frames` (B,) that are sound come again and again to the end of the window."""
    at = torch.arange(audio.shape[2], device=audio.device) % frames.clamp(min=1)[:, None]
    return audio.gather(2, at[:, None, :, None].expand_as(audio))
