"""What a stretch of speech sounds like, as numbers: cepstra, bands, level, pitch, and statistics of each over its time.

To regress them is a task without labels beside reconstruction, as in PASE (Pascual et al., Interspeech 2019, section
2.2), whose encoder predicts cepstra and prosody frame by frame. Here it predicts them step by step, a step being as
long as a patch, and functionals over the window, of which openSMILE's sets for emotion (Eyben et al., ACM Multimedia
2010) are made. All is computed from the batch's log-mel, so views that are louder or turned have targets of their own.
"""

import math
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from affekt.data.transforms import HIGH_HZ, LOW_HZ
from affekt.pretrain.objectives import exact, full
from affekt.pretrain.patches import mean_of_tokens, segment_means

FLOOR, SOUNDING = 80 * math.log(10) / 10, 35 * math.log(10) / 10  # nepers of power below the loudest: 80 and 35 dB
CEPSTRA, BANDS = 20, 16
PITCHES, LOWEST_HZ, HIGHEST_HZ, HARMONICS, HARMONICS_BELOW_HZ = 120, 70.0, 500.0, 8, 2500.0
QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)

# Round figures of where descriptors lie over frames of speech and how far apart, and of the same for each statistic of
# a descriptor so scaled over windows (RAVDESS and EMO-DB, training rows; 128 bins, frames of 25 and 64 ms; with fewer
# bins some lie elsewhere): every target has about the weight of any other, and what a target is depends on no other
# clip of the batch. But prosody, level, pitch and harmonicity, would be three of 41 descriptors, for the spectrum is
# told twice; its targets are larger by `PROSODY`.
PROSODY = 2.5
CEPSTRA_CENTRE = (-10, -8, -1, -6, -4.5, -6, -3, -3, -0.5, -2, -1, -2, 0, -1.5, 0, -1, 1, 0, 1, 0)
CEPSTRA_SCALE = (16, 10, 7.5, 6, 5.7, 5, 4, 4.4, 4, 3.5, 3.5, 3.5, 3.3, 3.3, 3.3, 3.2, 3.2, 3.2, 3.2, 3)
CEPSTRA_SLOPE_SCALE = (3, 2, 1.4, 1.2, 1.2, 1.1, 1, 0.9, 0.9, 0.8, 0.8, *[0.75] * 9)
OTHER_CENTRE = (0, 1.1, 0.5, *[-6.7] * BANDS, -0.5, 13)  # level, flux, centroid, bands, pitch, harmonicity
OTHER_SCALE = (3.5, 0.6, 0.2, *[3.8] * BANDS, 0.27, 7.5)
OTHER_SLOPE_SCALE = (0.7, 0.2, 0.05, *[0.75] * BANDS, 0.04, 1.7)
STATISTIC_CENTRE = (0, 0.75, 0, 3.2, 0, -1.3, -0.65, -0.15, 0.35, 1.1, 1, 2.4)
STATISTIC_SCALE = (0.6, 0.17, 0.5, 1.2, 0.35, 0.6, 0.6, 0.65, 0.65, 0.7, 0.3, 0.55)
SLOPE_STATISTIC_CENTRE = (0, 1, 0.25, 4.3, 0, -1.6, -0.6, 0, 0.55, 1.7, 1.15, 3.3)
SLOPE_STATISTIC_SCALE = (0.04, 0.25, 0.5, 1.5, 0.1, 0.5, 0.17, 0.09, 0.18, 0.5, 0.3, 0.9)
REFERENCE_HZ = 200.0  # the pitch is the logarithm of what is over it
SMALLEST_VARIANCE = 1e-5  # under a square root whose slope at 0 has no end
LARGEST = 4.0  # deviations; what is further away counts as far as this

NUM_DESCRIPTORS = CEPSTRA + 5 + BANDS
PITCH = NUM_DESCRIPTORS - 2
NUM_FUNCTIONALS = 2 * NUM_DESCRIPTORS * (len(QUANTILES) + 7) + 1


class FunctionalsHead(nn.Module):
    """Linear maps of tokens to `Told`: of their mean and deviation over the window, and of their mean in each step.
    What a linear map finds there, a probe of the same does too."""

    def __init__(self, dim: int, grid: tuple[int, int]):
        super().__init__()
        self.grid = grid
        self.window = nn.Linear(2 * dim, NUM_FUNCTIONALS)
        self.steps = nn.Linear(dim, 2 * NUM_DESCRIPTORS)

    def forward(self, tokens: Tensor, ids: Tensor, valid: Tensor | None = None) -> "Told":
        """(B, K, D) tokens at the places `ids` (B, K), of which `valid` (B, K) marks those that are no padding."""
        tokens, (steps, per_step) = full(tokens), self.grid
        mean = mean_of_tokens(tokens, valid)
        variance = mean_of_tokens((tokens - mean[:, None]).square(), valid)
        window = self.window(torch.cat((mean, (variance + SMALLEST_VARIANCE).sqrt()), 1))
        return Told(window, self.steps(segment_means(tokens, ids, per_step, steps, steps, valid)))


class Told(NamedTuple):
    """`window` (B, NUM_FUNCTIONALS) and `steps` (B, S, 2 NUM_DESCRIPTORS), descriptors and their slopes."""

    window: Tensor
    steps: Tensor


def steps_seen(ids: Tensor, valid: Tensor | None, grid: tuple[int, int]) -> Tensor:
    """bool (B, S): whether a step has a token that is visible, at `ids` (B, K), and no padding."""
    steps, per_step = grid
    there = torch.ones_like(ids) if valid is None else valid.long()
    return torch.zeros(len(ids), steps, dtype=torch.long, device=ids.device).scatter_add_(1, ids // per_step, there) > 0


@torch.compiler.disable  # its tables are made once, by what no graph can hold
@torch.no_grad()
def functionals(mel: Tensor, frames: Tensor, steps: int) -> Told:
    """Log-mel (B, T, bins), not normalised, with `frames` (B,) of sound -> what is to be told of it over the window and
    in each of so many `steps`, which divide T. Each number is of about mean 0 and deviation 1 over windows of speech,
    or `PROSODY` for level, pitch and harmonicity. A statistic of no frame, as of the pitch of silence, is 0.
    """
    with exact(mel.device):  # half the precision would move the pitch
        x, sounding, voiced = descriptors(mel, frames)
    slopes = F.pad((x[:, 3:-1] - x[:, 1:-3] + 2 * (x[:, 4:] - x[:, :-4])) / 10, (0, 0, 2, 2))  # per frame, over five
    at = torch.arange(x.shape[1], device=x.device)
    within = (at >= 2) & (at < frames[:, None] - 2)
    centre, scale, slope_scale, weight, *of_statistics = _scales(x.device)
    window, local, pitch = [], [], slice(PITCH, PITCH + 1)
    for values, real, middle, spread in (
        ((x - centre) / scale, at < frames[:, None], *of_statistics[:2]),
        (slopes / slope_scale, within, *of_statistics[2:]),
    ):
        of_all = statistics_over_time(values, sounding & real)
        of_all[:, :, pitch] = statistics_over_time(values[:, :, pitch], voiced & real)
        window.append((of_all - middle[:, None]) / spread[:, None])
        share = torch.ones_like(values) * real[..., None]
        share[:, :, PITCH] *= voiced + 1e-4  # where nothing is voiced, what unvoiced frames hold
        share, values = (s.unflatten(1, (steps, -1)) for s in (share, values * share))
        local.append(values.sum(2) / share.sum(2).clamp(min=1e-6))
    window, local = ([x.nan_to_num(0.0).clamp(-LARGEST, LARGEST) * weight for x in xs] for xs in (window, local))
    share = (sounding.float().mean(1, keepdim=True) - 0.5) / 0.25
    return Told(torch.cat([*(x.flatten(1) for x in window), share], 1), torch.cat(local, 2))


def descriptors(mel: Tensor, frames: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(B, T, NUM_DESCRIPTORS) of every frame, which frames sound, bool (B, T), not more than 35 dB below the loudest,
    and which of them are voiced. Cepstra 1 to 20; level in nepers of power; flux, the mean change of a bin; centroid in
    0..1 of the mel axis; bands; log pitch; harmonicity, how far the pitch's harmonics stand out of what is between.

    The pitch is the best of `PITCHES` combs over the spectrum after its envelope is taken off. Frames whose best comb
    fits no better than the median one count as unvoiced and hold the voiced ones' median.
    """
    bins = mel.shape[2]
    real = torch.arange(mel.shape[1], device=mel.device) < frames[:, None]
    loudest = torch.where(real[..., None], mel, -torch.inf).flatten(1).amax(1)[:, None, None]
    mel = torch.where(real[..., None], mel, -torch.inf).maximum(loudest - FLOOR)
    power = mel.exp()
    total = power.sum(2)
    level = total.log()
    sounding = real & (level > level.amax(1, keepdim=True) - SOUNDING)
    cosines, combs, pitches = _tables(bins, mel.device)
    flux = F.pad(mel.diff(dim=1).abs().mean(2), (1, 0))
    centroid = (power @ torch.linspace(0, 1, bins, device=mel.device)) / total
    bands = F.adaptive_avg_pool1d(mel, BANDS)
    fit, best = (mel @ combs).max(2)
    median = torch.where(sounding, fit, torch.nan).nanmedian(1).values
    voiced = sounding & (fit > median[:, None])
    pitch = pitches[best]
    usual = torch.where(voiced, pitch, torch.nan).nanmedian(1).values
    usual = usual.nan_to_num(OTHER_CENTRE[-2])  # of silence: what `functionals` makes 0
    pitch = torch.where(voiced, pitch, usual[:, None])
    single = [x[..., None] for x in (level, flux, centroid, pitch, fit)]
    return torch.cat([mel @ cosines, *single[:3], bands, *single[3:]], 2), sounding, voiced


def statistics_over_time(x: Tensor, counted: Tensor) -> Tensor:
    """(B, T, K) -> (B, 7 + QUANTILES, K) over the frames that are `counted` (B, T): mean, deviation, skewness (within
    5), kurtosis (to 20), slope over the counted part from -1 to 1, quantiles (nearest rank), distance of the quartiles
    and of the outer quantiles. NaN where no frame is counted."""
    weight = counted.to(x)[..., None]
    count = weight.sum(1).clamp(min=1)
    mean = (x * weight).sum(1) / count
    centred = (x - mean[:, None]) * weight
    deviation = (centred.square().sum(1) / count + 1e-8).sqrt()
    scaled = centred / deviation[:, None]
    skewness, kurtosis = scaled.pow(3).sum(1) / count, scaled.pow(4).sum(1) / count
    time = ((2 * weight.cumsum(1) - 1) / count[:, None] - 1) * weight  # middles of the frames
    slope = (centred * time).sum(1) / time.square().sum(1).clamp(min=1e-3)
    ascending = torch.where(counted[..., None], x, torch.inf).sort(1).values
    ranks = [(q * (count[:, 0] - 1)).round().long() for q in QUANTILES]
    quantiles = [ascending.gather(1, rank[:, None, None].expand(-1, 1, x.shape[2]))[:, 0] for rank in ranks]
    widths = [quantiles[3] - quantiles[1], quantiles[4] - quantiles[0]]
    found = [mean, deviation, skewness.clamp(-5, 5), kurtosis.clamp(0, 20), slope, *quantiles, *widths]
    return torch.where(counted.any(1)[:, None, None], torch.stack(found, 1), torch.nan)


@lru_cache(maxsize=8)
def _tables(bins: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Cosines (bins, CEPSTRA), combs (bins, PITCHES), and the logarithms of the pitches over `REFERENCE_HZ`. By numpy,
    which no counter of FLOPs or kernels takes for a part of the step."""
    cosines = math.sqrt(2 / bins) * np.cos(math.pi / bins * np.outer(np.arange(bins) + 0.5, np.arange(1, CEPSTRA + 1)))
    pitches = np.linspace(math.log(LOWEST_HZ), math.log(HIGHEST_HZ), PITCHES)
    low, high = (1127 * math.log(1 + hz / 700) for hz in (LOW_HZ, HIGH_HZ))
    combs = np.zeros((bins, PITCHES))
    for harmonic in range(1, HARMONICS + 1):
        for place, sign in ((harmonic, 1.0), (harmonic - 0.5, -1.0)):  # harmonics, and the valleys below them
            at = (1127 * np.log(1 + place * np.exp(pitches) / 700) - low) / ((high - low) / (bins + 1)) - 1
            below = np.floor(at).astype(int)
            inside = (below >= 0) & (below < bins - 1) & (harmonic * np.exp(pitches) <= HARMONICS_BELOW_HZ)
            (column,) = inside.nonzero()
            share = (at - below)[column]
            combs[below[column], column] += sign * (1 - share) / math.sqrt(harmonic)
            combs[below[column] + 1, column] += sign * share / math.sqrt(harmonic)
    near = (np.abs(np.subtract.outer(np.arange(bins), np.arange(bins))) <= bins // 16).astype(float)
    envelope = near / near.sum(1, keepdims=True)  # (bins, bins), means of neighbours
    combs -= envelope.T @ combs  # to fit them to the spectrum without its envelope
    tables = (cosines, combs, pitches - math.log(REFERENCE_HZ))
    return tuple(torch.from_numpy(table).float().to(device) for table in tables)


@lru_cache(maxsize=8)
def _scales(device: torch.device) -> tuple[Tensor, ...]:
    values = (
        (*CEPSTRA_CENTRE, *OTHER_CENTRE),
        (*CEPSTRA_SCALE, *OTHER_SCALE),
        (*CEPSTRA_SLOPE_SCALE, *OTHER_SLOPE_SCALE),
        (*[1] * CEPSTRA, PROSODY, 1, 1, *[1] * BANDS, PROSODY, PROSODY),
        STATISTIC_CENTRE,
        STATISTIC_SCALE,
        SLOPE_STATISTIC_CENTRE,
        SLOPE_STATISTIC_SCALE,
    )
    return tuple(torch.tensor(v, dtype=torch.float32, device=device) for v in values)
