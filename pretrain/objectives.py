"""The losses of HiCMAE: masked reconstruction and hierarchical cross-modal contrast (HCMCL)."""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext

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
    per_token = _SquaredDistance.apply(prediction, full(target))
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
    same: Sequence[Tensor] = (),
    rows: slice = slice(None),
) -> Tensor:
    """Symmetric InfoNCE between the pooled streams of the global batch (HiCMAE equations 9-11).

    `video`, `audio` (..., B, D) pooled features of all ranks' clips; leading dimensions, such as taps, stay. `paired`
    (B,) bool, False where a stream is missing: such clips are neither anchors nor negatives. `rows` are this rank's
    own clips: only they are anchors, B_own x B logits a direction, and the average over ranks equals the loss of one
    process with the whole batch.

    `same`: numbers (B,) int64, of the clip that a row is a view of, or of the speaker. Rows with the same number in any
    of them are no negatives of each other; a number below 0 stands for none.

    `center` takes the mean over the batch off each stream first. At the start pooled features differ by little more
    than rounding around a common direction, and without it short runs spend themselves on finding the difference.
    """
    with exact(video.device):  # bf16 would round logits near 14 to multiples of 0.06
        video, audio = full(video), full(audio)
        if center:
            weight = paired[:, None] / paired.sum().clamp(min=1)
            video, audio = (x - (x * weight).sum(-2, keepdim=True) for x in (video, audio))
        video, audio = (F.normalize(x, dim=-1) for x in (video, audio))
        labels = torch.arange(len(paired), device=video.device)[rows]
        hide = torch.where(paired, 0.0, float("-inf")).repeat(len(labels), 1)  # (B_own, B)
        for numbers in same:
            own = numbers[rows, None]
            hide.masked_fill_((own == numbers) & (own >= 0), float("-inf"))
        hide.scatter_(1, labels[:, None], 0.0)  # a row keeps its own pair, so that no softmax runs over nothing
        loss = 0.0
        for anchors, others in ((video, audio), (audio, video)):
            logits = anchors[..., rows, :] @ others.mT / temperature + hide  # (..., B_own, B)
            losses = F.cross_entropy(logits.flatten(0, -2), labels.repeat(logits[..., 0, 0].numel()), reduction="none")
            loss = loss + losses.view(logits.shape[:-1])
        count = paired.sum().clamp(min=1)
        return 0.5 * (loss * paired[rows]).sum(-1) * (len(paired) / len(labels)) / count


def exact(device: torch.device) -> AbstractContextManager:
    """A block where autocast rounds nothing."""
    return torch.autocast(device.type, enabled=False) if torch.amp.is_autocast_available(device.type) else nullcontext()


def full(x: Tensor) -> Tensor:
    """Losses are computed in float32 at least."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def _world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1
