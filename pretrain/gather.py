"""The rows of all ranks, fetched while the model does something else, with the gradient of all ranks' losses."""

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

# Newer releases of torch warn at the second names.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


class Gather:
    """Begins to collect x (B, ...) of every rank in rank order; `wait` returns the (global B, ...).

    The backward pass sums what all ranks' losses say of our rows, likewise in two halves: begun when the gradient of
    `wait` is there, awaited when that of x is needed. Autograd takes the newest nodes first, so everything that the
    model did between the two calls overlaps with the transfer in both directions. All ranks need the same B, and to
    make the same gathers in the same order. Without `across_ranks` x is all. `rows` is the slice of our own. Numbers
    travel as they are; with `half` under autocast in its precision, half the bytes.
    """

    def __init__(self, x: Tensor, across_ranks: bool = True, half: bool = False):
        alone = not (across_ranks and dist.is_initialized() and dist.get_world_size() > 1)
        self.rows = slice(0, len(x)) if alone else slice(dist.get_rank() * len(x), (dist.get_rank() + 1) * len(x))
        self._work = self._sum = None
        if half and not alone and torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))
        self._all = x if alone else _begin(x, self)
        self._alone = alone

    def wait(self) -> Tensor:
        everyone, self._all = self._all, None  # its graph holds this object: both would outlive the step
        return everyone if self._alone else _await(everyone, self)


@torch.compiler.disable
def _begin(x: Tensor, gather: Gather) -> Tensor:
    return _Begin.apply(x, gather)


@torch.compiler.disable
def _await(everyone: Tensor, gather: Gather) -> Tensor:
    return _Await.apply(everyone, gather)


class _Begin(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, gather: Gather) -> Tensor:
        ctx.gather = gather
        everyone = x.new_empty(dist.get_world_size() * len(x), *x.shape[1:])
        # An alias, as the backend keeps what it worked on last, which would keep the graph of the step.
        gather._work = _all_gather(everyone.detach(), x.contiguous(), async_op=True)
        return everyone

    @staticmethod
    @once_differentiable
    def backward(ctx, _gradient: Tensor) -> tuple[Tensor, None]:
        ctx.gather._work.wait()
        own, ctx.gather._sum = ctx.gather._sum, None
        return own, None


class _Await(torch.autograd.Function):
    @staticmethod
    def forward(ctx, everyone: Tensor, gather: Gather) -> Tensor:
        ctx.gather = gather
        gather._work.wait()
        return everyone.view_as(everyone)

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None]:
        gradient, ranks = gradient.contiguous(), dist.get_world_size()
        ctx.gather._sum = gradient.new_empty(len(gradient) // ranks, *gradient.shape[1:])
        ctx.gather._work = _reduce_scatter(ctx.gather._sum, gradient, async_op=True)
        return gradient, None
