"""Losses of a fine-tuning against slow twins and torch's own, and that corpora do not disturb each other's classes."""

import pytest
import torch
from torch.nn import functional as F

from affekt.finetune.training.clips import Table
from affekt.finetune.training.losses import (
    Loss,
    concordance,
    count,
    effective_weights,
    penalised,
    penalty_matrix,
    several_classes,
    smoothed,
    soft_cross_entropy,
)
from affekt.finetune.training.settings import LossSettings

NAN = float("nan")


def table(target, known=None, ratings=None):
    target = torch.tensor(target)
    known = torch.ones_like(target, dtype=torch.bool) if known is None else torch.tensor(known)
    ratings = torch.zeros(len(target), 0) if ratings is None else torch.tensor(ratings)
    return Table(target, known, ratings, torch.zeros(len(target), dtype=torch.int64))


def test_one_class_is_torch_s_cross_entropy_with_its_smoothing():
    torch.manual_seed(0)
    logits, label = torch.randn(6, 4), torch.arange(6) % 4
    target, known = F.one_hot(label, 4).float(), torch.ones(6, 4, dtype=torch.bool)
    ours = soft_cross_entropy(logits, smoothed(target, known, 0.1), known)
    assert torch.allclose(ours, F.cross_entropy(logits, label, label_smoothing=0.1, reduction="none"), atol=1e-6)


def test_classes_that_a_corpus_does_not_know_neither_pull_nor_push():
    torch.manual_seed(0)
    logits = torch.randn(2, 5, requires_grad=True)
    known = torch.tensor([[True, True, False, True, False]] * 2)
    target = torch.tensor([[0.3, 0.7, 0, 0, 0], [0, 0, 0, 1.0, 0]])
    for losses in (
        soft_cross_entropy(logits, smoothed(target, known, 0.1), known),
        several_classes(logits, target, known),
        penalised(logits, target, known, torch.rand(5, 5), multi=False),
    ):
        (gradient,) = torch.autograd.grad(losses.sum(), logits)
        assert gradient.isfinite().all() and (gradient[:, [2, 4]] == 0).all() and gradient[:, :2].abs().min() > 0
    part = soft_cross_entropy(logits[:, [0, 1, 3]], target[:, [0, 1, 3]], known[:, [0, 1, 3]])
    assert torch.allclose(soft_cross_entropy(logits, target, known), part, atol=1e-6)


def test_concordance_is_the_formula_and_leaves_unknown_ratings_out():
    torch.manual_seed(0)
    x, y = torch.randn(20, 2), torch.randn(20, 2)
    y[3:9, 1] = NAN
    for d, rows in ((0, slice(None)), (1, ~y[:, 1].isnan())):
        a, b = x[rows, d].double(), y[rows, d].double()
        slow = 2 * ((a - a.mean()) * (b - b.mean())).mean()
        slow /= a.var(correction=0) + b.var(correction=0) + (a.mean() - b.mean()) ** 2 + 1e-8
        assert abs(concordance(x, y)[d].item() - slow.item()) < 1e-6
    x.requires_grad_()
    concordance(x, y).sum().backward()
    assert x.grad.isfinite().all() and (x.grad[3:9, 1] == 0).all()
    assert concordance(torch.randn(4, 1), torch.full((4, 1), NAN)).tolist() == [1.0]


def test_effective_weights_and_penalties_by_hand():
    weights = effective_weights(torch.tensor([90.0, 10.0, 0.0]))
    beta = 0.99
    slow = [(1 - beta) / (1 - beta**n) for n in (90, 10)]
    assert torch.allclose(weights, torch.tensor([*(2 * w / sum(slow) for w in slow), 0.0]), atol=1e-5)
    shares = torch.tensor([[0.5, 0.5, 0], [1.0, 0, 0], [0, 0.5, 0.5], [0.5, 0.5, 0]])
    assert torch.allclose(
        penalty_matrix(shares), torch.tensor([[0, 1 / 3, 1], [1 / 3, 0, 2 / 3], [1, 0, 0]]), atol=1e-6
    )


@pytest.mark.parametrize("parts", [1, 2])
def test_the_mean_over_parts_is_the_mean_over_clips_with_a_target(parts):
    """Rows without one, of blank batches too, change nothing however they fall into the parts."""
    torch.manual_seed(0)
    outputs = torch.randn(4, 5)
    rows = table(
        [[1.0, 0, 0], [NAN] * 3, [0, 0.5, 0.5], [NAN] * 3], ratings=[[0.5, NAN], [0.1, 0.2], [NAN, NAN], [0, 0]]
    )
    loss = Loss(LossSettings(dimensions="mse", dimensions_weight=5.0), classes=3, multi=False)
    counts = count(rows, parts)
    assert counts.tolist() == [2, 5, parts]
    found = 0.0
    for at in torch.arange(4).chunk(parts):
        part = Table(rows.target[at], rows.known[at], rows.ratings[at], rows.group[at])
        found += loss(outputs[at], part, counts)["loss"] / parts
    log_q = outputs[:, :3].log_softmax(1)
    classes = -(log_q[0, 0] + 0.5 * log_q[2, 1] + 0.5 * log_q[2, 2]) / 2
    known = ~rows.ratings.isnan()
    squares = (outputs[:, 3:][known] - rows.ratings[known]).square().mean()
    assert torch.allclose(found, classes + 5 * squares, atol=1e-6)
