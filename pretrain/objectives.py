"""The losses of HiCMAE: masked reconstruction and hierarchical cross-modal contrast (HCMCL)."""

from contextlib import nullcontext

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable


def reconstruction_loss(prediction: Tensor, target: Tensor, weight: Tensor, tokens: Tensor | None = None) -> Tensor:
    """Mean squared error over the hidden tokens that exist.

    `prediction`, `target` (B, M, P); `weight` (B, M) is 0 for padding and for clips without the stream, else 1. The
    mean runs over the tokens of the global batch: on several ranks the average of the ranks' values is the loss of
    one process with the whole batch. Where that batch comes in parts, `tokens` is the mean of `weight.sum()` over all
    parts of all ranks, and the mean of the parts' values is the loss.
    """
    per_token = _SquaredDistance.apply(prediction, _full(target))
    total = (weight.sum() if tokens is None else tokens) * target.shape[-1]
    if tokens is None and _world_size() > 1:
        dist.all_reduce(total)
        total = total / _world_size()
    return (per_token * weight).sum() / total.clamp(min=1e-6)


class _SquaredDistance(torch.autograd.Function):
    """(..., P), (..., P) -> (...), in the precision of the target. The difference is all that is kept for the backward
    pass and all that the gradient is made of; written with torch's operators the same takes three times the memory, at
    the moment when a step holds the most."""

    @staticmethod
    def forward(ctx, prediction: Tensor, target: Tensor) -> Tensor:
        difference = prediction - target
        ctx.save_for_backward(difference)
        ctx.dtype = prediction.dtype
        return torch.linalg.vector_norm(difference, dim=-1).square()

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None]:
        (difference,) = ctx.saved_tensors
        return (2 * gradient[..., None] * difference).to(ctx.dtype), None


def contrastive_loss(
    video: Tensor,
    audio: Tensor,
    paired: Tensor,
    temperature: float,
    *,
    center: bool = False,
    across_ranks: bool = True,
    clip: Tensor | None = None,
) -> Tensor:
    """Symmetric InfoNCE between the pooled streams of the global batch (HiCMAE equations 9-11).

    `video`, `audio` (B, D) pooled features of this rank; `paired` (B,) bool, False where a stream is missing: such
    clips are neither anchors nor negatives. Features of other ranks are gathered with their gradient, so the average
    over ranks equals the loss of one process. With `across_ranks` False negatives are this rank's own clips, as in the
    published code, and the loss depends on how many ranks share the batch.

    `clip` (B,) int64: rows with the same number are views of one clip, and none is a negative of another; without it
    all rows count as different clips.

    `center` takes the mean over the batch off each stream first. At the start pooled features differ by little more
    than rounding around a common direction, and without it short runs spend themselves on finding the difference.
    """
    kind = video.device.type
    exact = torch.autocast(kind, enabled=False) if torch.amp.is_autocast_available(kind) else nullcontext()
    with exact:  # bf16 would round logits near 14 to multiples of 0.06
        return _contrastive_loss(_full(video), _full(audio), paired, temperature, center, across_ranks, clip)


def _contrastive_loss(
    video: Tensor,
    audio: Tensor,
    paired: Tensor,
    temperature: float,
    center: bool,
    across_ranks: bool,
    clip: Tensor | None,
) -> Tensor:
    all_video, all_audio, all_paired, all_clip, start = video, audio, paired, clip, 0
    ranks = _world_size() if across_ranks else 1
    if ranks > 1:
        all_video, all_audio = all_gather(video), all_gather(audio)
        all_paired, start = all_gather(paired.to(video)) > 0, _rank() * len(video)
        all_clip = None if clip is None else all_gather(clip)
    if center:
        weight = all_paired[:, None] / all_paired.sum().clamp(min=1)
        mean_video, mean_audio = ((x * weight).sum(0) for x in (all_video, all_audio))
        video, all_video = video - mean_video, all_video - mean_video
        audio, all_audio = audio - mean_audio, all_audio - mean_audio
    video, audio, all_video, all_audio = (F.normalize(x, dim=-1) for x in (video, audio, all_video, all_audio))
    labels = torch.arange(start, start + len(video), device=video.device)
    hide = torch.where(all_paired, 0.0, float("-inf")).repeat(len(video), 1)  # (B, global B)
    if clip is not None:
        hide.masked_fill_(clip[:, None] == all_clip, float("-inf"))
    hide.scatter_(1, labels[:, None], 0.0)  # a row keeps its own pair, so that no softmax runs over nothing
    loss = sum(
        F.cross_entropy(rows @ columns.T / temperature + hide, labels, reduction="none")
        for rows, columns in ((video, all_audio), (audio, all_video))
    )
    count = all_paired.sum().clamp(min=1)
    return 0.5 * (loss * paired).sum() * ranks / count


class _AllGather(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        parts = [torch.empty_like(x) for _ in range(_world_size())]
        dist.all_gather(parts, x.contiguous())
        return torch.cat(parts)

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient: Tensor) -> Tensor:
        gradient = gradient.contiguous()
        dist.all_reduce(gradient)  # every rank's loss depends on our rows
        return gradient.chunk(_world_size())[_rank()]


def all_gather(x: Tensor) -> Tensor:
    """(B, ...) of every rank -> (global B, ...), with the gradient of all ranks' losses."""
    return _AllGather.apply(x)


def _full(x: Tensor) -> Tensor:
    """Losses are computed in float32 at least."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def _world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def _rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0
