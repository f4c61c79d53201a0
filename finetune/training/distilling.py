"""Self-distillation on incomplete views: with moments hidden a clip is to be judged as it is with all there.

MSSD of CIDer (github.com/gw-zhong/CIDer), as one summed loss and one step: the published script clears no gradients
between its two. Its second term compares attention maps; here the answers are compared, which are there whatever
attends to what. Its reconstruction of what is hidden is left out: that is what pre-training did.
"""

from collections.abc import Callable, Sequence
from dataclasses import fields

import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional as F

from affekt.data.settings import Settings
from affekt.data.transforms import Inputs
from affekt.finetune.training.streams import incomplete_view


class Distilling(Settings):
    """Weights of what is added to the loss of the complete view; nothing by default. One that is on doubles the cost of
    a step."""

    task: float = Field(0.0, ge=0, description="of the loss of the incomplete view; CIDer: 1")
    features: float = Field(0.0, ge=0, description="of 1 - cosine of the features of both views; CIDer: 0 to 1")
    answers: float = Field(0.0, ge=0, description="of the divergence of the answers to both views; CIDer: 0 to 1")

    @property
    def on(self) -> bool:
        return bool(self.task or self.features or self.answers)

    def losses(
        self,
        model: Callable[..., tuple[Tensor, dict[str, Tensor]]],
        loss: Callable[[Tensor], dict[str, Tensor]],
        inputs: Inputs,
        keys: Sequence[int],
        *,
        classes: int,
        known: Tensor,
        multi: bool = False,
        tubelet: int = 2,
    ) -> dict[str, Tensor]:
        """What `loss` says of the complete view, its `loss` with the terms of the incomplete one added, and these.

        `model(inputs, True)` gives outputs (B, classes + D) and features by stream; both views go through
        it as one batch. `known` (B, classes) bool are the classes of each clip's corpus.
        """
        view, *_ = incomplete_view(inputs, keys, tubelet)
        outputs, features = model(joined(inputs, view), True)
        (whole, partly), rows = outputs.chunk(2), len(keys)
        losses = loss(whole)
        terms = {
            "loss_incomplete": (self.task, lambda: loss(partly)["loss"]),
            "loss_features": (self.features, lambda: feature_distance(features, rows, inputs)),
            "loss_answers": (self.answers, lambda: divergence(whole, partly, classes, known, multi)),
        }
        for name, (weight, term) in terms.items():
            if weight:
                losses[name] = term()
                losses["loss"] = losses["loss"] + weight * losses[name]
        return losses


def joined(one: Inputs, two: Inputs) -> Inputs:
    """Two batches as one."""
    pairs = {f.name: (getattr(one, f.name), getattr(two, f.name)) for f in fields(Inputs)}
    return Inputs(**{name: None if pair[0] is None else torch.cat(pair) for name, pair in pairs.items()})


def feature_distance(features: dict[str, Tensor], rows: int, inputs: Inputs) -> Tensor:
    """1 - cosine of the features of the second half of the rows and of the first, which gets no gradient; the mean over
    the streams of all clips. `features` (2 B, R, D) by stream."""
    distances, there = [], []
    for stream, both in features.items():
        whole, partly = both.float().flatten(1).split(rows)
        has = inputs.has_video if stream == "video" else inputs.has_audio
        distances.append(torch.where(has, 1 - F.cosine_similarity(partly, whole.detach(), dim=1), 0.0))
        there.append(has)
    return torch.stack(distances).sum() / torch.stack(there).sum().clamp(min=1)


def divergence(whole: Tensor, partly: Tensor, classes: int, known: Tensor, multi: bool) -> Tensor:
    """How far the answers `partly` (B, classes + D) are from `whole`, which get no gradient; the mean over clips that
    have some: KL of the classes (of each one, where there may be several), and smooth L1 of the dimensions."""
    whole, there = whole.float().detach(), whole.isfinite().all(1)
    p, q = whole[:, :classes], partly[:, :classes].float()
    distance = F.smooth_l1_loss(partly[:, classes:].float(), whole[:, classes:], reduction="none").sum(1)
    if classes and multi:
        cross = F.binary_cross_entropy_with_logits(q, p.sigmoid(), reduction="none")
        own = F.binary_cross_entropy_with_logits(p, p.sigmoid(), reduction="none")
        distance = distance + torch.where(known, cross - own, 0.0).sum(1)
    elif classes:
        p, q = (x.masked_fill(~known, -1e9).log_softmax(1) for x in (p, q))
        distance = distance + F.kl_div(q, p, log_target=True, reduction="none").sum(1)
    return torch.where(there, distance, 0.0).sum() / there.sum().clamp(min=1)
