"""From a batch of bytes and samples to a model's inputs: crop, resize, normalise, log-mel, batched on any device."""

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from affekt.data.batch import Batch
from affekt.data.decode import FRAME_LENGTH, FRAME_SHIFT

# ImageNet's, in the range 0 to 1; and AudioSet's of the log-mel, whose deviation is used twice (AST, HiCMAE).
PICTURE_MEAN, PICTURE_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
MEL_MEAN, MEL_STD = -4.2677393, 4.5689974

# Kaldi's filter bank at 16 kHz.
SAMPLE_RATE, LOW_HZ, HIGH_HZ, PRE_EMPHASIS = 16000, 20.0, 8000.0, 0.97
KALDI_FFT = 512
MEL_WINDOW_MS = FRAME_LENGTH / SAMPLE_RATE * 1000  # 25
EPSILON = torch.finfo(torch.float32).eps


@dataclass(frozen=True)
class Inputs:
    """What a model takes: video (B, 3, T, H, W) and audio (B, 1, mel_frames, mel_bins), None where not asked for.

    `has_video`, `has_audio` bool (B,): rows of a stream that a clip lacks hold nothing that may be learned from.
    `audio_frames` int64 (B,): how many frames of the log-mel are sound; the others are padding. `clip` int64 (B,): rows
    with the same number are views of the same clip; None where all are of different ones. `speaker` int64 (B,), below 0
    where it is not known.
    """

    video: Tensor | None
    audio: Tensor | None
    has_video: Tensor
    has_audio: Tensor
    audio_frames: Tensor
    clip: Tensor | None = None
    speaker: Tensor | None = None


@dataclass(frozen=True)
class Preprocess:
    """Turns a `Batch` into `Inputs` on the batch's device. An export keeps `to_dict()` beside the weights."""

    img_size: int
    mel_bins: int = 128
    mel_frames: int = 256
    mel_window_ms: float = MEL_WINDOW_MS

    @torch.no_grad()
    def __call__(self, batch: Batch) -> Inputs:
        frames, video, audio = batch.audio_frames(self.mel_frames), None, None
        with torch.autocast(batch.keys.device.type, enabled=False):  # half the precision would quantise the pixels
            if batch.video is not None:
                video = normalise_picture(crop_resize(batch.video, batch.crop, self.img_size))
            if batch.audio is not None:
                sound = vary_sound(batch.audio, batch.audio_valid, batch.gain, batch.roll)
                mel = log_mel(sound, self.mel_bins, batch.audio_valid, self.mel_window_ms)
                audio = normalise_mel(pad_frames(mel, frames, self.mel_frames)).unsqueeze(1)
        return Inputs(video, audio, batch.has_video, batch.has_audio, frames, batch.clip, batch.speaker)

    def to_dict(self) -> dict[str, Any]:
        """Everything that decides the outcome, as JSON can hold it."""
        return {
            "img_size": self.img_size,
            "mel_bins": self.mel_bins,
            "mel_frames": self.mel_frames,
            "picture_mean": list(PICTURE_MEAN),
            "picture_std": list(PICTURE_STD),
            "mel_mean": MEL_MEAN,
            "mel_std": MEL_STD,
            "sample_rate": SAMPLE_RATE,
            "resize": "bilinear, antialiased",
            **({} if self.mel_window_ms == MEL_WINDOW_MS else {"mel_window_ms": self.mel_window_ms}),
        }


def normalise_picture(video: Tensor) -> Tensor:
    """Pixels (B, 3, T, H, W) from 0..255, uint8 or float, to ImageNet's mean 0 and deviation 1."""
    x = video.movedim(1, -1)
    width = x.shape[-2]
    x = x.flatten(-2).to(torch.float32, copy=True)  # (B, T, H, W * 3): three colours a row would not be vectorised
    mean, std = (values.mul(255).repeat(width) for values in picture_constants(x.device))
    return x.sub_(mean).div_(std).unflatten(-1, (width, 3)).movedim(-1, 1)


def picture_constants(device: torch.device) -> tuple[Tensor, Tensor]:
    """Mean and deviation (3,) of the colours, filled in on the device: to copy them there would make the host wait."""
    mean, std = ([torch.full((), x, device=device) for x in values] for values in (PICTURE_MEAN, PICTURE_STD))
    return torch.stack(mean), torch.stack(std)


def normalise_mel(mel: Tensor) -> Tensor:
    return (mel - MEL_MEAN) / (2 * MEL_STD)


def plain_mel(normalised: Tensor) -> Tensor:
    """The log-mel, of any shape, of which `normalise_mel` gives this; float32."""
    return normalised.float() * (2 * MEL_STD) + MEL_MEAN


def crop_resize(video: Tensor, box: Tensor, size: int) -> Tensor:
    """Cut each clip (B, T, H, W, 3) uint8 to its box and resize to (B, 3, T, size, size): bilinear, antialiased.

    `box` (B, 4) is x0, y0, x1, y1 in 0..1 of the picture, whole pixels; x0 > x1 mirrors. On a CPU the result is uint8,
    by the integer arithmetic that is five times as fast there and rounds to a whole pixel value; else float32.
    """
    if video.device.type == "cpu":
        return _crop_resize_pixels(video, box, size)
    return _crop_resize_matrices(video, box, size)


def _crop_resize_pixels(video: Tensor, box: Tensor, size: int) -> Tensor:
    batch, time, height, width = video.shape[:4]
    out = video.new_empty(batch, time, size, size, 3)  # colours last in memory, as the pictures come and patches go
    pixels = (box.double() * torch.tensor([width, height, width, height])).round().long().tolist()
    for clip, (x0, y0, x1, y1), target in zip(video, pixels, out):
        clip = clip[:, y0:y1, min(x0, x1) : max(x0, x1)].permute(0, 3, 1, 2)  # (T, 3, h, w), channels last in memory
        if clip.shape[2:] != (size, size):
            clip = F.interpolate(clip, (size, size), mode="bilinear", antialias=True)
        target.copy_((clip.flip(-1) if x0 > x1 else clip).permute(0, 2, 3, 1))
    return out.movedim(-1, 1)


def _crop_resize_matrices(video: Tensor, box: Tensor, size: int) -> Tensor:
    """The same as two matrix products per clip: whatever the boxes are, the shapes stay and nothing waits for a box."""
    batch, time, height, width = video.shape[:4]
    x0, y0, x1, y1 = box.unbind(1)
    rows, columns = resize_matrix(y0, y1, height, size), resize_matrix(x0, x1, width, size)
    x = video.permute(0, 2, 4, 1, 3).reshape(batch, height, -1).float()  # (B, H, 3 T W)
    x = torch.bmm(rows, x).view(batch, -1, width)  # (B, size 3 T, W)
    x = torch.bmm(x, columns.mT).view(batch, size, 3, time, size)
    return x.permute(0, 2, 3, 1, 4)


def resize_matrix(low: Tensor, high: Tensor, length: int, size: int) -> Tensor:
    """Weights (B, size, length) that resize the part low..high (B,), in 0..1, of an axis; low > high mirrors it.

    Triangles one output pixel wide where the part shrinks and one input pixel wide where it grows: what
    `interpolate(mode="bilinear", antialias=True)` does with the part cut out.
    """
    start, end = torch.minimum(low, high) * length, torch.maximum(low, high) * length
    step = ((high - low) * length / size)[:, None]
    centre = low[:, None] * length + (torch.arange(size, device=low.device) + 0.5) * step  # (B, size)
    pixel = torch.arange(length, device=low.device) + 0.5
    inside = (pixel > start[:, None]) & (pixel < end[:, None])  # (B, length)
    distance = (pixel - centre[..., None]).abs() / step.abs().clamp(min=1)[..., None]
    weights = (1 - distance).clamp(min=0) * inside[:, None]
    return weights / weights.sum(-1, keepdim=True)


@torch.no_grad()
def log_mel(
    waveform: Tensor, mel_bins: int = 128, valid: Tensor | None = None, window_ms: float = MEL_WINDOW_MS
) -> Tensor:
    """Log-mel energies (B, frames, mel_bins) of 16 kHz sound (B, S), as Kaldi computes them, not normalised.

    Settings of AST and HiCMAE: 25 ms Hanning windows every 10 ms, pre-emphasis 0.97, DC removed per frame, power
    spectrum, natural logarithm, no dither. The mean of each waveform is taken off first; `valid` (B,) says how many
    samples are sound (the rest must be zeros and stays so).

    Longer windows, of `window_ms`, stand around the same moments as those of 25 ms, with zeros beyond the ends, so that
    there are as many. Noise keeps its level in them. Between the harmonics of a voice at 110 Hz a window of 25 ms
    leaves valleys of 11 dB and one of 64 ms of 45: what shows as pitch in the latter is hard to tell in the former.
    """
    batch, samples = waveform.shape
    valid = torch.full((batch,), samples, device=waveform.device) if valid is None else valid
    mean = waveform.sum(1, dtype=torch.float64) / valid.clamp(min=1)
    sound = torch.arange(samples, device=waveform.device) < valid[:, None]
    waveform = torch.where(sound, waveform - mean.float()[:, None], 0.0)
    if samples < FRAME_LENGTH:
        return waveform.new_zeros(batch, 0, mel_bins)
    length = round(window_ms * SAMPLE_RATE / 1000)
    window, bank, fft_size = _kaldi_constants(mel_bins, length, waveform.device)
    beyond = length - FRAME_LENGTH
    waveform = F.pad(waveform, (beyond // 2, beyond - beyond // 2))
    frames = waveform.unfold(1, length, FRAME_SHIFT)  # (B, frames, length)
    frames = frames - frames.mean(2, keepdim=True)
    before = frames * PRE_EMPHASIS  # a step of its own, rounded as Kaldi rounds it: weak bins show the last bit
    frames[..., 1:].sub_(before[..., :-1])
    frames[..., 0].sub_(before[..., 0])
    spectrum = torch.fft.rfft(frames.mul_(window), fft_size)
    power = spectrum.real.square().addcmul_(spectrum.imag, spectrum.imag)
    return (power @ bank).clamp_(min=EPSILON).log_()


def vary_sound(waveform: Tensor, valid: Tensor, gain: Tensor | None, roll: Tensor | None) -> Tensor:
    """The sound (B, S), turned round by `roll` (B,) within its `valid` (B,) samples, times `gain` (B,)."""
    if roll is not None:
        at = torch.arange(waveform.shape[1], device=waveform.device)
        turned = (at - roll[:, None]) % valid.clamp(min=1)[:, None]
        waveform = waveform.gather(1, torch.where(at < valid[:, None], turned, at))
    return waveform if gain is None else waveform * gain[:, None]


def pad_frames(mel: Tensor, frames: Tensor, length: int) -> Tensor:
    """(B, F, bins) to (B, length, bins): cut, or filled up with 0.0, as are all frames from `frames` (B,) on.

    The published recipe pads the raw log-mel with zeros before it normalises.
    """
    mel = F.pad(mel[:, :length], (0, 0, 0, max(0, length - mel.shape[1])))
    real = torch.arange(length, device=mel.device) < frames[:, None]
    return torch.where(real[..., None], mel, 0.0)


@lru_cache(maxsize=8)
def _kaldi_constants(mel_bins: int, length: int, device: torch.device) -> tuple[Tensor, Tensor, int]:
    """The Hanning window (length,), the filter bank (FFT / 2 + 1, mel_bins), triangles, evenly spaced on Kaldi's mel
    scale, and the size of the FFT, the next power of two."""
    fft_size = 2 ** math.ceil(math.log2(length))
    hertz = torch.arange(fft_size // 2) * (SAMPLE_RATE / fft_size)
    mel = 1127.0 * (1.0 + hertz / 700.0).log()
    low, high = (1127.0 * torch.tensor(1.0 + f / 700.0, dtype=torch.float64).log().item() for f in (LOW_HZ, HIGH_HZ))
    width = (high - low) / (mel_bins + 1)
    # In float32 and in this order, because Kaldi does: a triangle's edge is sensitive to the last bit.
    left, centre, right = (low + (torch.arange(mel_bins)[:, None] + i) * width for i in (0.0, 1.0, 2.0))
    bank = torch.minimum((mel - left) / (centre - left), (right - mel) / (right - centre)).clamp(min=0)
    window = torch.hann_window(length, periodic=False)
    if length != FRAME_LENGTH:  # as much power of noise in a band as with Kaldi's window of 25 ms and 512 bins
        window = window * math.sqrt(FRAME_LENGTH / length * KALDI_FFT / fft_size)
    return window.to(device), F.pad(bank, (0, 1)).T.contiguous().to(device), fft_size
