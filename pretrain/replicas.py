"""Do all ranks still hold the same numbers? A bit that memory or a processor got wrong says nothing by itself."""

from collections import Counter
from collections.abc import Iterator

import torch
import torch.distributed as dist
from torch import Tensor, nn

from affekt.data.errors import HealthError

BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
TOLD = 5


def check_replicas(step: int, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Compare weights, buffers and moments over all ranks, bit by bit. Raises HealthError on all of them where one
    differs, with the rank, as far as a majority tells it, and the tensors.

    Every rank sends 8 bytes per tensor. For tensors that all ranks hold in full (ZeRO stage 0).
    """
    names, tensors = zip(*replicated(model, optimizer), strict=True)
    own = torch.stack([bit_sum(tensor) for tensor in tensors])
    if dist.get_backend() == "nccl":
        own = own.to(torch.cuda.current_device())
    sums = [torch.empty_like(own) for _ in range(dist.get_world_size())]
    dist.all_gather(sums, own)
    differing = differences(names, torch.stack(sums).tolist())
    if differing:
        lines = [f"  {name}: {where}" for name, where in list(differing.items())[:TOLD]]
        more = f"\n  and {len(differing) - TOLD} more" if len(differing) > TOLD else ""
        raise HealthError(
            f"step {step}: the ranks hold different numbers, by a fault of memory or processor:\n"
            + "\n".join(lines)
            + f"{more}\ntake that machine out and go on with --resume auto, from a checkpoint of before"
        )


def replicated(model: nn.Module, optimizer: torch.optim.Optimizer) -> Iterator[tuple[str, Tensor]]:
    """All tensors that must be the same on every rank, in the same order on each."""
    yield from model.named_parameters()
    yield from model.named_buffers()
    for name, parameter in model.named_parameters():
        for key, value in sorted(optimizer.state.get(parameter, {}).items()):
            yield f"{name}:{key}", value


def bit_sum(tensor: Tensor) -> Tensor:
    """The sum of the elements' bits read as whole numbers, modulo 2**64: one flipped bit anywhere changes it."""
    whole = tensor.detach().contiguous().flatten()
    if whole.dtype == torch.bool:
        whole = whole.to(torch.int8)
    if whole.is_complex():
        whole = torch.view_as_real(whole).flatten()
    return whole.view(BITS[whole.element_size()]).sum(dtype=torch.int64)


def differences(names: tuple[str, ...], sums: list[list[int]]) -> dict[str, str]:
    """`{tensor: which ranks}` of those whose sums, (ranks, tensors), are not the same on all ranks."""
    found = {}
    for name, column in zip(names, zip(*sums, strict=True), strict=True):
        ((common, votes), *others) = Counter(column).most_common()
        if others:
            odd = [str(rank) for rank, value in enumerate(column) if value != common]
            majority = votes > len(column) / 2
            found[name] = f"rank {', '.join(odd)} differs" if majority else "no majority tells which rank is right"
    return found
