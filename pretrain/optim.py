"""AdamW with its parameter groups, and the learning rate as a pure function of the step."""

import math
from typing import Annotated

import torch
from pydantic import Field
from torch import nn

from affekt.data.settings import Settings

Beta = Annotated[float, Field(ge=0, lt=1)]


class OptimSettings(Settings):
    """AdamW as in the MAE family; the defaults are the published HiCMAE pre-training."""

    base_lr: float = Field(3e-4, gt=0, description="per 256 clips of the global batch; lr = base_lr * batch / 256")
    min_lr: float = Field(1e-5, ge=0, description="end of the cosine, scaled like base_lr")
    warmup_share: float = Field(0.05, ge=0, lt=1, description="share of all steps with a linear warm-up from 0")
    betas: tuple[Beta, Beta] = (0.9, 0.95)
    eps: float = Field(1e-8, gt=0)
    weight_decay: float = Field(0.05, ge=0, description="not of biases, norms and mask tokens; published: 0.05")
    clip_grad: float = Field(0.0, ge=0, description="maximal gradient norm; 0 clips nothing")
    decay_mask_token_audio: bool = Field(False, description="published: true, by a slip in a list of names")

    def scaled(self, lr: float, global_batch: int) -> float:
        return lr * global_batch / 256


def lr_at(step: int, total_steps: int, settings: OptimSettings, global_batch: int) -> float:
    """The learning rate of optimiser step `step` (0-based): linear warm-up, then a cosine down to `min_lr`."""
    peak, low = (settings.scaled(lr, global_batch) for lr in (settings.base_lr, settings.min_lr))
    warmup = round(settings.warmup_share * total_steps)
    if step < warmup:
        return peak * (step + 1) / warmup
    progress = (step - warmup) / max(1, total_steps - warmup)
    return low + 0.5 * (peak - low) * (1 + math.cos(math.pi * progress))


def create_optimizer(model: nn.Module, settings: OptimSettings) -> torch.optim.AdamW:
    """Fused AdamW. Biases, norms and mask tokens are free of weight decay, but where a setting says otherwise."""
    decay, free = [], []
    for name, parameter in model.named_parameters():
        spared = parameter.ndim == 1 or name.endswith("mask_token")
        if settings.decay_mask_token_audio and name == "decoder_audio.mask_token":
            spared = False
        (free if spared else decay).append(parameter)
    groups = [{"params": decay, "weight_decay": settings.weight_decay}, {"params": free, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=0.0, betas=settings.betas, eps=settings.eps, fused=True)


def clip_gradients(model: nn.Module, largest: float, scale: float = 1.0) -> torch.Tensor:
    """The norm of all gradients, which are scaled down to `largest` where it is above; 0 leaves them alone. `scale` is
    what the loss was multiplied with, and is taken off first."""
    parameters = [p for p in model.parameters() if p.grad is not None]
    if scale != 1:
        torch._foreach_div_([p.grad for p in parameters], scale)
    norm = torch.nn.utils.get_total_norm([p.grad for p in parameters])
    if largest:
        torch.nn.utils.clip_grads_with_norm_(parameters, largest, norm)
    return norm
