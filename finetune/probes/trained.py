"""Heads that are trained by gradient descent: an MLP, one query over tokens, and weights over layers.

All share one loop. They are asked after several numbers of steps, which is the option that development clips choose.
"""

import copy
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from affekt.finetune.probes.targets import Targets

HIDDEN, BATCH, CHUNK = 128, 64, 256

Tokens = tuple[np.ndarray, np.ndarray]  # (n, T, D) and bool (n, T), False for padding


class Attention(nn.Module):
    """One learned query over the tokens of each stream, their weighted sums joined under a linear layer.

    Attention pooling in its plainest form (attentive probing: a query, no projections), so that what is read is in the
    tokens. They are standardised by `mean` and `scale` (D,) of each stream, after pooling, which is the same and leaves
    a large array as it is. A query of zeros, where it starts, is the mean over tokens.
    """

    def __init__(self, moments: Sequence[tuple[np.ndarray, np.ndarray]], answers: int):
        super().__init__()
        self.moments = [(torch.tensor(mean), torch.tensor(scale)) for mean, scale in moments]
        self.queries = nn.ParameterList([nn.Parameter(torch.zeros(len(mean))) for mean, _ in moments])
        self.head = nn.Linear(sum(len(mean) for mean, _ in moments), answers)

    def forward(self, *streams: Tensor) -> Tensor:
        pooled = []
        for (mean, scale), query, x, real in zip(self.moments, self.queries, streams[::2], streams[1::2], strict=True):
            x = x.float()
            scores = (x @ (scale * query)).masked_fill(~real, -torch.inf)  # (B, T)
            pooled.append((torch.einsum("bt,btd->bd", scores.softmax(1), x) - mean) * scale)
        return self.head(torch.cat(pooled, 1))


class WeightedLayers(nn.Module):
    """Softmax weights over the layers of each stream, their sums joined under a linear layer (Yang et al. 2021, SUPERB:
    the weighted sum of its section 3)."""

    def __init__(self, layers: Sequence[int], widths: Sequence[int], answers: int):
        super().__init__()
        self.weights = nn.ParameterList([nn.Parameter(torch.zeros(count)) for count in layers])
        self.head = nn.Linear(sum(widths), answers)

    def forward(self, *streams: Tensor) -> Tensor:  # each (B, L, D)
        sums = [torch.einsum("l,bld->bd", w.softmax(0), x) for w, x in zip(self.weights, streams, strict=True)]
        return self.head(torch.cat(sums, 1))


def mlp(
    train: np.ndarray, targets: Targets, other: np.ndarray, steps: Sequence[int], seed: int
) -> Iterator[np.ndarray]:
    """Answers `(m, K)` of one hidden layer with dropout, after each number of steps."""
    size = np.sqrt(np.square(train).mean()) or 1.0  # columns are as uneven as directions of the features are
    rows, others = (torch.tensor(x / size, dtype=torch.float32) for x in (train, other))

    def make() -> nn.Module:
        hidden = nn.Linear(rows.shape[1], HIDDEN)
        return nn.Sequential(hidden, nn.GELU(), nn.Dropout(0.5), nn.Linear(HIDDEN, targets.values.shape[1]))

    for _, answers in train_and_ask(make, [rows], targets, [others], steps, seed, lr=3e-3):
        yield answers


def attentive(
    train: Sequence[Tokens], targets: Targets, other: Sequence[Tokens], steps: Sequence[int], seed: int
) -> Iterator[np.ndarray]:
    """Answers of `Attention` over the tokens of one stream or of two, standardised by those of `train`."""
    moments = [token_moments(*stream) for stream in train]
    rows, others = ([torch.as_tensor(x) for stream in side for x in stream] for side in (train, other))

    def make() -> nn.Module:
        return Attention(moments, targets.values.shape[1])

    for _, answers in train_and_ask(make, rows, targets, others, steps, seed, lr=1e-2):
        yield answers


def layer_weights(
    train: Sequence[np.ndarray], targets: Targets, other: Sequence[np.ndarray], steps: Sequence[int], seed: int
) -> Iterator[tuple[np.ndarray, list[np.ndarray]]]:
    """Answers of `WeightedLayers` on the pooled layers `(n, L, D)` of each stream, and the weights `(L,)` of each."""
    rows, others = [], []
    for layers, more in zip(train, other, strict=True):
        mean, deviation = layers.mean(0), layers.std(0)
        scale = np.divide(1, deviation, out=np.zeros_like(deviation), where=deviation > 1e-7 * np.abs(mean) + 1e-30)
        rows.append(torch.tensor((layers - mean) * scale, dtype=torch.float32))
        others.append(torch.tensor((more - mean) * scale, dtype=torch.float32))

    def make() -> nn.Module:
        return WeightedLayers([x.shape[1] for x in rows], [x.shape[2] for x in rows], targets.values.shape[1])

    for module, answers in train_and_ask(make, rows, targets, others, steps, seed, lr=1e-2):
        yield answers, [weights.detach().softmax(0).double().numpy() for weights in module.weights]


def train_and_ask(
    make: Callable[[], nn.Module],
    inputs: Sequence[Tensor],
    targets: Targets,
    others: Sequence[Tensor],
    steps: Sequence[int],
    seed: int,
    lr: float,
) -> list[tuple[nn.Module, np.ndarray]]:
    """Train a module on rows of `inputs` and ask it about `others` after each of the rising numbers of `steps`.

    AdamW on the weighted cross-entropy, or on the squared error of ratings standardised by `targets`. The same seed
    gives the same numbers; the process's own random state is left as it was.
    """
    values = torch.tensor(targets.values)
    mean, scale = values.mean(0), values.std(0, correction=0)
    truth = values.float() if targets.classes else ((values - mean) / scale.clamp(min=1e-6)).float()
    weights = torch.tensor(targets.weights, dtype=torch.float32)
    asked = []
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        module = make()
        optimizer = torch.optim.AdamW(module.parameters(), lr=lr, weight_decay=1e-2)
        batches = endless_batches(len(truth))
        for step in range(1, max(steps) + 1):
            module.train()
            rows = next(batches)
            said = module(*(x[rows] for x in inputs))
            if targets.classes:
                loss = F.cross_entropy(said, truth[rows], reduction="none")
            else:
                loss = (said - truth[rows]).square().mean(1)
            optimizer.zero_grad()
            (loss * weights[rows]).mean().backward()
            optimizer.step()
            if step in steps:
                said = ask(module, others)
                said = said if targets.classes else said * scale.numpy() + mean.numpy()
                asked.append((copy.deepcopy(module), said))
    return asked


def endless_batches(rows: int) -> Iterator[Tensor]:
    """Batches of row numbers, each row once a round, in another order every round."""
    while True:
        yield from torch.randperm(rows).split(BATCH)


@torch.inference_mode()
def ask(module: nn.Module, inputs: Sequence[Tensor]) -> np.ndarray:
    """Answers `(m, K)` float64, in chunks."""
    module.eval()
    parts = zip(*(x.split(CHUNK) for x in inputs), strict=True)
    return torch.cat([module(*part).double() for part in parts]).numpy()


def token_moments(tokens: np.ndarray, real: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean and reciprocal deviation `(D,)` over the real tokens of all clips; 0 for a dimension that is constant."""
    count, total, square = 0, 0.0, 0.0
    for first in range(0, len(tokens), CHUNK):
        part = tokens[first : first + CHUNK][real[first : first + CHUNK]].astype(np.float64)
        count, total, square = count + len(part), total + part.sum(0), square + np.square(part).sum(0)
    mean = total / count
    deviation = np.sqrt(np.maximum(square / count - mean**2, 0))
    scale = np.divide(1, deviation, out=np.zeros_like(deviation), where=deviation > 1e-3 * np.abs(mean) + 1e-6)
    return mean.astype(np.float32), scale.astype(np.float32)
