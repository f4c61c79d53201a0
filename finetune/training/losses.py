"""What is minimised: soft cross-entropy, several classes at once, concordance, and a head that corpora share.

Every mean is over the clips of all ranks that have the target, so that the gradient is the one of a single process.
"""

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional as F

from affekt.finetune.training.clips import Table
from affekt.finetune.training.settings import LossSettings
from affekt.pretrain.gather import Gather

CCC_EPSILON = 1e-8


@dataclass(frozen=True)
class Loss:
    """The loss of a batch. `weights` (K,) of the classes and `penalty` (K, K), None where not asked for."""

    settings: LossSettings
    classes: int
    multi: bool
    weights: Tensor | None = None
    penalty: Tensor | None = None

    def __call__(self, outputs: Tensor, rows: Table, counts: Tensor) -> dict[str, Tensor]:
        """`outputs` (B, K + D) of this part of the batch, `counts` of `count` over all parts and ranks. Of `loss`, the
        mean over parts and ranks is what is minimised; `loss_class` and `loss_dimensions` are its two halves."""
        logits, values = outputs[:, : self.classes].float(), outputs[:, self.classes :].float()
        losses, share = {}, _ranks() * counts[2] / counts[:2].clamp(min=1)
        if logits.shape[1]:
            losses["loss_class"] = self._of_classes(logits, rows).sum() * share[0]
        if values.shape[1]:
            losses["loss_dimensions"] = self._of_dimensions(values, rows.ratings, share[1])
        first = losses.get("loss_class", 0.0)
        weight = self.settings.dimensions_weight if self.classes else 1.0
        return {"loss": first + weight * losses.get("loss_dimensions", 0.0)} | losses

    def _of_classes(self, logits: Tensor, rows: Table) -> Tensor:
        there = ~rows.target.isnan().any(1)
        target = torch.where(there[:, None], rows.target, 0.0)
        if self.multi:
            losses = several_classes(logits, target, rows.known, self.weights)
        else:
            smooth = smoothed(target, rows.known, self.settings.smoothing)
            losses = soft_cross_entropy(logits, smooth, rows.known)
            if self.weights is not None:
                losses = losses * (target * self.weights).sum(1)
        if self.penalty is not None:
            losses = losses + self.settings.penalty * penalised(logits, target, rows.known, self.penalty, self.multi)
        return torch.where(there, losses, 0.0)

    def _of_dimensions(self, values: Tensor, ratings: Tensor, share: Tensor) -> Tensor:
        there = ~ratings.isnan()
        error = torch.where(there, values - torch.where(there, ratings, 0.0), 0.0).square().sum() * share
        if self.settings.dimensions == "mse":
            return error
        everyone, truth = Gather(values), Gather(ratings)
        loss = 1 - concordance(everyone.wait(), truth.wait()).mean()
        return loss + self.settings.mse_weight * error if self.settings.dimensions == "ccc+mse" else loss


def count(rows: Table, parts: int) -> Tensor:
    """float32 (3,): how many clips of all ranks have classes, how many ratings there are, and `parts`."""
    counts = torch.stack([(~rows.target.isnan().any(1)).sum(), (~rows.ratings.isnan()).sum()]).float()
    if not rows.target.shape[1]:
        counts[0] = 0
    if _ranks() > 1:
        dist.all_reduce(counts)
    return torch.cat((counts, counts.new_tensor([parts])))


def soft_cross_entropy(logits: Tensor, target: Tensor, known: Tensor) -> Tensor:
    """- sum p log q per clip (B,), among the classes that are `known` (B, K) to its corpus."""
    log_q = logits.masked_fill(~known, float("-inf")).log_softmax(1)
    return -(target * torch.where(known, log_q, 0.0)).sum(1)


def several_classes(logits: Tensor, target: Tensor, known: Tensor, weights: Tensor | None = None) -> Tensor:
    """Binary cross-entropy per clip (B,), the mean over the known classes."""
    losses = F.binary_cross_entropy_with_logits(logits, target, reduction="none")
    losses = losses if weights is None else losses * (target * weights + 1 - target)
    return (losses * known).sum(1) / known.sum(1).clamp(min=1)


def smoothed(target: Tensor, known: Tensor, amount: float) -> Tensor:
    """(1 - a) p + a / K over the K known classes (Szegedy et al. 2016; timm)."""
    return (1 - amount) * target + amount * known / known.sum(1, keepdim=True).clamp(min=1)


def effective_weights(counts: Tensor) -> Tensor:
    """(K,) weights of classes of which there are `counts`: (1 - b) / (1 - b^n) with b = (N - 1) / N, their mean 1 over
    the classes that occur (Cui et al. 2019; soft-label form of Chou et al., EMO-SUPERB)."""
    counts = counts.double()
    beta = 1 - 1 / counts.sum()
    weights = torch.where(counts > 0, (1 - beta) / (1 - beta**counts), 0.0)
    return (weights / weights[counts > 0].mean()).float()


def penalty_matrix(shares: Tensor) -> Tensor:
    """(K, K) of shares (N, K): one minus how often those who saw class i also saw class j; 0 on the diagonal (after
    Chou et al., Interspeech 2022)."""
    voted = (shares > 0).double()
    together = voted.T @ voted / voted.sum(0).clamp(min=1)[:, None]
    return (1 - together).fill_diagonal_(0).float()


def penalised(logits: Tensor, target: Tensor, known: Tensor, penalty: Tensor, multi: bool) -> Tensor:
    """sum_ij p_i P_ij q_j per clip (B,): probability on classes that are seldom seen beside the true ones."""
    q = logits.sigmoid() * known if multi else logits.masked_fill(~known, float("-inf")).softmax(1)
    return ((target @ penalty) * q).sum(1)


def concordance(x: Tensor, y: Tensor) -> Tensor:
    """Concordance correlation (D,) of (N, D) with (N, D), of the rows where y is known, by population moments: 2 cov /
    (var x + var y + (mean x - mean y)^2), in float32 as the loss of methods B6. A column of unknowns has 1."""
    there = ~y.isnan()
    n = there.sum(0).clamp(min=1)
    x, y = (torch.where(there, values, 0.0) for values in (x, y))
    mean_x, mean_y = x.sum(0) / n, y.sum(0) / n
    dx, dy = (torch.where(there, a - mean, 0.0) for a, mean in ((x, mean_x), (y, mean_y)))
    covariance, var_x, var_y = ((a * b).sum(0) / n for a, b in ((dx, dy), (dx, dx), (dy, dy)))
    found = 2 * covariance / (var_x + var_y + (mean_x - mean_y).square() + CCC_EPSILON)
    return torch.where(there.any(0), found, 1.0)


def _ranks() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1
