"""A batch in parts that fit into memory one at a time, whose losses and gradients are those of the whole.

The error of masked tokens is a mean over all of them, so a part has to know how many the whole batch has. The contrast
is between all clips at once, and is done as in GradCache (Gao et al. 2021, section 3.2): the features of all parts
without gradients, the loss over them and its gradient for each, then every part once more with gradients, where its
features are pulled along theirs. That costs a second pass through the encoders.
"""

from collections.abc import Iterator

import torch
import torch.distributed as dist
from torch import Tensor

from affekt.data.accounting import device_of_collectives
from affekt.data.batch import Batch
from affekt.data.transforms import Inputs, Preprocess
from affekt.pretrain.hicmae import HiCMAE, Whole
from affekt.pretrain.masks import Mask
from affekt.pretrain.objectives import full
from affekt.pretrain.zero import Engine


def in_parts(
    batch: Batch,
    seeds: list[int],
    model: HiCMAE,
    engine: Engine,
    preprocess: Preprocess,
    device: torch.device,
) -> Iterator[tuple[Inputs, list[Mask], Whole | None]]:
    """What the model takes, for as many parts as there are `seeds`; torch's generator stands at the part's seed (for
    drop path; nothing else draws from it). One part alone is a whole batch and has to know nothing of others."""
    parts = batch.parts(len(seeds))
    masks = [model.masks(part) for part in parts]  # from keys on the host, so that nothing has to wait

    def on_device(number: int) -> tuple[Inputs, list[Mask]]:
        torch.manual_seed(seeds[number])
        return preprocess(parts[number].to(device)), [mask.to(device) for mask in masks[number]]

    if len(parts) == 1:
        yield *on_device(0), None
        return
    tokens = _mean_tokens(model, parts, masks).to(device)
    contrast, gradients = None, [None] * len(parts)
    if model.settings.streams == "both" and model.settings.contrast_weight:
        rows = []
        for number in range(len(parts)):
            inputs, pair = on_device(number)
            rows.append((engine.features(inputs, *pair), model.numbers(inputs)))
        with engine.autocast():
            contrast, gradients = _contrast(model, *zip(*rows, strict=True))
    for number, gradient in enumerate(gradients):
        yield *on_device(number), Whole(tokens, contrast, gradient)


def _mean_tokens(model: HiCMAE, parts: list[Batch], masks: list[tuple[Mask, Mask]]) -> Tensor:
    """`HiCMAE.tokens` (4,) of all parts of all ranks, averaged."""
    mine = torch.stack([model.tokens(part, *pair) for part, pair in zip(parts, masks, strict=True)]).mean(0)
    mine = mine.to(device_of_collectives())
    dist.all_reduce(mine)
    return mine / dist.get_world_size()


def _contrast(model: HiCMAE, features: tuple[Tensor, ...], numbers: tuple[Tensor, ...]) -> tuple[Tensor, list[Tensor]]:
    """The loss over all parts, and its gradient for the features of each, times the number of parts, as the loss of a
    step is the mean over them."""
    rows = full(torch.cat(features)).requires_grad_()
    loss = model.contrast(*model.gathered(rows, torch.cat(numbers)))
    (gradient,) = torch.autograd.grad(loss, rows)
    return loss.detach(), list((gradient * len(features)).split([len(part) for part in features]))
