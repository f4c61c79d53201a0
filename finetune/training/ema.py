"""A running mean of the weights, which is judged in their place (Polyak averaging, as timm's ModelEmaV3)."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from affekt.data.errors import CheckpointError

KIND = "ema/"  # of its tensors in a checkpoint, before the parameter's name


class Ema:
    """The mean of the trained weights of `model`, on their device: each step it goes `1 - decay` of the way to them.

    Early it goes faster, so that it does not hang on the weights of the beginning: 1 - (1 + step) / (10 + step).
    """

    def __init__(self, model: nn.Module, decay: float):
        self.decay = decay
        self._parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self.means = {name: p.detach().clone() for name, p in self._parameters.items()}

    @torch.no_grad()
    def update(self, step: int) -> None:
        """After optimiser step `step` (0-based)."""
        decay = min(self.decay, (1 + step) / (10 + step))
        torch._foreach_lerp_(list(self.means.values()), [p.detach() for p in self._parameters.values()], 1 - decay)

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Inside, the model has the mean weights; afterwards its own, bit for bit."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    @torch.no_grad()
    def keep(self) -> None:
        """Training is over: the model has the mean weights from now on."""
        for name, parameter in self._parameters.items():
            parameter.copy_(self.means[name])

    def _swap(self) -> None:
        for name, parameter in self._parameters.items():
            parameter.data, self.means[name] = self.means[name], parameter.data

    def numbers(self, engine_numbers: dict[str, Tensor]) -> dict[str, Tensor]:
        """The means of the weights of which this rank writes `weight/NAME` or `weight/NAME@START` into a checkpoint
        (`Engine.numbers`; not at ZeRO stage 3, where no rank has whole weights)."""
        numbers = {}
        for key, piece in engine_numbers.items():
            kind, _, place = key.partition("/")
            name, _, start = place.partition("@")
            if kind == "weight" and name in self.means:
                flat = self.means[name].view(-1)[int(start or 0) : int(start or 0) + piece.numel()]
                numbers[KIND + place] = flat.view(piece.shape)
        return numbers

    @torch.no_grad()
    def restore(self, numbers: dict[str, Tensor]) -> None:
        """From what `read_checkpoint` gives beside the weights. Raises CheckpointError where a mean is missing."""
        for name, mean in self.means.items():
            saved = numbers.get(KIND + name)
            if saved is None or saved.shape != mean.shape:
                raise CheckpointError(f"the mean of `{name}` over steps is missing or has another shape")
            mean.copy_(saved)
