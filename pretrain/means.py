"""What is logged: means over ranks, and over the steps that were taken."""

import torch
import torch.distributed as dist


def add_taken(
    sums: dict[str, torch.Tensor], figures: dict[str, torch.Tensor], taken: torch.Tensor
) -> dict[str, torch.Tensor]:
    """`sums` with the figures of a step where it was `taken` (1.0, or 0.0), and how many were; all on the device."""
    figures = {**figures, "taken": taken}
    return {k: torch.where(taken > 0, v.detach(), 0.0) + sums.get(k, 0.0) for k, v in figures.items()}


def mean_taken(sums: dict[str, torch.Tensor], steps: int) -> dict[str, float]:
    """Means over the steps that were taken, of all ranks; `skipped` is how many were not, if any."""
    values = mean_over_ranks(sums)
    taken = round(values.pop("taken"))
    means = {name: value / taken for name, value in values.items()} if taken else {}
    return means | ({"skipped": steps - taken} if taken < steps else {})


def mean_over_ranks(values: dict[str, torch.Tensor]) -> dict[str, float]:
    """Scalars averaged over ranks; all of them wait for the device once."""
    stacked = torch.stack([value.detach().float() for value in values.values()])
    if dist.get_world_size() > 1:
        dist.all_reduce(stacked)
        stacked /= dist.get_world_size()
    return dict(zip(values, stacked.tolist(), strict=True))
