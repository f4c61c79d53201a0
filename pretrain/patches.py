"""Patches of a clip, their fixed positions and their reconstruction targets."""

import math

import torch
from torch import Tensor

from affekt.data.transforms import picture_constants


def patchify_video(video: Tensor, tubelet_size: int, patch_size: int) -> Tensor:
    """(B, 3, T, H, W) -> (B, t*h*w, tubelet*p*p*3), each vector in (frame, y, x, channel) order."""
    b, c, t, h, w = video.shape
    p = patch_size
    video = video.reshape(b, c, t // tubelet_size, tubelet_size, h // p, p, w // p, p)
    return video.permute(0, 2, 4, 6, 3, 5, 7, 1).flatten(4).flatten(1, 3)


def unpatchify_video(patches: Tensor, grid: tuple[int, int, int], tubelet_size: int, patch_size: int) -> Tensor:
    """The inverse of `patchify_video`: (B, t*h*w, tubelet*p*p*3) -> (B, 3, T, H, W)."""
    t, h, w = grid
    p = patch_size
    x = patches.reshape(-1, t, h, w, tubelet_size, p, p, 3)
    return x.permute(0, 7, 1, 4, 2, 5, 3, 6).reshape(-1, 3, t * tubelet_size, h * p, w * p)


def patchify_audio(mel: Tensor, patch_size: int) -> Tensor:
    """(B, 1, frames, mels) -> (B, time*mel, p*p), each vector in (frame, mel) order."""
    b, _, t, f = mel.shape
    p = patch_size
    return mel.reshape(b, t // p, p, f // p, p).transpose(2, 3).flatten(3).flatten(1, 2)


def unpatchify_audio(patches: Tensor, grid: tuple[int, int], patch_size: int) -> Tensor:
    """The inverse of `patchify_audio`: (B, time*mel, p*p) -> (B, 1, frames, mels)."""
    t, f = grid
    p = patch_size
    return patches.reshape(-1, t, f, p, p).transpose(2, 3).reshape(-1, 1, t * p, f * p)


@torch.no_grad()
def standardise_video(patches: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Undo the ImageNet normalisation, then standardise each patch per colour channel (unbiased, 1e-6 on the std).

    `patches` (B, N, L*3) -> standardised (B, N, L*3), mean and std (B, N, 3) on the 0-1 scale. Always float32.
    """
    pixels = patches.shape[-1] // 3
    run = math.gcd(pixels, 32)  # operations on rows of several pixels are vectorised, those on three colours are not
    x = patches.float().unflatten(-1, (-1, 3 * run))  # (B, N, L / run, run * 3)
    mean, std = picture_constants(x.device)
    x = torch.addcmul(_tiled(mean, run), x, _tiled(std, run))
    mean = x.sum(-2).unflatten(-1, (run, 3)).sum(-2) / pixels  # (B, N, 3)
    x.sub_(_tiled(mean, run)[..., None, :])
    std = ((x * x).sum(-2).unflatten(-1, (run, 3)).sum(-2) / (pixels - 1)).sqrt() + 1e-6
    return x.div_(_tiled(std, run)[..., None, :]).flatten(2), mean, std


def _tiled(colours: Tensor, run: int) -> Tensor:
    """(..., 3) -> (..., run * 3), for a row of pixels."""
    return colours.unsqueeze(-2).expand(*colours.shape[:-1], run, 3).flatten(-2)


@torch.no_grad()
def video_target(patches: Tensor, tubelet_size: int, frame_difference: bool) -> Tensor:
    """What the video decoder predicts, (B, N, L*3): standardised patches, and with `frame_difference` each later
    frame of a tubelet as its difference to the frame before (HiCMAE section 3.3; the published script has it on)."""
    target, _, _ = standardise_video(patches)
    if frame_difference:
        frames = target.unflatten(-1, (tubelet_size, -1))  # (B, N, tubelet, p*p*3)
        frames[:, :, 1:] = frames[:, :, 1:] - frames[:, :, :-1]
    return target


@torch.no_grad()
def standardise_audio(patches: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Standardise each log-mel patch over its values (unbiased, 1e-6 on the std): (B, N, L) and mean, std (B, N, 1)."""
    x = patches.float()
    var, mean = torch.var_mean(x, -1, keepdim=True)
    std = var.sqrt() + 1e-6
    return (x - mean) / std, mean, std


def flat_positions(grid: tuple[int, ...], dim: int) -> Tensor:
    """Fixed sinusoids over the flattened index of the tokens, (1, N, dim), as in the published code: neighbours in a
    column of the picture are as far apart as the grid is wide."""
    return sinusoids(math.prod(grid), dim)[None]


def factorised_positions(grid: tuple[int, ...], dim: int) -> Tensor:
    """Fixed sinusoids of each axis of the grid on channels of its own, (1, N, dim), as in MAE (2-D)."""
    widths = [dim // len(grid) // 2 * 2] * len(grid)
    widths[0] += dim - sum(widths)  # what does not divide goes to the time axis
    axes = []
    for axis, (length, width) in enumerate(zip(grid, widths, strict=True)):
        shape = [1] * len(grid) + [width]
        shape[axis] = length
        axes.append(sinusoids(length, width).view(shape).expand(*grid, width))
    return torch.cat(axes, -1).flatten(0, -2)[None]


def sinusoids(length: int, dim: int) -> Tensor:
    """(length, dim): sin on even, cos on odd channels, wavelengths from 2 pi to 10000 times that."""
    channel = torch.arange(dim, dtype=torch.float64)
    angle = torch.arange(length, dtype=torch.float64)[:, None] / 10000 ** (2 * (channel // 2) / dim)
    angle[:, 0::2] = angle[:, 0::2].sin()
    angle[:, 1::2] = angle[:, 1::2].cos()
    return angle.float()


def gather_tokens(x: Tensor, ids: Tensor) -> Tensor:
    """Tokens (B, N, D) at `ids` (B, K) -> (B, K, D); `x` (1, N, D) serves all rows. Whole rows are copied, which
    `torch.gather` does value by value."""
    rows = ids if len(x) == 1 else ids + torch.arange(len(x), device=ids.device)[:, None] * x.shape[1]
    return x.flatten(0, 1).index_select(0, rows.flatten()).unflatten(0, ids.shape)


def mean_of_tokens(x: Tensor, valid: Tensor | None = None) -> Tensor:
    """(B, N, D) -> (B, D), over the tokens that `valid` (B, N) marks as no padding; over all when None."""
    if valid is None:
        return x.mean(1)
    weight = valid[..., None].to(x)
    return (x * weight).sum(1) / weight.sum(1)


def segment_means(x: Tensor, ids: Tensor | None, per_step: int, steps: int, segments: int, valid: Tensor | None = None):
    """(B, N, D) -> (B, segments, D): means of the tokens in each of as many equal parts of the time; 0 where there is
    no token. `ids` (B, N) are their places in the grid of `steps` times `per_step` tokens, None where all are there."""
    places = torch.arange(x.shape[1], device=x.device)[None] if ids is None else ids
    part = places // per_step * segments // steps  # (B, N)
    weight = (part[:, None] == torch.arange(segments, device=x.device)[:, None]).to(x)  # (B, segments, N)
    if valid is not None:
        weight = weight * valid[:, None].to(x)
    return weight @ x / weight.sum(2, keepdim=True).clamp(min=1)
